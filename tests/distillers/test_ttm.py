"""TTM and WTTM: the authors' numbers, a reference in probabilities, and classical distillation as a relative."""

import numpy as np
import pytest
import torch
from kdzoo.distillers.ttm import TTM, transformed_matching
from scipy.special import rel_entr, softmax

from kdzoo.errors import UserError
from kdzoo.losses import softened_kl


def reference(student, teacher, gamma):
    """The divergence and the sum of powers of each row, from probabilities."""
    powers = softmax(teacher.numpy(), axis=1) ** gamma
    sums = powers.sum(axis=1)
    return rel_entr(powers / sums[:, None], softmax(student.numpy(), axis=1)).sum(axis=1), sums


@pytest.mark.parametrize("classes", [2, 10, 67])
@pytest.mark.parametrize("gamma", [0.1, 1.0, 3.0])
def test_both_forms_are_those_of_the_paper(logits, classes, gamma):
    student, teacher = logits(0.0, classes), logits(1.0, classes)
    rows, sums = reference(student, teacher, gamma)
    assert transformed_matching(student, teacher, gamma).item() == pytest.approx(rows.mean(), rel=1e-6)
    weighted = transformed_matching(student, teacher, gamma, weighted=True).item()
    assert weighted == pytest.approx((sums * rows).mean(), rel=1e-6)


def test_the_authors_code_gives_the_same(logits):
    """Numbers of ``distiller_zoo/ttm.py`` and ``wttm.py`` of zkxufo/TTM@fe457b3 in float64."""
    found = [transformed_matching(logits(), logits(1.0), 0.2, weighted).item() for weighted in (False, True)]
    assert found == pytest.approx([0.9936260855701038, 5.0400383361176075], rel=1e-12)


def test_it_is_distillation_with_the_temperature_on_the_teachers_side_alone(logits):
    student, teacher = logits(), logits(1.0)
    found = transformed_matching(student, teacher, 0.25).item()
    assert found == pytest.approx(softened_kl(student * 4, teacher, 4.0).item() / 16, rel=1e-12)
    assert found != pytest.approx(softened_kl(student, teacher, 4.0).item() / 16, rel=1e-2)
    assert transformed_matching(student, teacher, 1.0).item() == pytest.approx(
        softened_kl(student, teacher, 1.0).item(), rel=1e-12
    )


def test_without_a_power_the_weights_are_1_and_with_one_they_are_largest_for_unsure_rows(logits):
    student, teacher = logits(), logits(1.0)
    plain, weighted = (transformed_matching(student, teacher, 1.0, weighted).item() for weighted in (False, True))
    assert weighted == pytest.approx(plain, rel=1e-12)
    shares = []
    for scale in (0.1, 1.0, 10.0):
        pair = (transformed_matching(student, scale * teacher, 0.5, weighted).item() for weighted in (True, False))
        shares.append(np.divide(*pair))
    assert shares == sorted(shares, reverse=True)
    assert shares[0] == pytest.approx(np.sqrt(10), rel=0.02)  # equal probabilities give K^(1 - gamma)


def test_a_constant_added_to_a_row_is_not_seen_and_one_added_to_a_class_is(logits, waves):
    student, teacher = logits(), logits(1.0)
    before = transformed_matching(student, teacher, 0.5, weighted=True).item()
    moved = transformed_matching(student + waves(6, 1).double(), teacher + 7.0, 0.5, weighted=True).item()
    assert moved == pytest.approx(before, rel=1e-9)
    assert transformed_matching(student + waves(10).double(), teacher, 0.5, weighted=True).item() != pytest.approx(
        before, rel=1e-2
    )


@pytest.mark.parametrize("weighted", [False, True])
def test_gradients_are_those_of_the_formula(logits, weighted):
    assert torch.autograd.gradcheck(
        lambda z: transformed_matching(z, logits(1.0), 0.3, weighted), logits().requires_grad_()
    )


def test_keywords_reach_the_formula(logits, terms_of):
    rows, sums = reference(logits(), logits(1.0), 0.2)
    terms = terms_of(TTM(ttm=4.0, gamma=0.2, weighted=True), logits(), logits(1.0))
    assert terms["ttm"].item() == pytest.approx(4 * (sums * rows).mean(), rel=1e-6)
    assert terms_of(TTM(gamma=0.2), logits(), logits(1.0))["ttm"].item() == pytest.approx(45 * rows.mean(), rel=1e-6)


def test_a_power_of_0_is_refused():
    with pytest.raises(UserError, match="gamma=0"):
        TTM(gamma=0.0)
