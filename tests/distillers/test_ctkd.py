"""CTKD: a temperature that climbs where the student descends, ever more so over the warm-up."""

import numpy as np
import pytest
import torch
from kdzoo.distillers.ctkd import CTKD, cosine_rise, reverse_gradient

from kdzoo import Batch, DataSpec, Output
from kdzoo.errors import UserError


def logits(phase, classes=7, rows=5):
    steps = torch.arange(rows * classes, dtype=torch.float64)
    return (2 * torch.sin(0.7 * steps + phase) + torch.cos(1.9 * steps)).view(rows, classes)


def method(**keywords):
    shape = Output(torch.empty(1, 7), torch.empty(1, 3), ())
    return CTKD(**keywords).assemble(shape, shape, DataSpec("toy", 7, tuple("abcdefg"), 8, torch.arange(7))).double()


def terms(ctkd, progress, student=None):
    outputs = [Output(z, torch.zeros(5, 3), ()) for z in (logits(0.3) if student is None else student, logits(1.1))]
    return ctkd.loss(*outputs, Batch.of(torch.zeros(5, 3, 8, 8), torch.arange(5), 7, progress))


def distillation(hardness):
    """0.9 T^2 KL at T = 1 + 20 sigmoid(hardness), in numpy."""
    temperature = 1 + 20 / (1 + np.exp(-hardness))
    s, t = (logits(phase).numpy() / temperature for phase in (0.3, 1.1))
    s, t = (np.exp(z) / np.exp(z).sum(1, keepdims=True) for z in (s, t))
    return 0.9 * temperature**2 * (t * np.log(t / s)).sum(1).mean()


@pytest.mark.parametrize("start", [-3.0, 1.0])
def test_the_term_is_distillation_at_the_learned_temperature(start):
    assert terms(method(start=start), 0.5)["kd"].item() == pytest.approx(distillation(start), rel=1e-6)


def test_the_temperature_starts_at_15_and_stays_within_its_bounds():
    ctkd, late = method(), torch.tensor(0.5)
    assert ctkd.temperature(late).item() == pytest.approx(1 + 20 / (1 + np.exp(-1)), rel=1e-6)
    for hardness, bound in ((-1e3, 1.0), (1e3, 21.0)):
        torch.nn.init.constant_(ctkd.hardness, hardness)
        assert ctkd.temperature(late).item() == pytest.approx(bound)


@pytest.mark.parametrize(("progress", "strength"), [(0.0, 0.0), (5 / 240, 0.5), (10 / 240, 1.0), (0.9, 1.0)])
def test_its_gradient_is_reversed_and_sets_in_by_half_a_cosine(progress, strength):
    ctkd = method()
    terms(ctkd, progress)["kd"].backward()
    slope = (distillation(1 + 1e-6) - distillation(1 - 1e-6)) / 2e-6
    assert ctkd.hardness.grad.item() == pytest.approx(-strength * slope, rel=1e-5, abs=1e-7)


def test_a_step_of_descent_makes_the_students_task_harder():
    ctkd = method()
    before = terms(ctkd, 0.5)["kd"]
    before.backward()
    with torch.no_grad():
        ctkd.hardness -= 0.1 * ctkd.hardness.grad
    assert terms(ctkd, 0.5)["kd"] > before


def test_the_students_own_gradient_is_not_reversed():
    student = logits(0.3).requires_grad_()
    before = terms(method(), 0.5, student)["kd"]
    before.backward()
    with torch.no_grad():
        assert terms(method(), 0.5, student - 0.1 * student.grad)["kd"] < before


def test_reversal_leaves_the_value_to_the_bit():
    x = (0.1 + torch.sin(torch.arange(50.0))).requires_grad_()
    y = reverse_gradient(x, torch.tensor(0.37))
    y.sum().backward()
    assert torch.equal(y, x)
    assert torch.allclose(x.grad, torch.tensor(-0.37))


def test_the_rise_is_half_a_cosine():
    for epoch in range(12):
        expected = (1 - np.cos(np.pi * min(epoch / 10, 1))) / 2
        found = cosine_rise(torch.tensor(epoch / 240, dtype=torch.float64), 10 / 240).item()
        assert found == pytest.approx(expected, rel=1e-6, abs=1e-12)
    assert cosine_rise(torch.tensor(0.0), 0.0).item() == 1


def test_the_temperature_is_a_parameter_only_where_it_is_used():
    assert [name for name, _ in method().named_parameters()] == ["hardness"]
    assert not list(method(kd=0.0).parameters())


@pytest.mark.parametrize("wrong", [{"lowest": 0.0}, {"span": -1.0}, {"warmup": 10.0}])
def test_values_without_a_meaning_are_refused(wrong):
    with pytest.raises(UserError, match="expected"):
        method(**wrong)
