"""SKD: the authors' numbers, a reference in numpy, the plain length as its limit, and batches of one."""

import numpy as np
import pytest
import torch
from kdzoo.distillers.skd import SKD, direction_loss
from scipy.special import rel_entr, softmax

from kdzoo.errors import UserError


def gram(z):
    unit = z / np.linalg.norm(z, axis=1, keepdims=True)
    return unit @ unit.T


def reference(student, teacher, ridge, whiten=True):
    rows = (gram(student.numpy()) - gram(teacher.numpy())) / student.shape[1]
    matrix = ridge * np.eye(len(rows)) + (np.cov(rows.T) if whiten else 0)
    return np.mean([np.sqrt(row @ np.linalg.inv(matrix) @ row) for row in rows])


@pytest.mark.parametrize("classes", [2, 10, 67])
@pytest.mark.parametrize(("ridge", "whiten"), [(0.1, True), (1e-4, True), (0.1, False)])
def test_the_term_is_the_formula(logits, classes, ridge, whiten):
    student, teacher = logits(0.0, classes), logits(1.0, classes)
    found = direction_loss(student, teacher, ridge, whiten).item()
    assert found == pytest.approx(reference(student, teacher, ridge, whiten), rel=1e-6)


@pytest.mark.parametrize(("ridge", "number"), [(0.1, 0.1670636807371745), (1e-4, 1.882863395414282)])
def test_the_authors_code_gives_the_same(logits, ridge, number):
    """Numbers of ``mdistiller/distillers/SKD.py`` of HyunJunSik/StreamLined@7458628 in float64."""
    assert direction_loss(logits(), logits(1.0), ridge).item() == pytest.approx(number, rel=1e-9)


def test_by_default_the_covariance_hardly_counts_and_with_a_small_ridge_it_does(logits):
    student, teacher = logits(0.0, 100), logits(1.0, 100)
    for ridge, near in ((0.1, True), (1e-6, False)):
        whole, plain = (direction_loss(student, teacher, ridge, whiten).item() for whiten in (True, False))
        assert (whole == pytest.approx(plain, rel=0.01)) is near


def test_rows_scale_and_a_turn_of_all_logits_are_not_seen_and_a_single_rows_turn_is(logits, waves):
    student, teacher = logits(), logits(1.0)
    before = direction_loss(student, teacher, 0.1).item()
    turn = torch.linalg.qr(waves(10, 10, dtype=torch.float64)).Q
    scale = torch.arange(1, 7).double()[:, None]
    assert direction_loss(scale * student @ turn, teacher, 0.1).item() == pytest.approx(before, rel=1e-9)
    alone = torch.cat([student[:1] @ turn, student[1:]])
    assert direction_loss(alone, teacher, 0.1).item() != pytest.approx(before, rel=1e-3)
    assert direction_loss(student[[3, 0, 5, 1, 4, 2]], teacher[[3, 0, 5, 1, 4, 2]], 0.1).item() == pytest.approx(before)


def test_gradients_are_those_of_the_formula_and_finite_where_nothing_differs(logits):
    for whiten in (True, False):
        assert torch.autograd.gradcheck(
            lambda z, whiten=whiten: direction_loss(z, logits(1.0), 0.1, whiten), logits().requires_grad_()
        )
    for student, teacher in ((logits(), logits()), (logits()[:1], logits(1.0)[:1]), (0 * logits(), logits(1.0))):
        student = student.clone().requires_grad_()
        loss = direction_loss(student, teacher, 0.1)
        loss.backward()
        assert loss.isfinite()
        assert student.grad.isfinite().all()


def test_each_term_has_its_weight(logits, terms_of):
    p_t, p_s = (softmax(z.numpy() / 2, axis=1) for z in (logits(1.0), logits()))
    terms = terms_of(SKD(kd=0.7, skd=0.3, temperature=2.0, ridge=0.01), logits(), logits(1.0))
    assert terms["kd"].item() == pytest.approx(0.7 * 4 * rel_entr(p_t, p_s).sum(axis=1).mean(), rel=1e-6)
    assert terms["skd"].item() == pytest.approx(0.3 * reference(logits(), logits(1.0), 0.01), rel=1e-6)


@pytest.mark.parametrize("wrong", [{"ridge": 0.0}, {"temperature": 0.0}])
def test_values_without_a_meaning_are_refused(wrong):
    with pytest.raises(UserError, match="expected"):
        SKD(**wrong)
