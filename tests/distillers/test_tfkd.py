"""Teacher-free KD: the authors' numbers, a reference in numpy, and label smoothing as its twin."""

import numpy as np
import pytest
import torch
from kdzoo.distillers.tfkd import TfKD, virtual_teacher
from scipy.special import log_softmax, rel_entr, softmax
from torch.nn import functional as F

from kdzoo.errors import UserError
from kdzoo.losses import cross_entropy

LABELS = torch.tensor([0, 1, 2, 3, 4, 4])


def teacher(classes, certainty, temperature):
    """The virtual teacher's probabilities, row by row."""
    rows = np.full((6, classes), (1 - certainty) / (classes - 1))
    rows[np.arange(6), LABELS] = certainty
    return softmax(rows / temperature, axis=1)


@pytest.mark.parametrize("classes", [5, 10, 67])
@pytest.mark.parametrize(("certainty", "temperature"), [(0.99, 20.0), (0.9, 0.5)])
def test_the_term_is_the_divergence_from_the_virtual_teacher(logits, terms_of, classes, certainty, temperature):
    expected = rel_entr(teacher(classes, certainty, temperature), softmax(logits(0.0, classes).numpy(), axis=1))
    method = TfKD(tfkd=0.3, certainty=certainty, temperature=temperature)
    found = terms_of(method, logits(0.0, classes), logits(0.0, classes))["tfkd"].item()
    assert found == pytest.approx(0.3 * expected.sum(axis=1).mean(), rel=1e-6)


@pytest.mark.parametrize(
    ("alpha", "multiplier", "temperature", "number"),
    [(0.1, 10.0, 20.0, 4.284652054541074), (0.95, 1.0, 40.0, 0.36351983566614365)],
)
def test_the_authors_code_gives_the_same(logits, terms_of, alpha, multiplier, temperature, number):
    """Numbers of ``my_loss_function.py`` of yuanli2333/Teacher-free-Knowledge-Distillation@d000ab3 in float64.

    Its divergence is a mean over images and classes.
    """
    method = TfKD(ce=1 - alpha, tfkd=alpha * multiplier / 10, temperature=temperature)
    assert sum(terms_of(method, logits(), logits()).values()).item() == pytest.approx(number, rel=1e-9)


def test_it_is_label_smoothing_by_the_virtual_teacher_less_a_constant(logits, terms_of):
    targets, soft = F.one_hot(LABELS, 10).double(), torch.from_numpy(teacher(10, 0.99, 20.0))
    entropies = []
    for phase in (0.0, 1.0):
        terms = terms_of(TfKD(ce=0.7, tfkd=0.3), logits(phase), logits(phase))
        smoothed = cross_entropy(logits(phase), 0.7 * targets + 0.3 * soft)
        entropies.append((smoothed - sum(terms.values())).item())
        plain = cross_entropy(logits(phase), targets).item()
        assert sum(terms.values()).item() != pytest.approx(plain, rel=1e-2)
    assert entropies[0] == pytest.approx(entropies[1], rel=1e-9)  # so the gradients are those of smoothed labels
    assert entropies[0] == pytest.approx(-0.3 * (soft * soft.log()).sum(dim=1).mean().item(), rel=1e-6)


def test_the_softest_teacher_is_uniform_and_the_hardest_is_the_label(logits, terms_of):
    uniform = (-np.log(10) - log_softmax(logits().numpy(), axis=1)).mean()
    found = {t: terms_of(TfKD(tfkd=1.0, temperature=t), logits(), logits())["tfkd"].item() for t in (1e-3, 20.0, 1e6)}
    assert found[1e6] == pytest.approx(uniform, rel=1e-6)
    assert found[1e-3] == pytest.approx(cross_entropy(logits(), F.one_hot(LABELS, 10).double()).item(), rel=1e-6)
    assert found[20.0] != pytest.approx(uniform, rel=1e-4)


def test_mixed_targets_mix_the_virtual_teacher():
    one, other = F.one_hot(LABELS, 10).double(), F.one_hot(LABELS + 3, 10).double()
    mixed = virtual_teacher(0.7 * one + 0.3 * other, 0.99, 1.0).exp()
    assert mixed.sum(dim=1).numpy() == pytest.approx(1)
    order = mixed.gather(1, torch.stack([LABELS, LABELS + 3, LABELS + 5], dim=1))
    assert (order.diff(dim=1) < 0).all()


def test_it_asks_no_teacher_and_mixed_gradients_are_right(logits):
    assert not TfKD.needs.teacher
    assert torch.autograd.gradcheck(
        lambda z: TfKD().divergence(z, F.one_hot(LABELS, 10).double()), logits().requires_grad_()
    )


@pytest.mark.parametrize("wrong", [{"certainty": 1.5}, {"temperature": 0.0}])
def test_values_without_a_meaning_are_refused(wrong):
    with pytest.raises(UserError, match="expected"):
        TfKD(**wrong)
