"""Neuron selectivity transfer."""

import numpy as np
import pytest
import torch
from kdzoo.distillers.nst import NST, channel_discrepancy
from torch.nn import functional as F

from kdzoo.errors import UserError

FEW_POSITIONS, MANY_POSITIONS = (3, 2), (5, 4)  # either side of what 5 and 7 channels are compared as


def discrepancy(f_s, f_t):
    """The squared MMD, pair of channels by pair of channels."""
    values = []
    for maps in zip(f_s, f_t, strict=True):
        s, t = (m.reshape(len(m), -1) / np.linalg.norm(m.reshape(len(m), -1), axis=1, keepdims=True) for m in maps)
        mean = [np.mean([[(x @ y) ** 2 for x in a] for y in b]) for a, b in ((s, s), (t, t), (s, t))]
        values.append(mean[0] + mean[1] - 2 * mean[2])
    return np.mean(values)


@pytest.mark.parametrize("grid", [FEW_POSITIONS, MANY_POSITIONS])
def test_the_loss_is_the_squared_mmd_of_channels_under_the_polynomial_kernel(waves, grid):
    f_s, f_t = waves(3, 5, *grid, dtype=torch.float64), waves(3, 7, *grid, phase=1.0, dtype=torch.float64)
    expected = discrepancy(f_s.numpy(), f_t.numpy())
    assert channel_discrepancy(f_s, f_t).item() == pytest.approx(expected, rel=1e-9)


def test_the_term_is_the_sum_of_stages_on_their_common_grids(student, teacher, data, batch):
    term = NST(nst=10.0, stages=(0, 2)).assemble(student, teacher, data()).loss(student, teacher, batch())["nst"]
    expected = 0.0
    for stage, side in ((0, 7), (2, 4)):
        pair = (F.adaptive_avg_pool2d(o.features[stage].detach().double(), side).numpy() for o in (student, teacher))
        expected += 10 * discrepancy(*pair)
    assert term.item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("grid", [FEW_POSITIONS, MANY_POSITIONS])
def test_channels_may_come_in_any_order_size_sign_and_number_of_copies(waves, grid):
    f_s, f_t = waves(3, 5, *grid), waves(3, 7, *grid, phase=1.0)
    loss = channel_discrepancy(f_s, f_t)
    for other in (f_s.flip(1), 3 * f_s, -f_s, f_s.repeat(1, 2, 1, 1)):
        torch.testing.assert_close(channel_discrepancy(other, f_t), loss, rtol=1e-4, atol=1e-6)
    assert (channel_discrepancy(f_s.flip(2), f_t) - loss).abs() > 1e-3
    assert channel_discrepancy(f_s.repeat(1, 2, 1, 1), f_s).abs() < 1e-6


@pytest.mark.parametrize("grid", [FEW_POSITIONS, MANY_POSITIONS])
def test_the_gradient_is_that_of_the_loss_and_zero_for_channels_that_are(waves, grid):
    f_s = waves(2, 5, *grid, dtype=torch.float64)
    f_t = waves(2, 7, *grid, phase=1.0, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda maps: channel_discrepancy(maps, f_t), f_s.requires_grad_())
    dead = f_s.detach().clone()
    dead[:, 2] = 0
    channel_discrepancy(dead.requires_grad_(), f_t).backward()
    assert torch.equal(dead.grad[:, 2], torch.zeros_like(dead.grad[:, 2]))
    assert dead.grad[:, 1].abs().sum() > 0


@pytest.mark.parametrize("constant", [0.0, 1.0])
def test_gradients_are_finite_for_constant_maps(output, teacher, data, batch, constant):
    student = output(constant=constant)
    NST().assemble(student, teacher, data()).loss(student, teacher, batch())["nst"].backward()
    assert all(f.grad.isfinite().all() for f in student.features[1:])


def test_every_stage_of_the_student_gets_a_gradient(student, teacher, data, batch):
    NST().assemble(student, teacher, data()).loss(student, teacher, batch())["nst"].backward()
    assert all(f.grad.abs().sum() > 0 for f in student.features[1:])


def test_a_weight_of_zero_leaves_its_term_out(student, teacher, data, batch):
    method = NST(nst=0).assemble(student, teacher, data())
    assert method.loss(student, teacher, batch()).keys() == {"ce"}
    assert not method.needs.features
    assert NST(ce=0).assemble(student, teacher, data()).loss(student, teacher, batch()).keys() == {"nst"}


def test_a_stage_that_does_not_exist_is_the_users_error(student, teacher, data):
    with pytest.raises(UserError, match="stages"):
        NST(stages=(4,)).assemble(student, teacher, data())
