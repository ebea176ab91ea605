"""Correlation congruence in the authors' form."""

import numpy as np
import pytest
import torch
from kdzoo.distillers.cc import CC, correlation_loss

from kdzoo.errors import UserError


def correlation(e_s, e_t):
    gap = np.abs(e_s - e_t)
    return np.mean([gap[i] @ gap[i + 1] for i in range(len(gap) - 1)])


def test_the_loss_is_the_mean_product_of_gaps_that_follow_each_other(waves):
    e_s, e_t = waves(5, 4, dtype=torch.float64), waves(5, 4, phase=1.0, dtype=torch.float64)
    expected = correlation(e_s.numpy(), e_t.numpy())
    assert correlation_loss(e_s, e_t).item() == pytest.approx(expected, rel=1e-9)


def test_the_term_embeds_both_networks(student, teacher, data, batch):
    method = CC(cc=0.5, width=7).assemble(student, teacher, data())
    embedded = []
    for output, layer in ((student, method.embed_s), (teacher, method.embed_t)):
        weight, bias = (p.detach().double().numpy() for p in (layer.weight, layer.bias))
        embedded.append(output.embedding.detach().double().numpy() @ weight.T + bias)
    term = method.loss(student, teacher, batch())["cc"]
    assert term.item() == pytest.approx(0.5 * correlation(*embedded), rel=1e-5)
    term.backward()
    assert all(p.grad.abs().sum() > 0 for p in method.parameters())
    assert student.embedding.grad.abs().sum() > 0


def test_the_batch_may_be_read_backwards_and_in_no_third_order(waves):
    e_s, e_t = waves(5, 4), waves(5, 4, phase=1.0)
    loss = correlation_loss(e_s, e_t)
    torch.testing.assert_close(correlation_loss(e_s.flip(0), e_t.flip(0)), loss)
    assert (correlation_loss(e_s[[2, 0, 3, 1, 4]], e_t[[2, 0, 3, 1, 4]]) - loss).abs() > 0.01


def test_the_networks_are_exchangeable_and_gaps_that_never_meet_cost_nothing(waves):
    e_s, e_t = waves(5, 4), waves(5, 4, phase=1.0)
    torch.testing.assert_close(correlation_loss(e_t, e_s), correlation_loss(e_s, e_t))
    gaps = torch.eye(4)
    assert correlation_loss(e_s[:4] + gaps, e_s[:4]) < 1e-6
    assert correlation_loss(e_s[:4] + gaps[[0, 0, 1, 1]], e_s[:4]) > 0.5


def test_one_image_has_no_neighbour(waves):
    assert correlation_loss(waves(1, 4), waves(1, 4, phase=1.0)) == 0


def test_a_weight_of_zero_leaves_its_term_and_its_modules_out(student, teacher, data, batch):
    method = CC(cc=0).assemble(student, teacher, data())
    assert method.loss(student, teacher, batch()).keys() == {"ce"}
    assert not list(method.parameters())
    assert CC(ce=0).assemble(student, teacher, data()).loss(student, teacher, batch()).keys() == {"cc"}
    assert not CC.needs.features


def test_a_width_of_zero_is_the_users_error(student, teacher, data):
    with pytest.raises(UserError, match="width=0"):
        CC(width=0).assemble(student, teacher, data())
