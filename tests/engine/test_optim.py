"""Rates follow the recipe, and every parameter is trained once, decayed or not as the recipe says."""

from copy import deepcopy
from itertools import pairwise, permutations

import numpy as np
import pytest
import timm
import torch
import torchvision
from torch import nn

from kdzoo.engine.optim import POLYNOMIALS, Muon, Optimizer, learning_rate, orthogonal, parameter_groups
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


def test_a_cosine_never_raises_a_rate_that_is_below_its_minimum():
    protocol = Protocol(epochs=10, schedule="cosine", warmup=2, min_lr=0.01)
    rates = [learning_rate(protocol, 0.001, step, steps_per_epoch=10) for step in range(101)]
    assert rates[20:] == [0.001] * 81


class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.hidden = nn.Linear(4, 4)
        self.norm = nn.LayerNorm(4)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([Mlp(), Mlp()])
        self.stem = nn.Conv2d(3, 4, 1)
        self.head = nn.Linear(4, 2)
        self.tied = self.head
        self.frozen = nn.Parameter(torch.zeros(2, 2), requires_grad=False)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "muon"])
@pytest.mark.parametrize("decay_norms", [True, False])
def test_no_trainable_parameter_is_left_out_or_taken_twice(optimizer, decay_norms):
    network = Block()
    built = Optimizer(network, Protocol(optimizer=optimizer, decay_norms=decay_norms))
    taken = [p for part in built.optimizers for group in part.param_groups for p in group["params"]]
    trainable = [p for p in network.parameters() if p.requires_grad]
    assert sorted(map(id, taken)) == sorted(map(id, trainable))


def test_norms_and_biases_are_undecayed_where_the_recipe_says_so():
    network = Block()
    plain = parameter_groups(network, Protocol(decay_norms=False))["plain"]
    assert {id(p) for p in plain} == {id(p) for p in network.parameters() if p.ndim < 2}
    assert not parameter_groups(network, Protocol(decay_norms=True))["plain"]


def matrices_of(network):
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    return {names[id(matrix)] for matrix in parameter_groups(network, Protocol(optimizer="muon"))["matrices"]}


def test_muon_takes_the_blocks_matrices_and_nothing_else():
    assert matrices_of(Block()) == {"blocks.0.hidden.weight", "blocks.1.hidden.weight"}


class Plain(nn.Module):
    """Layers in a row, the last of which is the classifier."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))


def tokens_only():
    layer = nn.TransformerEncoderLayer(8, 2, 16)
    return nn.Sequential(nn.Embedding(5, 8), nn.TransformerEncoder(layer, 2, enable_nested_tensor=False))


@pytest.mark.parametrize(
    ("make", "per_block", "blocks"),
    [
        pytest.param(lambda: timm.create_model("vit_tiny_patch16_224"), 4, 12, id="timm ViT"),
        pytest.param(lambda: timm.create_model("deit_tiny_distilled_patch16_224"), 4, 12, id="two classifiers"),
        pytest.param(lambda: timm.create_model("mixer_s32_224"), 4, 8, id="timm Mixer"),
        pytest.param(lambda: torchvision.models.vit_b_32(), 4, 12, id="torchvision ViT"),
        pytest.param(tokens_only, 4, 2, id="torch's own layers"),
        pytest.param(lambda: timm.create_model("resnet18"), 0, 0, id="convolutions"),
        pytest.param(Plain, 0, 0, id="layers in a row"),
    ],
)
def test_muon_takes_the_same_matrices_of_every_block_and_no_classifier(make, per_block, blocks):
    with torch.device("meta"):
        found = matrices_of(make())
    assert len(found) == per_block * blocks
    assert not [name for name in found if "head" in name or "embed" in name or name.endswith("bias")]


@pytest.mark.parametrize("make", [lambda: timm.create_model("swin_tiny_patch4_window7_224"), torchvision.models.swin_t])
def test_muon_takes_a_swins_matrices_however_it_spells_its_paths_but_no_table_of_positions(make):
    with torch.device("meta"):
        network = make()
    found = matrices_of(network)
    assert len(found) == 12 * 4 + 3  # the three merge patches between two stages
    tables = [name for name, parameter in network.named_parameters() if "table" in name and parameter.ndim == 2]
    assert tables
    assert not found & set(tables)


def orthogonalised(matrix):
    """Three steps of Polar Express in float64, by numpy, on the singular values alone."""
    left, values, right = np.linalg.svd(matrix.double().numpy(), full_matrices=False)
    values = values / np.linalg.norm(values)
    for a, b, c in POLYNOMIALS:
        values = a * values + b * values**3 + c * values**5
    return torch.from_numpy(left @ np.diag(values) @ right)


@pytest.mark.parametrize("shape", [(6, 24), (24, 6), (8, 8)])
def test_muon_steps_along_momentum_made_orthogonal(shape):
    torch.manual_seed(0)
    before, gradients = torch.randn(shape), torch.randn(2, *shape)
    matrix = nn.Parameter(before.clone())
    muon = Muon([matrix], lr=0.1, weight_decay=0.5, momentum=0.9)
    expected, momentum = before.double(), torch.zeros(shape).double()
    for gradient in gradients:
        matrix.grad = gradient
        muon.step()
        momentum = 0.9 * momentum + 0.1 * gradient
        direction = orthogonalised(0.1 * gradient + 0.9 * momentum)
        expected = (1 - 0.1 * 0.5) * expected - 0.1 * 0.2 * max(shape) ** 0.5 * direction
    torch.testing.assert_close(matrix.detach().double(), expected, atol=1e-5, rtol=0)


def test_matrices_may_step_by_turns_and_farther():
    torch.manual_seed(0)
    before, gradient = torch.randn(2, 4, 4), torch.randn(4, 4)
    moved = {}
    for every in (1, 2):
        matrices = [nn.Parameter(matrix.clone()) for matrix in before]
        muon = Muon(matrices, lr=0.1, weight_decay=0, momentum=0, every=every)
        for _ in range(2):
            for matrix in matrices:
                matrix.grad = gradient
            muon.step()
            moved.setdefault(every, []).append(
                [(matrix - old).norm().item() for matrix, old in zip(matrices, before, strict=True)]
            )
    one_step = moved[1][0][0]
    assert moved[1] == [pytest.approx([one_step] * 2), pytest.approx([2 * one_step] * 2)]
    assert moved[2] == [pytest.approx([0, 2**0.5 * one_step]), pytest.approx([2**0.5 * one_step] * 2)]


@pytest.mark.parametrize("shape", [(64, 256), (256, 64), (128, 128)])
def test_singular_values_from_a_hundredth_upwards_come_between_a_tenth_and_two(shape):
    torch.manual_seed(0)
    left, _, right = torch.linalg.svd(torch.randn(shape), full_matrices=False)
    values = torch.linalg.svdvals(orthogonal(left @ torch.diag(torch.logspace(0, -2, min(shape))) @ right))
    assert values.min() > 0.1
    assert values.max() < 2
    assert torch.isfinite(orthogonal(torch.zeros(shape))).all()


def test_a_matrix_without_a_gradient_stays():
    matrix = nn.Parameter(torch.ones(4, 4))
    Muon([matrix], lr=0.1, weight_decay=0.5).step()
    assert torch.equal(matrix, torch.ones(4, 4))


def test_a_step_uses_the_rate_it_is_given_and_clips():
    network = nn.Linear(2, 1, bias=False)
    before = network.weight.detach().clone()
    built = Optimizer(network, Protocol(optimizer="sgd", momentum=0, weight_decay=0, clip=1.0))
    (network(torch.tensor([[300.0, 400.0]])) * 1.0).sum().backward()
    built.set_rate(0.5)
    built.step()
    assert torch.allclose(before - network.weight, torch.tensor([[0.3, 0.4]]), atol=1e-5)
    assert network.weight.grad is None


@pytest.mark.parametrize(("optimizer", "every"), [("adamw", 1), ("muon", 1), ("muon", 2)])
def test_restored_moments_go_on_with_the_same_bits(optimizer, every):
    def steps(optimizer, network, count):
        for _ in range(count):
            for block in network.blocks:
                block.hidden(torch.ones(1, 4)).square().sum().backward()
            optimizer.set_rate(0.1)
            optimizer.step()

    protocol = Protocol(optimizer=optimizer, muon_every=every)
    torch.manual_seed(0)
    one, other, forgetful = Block(), Block(), Block()
    first, second, third = (Optimizer(network, protocol) for network in (one, other, forgetful))
    steps(first, one, 3)  # in the middle of a turn
    for network in (other, forgetful):
        network.load_state_dict(one.state_dict())
    second.load_state_dict(deepcopy(first.state_dict()))
    steps(first, one, 2)
    steps(second, other, 2)
    steps(third, forgetful, 2)
    assert torch.equal(one.blocks[0].hidden.weight, other.blocks[0].hidden.weight)
    assert not torch.equal(one.blocks[0].hidden.weight, forgetful.blocks[0].hidden.weight)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_weights_with_their_channels_last_step_with_the_same_bits_and_without_a_copy(optimizer):
    protocol = Protocol(optimizer=optimizer, lr=0.1, decay_norms=False)
    made = nn.Sequential(nn.Conv2d(6, 8, 3), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 4, (1, 3), groups=2), nn.BatchNorm2d(4))
    found = []
    for layout in (torch.contiguous_format, torch.channels_last):
        network = deepcopy(made).to(memory_format=layout)
        stepper, draw = Optimizer(network, protocol), torch.Generator().manual_seed(0)
        for step in range(5):
            for index, p in enumerate(network.parameters()):
                slope = torch.randn(p.shape, generator=draw)
                # Of any layout, and not of every weight each time.
                p.grad = None if index == step else torch.empty_like(p).copy_(slope) if step % 2 else slope
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], acc_events=True) as profile:
                stepper.step()
            copied = "aten::clone" in [event.name for event in profile.events()]
            assert copied == (layout == torch.channels_last and step % 2 == 0)
            assert {p.grad for p in network.parameters()} == {None}
        saved = stepper.state_dict()
        stepper = Optimizer(network, protocol)
        stepper.load_state_dict(saved)
        for p in network.parameters():
            p.grad = torch.ones_like(p)
        stepper.step()
        found.append(network.state_dict())
    for one, other in zip(found[0].values(), found[1].values(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("layouts", [*permutations([torch.contiguous_format, torch.channels_last])])
def test_moments_go_on_where_weights_lie_in_another_order_as_on_another_device(optimizer, layouts):
    protocol = Protocol(optimizer=optimizer, lr=0.1)
    torch.manual_seed(0)
    kept = nn.Conv2d(6, 8, 3).to(memory_format=layouts[0])
    stepper, slopes = Optimizer(kept, protocol), torch.randn(3, 8, 6, 3, 3)

    def advance(layer, one, step):  # by gradients that are the same in any layout, as those of passes are not
        layer.weight.grad = torch.empty_like(layer.weight).copy_(slopes[step])
        layer.bias.grad = slopes[step, :, 0, 0, 0].clone()
        one.step()

    for step in range(2):
        advance(kept, stepper, step)
    moved = deepcopy(kept).to(memory_format=layouts[1])
    continued = Optimizer(moved, protocol)
    continued.load_state_dict(deepcopy(stepper.state_dict()))
    for layer, one in ((kept, stepper), (moved, continued)):
        advance(layer, one, 2)
    torch.testing.assert_close(moved.weight, kept.weight)
    saved = stepper.state_dict()
    assert {value.shape for of in saved[0]["state"].values() for value in of.values()} - {()} == {(8, 6, 3, 3), (8,)}
    with pytest.raises(ValueError, match="for a weight of shape"):
        Optimizer(nn.Conv2d(4, 8, 3), protocol).load_state_dict(saved)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_weights_that_were_exchanged_for_others_are_those_that_step(optimizer):
    found = []
    for layout in (torch.contiguous_format, torch.channels_last):
        torch.manual_seed(0)
        layer = nn.Conv2d(6, 8, 3, bias=False).to(memory_format=layout)
        stepper = Optimizer(layer, Protocol(optimizer=optimizer, lr=0.1))
        for given in (torch.contiguous_format, layout):
            layer.weight.data = torch.randn(8, 6, 3, 3).contiguous(memory_format=given)
            for _ in range(2):
                layer(torch.randn(2, 6, 5, 5)).square().sum().backward()
                stepper.step()
            found.append(layer.weight.detach().clone())
    for one, other in (found[::2], found[1::2]):
        torch.testing.assert_close(one, other)


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
    built.set_rate(0.5)
    built.step()
    assert torch.allclose(before - network.weight, torch.tensor([[0.5, 1.0]]))


def test_only_muon_takes_its_rate_from_the_host():
    assert Optimizer(Block(), Protocol(optimizer="sgd")).host_bound is None
    assert Optimizer(Block(), Protocol(optimizer="adamw")).host_bound is None
    assert "Muon" in (Optimizer(Block(), Protocol(optimizer="muon")).host_bound or "")


@pytest.mark.parametrize("name", ["sgd", "adamw", "muon"])
def test_a_parameter_may_get_its_first_gradient_late_also_after_a_restore(name):
    protocol = Protocol(optimizer=name, lr=0.1, schedule="constant", weight_decay=0.0)

    def trained(restore: bool) -> list[torch.Tensor]:
        torch.manual_seed(0)
        early, late = nn.Linear(3, 2), nn.Linear(3, 2)
        both = nn.ModuleList([early, late])
        optimizer = Optimizer(both, protocol)
        for step in range(4):
            if restore and step == 2:
                state, optimizer = deepcopy(optimizer.state_dict()), Optimizer(both, protocol)
                optimizer.load_state_dict(state)
            used = [early, late] if step >= 2 else [early]
            sum(module(torch.ones(1, 3)).square().sum() for module in used).backward()
            optimizer.set_rate(0.1)
            optimizer.step()
        return [p.detach().clone() for p in both.parameters()]

    whole, restored = trained(False), trained(True)
    assert all(torch.equal(one, other) for one, other in zip(whole, restored, strict=True))
    # The late one's two steps are those that it would take alone.
    torch.manual_seed(0)
    _, late = nn.Linear(3, 2), nn.Linear(3, 2)
    optimizer = Optimizer(late, protocol)
    for _ in range(2):
        late(torch.ones(1, 3)).square().sum().backward()
        optimizer.set_rate(0.1)
        optimizer.step()
    torch.testing.assert_close(whole[2:], [p.detach() for p in late.parameters()], rtol=1e-6, atol=1e-7)
