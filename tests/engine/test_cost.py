"""What a student costs: operations that one can count by hand, and latency that disturbs nothing."""

import pytest
import torch
from torch import nn

from kdzoo import models
from kdzoo.distiller import DataSpec
from kdzoo.engine import cost
from kdzoo.outputs import Output

SIDE, CLASSES, CPU = 8, 5, torch.device("cpu")


class Bare(nn.Module):
    """One convolution, one attention and one linear layer, shown as networks show themselves."""

    def __init__(self, fewest=1):
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 4, 3, padding=1), nn.Linear(4, CLASSES)
        self.attention = nn.MultiheadAttention(4, 1, batch_first=True)
        self.fewest, self.seen = fewest, []

    def forward(self, images):
        self.seen.append((len(images), self.training))
        if len(images) < self.fewest:
            raise ValueError("too few images")
        tokens = self.conv(images).flatten(2).transpose(1, 2)
        tokens, _ = self.attention(tokens, tokens, tokens, need_weights=False)
        embedding = tokens.mean(1)
        return Output(self.head(embedding), embedding)


def test_operations_are_those_of_one_image_with_an_addition_for_each_product():
    found = cost.measure(Bare(), SIDE, CPU)
    positions = SIDE**2
    conv, head = positions * 3 * 4 * 9, 4 * CLASSES
    attention = positions * 4 * 12 + 2 * positions**2 * 4 + positions * 4 * 4
    assert found.flops == 2 * (conv + attention + head)
    assert found.latency_1 > 0
    assert found.latency_64 > 0


def test_a_network_is_left_as_it_was():
    network = Bare()
    network.head.eval()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    cost.measure(network, SIDE, CPU)
    assert torch.equal(torch.rand(2), expected)
    assert (network.training, network.conv.training, network.head.training) == (True, True, False)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert all(parameter.grad is None for parameter in network.parameters())
    assert {training for _, training in network.seen} == {False}
    assert {count for count, _ in network.seen} == {1, 64}


@pytest.mark.parametrize("fewest", [1, 3])
def test_a_batch_passes_once_to_warm_up_and_then_as_often_as_it_must(monkeypatch, fewest):
    monkeypatch.setattr(cost, "FEWEST", fewest)
    monkeypatch.setattr(cost, "SECONDS", 0.0)
    network = Bare()
    cost.measure(network, SIDE, CPU)
    assert [count for count, _ in network.seen].count(64) == 1 + fewest


def test_what_a_network_cannot_do_is_left_out():
    found = cost.measure(Bare(fewest=2), SIDE, CPU)
    assert (found.flops, found.latency_1) == (None, None)
    assert found.latency_64 > 0
    assert cost.measure(Bare(fewest=99), SIDE, CPU) == (None, None, None)


def test_a_convolutional_network_costs_four_times_as_much_at_twice_the_side():
    def flops(side):
        spec = DataSpec("any", 10, tuple("0123456789"), side, torch.arange(10))
        return cost.measure(models.create("resnet8", spec), side, CPU).flops

    assert flops(32) == pytest.approx(4 * flops(16), rel=0.01)
