"""NormKD: the authors' numbers, a reference in numpy, LSKD as a relative, and rows without a deviation."""

import numpy as np
import pytest
import torch
from kdzoo.distillers.lskd import LSKD
from kdzoo.distillers.normkd import NormKD, normalised_kl
from scipy.special import rel_entr, softmax

from kdzoo.errors import UserError


def reference(student, teacher, scale):
    t_s, t_t = (scale * z.numpy().std(axis=1, ddof=1, keepdims=True) for z in (student, teacher))
    p_s, p_t = softmax(student.numpy() / t_s, axis=1), softmax(teacher.numpy() / t_t, axis=1)
    return (t_t[:, 0] ** 2 * rel_entr(p_t, p_s).sum(axis=1)).mean()


@pytest.mark.parametrize("classes", [3, 10, 101])
@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_the_temperature_is_each_rows_unbiased_deviation(logits, classes, scale):
    student, teacher = logits(0.0, classes), logits(1.0, classes)
    assert normalised_kl(student, teacher, scale).item() == pytest.approx(reference(student, teacher, scale), rel=1e-6)


@pytest.mark.parametrize(("scale", "number"), [(2.0, 1.3141791211158036), (1.0, 1.0950243626316438)])
def test_the_authors_code_gives_the_same(logits, scale, number):
    """Numbers of ``mdistiller/distillers/NormKD.py`` of gizi1/NormKD@279371b in float64."""
    assert normalised_kl(logits(), logits(1.0), scale).item() == pytest.approx(number, rel=1e-9)


def test_it_is_lskd_times_the_teachers_variance_where_all_rows_have_the_same(logits, terms_of):
    student, teacher = logits(), logits(1.0)
    alike = 3.0 * teacher / teacher.std(dim=1, keepdim=True)
    for z_t, same in ((alike, True), (teacher, False)):
        relative = terms_of(LSKD(kd=9.0), student, z_t)["kd"].item()
        assert (terms_of(NormKD(kd=1.0), student, z_t)["kd"].item() == pytest.approx(relative, rel=1e-5)) is same


def test_the_students_scale_and_offset_are_of_no_account_and_the_teachers_scale_counts_squared(logits):
    scale, offset = torch.arange(1, 7).double()[:, None], torch.linspace(-3, 9, 6).double()[:, None]
    student, teacher = logits(), logits(1.0)
    before = normalised_kl(student, teacher, 2.0).item()
    assert normalised_kl(scale * student + offset, teacher + offset, 2.0).item() == pytest.approx(before, rel=1e-9)
    assert normalised_kl(student, 3 * teacher, 2.0).item() == pytest.approx(9 * before, rel=1e-9)
    assert normalised_kl(-student, teacher, 2.0).item() != pytest.approx(before, rel=1e-3)


def test_constant_rows_cost_no_infinity(logits):
    student = torch.full((6, 10), 3.0, requires_grad=True)
    loss = normalised_kl(student, logits(1.0).float(), 2.0)
    loss.backward()
    assert loss.isfinite()
    assert student.grad.isfinite().all()
    assert normalised_kl(logits(), torch.full((6, 10), 3.0).double(), 2.0).item() == 0


def test_gradients_are_those_of_the_formula(logits):
    assert torch.autograd.gradcheck(lambda z: normalised_kl(z, logits(1.0), 2.0), logits().requires_grad_())


def test_keywords_reach_the_formula(logits, terms_of):
    found = terms_of(NormKD(kd=0.3, scale=1.5), logits(), logits(1.0))["kd"].item()
    assert found == pytest.approx(0.3 * reference(logits(), logits(1.0), 1.5), rel=1e-6)
    assert NormKD.fewest_classes == 3
    assert np.isclose(normalised_kl(logits(0.0, 2), logits(0.0, 2) * 2, 1.0).item(), 0)  # two of one sign look alike


def test_a_scale_of_0_is_refused():
    with pytest.raises(UserError, match="scale=0"):
        NormKD(scale=0.0)
