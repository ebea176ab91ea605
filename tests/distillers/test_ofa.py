"""OFA: the raised target against numpy, what it is at eps 1, and projectors for every stage."""

import numpy as np
import pytest
import torch
from kdzoo.distillers.ofa import OFA, ofa_loss, projector
from torch.nn import functional as F

from kdzoo import Batch, DataSpec, Output
from kdzoo.errors import UserError


def logits(phase, classes=7, rows=5):
    steps = torch.arange(rows * classes, dtype=torch.float64)
    return (2 * torch.sin(0.7 * steps + phase) + torch.cos(1.9 * steps)).view(rows, classes)


def target_of(rows, classes):
    return torch.arange(classes) == (3 * torch.arange(rows) % classes)[:, None]


def reference(student, teacher, target, eps, temperature):
    p_s, p_t = (np.exp(z / temperature) / np.exp(z / temperature).sum(1, keepdims=True) for z in (student, teacher))
    total = 0.0
    for row, (s, t) in enumerate(zip(p_s, p_t, strict=True)):
        for k in range(len(s)):
            m = float(target[row, k])
            total -= ((t[k] + m) ** eps - m) * np.log(s[k])
    return total / len(p_s)


@pytest.mark.parametrize("eps", [1.0, 1.5])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("classes", [2, 7, 67])
def test_it_is_the_formula_of_the_paper(classes, temperature, eps):
    student, teacher, target = logits(0.3, classes), logits(1.1, classes), target_of(5, classes)
    expected = reference(student.numpy(), teacher.numpy(), target.numpy(), eps, temperature)
    assert ofa_loss(student, teacher, target, eps, temperature).item() == pytest.approx(expected, rel=1e-6)


def test_at_eps_1_it_is_the_cross_entropy_with_the_teacher_for_any_class():
    student, teacher = logits(0.3), logits(1.1)
    expected = F.cross_entropy(student, teacher.softmax(dim=1)).item()
    for target in (target_of(5, 7), target_of(5, 7).roll(2, 1)):
        assert ofa_loss(student, teacher, target, 1.0).item() == pytest.approx(expected, rel=1e-9)


def test_a_larger_eps_pulls_the_true_class_further_from_each_other():
    teacher, target, margins = logits(1.1), target_of(5, 7), []
    for eps in (1.0, 2.0):
        student = torch.zeros(5, 7, dtype=torch.float64, requires_grad=True)
        (slope,) = torch.autograd.grad(ofa_loss(student, teacher, target, eps), student)
        margins.append((slope - slope[target][:, None])[~target])
    assert (margins[1] > margins[0]).all()


def test_logits_so_large_that_probabilities_vanish_cost_no_infinity():
    student = torch.tensor([[300.0, -300, 0]], requires_grad=True)
    assert F.softmax(student, dim=1).log().isinf().any()  # what a log of a softmax would give
    loss = ofa_loss(student, -student.detach(), torch.tensor([[False, True, False]]), 1.5)
    loss.backward()
    assert loss.isfinite()
    assert student.grad.isfinite().all()


def test_gradients_are_those_of_the_formula():
    teacher, target = logits(1.1), target_of(5, 7)
    assert torch.autograd.gradcheck(lambda z: ofa_loss(z, teacher, target, 1.5), logits(0.3).requires_grad_())


@pytest.mark.parametrize("grid", [(1, 1), (7, 5), (16, 16)])
@pytest.mark.parametrize("halvings", [0, 1, 3])
def test_a_projector_turns_any_map_into_logits(halvings, grid):
    maps = torch.sin(torch.arange(2 * 6 * grid[0] * grid[1]).float()).view(2, 6, *grid)
    assert projector(6, halvings, 20, 7)(maps).shape == (2, 7)


def features(widths=(6, 8, 8, 12), rows=5):
    grids = (8, 4, 2, 1)
    return tuple(
        torch.sin(torch.arange(rows * width * grid * grid).double()).view(rows, width, grid, grid)
        for width, grid in zip(widths, grids, strict=True)
    )


def method(**keywords):
    student = Output(torch.empty(1, 7), torch.empty(1, 12), features(rows=1))
    teacher = Output(torch.empty(1, 7), torch.empty(1, 20), features((8, 12, 16, 20), rows=1))
    return OFA(**keywords).assemble(student, teacher, DataSpec("toy", 7, tuple("abcdefg"), 8, torch.arange(7)))


def test_projectors_end_in_the_wider_embedding():
    assert [p[-1].in_features for p in method().projectors] == [20] * 4


def test_the_stages_add_up_and_the_students_logits_have_another_term():
    torch.manual_seed(0)
    ofa = method(eps=1.5, ofa=0.5).double().eval()
    student, teacher = Output(logits(0.3), torch.zeros(5, 12), features()), Output(logits(1.1), torch.zeros(5, 20), ())
    found = ofa.loss(student, teacher, Batch.of(torch.zeros(5, 3, 8, 8), 3 * torch.arange(5) % 7, 7))
    with torch.no_grad():
        staged = [project(maps).numpy() for project, maps in zip(ofa.projectors, features(), strict=True)]
    expected = [
        reference(z, logits(1.1).numpy(), target_of(5, 7).numpy(), 1.5, 1.0) for z in (*staged, logits(0.3).numpy())
    ]
    assert found["ofa"].item() == pytest.approx(0.5 * sum(expected[:4]), rel=1e-6)
    assert found["kd"].item() == pytest.approx(expected[4], rel=1e-6)


def test_a_weight_of_0_builds_no_projector_and_asks_for_no_features():
    ofa = method(ofa=0.0)
    assert not list(ofa.parameters())
    assert not ofa.needs.features


@pytest.mark.parametrize("wrong", [{"eps": 0.0}, {"temperature": -1.0}, {"stages": (0, 4)}])
def test_values_without_a_meaning_are_refused(wrong):
    with pytest.raises(UserError, match="expected"):
        method(**wrong)
