"""DIST: against scipy's correlation, its invariances, and classes that no image shows."""

import numpy as np
import pytest
import torch
from kdzoo.distillers.dist import DIST
from scipy import stats

from kdzoo import Batch, DataSpec, Output
from kdzoo.errors import UserError
from kdzoo.losses import dist_loss, pearson_distance


def logits(phase, classes=7, rows=6):
    steps = torch.arange(rows * classes, dtype=torch.float64)
    return (2 * torch.sin(0.7 * steps + phase) + torch.cos(1.9 * steps)).view(rows, classes)


def correlation(a, b):
    """Pearson's, with the 1e-8 that the authors add to the denominator."""
    norms = np.linalg.norm(a - a.mean()) * np.linalg.norm(b - b.mean())
    return stats.pearsonr(a, b).statistic * norms / (norms + 1e-8)


def reference(student, teacher, inter, intra, temperature):
    p_s, p_t = (np.exp(z / temperature) / np.exp(z / temperature).sum(1, keepdims=True) for z in (student, teacher))
    rows = np.mean([1 - correlation(a, b) for a, b in zip(p_s, p_t, strict=True)])
    columns = np.mean([1 - correlation(a, b) for a, b in zip(p_s.T, p_t.T, strict=True)])
    return temperature**2 * (inter * rows + intra * columns)


@pytest.mark.parametrize("weights", [(1.0, 1.0), (2.0, 0.0), (0.0, 0.5)])
@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_it_is_one_minus_the_correlation_of_rows_and_of_columns(temperature, weights):
    student, teacher = logits(0.3), logits(1.1)
    expected = reference(student.numpy(), teacher.numpy(), *weights, temperature)
    assert dist_loss(student, teacher, *weights, temperature).item() == pytest.approx(expected, rel=1e-6)


def test_rows_may_be_scaled_and_shifted_but_not_turned_around():
    student, teacher = logits(0.3), logits(1.1)
    whole = pearson_distance(student, teacher).item()
    assert pearson_distance(3 * student + 5, teacher).item() == pytest.approx(whole, rel=1e-6)
    assert pearson_distance(teacher, teacher).item() == pytest.approx(0, abs=1e-6)
    assert pearson_distance(-teacher, teacher).item() == pytest.approx(2, rel=1e-6)


def test_the_order_of_images_and_of_classes_is_of_no_account():
    student, teacher, images, classes = logits(0.3), logits(1.1), [3, 0, 5, 1, 4, 2], [6, 2, 0, 1, 5, 3, 4]
    whole = dist_loss(student, teacher, 1.0, 1.0, 4.0).item()
    moved = dist_loss(student[images][:, classes], teacher[images][:, classes], 1.0, 1.0, 4.0).item()
    assert moved == pytest.approx(whole, rel=1e-9)
    assert dist_loss(student[images], teacher, 1.0, 1.0, 4.0).item() != pytest.approx(whole, rel=1e-3)


def test_a_class_with_the_same_probability_in_every_image_adds_a_constant():
    student, teacher = logits(0.3).float().requires_grad_(), logits(1.1).float()
    constant = torch.full((6, 1), 0.25)
    loss = pearson_distance(
        torch.cat([student.softmax(1), constant], 1).mT, torch.cat([teacher.softmax(1), constant], 1).mT
    )
    alone = pearson_distance(student.softmax(1).mT, teacher.softmax(1).mT)
    loss.backward()
    assert loss.item() == pytest.approx((7 * alone.item() + 1) / 8, rel=1e-5)
    assert student.grad.isfinite().all()


def test_gradients_are_those_of_the_formula():
    teacher = logits(1.1)
    assert torch.autograd.gradcheck(lambda z: dist_loss(z, teacher, 1.0, 0.5, 4.0), logits(0.3).requires_grad_())


def method(**keywords):
    shape = Output(torch.empty(1, 7), torch.empty(1, 3), ())
    return DIST(**keywords).assemble(shape, shape, DataSpec("toy", 7, tuple("abcdefg"), 8, torch.arange(7)))


def test_the_term_is_twice_the_loss_at_temperature_4_unless_told_otherwise():
    outputs = [Output(logits(phase), torch.zeros(6, 3), ()) for phase in (0.3, 1.1)]
    batch = Batch.of(torch.zeros(6, 3, 8, 8), torch.arange(6), 7)
    expected = reference(logits(0.3).numpy(), logits(1.1).numpy(), 1, 1, 4)
    assert method().loss(*outputs, batch)["dist"].item() == pytest.approx(2 * expected, rel=1e-6)
    assert set(method(dist=0.0).loss(*outputs, batch)) == {"ce"}


def test_a_temperature_of_0_is_refused():
    with pytest.raises(UserError, match="temperature=0"):
        method(temperature=0.0)
