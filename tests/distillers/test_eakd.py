"""EA-KD: the authors' numbers, a reference in numpy, and classical distillation where all images are alike."""

import numpy as np
import pytest
import torch
from kdzoo.distillers.eakd import EAKD, sample_weights
from scipy.special import rel_entr, softmax
from scipy.stats import entropy

from kdzoo.errors import UserError
from kdzoo.losses import softened_kl


def reference(student, teacher, temperature, entropy_temperature):
    """The weights and the weighted mean, from probabilities."""
    p_s, p_t = (softmax(z.numpy() / temperature, axis=1) for z in (student, teacher))
    h_s, h_t = (entropy(softmax(z.numpy() / entropy_temperature, axis=1), axis=1) for z in (student, teacher))
    weights = h_t * (1 + h_s / np.log(student.shape[1])) / 2
    return weights, (weights * temperature**2 * rel_entr(p_t, p_s).sum(axis=1)).mean()


@pytest.mark.parametrize("classes", [2, 10, 67])
def test_weights_and_term_are_those_of_the_paper(logits, terms_of, classes):
    student, teacher = logits(0.0, classes), logits(1.0, classes)
    weights, expected = reference(student, teacher, 2.0, 1.5)
    np.testing.assert_allclose(sample_weights(student, teacher, 1.5).numpy(), weights, rtol=1e-6)
    terms = terms_of(EAKD(kd=0.3, temperature=2.0, entropy_temperature=1.5), student, teacher)
    assert terms["kd"].item() == pytest.approx(0.3 * expected, rel=1e-6)


@pytest.mark.parametrize(
    ("temperature", "entropy_temperature", "number"), [(4.0, 3.0, 2.6464179055179082), (1.0, 2.0, 1.2889864695709496)]
)
def test_the_authors_code_gives_the_same(logits, terms_of, temperature, entropy_temperature, number):
    """Numbers of ``mdistiller/distillers/KD.py`` of cpsu00/EA-KD@6fb4c06 in float64, its bound being log K."""
    method = EAKD(kd=1.0, temperature=temperature, entropy_temperature=entropy_temperature)
    assert terms_of(method, logits(), logits(1.0))["kd"].item() == pytest.approx(number, rel=1e-7)


def test_images_count_by_the_doubt_of_both_networks():
    sure, unsure = torch.tensor([[50.0, 0, 0]]), torch.zeros(1, 3)
    found = {
        (s, t): sample_weights(*(unsure if one == "unsure" else sure for one in (s, t)), 1.0).item()
        for s in ("sure", "unsure")
        for t in ("sure", "unsure")
    }
    assert found["sure", "sure"] == pytest.approx(0, abs=1e-6)
    assert found["unsure", "sure"] == pytest.approx(0, abs=1e-6)
    assert found["sure", "unsure"] == pytest.approx(np.log(3) / 2)
    assert found["unsure", "unsure"] == pytest.approx(np.log(3))


def test_where_all_rows_are_permutations_of_one_it_is_classical_distillation_times_a_number(terms_of, logits):
    student = torch.stack([logits()[0].roll(k) for k in range(6)])
    teacher = torch.stack([logits(1.0)[0].roll(3 * k) for k in range(6)])
    for z_t, alike in ((teacher, True), (logits(1.0), False)):
        weight = sample_weights(student, z_t, 3.0).mean().item()
        found = terms_of(EAKD(kd=1.0), student, z_t)["kd"].item()
        assert (found == pytest.approx(weight * softened_kl(student, z_t, 4.0).item(), rel=1e-6)) is alike


def test_weights_carry_no_gradient_so_it_is_that_of_the_weighted_divergence(logits):
    student, teacher = logits().requires_grad_(), logits(1.0)
    weights = sample_weights(student, teacher, 3.0)
    assert not weights.requires_grad
    (given,) = torch.autograd.grad(EAKD().weighted(student, teacher), student)
    rows = [softened_kl(student[i : i + 1], teacher[i : i + 1], 4.0) for i in range(6)]
    (expected,) = torch.autograd.grad((weights * torch.stack(rows)).mean(), student)
    torch.testing.assert_close(given, expected)
    assert not torch.allclose(given, torch.autograd.grad(softened_kl(student, teacher, 4.0), student)[0])


@pytest.mark.parametrize("wrong", [{"temperature": 0.0}, {"entropy_temperature": 0.0}])
def test_values_without_a_meaning_are_refused(wrong):
    with pytest.raises(UserError, match="expected"):
        EAKD(**wrong)
