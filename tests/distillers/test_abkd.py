"""ABKD: the authors' numbers, a reference in probabilities, the divergences it contains, and its limits."""

import numpy as np
import pytest
import torch
from kdzoo.distillers.abkd import ABKD, alpha_beta_divergence
from scipy.special import rel_entr, softmax
from torch.nn import functional as F

from kdzoo.errors import UserError


def divergence(student, teacher, alpha, beta):
    return alpha_beta_divergence(F.log_softmax(teacher, dim=1), F.log_softmax(student, dim=1), alpha, beta).numpy()


def reference(p, q, a, b):
    return -((p**a * q**b - a / (a + b) * p ** (a + b) - b / (a + b) * q ** (a + b)).sum(axis=1)) / (a * b)


@pytest.mark.parametrize("classes", [2, 10, 67])
@pytest.mark.parametrize(("alpha", "beta"), [(0.8, 0.3), (0.5, 0.5), (2.0, 1.5)])
def test_it_is_the_formula_of_the_paper(logits, classes, alpha, beta):
    student, teacher = logits(0.0, classes), logits(1.0, classes)
    p, q = (softmax(z.numpy(), axis=1) for z in (teacher, student))
    np.testing.assert_allclose(divergence(student, teacher, alpha, beta), reference(p, q, alpha, beta), rtol=1e-6)


@pytest.mark.parametrize(
    ("alpha", "beta", "number"),
    [
        (0.8, 0.3, 0.06369364972113746),
        (1.0, 1.0, 0.008080503202173746),
        (1.0, 0.0, 0.08127381864471192),
        (0.0, 1.0, 0.08117842251855151),
        (0.0, 0.0, 0.9254438969683445),
        (0.5, 0.0, 0.13435334270857496 / 0.5),  # the authors divide by 0.5 once, where the limit has its square
    ],
)
def test_the_authors_code_gives_the_same(logits, terms_of, alpha, beta, number):
    """Numbers of ``standard_classification/distiller_zoo/abkl.py`` of ghwang-s/abkd@df81318 in float64."""
    found = terms_of(ABKD(abkd=1.0, alpha=alpha, beta=beta), logits(), logits(1.0))["abkd"].item()
    assert found == pytest.approx(number, rel=1e-9)


def test_it_contains_the_usual_divergences(logits):
    student, teacher = logits(), logits(1.0)
    p, q = (softmax(z.numpy(), axis=1) for z in (teacher, student))
    for alpha, beta, expected in (
        (1.0, 0.0, rel_entr(p, q)),
        (0.0, 1.0, rel_entr(q, p)),
        (0.5, 0.5, 2 * (np.sqrt(p) - np.sqrt(q)) ** 2),
        (1.0, 1.0, (p - q) ** 2 / 2),
        (0.0, 0.0, np.log(p / q) ** 2 / 2),
    ):
        np.testing.assert_allclose(divergence(student, teacher, alpha, beta), expected.sum(axis=1), rtol=1e-9)
        assert not np.allclose(divergence(student, teacher, alpha + 0.2, beta), expected.sum(axis=1), rtol=1e-3)


@pytest.mark.parametrize(("alpha", "beta"), [(0.7, 0.0), (0.0, 0.7), (0.0, 0.0)])
def test_values_at_0_are_the_limits(logits, alpha, beta):
    at, near, far = (divergence(logits(), logits(1.0), alpha + step, beta + step) for step in (0.0, 1e-4, 0.1))
    np.testing.assert_allclose(near, at, rtol=2e-3)
    assert not np.allclose(far, at, rtol=2e-3)


def test_equal_distributions_cost_nothing_and_others_something(logits):
    for alpha, beta in ((0.8, 0.3), (1.0, 0.0), (0.0, 0.0)):
        assert np.abs(divergence(logits(), logits() + 5.0, alpha, beta)).max() < 1e-12
        assert divergence(logits(), logits(1.0), alpha, beta).min() > 1e-3


def test_changing_places_changes_the_powers(logits):
    there, back = divergence(logits(), logits(1.0), 0.8, 0.3), divergence(logits(1.0), logits(), 0.3, 0.8)
    np.testing.assert_allclose(there, back, rtol=1e-12)
    assert not np.allclose(there, divergence(logits(1.0), logits(), 0.8, 0.3), rtol=1e-2)


@pytest.mark.parametrize(("alpha", "beta"), [(0.8, 0.3), (1.0, 0.0), (0.0, 0.6), (0.0, 0.0)])
def test_gradients_are_those_of_the_formula_and_stay_finite_for_huge_logits(logits, alpha, beta):
    log_p = F.log_softmax(logits(1.0), dim=1)
    assert torch.autograd.gradcheck(
        lambda z: alpha_beta_divergence(log_p, F.log_softmax(z, dim=1), alpha, beta), logits().requires_grad_()
    )
    huge = (1e4 * logits()).float().requires_grad_()
    loss = ABKD(alpha=alpha, beta=beta).divergence(huge, 1e4 * logits(1.0).float()).mean()
    loss.backward()
    assert loss.isfinite()
    assert huge.grad.isfinite().all()


def test_the_temperature_softens_both_sides_and_is_not_squared(logits, terms_of):
    found = terms_of(ABKD(abkd=1.0, temperature=2.0), logits(), logits(1.0))["abkd"].item()
    assert found == pytest.approx(divergence(logits() / 2, logits(1.0) / 2, 0.8, 0.3).mean(), rel=1e-9)


@pytest.mark.parametrize("wrong", [{"alpha": -0.5}, {"beta": -0.1}, {"temperature": 0.0}])
def test_values_without_a_meaning_are_refused(wrong):
    with pytest.raises(UserError, match="expected"):
        ABKD(**wrong)
