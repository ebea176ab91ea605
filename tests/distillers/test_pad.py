"""Errors under a learned variance."""

import numpy as np
import pytest
import torch
from kdzoo.distillers.pad import PAD, uncertain_error

from kdzoo.errors import UserError


def at(batch, progress):
    return batch._replace(progress=torch.tensor(progress))


def test_the_error_is_the_likelihood_of_a_gaussian(waves):
    s, t, v = (waves(3, 4, phase=phase, dtype=torch.float64) for phase in (0.0, 1.0, 0.5))
    expected = np.mean((s.numpy() - t.numpy()) ** 2 / (np.exp(v.numpy()) + 1e-6) + v.numpy())
    found = uncertain_error(s, t, v).item()
    assert found == pytest.approx(expected, rel=1e-9)
    # the expression of PADL2Loss, yoshitomo-matsubara/torchdistill@3e4373c, torchdistill/losses/mid_level.py
    assert found == pytest.approx(1.334308785738995, rel=1e-9)


def test_the_best_variance_is_the_squared_error(waves):
    s, t = waves(3, 4, dtype=torch.float64), waves(3, 4, phase=1.0, dtype=torch.float64)
    best = (s - t).square().log()
    lowest = uncertain_error(s, t, best)
    assert all(uncertain_error(s, t, best + shift) > lowest for shift in (-0.5, 0.5))


def test_the_term_predicts_the_teachers_embedding_after_the_warmup(student, teacher, data, batch):
    method = PAD(pad=2.0, warmup=0.25).assemble(student, teacher, data()).eval()
    predicted, log_variance = method.embed(student.embedding), method.log_variance(student.embedding)
    plain = 2 * (predicted - teacher.embedding).square().mean().item()
    full = 2 * uncertain_error(predicted, teacher.embedding, log_variance).item()
    early, late = (method.loss(student, teacher, at(batch(), p))["pad"].item() for p in (0.2, 0.25))
    assert early == pytest.approx(plain, rel=1e-5)
    assert late == pytest.approx(full, rel=1e-5)
    assert early != pytest.approx(late, rel=1e-2)


def test_equal_widths_need_no_map(student, data):
    assert not list(PAD().assemble(student, student, data()).embed.parameters())


def test_variances_learn_after_the_warmup_only(student, teacher, data, batch):
    for progress, learns in ((0.1, False), (0.9, True)):
        method = PAD(ce=0).assemble(student, teacher, data())
        method.loss(student, teacher, at(batch(), progress))["pad"].backward()
        assert bool(method.log_variance[0].weight.grad.any()) is learns


def test_a_weight_of_zero_leaves_its_term_and_its_modules_out(student, teacher, data, batch):
    method = PAD(pad=0).assemble(student, teacher, data())
    assert method.loss(student, teacher, batch()).keys() == {"ce"}
    assert not list(method.parameters())


def test_a_bad_keyword_is_the_users_error():
    with pytest.raises(UserError, match="warmup=20"):
        PAD(warmup=20)
