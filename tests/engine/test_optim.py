"""Rates follow the recipe, and every parameter is trained once, decayed or not as the recipe says."""

from copy import deepcopy
from itertools import pairwise

import pytest
import torch
from torch import nn

from kdzoo.engine.optim import Optimizer, learning_rate, parameter_groups
from kdzoo.recipe import Protocol


def test_steps_multiply_the_rate_after_each_milestone():
    protocol = Protocol(epochs=10, schedule="step", milestones=(4, 8), gamma=0.1)
    rates = [learning_rate(protocol, 1.0, step, steps_per_epoch=3) for step in range(30)]
    assert rates[:12] == [1.0] * 12
    assert rates[12:24] == pytest.approx([0.1] * 12)
    assert rates[24:] == pytest.approx([0.01] * 6)


def test_a_cosine_ends_at_its_minimum_after_a_linear_warm_up():
    protocol = Protocol(epochs=10, schedule="cosine", warmup=2, min_lr=0.01)
    rates = [learning_rate(protocol, 1.0, step, steps_per_epoch=10) for step in range(101)]
    rises = [after - before for before, after in pairwise(rates[:20])]
    assert rises == pytest.approx([rises[0]] * 19)
    assert rates[20] == pytest.approx(1.0)
    assert rates[60] == pytest.approx(0.505)
    assert rates[100] == pytest.approx(0.01)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(4, 4), nn.LayerNorm(4)])
        self.stem = nn.Conv2d(3, 4, 1)
        self.head = nn.Linear(4, 2)
        self.tied = self.head
        self.frozen = nn.Parameter(torch.zeros(2, 2), requires_grad=False)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "muon"])
@pytest.mark.parametrize("decay_norms", [True, False])
def test_no_trainable_parameter_is_left_out_or_taken_twice(optimizer, decay_norms):
    network = Block()
    built = Optimizer(network, Protocol(optimizer=optimizer, decay_norms=decay_norms))
    taken = [p for part in built.parts for group in part.param_groups for p in group["params"]]
    trainable = [p for p in network.parameters() if p.requires_grad]
    assert sorted(map(id, taken)) == sorted(map(id, trainable))


def test_norms_and_biases_are_undecayed_where_the_recipe_says_so():
    network = Block()
    plain = parameter_groups(network, Protocol(decay_norms=False))["plain"]
    assert {id(p) for p in plain} == {id(p) for p in network.parameters() if p.ndim < 2}
    assert not parameter_groups(network, Protocol(decay_norms=True))["plain"]


def test_muon_takes_the_blocks_matrices_and_nothing_else():
    network = Block()
    groups = parameter_groups(network, Protocol(optimizer="muon"))
    assert [id(p) for p in groups["matrices"]] == [id(network.blocks[0].weight)]


def test_a_step_uses_the_rate_it_is_given_and_clips():
    network = nn.Linear(2, 1, bias=False)
    before = network.weight.detach().clone()
    built = Optimizer(network, Protocol(optimizer="sgd", momentum=0, weight_decay=0, clip=1.0))
    (network(torch.tensor([[300.0, 400.0]])) * 1.0).sum().backward()
    built.step(rate=0.5)
    assert torch.allclose(before - network.weight, torch.tensor([[0.3, 0.4]]), atol=1e-5)
    assert network.weight.grad is None


def test_restored_moments_go_on_with_the_same_bits():
    def steps(optimizer, network, count):
        for _ in range(count):
            network(torch.ones(1, 3, 2, 2)).square().sum().backward()
            optimizer.step(0.1)

    class Net(nn.Sequential):
        pass

    protocol = Protocol(optimizer="adamw")
    torch.manual_seed(0)
    one = Net(nn.Conv2d(3, 4, 1))
    first = Optimizer(one, protocol)
    steps(first, one, 2)
    other = Net(nn.Conv2d(3, 4, 1))
    other.load_state_dict(one.state_dict())
    second = Optimizer(other, protocol)
    second.load_state_dict(deepcopy(first.state_dict()))
    steps(first, one, 2)
    steps(second, other, 2)
    assert torch.equal(one[0].weight, other[0].weight)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_rate_in_a_tensor_leaves_the_bits_that_a_number_leaves(optimizer):
    torch.manual_seed(0)
    network = nn.Linear(7, 5)
    plain = deepcopy(network)
    built = Optimizer(network, Protocol(optimizer=optimizer, weight_decay=0.05, lr=0.3))
    if optimizer == "sgd":
        theirs = torch.optim.SGD(plain.parameters(), lr=0.3, momentum=0.9, weight_decay=0.05, fused=True)
    else:
        theirs = torch.optim.AdamW(plain.parameters(), lr=0.3, weight_decay=0.05, fused=True)
    for rate in (0.3, 0.0123, 1 / 3):
        for one in (network, plain):
            one(torch.ones(2, 7)).square().sum().backward()
        built.set_rate(rate)
        built.step()
        theirs.param_groups[0]["lr"] = rate
        theirs.step()
        theirs.zero_grad()
        assert torch.equal(network.weight, plain.weight)


def test_the_rate_follows_the_schedule_after_a_restore_too():
    network = nn.Linear(2, 1, bias=False)
    protocol = Protocol(optimizer="sgd", momentum=0, weight_decay=0, lr=0.1)
    built = Optimizer(network, protocol)
    built.load_state_dict(deepcopy(built.state_dict()))
    before = network.weight.detach().clone()
    network(torch.tensor([[1.0, 2.0]])).sum().backward()
    built.step(rate=0.5)
    assert torch.allclose(before - network.weight, torch.tensor([[0.5, 1.0]]))


def test_only_muon_takes_its_rate_from_the_host():
    assert Optimizer(Block(), Protocol(optimizer="sgd")).host_bound is None
    assert Optimizer(Block(), Protocol(optimizer="adamw")).host_bound is None
    assert "Muon" in (Optimizer(Block(), Protocol(optimizer="muon")).host_bound or "")
