"""Norm and direction of embeddings."""

import numpy as np
import pytest
import torch
from kdzoo.distillers.nd import ND, norm_direction_loss
from torch import nn

from kdzoo import Batch, DataSpec, Distillation, Output
from kdzoo.errors import UserError


class Net(nn.Module):
    """A linear network on flattened images."""

    def __init__(self, width, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.body, self.classifier = nn.Linear(12, width), nn.Linear(width, 4)

    def forward(self, images, show=None):
        embedding = self.body(images.flatten(1))
        return Output(self.classifier(embedding), embedding)


@pytest.fixture
def together(waves, data):
    """A prepared student and teacher, and the two batches of an epoch: no image of class 3."""

    def build(s_width=5, t_width=5, **keywords):
        student, teacher = Net(s_width, 1), Net(t_width, 2)
        images, labels = waves(8, 3, 2, 2), torch.tensor([0, 1, 2, 2, 1, 0, 2, 2])
        batches = [Batch.of(images[rows], labels[rows], 4) for rows in (slice(0, 4), slice(4, 8))]
        outputs = student(images), teacher(images)
        made = Distillation(student, teacher, ND(**keywords).assemble(*outputs, data(4)))
        made.prepare(batches)
        return made, batches

    return build


def data_of(classes):
    return DataSpec("four", classes, tuple("abcd"), 2, torch.arange(classes))


def reference(student, teacher, directions):
    longest = np.maximum(np.linalg.norm(student, axis=1), np.linalg.norm(teacher, axis=1))
    return np.mean(1 - (student * directions).sum(1) / longest)


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def test_it_is_the_formula_and_what_the_authors_code_gives(waves):
    student, teacher = waves(6, 5, dtype=torch.float64), 0.7 * waves(6, 5, phase=1.0, dtype=torch.float64)
    means = waves(4, 5, phase=2.0, dtype=torch.float64)[[0, 1, 2, 3, 1, 2]]
    directions = means / means.norm(dim=1, keepdim=True)
    found = norm_direction_loss(student, teacher, directions).item()
    assert found == pytest.approx(reference(student.numpy(), teacher.numpy(), unit(means.numpy())), rel=1e-9)
    # WangYZ1608/Knowledge-Distillation-via-ND@fc6f3f9, DirectNormLoss with a weight of 2
    assert 2 * found == pytest.approx(2.2428203265830287, rel=1e-6)


def test_the_directions_are_those_of_the_teachers_class_means(together):
    made, batches = together()
    images, labels = (torch.cat([batch[i] for batch in batches]) for i in (0, 1))
    embedding = made.teacher(images).embedding.detach().double().numpy()
    for k in range(3):
        expected = unit(embedding[labels.numpy() == k].mean(0))
        np.testing.assert_allclose(made.distiller.directions[k], expected, rtol=1e-5)
    assert made.distiller.directions[3].abs().max() == 0  # no image


def test_the_term_is_that_of_the_students_own_embedding_where_widths_agree(together):
    made, batches = together(nd=3.0, kd=0)
    assert not list(made.distiller.parameters())
    e_s, e_t = (n(batches[0].images).embedding.detach().double().numpy() for n in (made.student, made.teacher))
    expected = 3 * reference(e_s, e_t, made.distiller.directions[batches[0].labels].double().numpy())
    assert made(batches[0])["nd"].item() == pytest.approx(expected, rel=1e-5)


def test_other_widths_go_through_norm_dropout_and_a_linear_map(together):
    made, batches = together(s_width=7, dropout=0.0)
    norm, drop, linear = made.distiller.projector
    e_s = made.student(batches[0].images).embedding.detach().double().numpy()
    normal = (e_s - e_s.mean(0)) / np.sqrt(e_s.var(0) + norm.eps)
    projected = normal @ linear.weight.detach().double().numpy().T + linear.bias.detach().double().numpy()
    e_t = made.teacher(batches[0].images).embedding.detach().double().numpy()
    expected = 2 * reference(projected, e_t, made.distiller.directions[batches[0].labels].double().numpy())
    assert made(batches[0])["nd"].item() == pytest.approx(expected, rel=1e-4)
    assert drop.p == 0
    assert (
        ND().assemble(*(Output(torch.zeros(2, 4), torch.zeros(2, w)) for w in (7, 5)), data_of(4)).projector[1].p == 0.5
    )


def test_a_short_student_gains_by_length_and_a_long_one_by_direction_alone(waves):
    teacher, direction = 3 * waves(6, 5, phase=1.0), torch.nn.functional.normalize(waves(6, 5, phase=2.0))
    losses = [norm_direction_loss(length * direction, teacher, direction) for length in (0.1, 0.2, 50.0, 100.0)]
    assert losses[1] < losses[0]
    assert losses[2].item() == losses[3].item() == pytest.approx(0, abs=1e-6)
    assert norm_direction_loss(-direction, teacher, direction) > 1


def test_logits_warm_up(together):
    made, batches = together()
    terms = [made(batches[0]._replace(progress=torch.tensor(p)))["kd"].item() for p in (0.0, 10 / 240, 0.5)]
    assert terms[0] == 0
    assert terms[1] == pytest.approx(terms[2] / 2, rel=1e-5)


def test_embeddings_of_zero_have_finite_gradients(waves):
    student = torch.zeros(3, 5, requires_grad=True)
    norm_direction_loss(student, torch.zeros(3, 5), torch.zeros(3, 5)).backward()
    assert student.grad.isfinite().all()


def test_state_restores_the_directions(together):
    made, batches = together(s_width=7, dropout=0.0)
    fresh = ND(dropout=0.0).assemble(made.student(batches[0].images), made.teacher(batches[0].images), data_of(4))
    assert fresh.directions.isnan().all()
    fresh.load_state_dict(made.distiller.state_dict())
    assert torch.equal(fresh.directions, made.distiller.directions)


def test_a_weight_of_zero_leaves_its_term_and_its_phase_out(together):
    made, batches = together(nd=0)
    assert made(batches[0]).keys() == {"ce", "kd"}
    assert not list(made.distiller.buffers())


@pytest.mark.parametrize(("keywords", "message"), [({"dropout": 1.0}, "dropout=1"), ({"warmup": -1.0}, "warmup=-1")])
def test_a_bad_keyword_is_the_users_error(keywords, message):
    with pytest.raises(UserError, match=message):
        ND(**keywords)
