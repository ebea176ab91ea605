"""Convolutions learn the same by what is fastest for their maps, no matter what memory held before."""

import copy
import os
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from kdzoo.models import convolutions, learn_on_cpu, wrap
from kdzoo.models.convolutions import LearningConv2d

PADDED = {"kernel_size": 3, "stride": 2, "padding": 1}
LAYERS = {
    "3x3": PADDED,
    "5x5, stride 3": {"kernel_size": 5, "stride": 3, "padding": 2},
    "in groups": {**PADDED, "groups": 2},
    "without a bias": {**PADDED, "bias": False},
    "padded by 2 and 1": {**PADDED, "kernel_size": (5, 3), "padding": (2, 1)},
    "dilated": {**PADDED, "padding": 2, "dilation": 2},
}


def layer(kind):
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(16, 16, **LAYERS[kind]))


def slopes(network, maps, dtype):
    """The gradients of weight, bias and maps, computed where memory holds NaN."""
    maps = maps.clone().requires_grad_()
    for size in (64, 256, 1000, 4000, 16000, 64000):
        torch.full((size,), torch.nan)
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        found = network(maps)
    return found, torch.autograd.grad(found.float().square().sum(), [*network.parameters(), maps])


def learned(changed, exact, maps, dtype):
    """The outputs and gradients of a layer, which are those of float64 but for rounding."""
    found, gradients = slopes(changed, maps, dtype)
    wanted, expected = slopes(exact, maps.double(), torch.float32)
    assert found.dtype == dtype
    tolerance = 1e-5 if dtype == torch.float32 else 0.02
    for one, other in zip((found, *gradients), (wanted, *expected), strict=True):
        assert (one - other).norm() <= tolerance * other.norm()
    return found, gradients


@pytest.mark.parametrize("shape", [(1, 1), (2, 1), (1, 2), (4, 4), (3, 2)])
@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("watched", [True, False])
def test_gradients_on_narrow_maps_are_those_of_float32_but_for_rounding(kind, shape, watched):
    plain, changed = layer(kind), layer(kind)
    if watched:  # and in evaluation mode, as a part of a network may be that learns
        changed.eval()[0].register_forward_hook(lambda module, inputs, output: None)
    learn_on_cpu(changed)
    assert changed.state_dict().keys() == plain.state_dict().keys()
    maps = torch.rand(8, 16, *shape)
    outputs, expected = slopes(plain, maps, torch.float32)
    torch.testing.assert_close(outputs, changed(maps))
    for _ in range(3):
        found, gradients = slopes(changed, maps, torch.bfloat16)
        torch.testing.assert_close(found.float(), outputs, rtol=0.05, atol=0.05)
        for one, other in zip(gradients, expected, strict=True):
            assert (one - other).norm() <= 0.05 * other.norm()


class Own(nn.Conv2d):
    """May do more with its weight."""


def test_other_layers_stay_what_they_are():
    network = nn.Sequential(Own(3, 3, 3), nn.Conv2d(3, 3, 3, padding=1, padding_mode="reflect"))
    kinds = [type(module) for module in network]
    learn_on_cpu(network)
    assert [type(module) for module in network] == kinds


class Typed(nn.Module):
    """Does more where a layer is of torch's own type."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(*(nn.Conv2d(one, 8, 3, 2, 1) for one in (3, 8, 8, 8)), nn.Flatten())
        self.head = nn.Linear(8, 5)

    def forward(self, maps):
        for layer in self.layers:
            maps = layer(maps).relu() if type(layer) is nn.Conv2d else layer(maps)
        return self.head(maps)


def test_a_network_that_asks_for_the_types_of_its_layers_computes_the_same():
    network, images = wrap(Typed(), image_size=16, num_classes=5), torch.rand(4, 3, 16, 16)
    before = network(images).logits
    learn_on_cpu(network)
    assert torch.equal(network(images).logits, before)
    assert network.training


SMALL = {
    "3x3": {"kernel_size": 3, "padding": 1},
    "3x3, stride 2": {"kernel_size": 3, "stride": 2, "padding": 1},
    "3x5, stride 2 and 1, padded by 2 and 0": {"kernel_size": (3, 5), "stride": (2, 1), "padding": (2, 0)},
    "1x1": {"kernel_size": 1},
    "1x1, stride 2, without a bias": {"kernel_size": 1, "stride": 2, "bias": False},
    "4x4, stride 4": {"kernel_size": 4, "stride": 4},
}


@pytest.fixture
def products(monkeypatch):
    """The layers that learn by one product of matrices, in the order of their passes."""
    found, product = [], LearningConv2d._as_one_product

    def noted(layer, maps):
        found.append(layer)
        return product(layer, maps)

    monkeypatch.setattr(LearningConv2d, "_as_one_product", noted)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    return found


@pytest.fixture
def narrow(monkeypatch):
    """Narrow layers gain too, so that tests are quick."""
    monkeypatch.setattr(convolutions, "MOST_COLUMNS", 1000)
    monkeypatch.setattr(convolutions, "LEAST_WIDTH", dict.fromkeys(convolutions.LEAST_WIDTH, 6))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", SMALL)
@pytest.mark.usefixtures("narrow")
def test_small_maps_are_learned_from_with_the_gradients_of_float64(products, kind, dtype, layout):
    torch.manual_seed(1)
    plain = nn.Sequential(nn.Conv2d(6, 7, **SMALL[kind])).to(memory_format=layout)
    changed, exact = copy.deepcopy(plain), copy.deepcopy(plain).double()
    learn_on_cpu(changed)
    maps = torch.randn(5, 6, 4, 7).contiguous(memory_format=layout)
    found, gradients = learned(changed, exact, maps, dtype)
    assert products == [changed[0]]
    assert found.is_contiguous(memory_format=torch.channels_last)
    if layout == torch.channels_last:
        assert gradients[0].is_contiguous(memory_format=torch.channels_last)  # as the weight that it is added to


SEPARATE = {
    "3x3": {"kernel_size": 3, "padding": 1},
    "3x3, stride 2": {"kernel_size": 3, "stride": 2, "padding": 1},
    "3x3, dilated": {"kernel_size": 3, "padding": 2, "dilation": 2},
    "5x5, without a bias": {"kernel_size": 5, "padding": 2, "bias": False},
    "two of each": {"kernel_size": 3, "padding": 1, "out_channels": 16},
}
ALWAYS, NARROW = (2, 3, 9), (2,)  # sides of maps


@pytest.fixture
def apart(monkeypatch):
    """The layers of separate channels that are not left to torch, in the order of their passes."""
    found, compute = [], LearningConv2d._in_float32

    def noted(layer, maps):
        found.append(layer)
        return compute(layer, maps)

    monkeypatch.setattr(LearningConv2d, "_in_float32", noted)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    return found


@pytest.mark.parametrize("side", ALWAYS)
@pytest.mark.parametrize(
    ("dtype", "kind", "sides"),
    [
        (torch.float32, "3x3", NARROW),
        (torch.float32, "3x3, stride 2", NARROW),
        (torch.float32, "two of each", NARROW),
        (torch.float32, "5x5, without a bias", ()),
        (torch.bfloat16, "3x3", NARROW),
        (torch.bfloat16, "3x3, stride 2", ALWAYS),
        (torch.bfloat16, "3x3, dilated", ALWAYS),
        (torch.bfloat16, "5x5, without a bias", ALWAYS),
        (torch.bfloat16, "two of each", ALWAYS),
    ],
)
def test_separate_channels_that_torch_is_slow_at_learn_with_the_gradients_of_float64(apart, dtype, kind, sides, side):
    torch.manual_seed(1)
    plain = nn.Sequential(nn.Conv2d(8, groups=8, **{"out_channels": 8, **SEPARATE[kind]}))
    plain.to(memory_format=torch.channels_last)
    changed, exact = copy.deepcopy(plain), copy.deepcopy(plain).double()
    learn_on_cpu(changed)
    maps = torch.randn(5, 8, side, 7).contiguous(memory_format=torch.channels_last)
    found, _ = learned(changed, exact, maps, dtype)
    assert apart == [changed[0]] * (side in sides)
    assert found.is_contiguous(memory_format=torch.channels_last)
    slopes(changed.eval(), maps, dtype)
    slopes(changed.train().double(), maps.double(), torch.float32)
    assert len(apart) == (side in sides)


@pytest.mark.parametrize(
    ("shape", "kernel", "stride", "padding", "read"),
    [
        ((1, 1), 3, 1, 1, 1),
        ((2, 2), 3, 2, 1, 4),
        ((2, 2), 3, 1, 1, 9),
        ((1, 3), 3, 1, 1, 3),
        ((1, 1), 5, 2, 2, 1),
        ((2, 1), (5, 3), (1, 2), (2, 1), 3),
        ((1, 1), 3, 1, 2, 9),  # the map lies once under each
        ((1, 1), 2, 3, 1, 1),
    ],
)
@pytest.mark.usefixtures("narrow")
def test_what_lies_on_padding_alone_is_not_multiplied(products, shape, kernel, stride, padding, read):
    torch.manual_seed(2)
    plain = nn.Sequential(nn.Conv2d(6, 7, kernel, stride, padding))
    changed, exact = copy.deepcopy(plain), copy.deepcopy(plain).double()
    learn_on_cpu(changed)
    maps = torch.randn(5, 6, *shape)
    with FlopCounterMode(display=False) as counter:
        positions = changed(maps).shape[2:].numel()
    assert counter.get_total_flops() == 2 * 5 * positions * 6 * 7 * read
    learned(changed, exact, maps, torch.float32)
    assert products == [changed[0]] * 2


def test_a_convolution_of_padding_alone_gives_its_bias(products):
    layer = nn.Conv2d(256, 256, 1, stride=3, padding=1)
    fast, maps = copy.deepcopy(layer), torch.rand(2, 256, 1, 1)
    learn_on_cpu(fast)
    assert torch.equal(fast(maps), layer(maps))
    assert products == []


@pytest.mark.parametrize(
    ("dtype", "channels", "kernel", "taken", "left"),
    [
        (torch.float32, 256, 3, (4, 4), (4, 5)),
        (torch.float32, 256, 1, (12, 12), (12, 13)),
        (torch.float32, 255, 3, None, (2, 2)),
        (torch.bfloat16, 128, 3, (4, 4), (4, 5)),
        (torch.bfloat16, 128, 1, (12, 12), (12, 13)),
        (torch.bfloat16, 127, 3, None, (2, 2)),
    ],
)
def test_only_maps_that_were_measured_to_gain_are_small(products, monkeypatch, dtype, channels, kernel, taken, left):
    for instructions in ("AVX2", "AVX512", "DEFAULT"):
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda named=instructions: named)
        layer = nn.Conv2d(channels, 256, kernel, padding=kernel // 2)
        learn_on_cpu(layer)
        for grid in (taken, left):
            if grid is not None:
                products.clear()
                with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                    layer(torch.rand(2, channels, *grid))
                assert bool(products) == (grid == taken and instructions != "DEFAULT")


@pytest.mark.usefixtures("narrow")
def test_what_is_measured_or_kept_is_the_convolution_itself(products):
    layer = nn.Conv2d(8, 8, 3, padding=1)
    fast, maps = copy.deepcopy(layer), torch.rand(2, 8, 2, 2)
    learn_on_cpu(fast)
    with torch.no_grad():
        assert torch.equal(fast(maps), layer(maps))
    assert torch.equal(fast.eval()(maps), layer(maps))
    assert torch.equal(fast.train()(maps[0]), layer(maps[0]))  # an image without a batch
    for others in ({"groups": 2}, {"dilation": 2}, {"padding": "same"}):
        other = nn.Conv2d(8, 8, **{"kernel_size": 3, "padding": 2, **others})
        learned = copy.deepcopy(other)
        learn_on_cpu(learned)
        assert torch.equal(learned(maps), other(maps))
    assert products == []
    fast(maps)
    assert products == [fast]


@pytest.mark.usefixtures("narrow")
def test_maps_without_positions_are_refused_as_ever(products):
    layer = nn.Conv2d(8, 8, 5)
    learn_on_cpu(layer)
    with pytest.raises(RuntimeError, match=r"[Kk]ernel size"):
        layer(torch.rand(2, 8, 2, 2))


@pytest.mark.usefixtures("narrow")
def test_gradients_of_gradients_are_right_and_what_follows_may_write_to_its_maps(products):
    layer = nn.Conv2d(8, 8, 3, padding=1)
    fast, maps = copy.deepcopy(layer), torch.randn(4, 8, 2, 2, requires_grad=True)
    learn_on_cpu(fast)
    found = []
    for module in (layer, fast):
        [slope] = torch.autograd.grad(nn.ReLU(inplace=True)(module(maps)).pow(3).sum(), maps, create_graph=True)
        found.append(torch.autograd.grad(slope.square().sum(), [maps, *module.parameters()]))
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-4 * one.abs().max().item())
    fast.requires_grad_(False)
    [slope] = torch.autograd.grad(fast(maps).sum(), maps)
    torch.testing.assert_close(slope, torch.autograd.grad(layer(maps).sum(), maps)[0])
    assert products == [fast, fast]


@pytest.mark.usefixtures("narrow")
@pytest.mark.parametrize("groups", [1, 8])
@pytest.mark.slow(reason="torch.compile takes seconds")
def test_it_compiles_where_it_learns(groups):
    torch.compiler.reset()
    fast, maps = nn.Conv2d(8, 8, 3, padding=1, groups=groups), torch.randn(4, 8, 2, 2)
    learn_on_cpu(fast)
    fast.may_gain = True  # no function of torch is patched here, since the compiler fails at some of them
    compiled = torch.compile(fast, fullgraph=True, backend="aot_eager")
    for dtype in (torch.float32, torch.bfloat16):
        for one, two in zip(slopes(compiled, maps, dtype)[1], slopes(fast, maps, dtype)[1], strict=True):
            torch.testing.assert_close(one, two)


@pytest.mark.usefixtures("narrow")
def test_maps_may_be_given_by_name(products):
    layer = nn.Conv2d(8, 8, 3, padding=1)
    fast, maps = copy.deepcopy(layer), torch.rand(2, 8, 2, 2)
    learn_on_cpu(fast)
    torch.testing.assert_close(fast(input=maps), layer(input=maps))
    assert products == [fast]


FEW = """
import torch
from torch import nn
from kdzoo.models import learn_on_cpu

for channels, stride, padding in ((2, 3, 0), (3, 2, 0), (4, 3, 1), (5, (2, 1), 0), (7, (1, 2), 0)):
    torch.manual_seed(0)
    layer = nn.Conv2d(channels, 64, 1, stride, padding)
    exact = nn.Conv2d(channels, 64, 1, stride, padding).double()
    exact.load_state_dict(layer.state_dict())
    learn_on_cpu(layer.to(memory_format=torch.channels_last))
    maps = torch.randn(8, channels, 15, 16).contiguous(memory_format=torch.channels_last)
    wanted = exact(maps.double())
    torch.testing.assert_close(layer(maps), wanted.float())
    slopes = torch.randn(wanted.shape).contiguous(memory_format=torch.channels_last)
    layer(maps).backward(slopes)
    wanted.backward(slopes.double())
    torch.testing.assert_close(layer.weight.grad, exact.weight.grad.float(), rtol=1e-3, atol=1e-3)
"""


def test_strided_layers_of_few_channels_learn_right_where_a_processor_has_avx2_and_no_more():
    subprocess.run([sys.executable, "-c", FEW], env={**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2"}, check=True)
