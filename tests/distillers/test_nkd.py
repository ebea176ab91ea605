"""NKD: against numpy, with the true class left out of the second part, and with two classes."""

import numpy as np
import pytest
import torch
from kdzoo.distillers.nkd import NKD, other_classes_entropy

from kdzoo import Batch, DataSpec, Output
from kdzoo.errors import UserError
from kdzoo.losses import soft_target_loss


def logits(phase, classes=7, rows=5):
    steps = torch.arange(rows * classes, dtype=torch.float64)
    return (2 * torch.sin(0.7 * steps + phase) + torch.cos(1.9 * steps)).view(rows, classes)


def target_of(rows, classes):
    return torch.arange(classes) == (3 * torch.arange(rows) % classes)[:, None]


def softmax(z):
    return np.exp(z) / np.exp(z).sum(axis=1, keepdims=True)


def reference(student, teacher, target, temperature):
    mask = target.numpy()
    p_s, p_t = softmax(student.numpy()), softmax(teacher.numpy())
    rest_s, rest_t = (softmax(z.numpy()[~mask].reshape(len(z), -1) / temperature) for z in (student, teacher))
    return -(p_t[mask] * np.log(p_s[mask])).mean(), -(temperature**2) * (rest_t * np.log(rest_s)).sum(1).mean()


@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("classes", [3, 10, 101])
def test_both_parts_are_those_of_the_paper(classes, temperature):
    student, teacher, target = logits(0.3, classes), logits(1.1, classes), target_of(5, classes)
    certain, rest = reference(student, teacher, target, temperature)
    assert soft_target_loss(student, teacher, target).item() == pytest.approx(certain, rel=1e-6)
    assert other_classes_entropy(student, teacher, target, temperature).item() == pytest.approx(rest, rel=1e-6)


def test_the_second_part_leaves_the_true_class_out():
    student, teacher, target = logits(0.3), logits(1.1), target_of(5, 7)
    before = other_classes_entropy(student, teacher, target, 1.0).item()
    for raised in ((student + 5.0 * target, teacher), (student, teacher - 5.0 * target)):
        assert other_classes_entropy(*raised, target, 1.0).item() == pytest.approx(before, rel=1e-9)
    everywhere = -(softmax(teacher.numpy()) * np.log(softmax(student.numpy()))).sum(1).mean()
    assert before != pytest.approx(everywhere, rel=1e-2)  # what a mask that is true everywhere would give


def test_two_classes_leave_no_rest_and_finite_gradients():
    student, teacher, target = logits(0.3, 2).requires_grad_(), logits(1.1, 2), target_of(5, 2)
    rest = other_classes_entropy(student, teacher, target, 1.0)
    assert rest.item() == 0
    (rest + soft_target_loss(student, teacher, target)).backward()
    assert student.grad.isfinite().all()
    assert student.grad.any()


def test_gradients_are_those_of_the_formula():
    teacher, target = logits(1.1), target_of(5, 7)
    assert torch.autograd.gradcheck(lambda z: soft_target_loss(z, teacher, target), logits(0.3).requires_grad_())
    assert torch.autograd.gradcheck(
        lambda z: other_classes_entropy(z, teacher, target, 3.0), logits(0.3).requires_grad_()
    )


def method(**keywords):
    shape = Output(torch.empty(1, 7), torch.empty(1, 3), ())
    return NKD(**keywords).assemble(shape, shape, DataSpec("toy", 7, tuple("abcdefg"), 8, torch.arange(7)))


def test_gamma_weighs_the_second_part_and_the_true_class_is_that_of_the_targets():
    outputs = [Output(logits(phase), torch.zeros(5, 3), ()) for phase in (0.3, 1.1)]
    batch = Batch.of(torch.zeros(5, 3, 8, 8), 3 * torch.arange(5) % 7, 7)
    certain, rest = reference(logits(0.3), logits(1.1), target_of(5, 7), 3.0)
    found = method(gamma=3.5, temperature=3.0).loss(*outputs, batch)["nkd"].item()
    assert found == pytest.approx(certain + 3.5 * rest, rel=1e-6)
    smoothed = batch._replace(targets=0.9 * batch.targets + 0.1 / 7)
    assert method(gamma=3.5, temperature=3.0).loss(*outputs, smoothed)["nkd"].item() == found
    others = batch._replace(targets=batch.targets.roll(1, 1))
    assert method(gamma=3.5, temperature=3.0).loss(*outputs, others)["nkd"].item() != pytest.approx(found, rel=1e-3)


def test_a_temperature_of_0_is_refused():
    with pytest.raises(UserError, match="temperature=0"):
        method(temperature=0.0)
