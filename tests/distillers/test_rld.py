"""RLD: the authors' numbers, a reference in probabilities, DKD where the teacher is right, and rows without classes."""

import numpy as np
import pytest
import torch
from kdzoo.distillers.dkd import DKD
from kdzoo.distillers.rld import RLD, at_least_as_likely, sample_confidence_loss
from scipy.special import rel_entr, softmax

from kdzoo.errors import UserError
from kdzoo.losses import other_classes_loss, true_class

LABELS = np.array([0, 1, 2, 3, 4, 4])


def reference(student, teacher, temperature, confidence_temperature):
    """SCD and MCD from probabilities, means over the rows."""
    z_s, z_t = student.numpy(), teacher.numpy()
    rows, parts = np.arange(len(z_s)), []
    p_s, p_t = (softmax(z / confidence_temperature, axis=1) for z in (z_s, z_t))
    mine, theirs = p_s[rows, LABELS], p_t.max(axis=1)
    confidence = rel_entr([theirs, 1 - theirs], [mine, 1 - mine]).sum(axis=0).mean()
    for row, label in enumerate(LABELS):
        below = z_t[row] < z_t[row, label]
        t, s = (np.exp(z[row][below] / temperature) for z in (z_t, z_s))  # there may be no class below
        parts.append(rel_entr(t / t.sum(), s / s.sum()).sum())
    return confidence_temperature**2 * confidence, temperature**2 * np.mean(parts)


@pytest.mark.parametrize("classes", [5, 10, 67])
def test_both_parts_are_those_of_the_paper(logits, terms_of, classes):
    student, teacher = logits(0.0, classes), logits(1.0, classes)
    scd, mcd = reference(student, teacher, 3.0, 2.0)
    method = RLD(rld=0.5, alpha=3.0, beta=7.0, temperature=3.0, confidence_temperature=2.0)
    assert terms_of(method, student, teacher)["rld"].item() == pytest.approx(0.5 * (3 * scd + 7 * mcd), rel=1e-6)


@pytest.mark.parametrize(("confidence_temperature", "number"), [(4.0, 7.615819042562696), (1.0, 7.829834360966849)])
def test_the_authors_code_gives_the_same(logits, terms_of, confidence_temperature, number):
    """Numbers of ``mdistiller/distillers/RLD.py`` of zju-SWJ/RLD@d54578f in float64, at its own alpha and beta."""
    found = terms_of(RLD(confidence_temperature=confidence_temperature), logits(), logits(1.0))["rld"].item()
    assert found == pytest.approx(number, rel=1e-12)


def test_it_is_dkd_where_the_teacher_is_right_and_only_there(logits, terms_of):
    student, teacher = logits(), logits(1.0)
    right = teacher.clone()
    right[np.arange(6), LABELS] += 10.0
    for z_t, same in ((right, True), (teacher, False)):
        found, relative = (
            terms_of(m, student, z_t)[name].item() for m, name in ((RLD(beta=2.0), "rld"), (DKD(beta=2.0), "dkd"))
        )
        assert (found == pytest.approx(relative, rel=1e-9)) is same


def test_classes_that_the_teacher_prefers_to_the_true_one_are_not_seen(logits):
    student, teacher = logits(), logits(1.0)
    target = torch.from_numpy(np.eye(10, dtype=bool)[LABELS])
    dropped = at_least_as_likely(teacher, target)
    assert dropped[target].all()
    assert dropped.sum() > 6
    before = other_classes_loss(student, teacher, dropped, 4.0).item()
    assert other_classes_loss(student + 5.0 * dropped, teacher, dropped, 4.0).item() == pytest.approx(before, rel=1e-12)
    assert other_classes_loss(student + 5.0 * target.roll(1, 1), teacher, dropped, 4.0).item() != pytest.approx(
        before, rel=1e-3
    )


def test_a_teacher_to_whom_the_true_class_comes_last_leaves_nothing_to_compare(logits, terms_of):
    student, teacher = logits().requires_grad_(), logits(1.0)
    teacher[np.arange(6), LABELS] = -20.0
    loss = terms_of(RLD(alpha=0.0), student, teacher)["rld"]
    loss.backward()
    assert loss.item() == 0
    assert not student.grad.any()
    teacher[0, 0] = 20.0  # one row with classes left
    assert terms_of(RLD(alpha=0.0), student, teacher)["rld"].item() > 0


def test_a_probability_that_rounds_to_0_costs_no_infinity():
    student = torch.tensor([[-400.0, 400, 0, 0], [0, 0, 0, 400]], requires_grad=True)
    teacher = torch.tensor([[400.0, -400, 0, 0], [400, 0, 0, 0]])
    target = torch.tensor([[True, False, False, False], [False, False, True, False]])
    assert student.softmax(dim=1).log().isinf().any()  # what a log of a softmax would give
    loss = sample_confidence_loss(student, teacher, target, 1.0)
    loss = loss + other_classes_loss(student, teacher, at_least_as_likely(teacher, target), 1.0)
    loss.backward()
    assert loss.isfinite()
    assert student.grad.isfinite().all()


def test_gradients_are_those_of_the_formula(logits):
    teacher = logits(1.0)
    target = true_class(teacher.roll(1, 1))
    for part in (
        lambda z: sample_confidence_loss(z, teacher, target, 2.0),
        lambda z: other_classes_loss(z, teacher, at_least_as_likely(teacher, target), 2.0),
    ):
        assert torch.autograd.gradcheck(part, logits().requires_grad_())


def test_distillation_sets_in_over_the_warm_up(logits, terms_of):
    found = {p: terms_of(RLD(), logits(), logits(1.0), progress=torch.tensor(p))["rld"].item() for p in (0, 1 / 24, 1)}
    assert found[0] == 0
    assert found[1 / 24] == pytest.approx(found[1] / 2, rel=1e-6)


@pytest.mark.parametrize("wrong", [{"temperature": 0.0}, {"confidence_temperature": -1.0}, {"warmup": 20.0}])
def test_values_without_a_meaning_are_refused(wrong):
    with pytest.raises(UserError, match="expected"):
        RLD(**wrong)
