"""LSKD: against numpy, and blind to what each row's scale and offset say."""

import numpy as np
import pytest
import torch
from kdzoo.distillers.lskd import LSKD, standardize

from kdzoo import Batch, DataSpec, Output
from kdzoo.errors import UserError
from kdzoo.losses import softened_kl


def logits(phase, classes=7, rows=5):
    steps = torch.arange(rows * classes, dtype=torch.float64)
    return (2 * torch.sin(0.7 * steps + phase) + torch.cos(1.9 * steps)).view(rows, classes)


def reference(student, teacher, temperature):
    scores = [(z - z.mean(1, keepdims=True)) / (z.std(1, ddof=1, keepdims=True) + 1e-7) for z in (student, teacher)]
    s, t = (np.exp(z / temperature) / np.exp(z / temperature).sum(1, keepdims=True) for z in scores)
    return temperature**2 * (t * np.log(t / s)).sum(1).mean()


@pytest.mark.parametrize("classes", [2, 7, 101])
def test_rows_are_z_scores_with_the_unbiased_deviation(classes):
    z = logits(0.3, classes).numpy()
    expected = (z - z.mean(1, keepdims=True)) / (z.std(1, ddof=1, keepdims=True) + 1e-7)
    np.testing.assert_allclose(standardize(logits(0.3, classes)).numpy(), expected, rtol=1e-9, atol=1e-12)
    biased = (z - z.mean(1, keepdims=True)) / (z.std(1, keepdims=True) + 1e-7)
    assert not np.allclose(standardize(logits(0.3, classes)).numpy(), biased, rtol=1e-3)


def method(**keywords):
    shape = Output(torch.empty(1, 7), torch.empty(1, 3), ())
    return LSKD(**keywords).assemble(shape, shape, DataSpec("toy", 7, tuple("abcdefg"), 8, torch.arange(7)))


def terms(student, teacher, **keywords):
    outputs = [Output(z, torch.zeros(5, 3), ()) for z in (student, teacher)]
    return method(**keywords).loss(*outputs, Batch.of(torch.zeros(5, 3, 8, 8), torch.arange(5), 7))


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_term_is_nine_times_the_distillation_of_z_scores(temperature):
    expected = reference(logits(0.3).numpy(), logits(1.1).numpy(), temperature)
    found = terms(logits(0.3), logits(1.1), temperature=temperature)["kd"].item()
    assert found == pytest.approx(9 * expected, rel=1e-6)


def test_each_rows_scale_and_offset_are_of_no_account():
    scale, offset = torch.arange(1, 6).double()[:, None], torch.linspace(-3, 9, 5).double()[:, None]
    student, teacher = logits(0.3), logits(1.1)
    before = terms(student, teacher)["kd"].item()
    assert terms(scale * student + offset, teacher)["kd"].item() == pytest.approx(before, rel=1e-5)
    assert terms(student, scale * teacher + offset)["kd"].item() == pytest.approx(before, rel=1e-5)
    assert terms(-student, teacher)["kd"].item() != pytest.approx(before, rel=1e-3)
    assert softened_kl(scale * student, teacher, 2.0) != pytest.approx(
        softened_kl(student, teacher, 2.0).item(), rel=1e-3
    )


def test_a_constant_row_becomes_0_and_its_gradient_is_finite():
    student = torch.full((5, 7), 3.0, requires_grad=True)
    assert not standardize(student).any()
    terms(student, logits(1.1).float())["kd"].backward()
    assert student.grad.isfinite().all()


def test_gradients_are_those_of_the_formula():
    teacher = standardize(logits(1.1))
    assert torch.autograd.gradcheck(lambda z: softened_kl(standardize(z), teacher, 2.0), logits(0.3).requires_grad_())


def test_a_temperature_of_0_is_refused():
    with pytest.raises(UserError, match="temperature=0"):
        method(temperature=0.0)
