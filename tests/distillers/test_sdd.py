"""SDD: logits of cells, what they weigh, and the networks in which cells have none."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from distillers.sdd import SDD, cell_logits, scale_decoupled_loss
from kdzoo import Batch, DataSpec, Output
from kdzoo.distillation import Distillation, Seen
from kdzoo.errors import UserError
from kdzoo.losses import softened_kl


def waves(phase, *shape):
    steps = torch.arange(torch.Size(shape).numel(), dtype=torch.float64)
    return (2 * torch.sin(0.7 * steps + phase) + torch.cos(1.9 * steps)).view(shape)


def reference(student, teacher, overall, temperature, complementary):
    total = 0.0
    for b, image in enumerate(teacher):
        for n, cell in enumerate(image):
            s, t = (np.exp(z / temperature) / np.exp(z / temperature).sum() for z in (student[b, n], cell))
            weight = complementary if cell.argmax() != overall[b].argmax() else 1.0
            total += weight * temperature**2 * (t * np.log(t / s)).sum()
    return total / (teacher.shape[0] * teacher.shape[1])


@pytest.mark.parametrize("complementary", [1.0, 2.0])
@pytest.mark.parametrize("classes", [2, 7])
def test_it_is_the_weighted_mean_over_images_and_cells(classes, complementary):
    given = waves(0.3, 4, 5, classes), waves(1.1, 4, 5, classes), waves(2.0, 4, classes)
    expected = reference(*(z.numpy() for z in given), 4.0, complementary)
    assert scale_decoupled_loss(*given, 4.0, complementary).item() == pytest.approx(expected, rel=1e-6)


def test_only_cells_that_disagree_with_their_image_weigh_more():
    student, teacher = waves(0.3, 4, 1, 7), waves(1.1, 4, 1, 7)
    plain = softened_kl(student[:, 0], teacher[:, 0], 4.0).item()
    for weight in (1.0, 5.0):
        agreeing = scale_decoupled_loss(student, teacher, teacher[:, 0], 4.0, weight)
        assert agreeing.item() == pytest.approx(plain, rel=1e-9)
    disagreeing = scale_decoupled_loss(student, teacher, -teacher[:, 0], 4.0, 5.0)
    assert disagreeing.item() == pytest.approx(5 * plain, rel=1e-9)


def test_the_order_of_cells_is_of_no_account_as_long_as_both_share_it():
    student, teacher, overall, order = waves(0.3, 4, 5, 7), waves(1.1, 4, 5, 7), waves(2.0, 4, 7), [4, 2, 0, 1, 3]
    before = scale_decoupled_loss(student, teacher, overall, 4.0, 2.0).item()
    assert scale_decoupled_loss(student[:, order], teacher[:, order], overall, 4.0, 2.0).item() == pytest.approx(before)
    assert scale_decoupled_loss(student[:, order], teacher, overall, 4.0, 2.0).item() != pytest.approx(before, rel=1e-2)


def test_cells_are_classified_one_by_one():
    cells, weight, bias = waves(0.1, 2, 3, 5), waves(0.2, 7, 3), waves(0.3, 7)
    found = cell_logits(cells, weight, bias)
    for b in range(2):
        for n in range(5):
            expected = weight.numpy() @ cells[b, :, n].numpy() + bias.numpy()
            np.testing.assert_allclose(found[b, n].numpy(), expected, rtol=1e-9)


def test_gradients_are_those_of_the_formula():
    teacher, overall = waves(1.1, 3, 4, 5), waves(2.0, 3, 5)
    student = waves(0.3, 3, 4, 5).requires_grad_()
    assert torch.autograd.gradcheck(lambda z: scale_decoupled_loss(z, teacher, overall, 4.0, 2.0), student)


class Pooled(nn.Module):
    """A linear layer on the mean of the one map; ``kind`` is another way to an embedding of the same width."""

    def __init__(self, width, phase, side=8, kind="mean"):
        super().__init__()
        self.stage, self.classifier = nn.Conv2d(3, width, 3, padding=1), nn.Linear(width, 7)
        self.side, self.kind = side, kind
        self.norm = nn.BatchNorm2d(width)
        for p in self.parameters():
            p.data = waves(phase, *p.shape).float() / 4

    def forward(self, images):
        maps = F.adaptive_avg_pool2d(self.norm(self.stage(images)), self.side)
        embedding = maps.mean((2, 3)) if self.kind == "mean" else maps.relu().mean((2, 3))
        return Output(self.classifier(embedding), embedding, (maps,))


def method(student, teacher, **keywords):
    outputs = [net.eval()(torch.zeros(1, 3, 8, 8)) for net in (student, teacher)]
    return SDD(*outputs, DataSpec("toy", 7, tuple("abcdefg"), 8, torch.arange(7)), **keywords)


def batch():
    return Batch.of(waves(0.0, 6, 3, 8, 8).float(), torch.arange(6), 7)


def test_at_scale_1_it_is_distillation_of_the_networks_own_logits():
    student, teacher = Pooled(4, 0.3), Pooled(6, 1.1, side=3)
    sdd, given = method(student, teacher, scales=(1,)), batch()
    expected = 0.9 * softened_kl(student(given.images).logits, teacher(given.images).logits, 4.0)
    for wrapped in (Seen(teacher), Seen(Seen(teacher))):  # engines may wrap a teacher once more
        assert sdd(Seen(student), wrapped, given)["sdd"].item() == pytest.approx(expected.item(), rel=1e-4)


def test_cells_are_the_means_of_the_maps_parts_at_every_scale():
    student, teacher, given = Pooled(4, 0.3), Pooled(6, 1.1), batch()
    sdd = method(student, teacher)
    cells = []
    for net in (student, teacher):
        maps = net(given.images).features[0]
        parts = torch.cat([F.adaptive_avg_pool2d(maps, g).flatten(2) for g in (1, 2, 4)], dim=2)
        cells.append(net.classifier(parts.mT).detach().double().numpy())
    assert cells[0].shape == (6, 21, 7)
    overall = teacher(given.images).logits.detach().numpy()
    found = sdd(Seen(student), Seen(teacher), given)["sdd"].item()
    assert found == pytest.approx(0.9 * reference(*cells, overall, 4.0, 2.0), rel=1e-4)
    other = method(student, teacher, scales=(1, 2))(Seen(student), Seen(teacher), given)["sdd"].item()
    assert found != pytest.approx(other, rel=1e-3)


@pytest.mark.parametrize("sides", [(1, 8), (3, 2), (8, 7)])
def test_scales_finer_than_a_map_become_its_own_grid(sides):
    student, teacher = Pooled(4, 0.3, sides[0]), Pooled(6, 1.1, sides[1])
    terms = method(student, teacher)(Seen(student), Seen(teacher), batch())
    assert terms["sdd"].isfinite()
    sum(terms.values()).backward()
    assert student.classifier.weight.grad.any()


@pytest.mark.parametrize("role", ["student", "teacher"])
def test_a_network_whose_embedding_is_not_the_mean_of_its_map_is_refused_before_training(role):
    networks = {"student": Pooled(4, 0.3), "teacher": Pooled(6, 1.1)}
    together = Distillation(**networks, distiller=method(*networks.values()))
    together.prepare([batch()])
    networks[role].kind = "other"
    with pytest.raises(UserError, match=f"the {role}'s are not"):
        together.prepare([batch()])


def test_a_network_without_a_linear_classifier_is_refused_before_training():
    student, teacher = Pooled(4, 0.3), Pooled(6, 1.1)
    together = Distillation(student, teacher, method(student, teacher))
    teacher.classifier = nn.Sequential(teacher.classifier)
    with pytest.raises(UserError, match="the teacher's are not"):
        together.prepare([batch()])


def test_maps_of_another_width_than_the_embedding_are_refused_at_once():
    wide = Output(torch.empty(1, 7), torch.empty(1, 5), (torch.empty(1, 4, 8, 8),))
    with pytest.raises(UserError, match="the student's are not"):
        SDD(wide, wide, DataSpec("toy", 7, tuple("abcdefg"), 8, torch.arange(7)))


def test_the_check_before_training_leaves_the_student_as_it_was():
    student, teacher = Pooled(4, 0.3), Pooled(6, 1.1)
    together = Distillation(student, teacher, method(student, teacher)).train()
    student.norm.eval()
    before = {name: value.clone() for name, value in student.state_dict().items()}
    together.prepare([batch()])
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())
    assert student.training
    assert not student.norm.training


def test_large_logits_and_constant_maps_have_finite_gradients():
    for student in (1e4 * waves(0.3, 3, 4, 5), torch.zeros(3, 4, 5), torch.ones(3, 4, 5)):
        z = student.float().requires_grad_()
        loss = scale_decoupled_loss(z, 1e4 * waves(1.1, 3, 4, 5).float(), waves(2.0, 3, 5), 4.0, 2.0)
        loss.backward()
        assert loss.isfinite()
        assert z.grad.isfinite().all()


@pytest.mark.parametrize("wrong", [{"temperature": 0.0}, {"scales": ()}, {"scales": (0, 1)}])
def test_values_without_a_meaning_are_refused(wrong):
    with pytest.raises(UserError, match="expected"):
        method(Pooled(4, 0.3), Pooled(6, 1.1), **wrong)
