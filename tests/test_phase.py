"""The phase before training."""

import torch
from torch import nn

from kdzoo import Batch
from kdzoo.phase import fit


def batches(*values):
    """Batches whose first image has these numbers in each channel and place."""
    return [Batch.of(torch.full((1, 3, 1, 1), value), torch.tensor([0]), 2) for value in values]


def by_hand(weight, values, epochs, lr):
    """SGD with momentum 0.9 and weight decay 5e-4 on (weight - value)^2."""
    velocity = 0.0
    for value in values * epochs:
        velocity = 0.9 * velocity + 2 * (weight - value) + 5e-4 * weight
        weight -= lr * velocity
    return weight


def test_parameters_follow_sgd_over_the_batches_again_and_again():
    weight = nn.Parameter(torch.tensor(3.0, dtype=torch.float64))
    fit([weight], lambda batch: (weight - batch.images[0, 0, 0, 0]).square(), batches(1.0, 2.0), epochs=3, lr=0.1)
    torch.testing.assert_close(weight.item(), by_hand(3.0, [1.0, 2.0], 3, 0.1))
    assert weight.item() != by_hand(3.0, [1.0, 2.0], 2, 0.1)
    assert weight.grad is None


def test_what_the_loss_does_not_read_stays_and_so_does_what_is_frozen():
    read, unread, frozen = (nn.Parameter(torch.tensor(3.0)) for _ in range(3))
    frozen.requires_grad_(False)
    fit([read, unread, frozen], lambda batch: (read * frozen).square(), batches(1.0), epochs=2, lr=0.1)
    assert unread.item() == frozen.item() == 3
    assert read.item() != 3


def test_gradients_are_averaged_over_ranks(monkeypatch):
    monkeypatch.setattr("kdzoo.phase.all_sum", lambda tensor: tensor + torch.full_like(tensor, 1.0))
    weight = nn.Parameter(torch.tensor(3.0))
    fit([weight], lambda batch: 5 * weight, batches(1.0), epochs=1, lr=0.1)
    # Two ranks, of which the other's gradient is 1: all_sum counts it as one rank more.
    torch.testing.assert_close(weight.item(), 3 - 0.1 * ((5 + 1) / 2 + 5e-4 * 3))


def test_gradients_are_cut_to_a_length_of_five_together():
    long, short = (nn.Parameter(torch.zeros(2)) for _ in range(2))
    fit([long, short], lambda batch: (long * 30 + short * 40).sum(), batches(1.0), epochs=1, lr=0.1)
    for weight, share in ((long, 3 / 5), (short, 4 / 5)):
        torch.testing.assert_close(weight.data, torch.full((2,), -0.1 * 5 * share / 2**0.5))
    small = nn.Parameter(torch.zeros(1))
    fit([small], lambda batch: 4 * small.sum(), batches(1.0), epochs=1, lr=0.1)
    torch.testing.assert_close(small.item(), -0.4)


def test_a_loss_that_would_diverge_stays_finite():
    weight, plain = (nn.Parameter(torch.tensor(1.0)) for _ in range(2))
    fit([weight], lambda batch: 1e3 * weight.square(), batches(1.0), epochs=200, lr=0.1)
    assert weight.isfinite()
    without = torch.optim.SGD([plain], lr=0.1, momentum=0.9, weight_decay=5e-4)
    for _ in range(200):
        without.zero_grad()
        (1e3 * plain.square()).backward()
        without.step()
    assert not plain.isfinite()
