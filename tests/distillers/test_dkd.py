"""DKD: both parts against a reference in probabilities, their sum against classical distillation, and the traps."""

import numpy as np
import pytest
import torch
from kdzoo.distillers.dkd import DKD, other_classes_loss, target_class_loss
from torch import Tensor
from torch.nn import functional as F

from kdzoo import Batch, DataSpec, Output
from kdzoo.errors import UserError


def logits(phase, classes=7, rows=5):
    steps = torch.arange(rows * classes, dtype=torch.float64)
    return (2 * torch.sin(0.7 * steps + phase) + torch.cos(1.9 * steps)).view(rows, classes)


def target_of(rows, classes):
    return torch.arange(classes) == (3 * torch.arange(rows) % classes)[:, None]


def softmax(z):
    return np.exp(z) / np.exp(z).sum(axis=1, keepdims=True)


def kl(p, q):
    return (p * np.log(p / q)).sum(axis=1)


def reference(student, teacher, target, temperature):
    """TCKD and NCKD from probabilities, one value for each row."""
    p_s, p_t = (softmax(z.numpy() / temperature) for z in (student, teacher))
    mask = target.numpy()
    binary = [np.stack([p[mask], 1 - p[mask]], axis=1) for p in (p_t, p_s)]
    rest = [p[~mask].reshape(len(p), -1) for p in (p_t, p_s)]
    rest = [p / p.sum(axis=1, keepdims=True) for p in rest]
    return temperature**2 * kl(*binary), temperature**2 * kl(*rest), binary[0][:, 1]


@pytest.mark.parametrize("temperature", [1.0, 4.0])
@pytest.mark.parametrize("classes", [3, 10, 67])
def test_both_parts_are_those_of_the_paper(classes, temperature):
    student, teacher, target = logits(0.3, classes), logits(1.1, classes), target_of(5, classes)
    tckd, nckd, _ = reference(student, teacher, target, temperature)
    assert target_class_loss(student, teacher, target, temperature).item() == pytest.approx(tckd.mean(), rel=1e-6)
    assert other_classes_loss(student, teacher, target, temperature).item() == pytest.approx(nckd.mean(), rel=1e-6)


def test_classical_distillation_is_their_sum_with_the_teachers_doubt_as_weight():
    student, teacher, target = logits(0.3), logits(1.1), target_of(5, 7)
    doubt = reference(student, teacher, target, 4.0)[2]
    coupled = [
        target_class_loss(student[i : i + 1], teacher[i : i + 1], target[i : i + 1], 4.0).item()
        + doubt[i] * other_classes_loss(student[i : i + 1], teacher[i : i + 1], target[i : i + 1], 4.0).item()
        for i in range(5)
    ]
    whole = 16 * kl(softmax(teacher.numpy() / 4), softmax(student.numpy() / 4)).mean()
    assert np.mean(coupled) == pytest.approx(whole, rel=1e-6)


def test_the_rest_of_the_classes_does_not_see_the_true_one():
    student, teacher, target = logits(0.3), logits(1.1), target_of(5, 7)
    raised = student + 5.0 * target
    before, after = (other_classes_loss(z, teacher, target, 4.0) for z in (student, raised))
    assert after.item() == pytest.approx(before.item(), rel=1e-12)
    assert target_class_loss(raised, teacher, target, 4.0) != target_class_loss(student, teacher, target, 4.0)


def test_two_classes_leave_no_rest():
    student, teacher, target = logits(0.3, 2).requires_grad_(), logits(1.1, 2), target_of(5, 2)
    assert other_classes_loss(student, teacher, target, 4.0).item() == 0
    (target_class_loss(student, teacher, target, 4.0) + other_classes_loss(student, teacher, target, 4.0)).backward()
    assert student.grad.isfinite().all()
    assert student.grad.any()


def test_a_probability_that_rounds_to_0_costs_no_infinity():
    target = target_of(2, 4)
    student = torch.tensor([[-400.0, 400, 0, 0], [0, 0, 0, 400]], requires_grad=True)
    teacher = torch.tensor([[400.0, -400, 0, 0], [400, 0, 0, 0]])
    assert F.softmax(student, dim=1).log().isinf().any()  # what a log of a softmax would give
    loss = target_class_loss(student, teacher, target, 1.0) + other_classes_loss(student, teacher, target, 1.0)
    loss.backward()
    assert loss.isfinite()
    assert student.grad.isfinite().all()


def test_gradients_are_those_of_the_formula():
    teacher, target = logits(1.1), target_of(5, 7)
    for part in (target_class_loss, other_classes_loss):
        assert torch.autograd.gradcheck(
            lambda z, part=part: part(z, teacher, target, 4.0), logits(0.3).requires_grad_()
        )


def method(**keywords):
    shape = Output(torch.empty(1, 7), torch.empty(1, 3), ())
    data = DataSpec("toy", 7, tuple("abcdefg"), 8, torch.arange(7))
    return DKD(**keywords).assemble(shape, shape, data)


def terms(progress, **keywords) -> dict[str, Tensor]:
    outputs = [Output(logits(phase), torch.zeros(5, 3), ()) for phase in (0.3, 1.1)]
    labels = 3 * torch.arange(5) % 7
    return method(**keywords).loss(*outputs, Batch.of(torch.zeros(5, 3, 8, 8), labels, 7, progress))


def test_distillation_sets_in_over_the_warm_up_and_then_stays():
    whole = terms(0.5)["dkd"].item()
    assert terms(0.0)["dkd"].item() == 0
    assert terms(10 / 240)["dkd"].item() == pytest.approx(whole / 2, rel=1e-6)
    assert terms(20 / 240)["dkd"].item() == pytest.approx(whole, rel=1e-6)
    assert terms(0.0, warmup=0.0)["dkd"].item() == pytest.approx(whole, rel=1e-12)
    assert terms(0.0)["ce"].item() == terms(0.9)["ce"].item() > 0


def test_alpha_and_beta_weigh_the_two_parts():
    tckd, nckd, _ = reference(logits(0.3), logits(1.1), target_of(5, 7), 4.0)
    assert terms(0.5)["dkd"].item() == pytest.approx(tckd.mean() + 8 * nckd.mean(), rel=1e-6)
    assert terms(0.5, alpha=3.0, beta=0.0)["dkd"].item() == pytest.approx(3 * tckd.mean(), rel=1e-6)


@pytest.mark.parametrize("wrong", [{"temperature": 0.0}, {"warmup": 20.0}])
def test_values_without_a_meaning_are_refused(wrong):
    with pytest.raises(UserError, match="expected"):
        method(**wrong)
