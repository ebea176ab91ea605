"""Distillation of softened probabilities."""

import pytest
import torch
from kdzoo.distillers.kd import KD
from scipy.special import log_softmax, rel_entr, softmax

from kdzoo.errors import UserError


def test_the_terms_are_those_of_the_paper(student, teacher, batch):
    z_s, z_t = (o.logits.detach().double().numpy() for o in (student, teacher))
    ce = -log_softmax(z_s, axis=1)[range(6), batch().labels].mean()
    kl = rel_entr(softmax(z_t / 4, axis=1), softmax(z_s / 4, axis=1)).sum(axis=1).mean()
    terms = KD().loss(student, teacher, batch())
    assert terms["ce"].item() == pytest.approx(0.1 * ce, rel=1e-5)
    assert terms["kd"].item() == pytest.approx(0.9 * 16 * kl, rel=1e-5)


def test_a_weight_of_zero_leaves_its_term_out(student, teacher, batch):
    assert KD(ce=0).loss(student, teacher, batch()).keys() == {"kd"}
    assert KD(kd=0).loss(student, teacher, batch()).keys() == {"ce"}


def test_a_student_with_the_teachers_logits_has_nothing_to_learn_from_it(teacher, batch):
    method = KD(ce=0)
    assert method.loss(teacher, teacher, batch())["kd"].abs() < 1e-6
    other = teacher._replace(logits=teacher.logits.flip(1))
    assert method.loss(other, teacher, batch())["kd"] > 0.01


@pytest.mark.parametrize("temperature", [0, -1, float("nan")])
def test_a_temperature_that_is_not_positive_is_the_users_error(temperature):
    with pytest.raises(UserError, match="temperature"):
        KD(temperature=temperature)


def test_features_are_not_asked_for():
    assert not KD().needs.features
    assert KD.needs.teacher


def test_the_gradient_keeps_its_size_as_temperature_grows(student, teacher, batch):
    sizes = []
    for temperature in (20.0, 40.0):
        term = KD(temperature=temperature).loss(student, teacher, batch())["kd"]
        sizes.append(torch.autograd.grad(term, student.logits)[0].norm())
    torch.testing.assert_close(*sizes, rtol=0.1, atol=0)
