"""CRLD: a reference in numpy, masks that choose, and the views that each term reads."""

import numpy as np
import pytest
import torch
from kdzoo.distillers.crld import CRLD, confident, view_loss
from scipy.special import log_softmax, rel_entr, softmax
from torch import nn

from kdzoo import Batch, Output
from kdzoo.errors import UserError

LABELS = np.array([0, 1, 2, 3, 4, 4])


def kl(student, teacher, temperature):
    p_t, p_s = softmax(teacher / temperature, axis=1), softmax(student / temperature, axis=1)
    return temperature**2 * rel_entr(p_t, p_s).sum(axis=1)


class Linear(nn.Module):
    """Logits that are a fixed linear map of the images; it counts its passes."""

    def __init__(self, weight):
        super().__init__()
        self.weight, self.passes = nn.Parameter(weight), 0

    def forward(self, images):
        self.passes += 1
        return Output(images.flatten(1) @ self.weight, images.flatten(1))


@pytest.fixture
def pair(waves):
    return [Linear(waves(12, 10, phase=phase, dtype=torch.float64)) for phase in (0.0, 1.0)]


@pytest.fixture
def views(waves):
    return {name: waves(6, 3, 2, 2, phase=phase, dtype=torch.float64) for name, phase in (("weak", 2), ("strong", 3))}


@pytest.fixture
def given(views):
    images = torch.full((6, 3, 2, 2), torch.nan)  # which no term reads
    return Batch.of(images, torch.from_numpy(LABELS), 10)._replace(views=views)


def reference(pair, views, temperature, weak, strong):
    """The unweighted terms within and across views, by the probabilities from which the teacher is sure."""
    s, t = ([net(views[name]).logits.detach().numpy() for name in ("weak", "strong")] for net in pair)
    sure = [softmax(z, axis=1).max(axis=1) >= threshold for z, threshold in zip(t, (weak, strong), strict=True)]
    within = sure[0] * (kl(s[0], t[0], temperature) + kl(s[1], t[1], temperature))
    cross = sure[1] * (kl(s[1], t[0], temperature) + kl(s[0], t[1], temperature))
    entropy = -sum(log_softmax(z, axis=1)[np.arange(6), LABELS].mean() for z in s)
    return entropy, within.mean(), cross.mean(), sure


def test_each_term_reads_its_pairs_of_views_and_its_mask(pair, views, given):
    entropy, within, cross, sure = reference(pair, views, 4.0, 0.9, 0.95)
    assert all(0 < mask.sum() < 6 for mask in sure)
    assert (sure[0] != sure[1]).any()
    terms = CRLD(strong_threshold=0.95)(*pair, given)
    assert terms["ce"].item() == pytest.approx(entropy, rel=1e-6)
    assert terms["within"].item() == pytest.approx(2 * within, rel=1e-6)
    assert terms["cross"].item() == pytest.approx(0.5 * cross, rel=1e-6)


def test_thresholds_of_0_keep_all_images_and_of_1_keep_none_that_is_unsure(pair, views, given):
    _, within, cross, _ = reference(pair, views, 2.0, 0.0, 0.0)
    all_kept = CRLD(temperature=2.0, weak_threshold=0.0, strong_threshold=0.0)(*pair, given)
    assert all_kept["within"].item() == pytest.approx(2 * within, rel=1e-6)
    assert all_kept["cross"].item() == pytest.approx(0.5 * cross, rel=1e-6)
    none_kept = CRLD(weak_threshold=1.0, strong_threshold=1.0)(*pair, given)
    assert none_kept["within"].item() == none_kept["cross"].item() == 0


def test_images_of_which_the_teacher_is_unsure_have_no_gradient(logits):
    student, teacher = logits().requires_grad_(), logits(1.0)
    sure = confident(teacher, 0.5)
    assert 0 < sure.sum() < 6
    view_loss((student, student), (teacher, teacher), sure, 4.0).backward()
    assert not student.grad[~sure].any()
    assert student.grad[sure].any(dim=1).all()


def test_one_view_twice_makes_both_terms_the_same(pair, views, given):
    same = given._replace(views={"weak": views["weak"], "strong": views["weak"]})
    for batch, equal in ((same, True), (given, False)):
        terms = CRLD(within=1.0, cross=1.0, weak_threshold=0.5, strong_threshold=0.5)(*pair, batch)
        assert (terms["within"].item() == pytest.approx(terms["cross"].item(), rel=1e-9)) is equal


def test_each_network_sees_each_view_once(pair, given):
    CRLD()(*pair, given)
    assert [net.passes for net in pair] == [2, 2]


def test_views_are_not_mixed_so_mixed_targets_do_not_reach_them(pair, given):
    mixed = given._replace(targets=(given.targets + given.targets.flip(0)) / 2, partner=torch.arange(6).flip(0))
    before = CRLD()(*pair, given)["ce"].item()
    assert CRLD()(*pair, mixed)["ce"].item() == pytest.approx(before, rel=1e-9)
    smoothed = given._replace(targets=0.9 * given.targets + 0.01)
    assert CRLD()(*pair, smoothed)["ce"].item() != pytest.approx(before, rel=1e-3)


def test_gradients_are_those_of_the_formula(logits):
    sure = torch.arange(6) % 2 == 0
    assert torch.autograd.gradcheck(
        lambda z: view_loss((z, z.roll(1, 0)), (logits(1.0), logits(2.0)), sure, 3.0), logits().requires_grad_()
    )


@pytest.mark.parametrize("wrong", [{"weak_threshold": 1.5}, {"strong_threshold": -0.1}, {"temperature": 0.0}])
def test_values_without_a_meaning_are_refused(wrong):
    with pytest.raises(UserError, match="expected"):
        CRLD(**wrong)
