"""SDD: logits of cells, what they weigh, and the networks in which cells have none."""

import numpy as np
import pytest
import torch
from kdzoo.distillers.sdd import SDD, scale_decoupled_loss
from torch import nn
from torch.nn import functional as F

from kdzoo import Batch, DataSpec, Distillation, NetworkView, Output, Show, models
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


def test_gradients_are_those_of_the_formula():
    teacher, overall = waves(1.1, 3, 4, 5), waves(2.0, 3, 5)
    student = waves(0.3, 3, 4, 5).requires_grad_()
    assert torch.autograd.gradcheck(lambda z: scale_decoupled_loss(z, teacher, overall, 4.0, 2.0), student)


class Pooled(nn.Module):
    """A small head on the mean of the one map: linear, or with a norm and a nonlinearity before it."""

    def __init__(self, width, phase, side=8, curved=False):
        super().__init__()
        self.stage, self.norm, self.classifier = (
            nn.Conv2d(3, width, 3, padding=1),
            nn.BatchNorm2d(width),
            nn.Linear(width, 7),
        )
        self.side, self.curved = side, curved
        for p in self.parameters():
            p.data = waves(phase, *p.shape).float() / 4

    def classify(self, means):
        return self.classifier(F.layer_norm(means, means.shape[1:]).tanh() if self.curved else means)

    def forward(self, images, show=None):
        maps = F.adaptive_avg_pool2d(self.norm(self.stage(images)), self.side)
        embedding = maps.mean((2, 3))
        return Output(self.classify(embedding), embedding, (), final=maps)


def method(student, teacher, **keywords):
    outputs = [net.eval()(torch.zeros(1, 3, 8, 8)) for net in (student, teacher)]
    return SDD(**keywords).assemble(*outputs, DataSpec("toy", 7, tuple("abcdefg"), 8, torch.arange(7)))


def batch():
    return Batch.of(waves(0.0, 6, 3, 8, 8).float(), torch.arange(6), 7)


@pytest.mark.parametrize("curved", [False, True])
def test_at_scale_1_it_is_distillation_of_the_networks_own_logits(curved):
    student, teacher = Pooled(4, 0.3, curved=curved), Pooled(6, 1.1, side=3, curved=curved)
    sdd, given = method(student, teacher, scales=(1,)), batch()
    expected = 0.9 * softened_kl(student(given.images).logits, teacher(given.images).logits, 4.0)
    found = sdd(NetworkView(student), NetworkView(teacher), given)["sdd"].item()
    assert found == pytest.approx(expected.item(), rel=1e-4)


@pytest.mark.parametrize(("curved", "side"), [(False, 8), (True, 8), (False, 2), (True, 7)])
def test_cells_are_the_means_of_the_maps_parts_at_every_scale(curved, side):
    student, teacher, given = Pooled(4, 0.3, side, curved), Pooled(6, 1.1, curved=curved), batch()
    sdd = method(student, teacher)
    cells = []
    for net in (student, teacher):
        maps = net(given.images).final
        parts = [F.adaptive_avg_pool2d(maps, g) for g in (1, 2, 4)]
        pixels = torch.cat([part.flatten(2) for part in parts], dim=2)
        cells.append(torch.stack([net.classify(p) for p in pixels.unbind(2)], dim=1).detach().double().numpy())
    assert cells[0].shape == (6, 21, 7)
    overall = teacher(given.images).logits.detach().numpy()
    found = sdd(NetworkView(student), NetworkView(teacher), given)["sdd"].item()
    assert found == pytest.approx(0.9 * reference(*cells, overall, 4.0, 2.0), rel=1e-4)
    other = method(student, teacher, scales=(1, 2))(NetworkView(student), NetworkView(teacher), given)["sdd"].item()
    assert found != pytest.approx(other, rel=1e-3)


def test_gradients_reach_the_students_map_and_head_and_nothing_of_the_teacher():
    student, teacher = Pooled(4, 0.3, side=1), Pooled(6, 1.1, side=7, curved=True)
    Distillation(student, teacher, method(student, teacher, ce=0))(batch())["sdd"].backward()
    assert all(p.grad.any() for p in (student.stage.weight, student.classifier.weight))
    assert all(p.grad is None for p in teacher.parameters())


CNNS = ["resnet8x4", "wrn_16_2", "vgg8", "shufflenetv1", "shufflenetv2", "mobilenetv2_half", "resnet18", "mobilenetv2"]


@pytest.mark.parametrize("name", [*CNNS, "swin_pico", "test_convnext", "torchvision:resnet18", "vit_t avg"])
def test_at_scale_1_cells_have_the_logits_of_any_network_that_averages_a_map(name):
    spec = DataSpec("toy", 7, tuple("abcdefg"), 32, torch.arange(7))
    torch.manual_seed(0)
    name, _, pool = name.partition(" ")
    network = models.create(name, spec, **({"global_pool": pool} if pool else {})).eval()
    images = torch.rand(3, 3, 32, 32)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    with torch.no_grad():
        network.train()(images)  # else the maps of deep networks all but vanish in evaluation
        network.eval()
        seen = network(images, Show(final=True))
        for side in (1, 2, 4):  # so all are what the network makes of the image's parts, not of a trick at scale 1
            means = F.adaptive_avg_pool2d(seen.final, side)
            logits = network.classify(means.permute(0, 2, 3, 1).flatten(0, 2)).unflatten(0, (3, side, side))
            assert logits.shape == (3, side, side, 7)
            if side == 1:
                torch.testing.assert_close(logits[:, 0, 0], seen.logits, rtol=1e-3, atol=1e-4)
            else:
                assert not torch.allclose(logits[:, 0, 0], seen.logits, rtol=1e-2)


@pytest.mark.parametrize("name", ["vit_t", "deit_t", "levit_128s"])
@pytest.mark.parametrize("role", ["student", "teacher"])
def test_a_network_that_averages_no_map_is_refused_at_once(name, role):
    spec = DataSpec("toy", 7, tuple("abcdefg"), 32, torch.arange(7))
    shapes = dict.fromkeys(("student", "teacher"), models.create("resnet8", spec).shapes())
    shapes[role] = models.create(name, spec).shapes()
    with pytest.raises(UserError, match=f"the {role}'s are not"):
        SDD().assemble(*shapes.values(), spec)
    SDD(sdd=0).assemble(*shapes.values(), spec)


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
