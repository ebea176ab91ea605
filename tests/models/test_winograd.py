"""Wide 3x3 convolutions with fewer products give the same, forward and backward, but for rounding."""

import copy

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F

from kdzoo import DataSpec
from kdzoo.models import create, frozen, learn_on_cpu, use_winograd, winograd, wrap
from kdzoo.models.convolutions import LearningConv2d
from kdzoo.models.winograd import LEAST_WIDTH, Winograd, transformed
from kdzoo.outputs import EVERYTHING, LOGITS
from kdzoo.precision import PRECISIONS
from kdzoo.tensors import leaves

DATA = DataSpec("fake", 7, tuple("abcdefg"), 32, torch.arange(7))
WIDE = {"resnet8x4": 3, "resnet32x4": 27, "vgg13_cifar": 9, "wrn_40_2": 22, "wrn_16_1": 3, "resnet18": 13}
WIDE["mobilenetv2_half"] = 0
SLOW = ("resnet32x4", "vgg13_cifar", "wrn_40_2")


@pytest.fixture(autouse=True)
def measured(monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    monkeypatch.setattr(winograd, "LEAST_WIDTH", 64)  # so that layers are small


def winograds(network):
    return [name for name, module in network.named_modules() if isinstance(module, Winograd)]


@pytest.mark.parametrize(
    ("images", "channels", "wide", "grid"),
    [(3, 64, 64, (8, 8)), (2, 64, 96, (7, 7)), (9, 65, 64, (4, 12)), (1, 128, 64, (33, 30)), (300, 64, 64, (4, 4))],
)
@pytest.mark.parametrize("bias", [True, False])
@torch.no_grad()
def test_a_convolution_has_the_values_of_float64(images, channels, wide, grid, bias):
    layer = nn.Conv2d(channels, wide, 3, padding=1, bias=bias)
    maps = torch.randn(images, channels, *grid)
    wanted = F.conv2d(maps.double(), layer.weight.double(), layer.bias.double() if bias else None, padding=1)
    for layout in (torch.contiguous_format, torch.channels_last):
        found = Winograd(layer)(maps.contiguous(memory_format=layout))
        assert not torch.equal(found, layer(maps))
        assert found.is_contiguous(memory_format=torch.channels_last)
        assert torch.allclose(found.double(), wanted, rtol=0, atol=1e-5 * wanted.abs().max().item())


def test_the_identity_is_exact_in_rational_numbers():
    weight = torch.randint(-3, 4, (64, 64, 3, 3)).double()
    maps = torch.randint(-3, 4, (2, 64, 9, 8)).double()
    bias = torch.randint(-3, 4, (64,)).double()
    found = winograd.winograd(maps, transformed(weight.transpose(0, 1)), bias)
    assert torch.allclose(found, F.conv2d(maps, weight, bias, padding=1), rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    ("shape", "by_tiles"), [((1, 64, 8, 8), True), ((1, 64, 128, 128), True), ((1, 64, 129, 128), False)]
)
def test_maps_of_large_images_are_convolved_plainly(shape, by_tiles):
    layer, maps = nn.Conv2d(64, 64, 3, padding=1), torch.randn(shape)
    with torch.no_grad():
        assert torch.equal(Winograd(layer)(maps), layer(maps)) == (not by_tiles)


def test_one_image_has_the_values_that_it_has_among_others():
    layer = Winograd(nn.Conv2d(64, 64, 3, padding=1))
    maps = torch.randn(37, 64, 8, 8)
    with torch.no_grad():
        assert torch.allclose(layer(maps)[30:31], layer(maps[30:31]), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow(reason="large")) if n in SLOW else n for n in WIDE]
)
def test_a_networks_outputs_stay_and_its_weights_are_shared(name):
    network = create(name, DATA).eval().requires_grad_(False)
    fast = use_winograd(network)
    assert len(winograds(fast)) == WIDE[name]
    assert (fast is network) == (WIDE[name] == 0)
    held = {tensor.data_ptr() for tensor in (*network.parameters(), *network.buffers())}
    assert held <= {tensor.data_ptr() for tensor in (*fast.parameters(), *fast.buffers())}
    assert winograds(network) == []
    images = torch.rand(5, 3, network.image_size, network.image_size)
    with torch.no_grad():
        found, wanted = fast(images, EVERYTHING), network(images, EVERYTHING)
    for one, other in zip((found.logits, *found.features), (wanted.logits, *wanted.features), strict=True):
        assert torch.allclose(one, other, rtol=0, atol=1e-5 * other.abs().max().item())


def test_where_gradients_are_asked_for_or_maps_are_small_the_layer_itself_is_called():
    layer = nn.Conv2d(64, 64, 3, padding=1)
    fast = Winograd(layer)
    maps = torch.randn(2, 64, 8, 8, requires_grad=True)
    assert torch.equal(fast(maps), layer(maps))
    assert torch.autograd.grad(fast(maps).sum(), maps)[0].abs().sum() > 0
    with torch.no_grad():
        for side in (1, 2, 3, 5, 6):
            assert torch.equal(fast(maps[..., :side, :side]), layer(maps[..., :side, :side]))
        assert not torch.equal(fast(maps), layer(maps))


class Own(nn.Conv2d):
    """May do more with its weight."""


class Many(nn.Module):
    """A convolution of each kind, of which the first alone is taken."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 64, 3, padding=1)
        self.wide = nn.Conv2d(64, 64, 3, padding=1)
        self.others = nn.Sequential(
            nn.Conv2d(64, 64, 3, padding=1, stride=2),
            nn.Conv2d(64, 64, 3, padding=2, dilation=2),
            nn.Conv2d(64, 64, 3, padding=1, groups=2),
            nn.Conv2d(64, 64, 3, padding=1, padding_mode="circular"),
            nn.Conv2d(64, 64, 5, padding=2),
            nn.Conv2d(64, 64, 1),
            Own(64, 64, 3, padding=1),
            nn.Conv2d(64, 63, 3, padding=1),
            nn.Conv2d(63, 64, 3, padding=1),
        )
        self.watched = nn.Conv2d(64, 64, 3, padding=1)
        self.watched.register_forward_hook(lambda module, inputs, output: None)
        self.fc = nn.Linear(64, 7)

    def forward(self, images):
        return self.fc(self.watched(self.others(self.wide(self.stem(images)))).mean((2, 3)))


def test_only_layers_that_are_known_to_be_right_and_to_gain_are_exchanged():
    network = wrap(Many(), image_size=32, num_classes=7).eval().requires_grad_(False)
    assert [name.rpartition(".")[2] for name in winograds(use_winograd(network))] == ["wide"]


def test_a_network_whose_outputs_would_differ_stays_as_it_is(monkeypatch):
    network = create("resnet8x4", DATA).eval().requires_grad_(False)
    assert use_winograd(network) is not network
    monkeypatch.setattr(winograd, "transformed", lambda weight: 1.01 * transformed(weight))
    assert use_winograd(network) is network


@pytest.mark.parametrize(("instructions", "taken"), [("AVX2", 7), ("AVX512", 7), ("DEFAULT", 0)])
def test_only_wide_convolutions_are_exchanged_on_processors_that_were_measured(monkeypatch, instructions, taken):
    monkeypatch.setattr(winograd, "LEAST_WIDTH", LEAST_WIDTH)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: instructions)
    network = create("vgg13_cifar", DATA).eval().requires_grad_(False)
    assert len(winograds(use_winograd(network))) == taken


def learning(layer):
    network = nn.Sequential(layer)
    learn_on_cpu(network)
    return network.train()


def gradients(module, maps, slopes):
    maps = maps.detach().requires_grad_()
    found = module(maps)
    return [found, *torch.autograd.grad(found, [maps, *module.parameters()], slopes)]


@pytest.mark.parametrize(
    ("images", "channels", "wide", "grid"),
    [(32, 64, 64, (8, 8)), (35, 64, 96, (7, 7)), (43, 65, 64, (4, 12)), (2, 128, 64, (33, 30)), (300, 64, 64, (4, 4))],
)
@pytest.mark.parametrize("bias", [True, False])
def test_a_convolution_learns_with_the_gradients_of_float64(images, channels, wide, grid, bias):
    layer = nn.Conv2d(channels, wide, 3, padding=1, bias=bias).to(memory_format=torch.channels_last)
    maps, slopes = torch.randn(images, channels, *grid), torch.randn(images, wide, *grid)
    wanted = gradients(copy.deepcopy(layer).double(), maps.double(), slopes.double())
    plain = gradients(layer, maps, slopes)
    found = gradients(learning(layer), maps, slopes)
    assert not torch.equal(found[0], plain[0])
    assert found[2].stride() == layer.weight.stride()
    for one, other in zip(found, wanted, strict=True):
        assert torch.allclose(one.double(), other, rtol=0, atol=1e-5 * other.abs().max().item())


@pytest.mark.slow(reason="passes through large networks")
def test_a_network_learns_by_it_and_is_measured_and_kept_as_it_was():
    network = create("resnet8x4", DATA).to(memory_format=torch.channels_last)
    other = copy.deepcopy(network)
    learn_on_cpu(other)
    learns = [
        name for name, module in other.named_modules() if isinstance(module, LearningConv2d) and winograd.suits(module)
    ]
    assert len(learns) == WIDE["resnet8x4"]
    assert list(other.state_dict()) == list(network.state_dict())
    images = torch.rand(32, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    exact = copy.deepcopy(network).double()
    labels, slopes = torch.arange(32) % 7, []
    for each, shown in ((exact, images.double()), (network, images), (other, images)):
        loss = F.cross_entropy(each.train()(shown, LOGITS).logits, labels)
        slopes.append(torch.cat([one.double().flatten() for one in torch.autograd.grad(loss, list(each.parameters()))]))
    plain, found = ((each - slopes[0]).norm() for each in slopes[1:])
    assert 0 < found < 5 * plain  # most of either is rounding that turns a ReLU on or off
    other.load_state_dict(network.state_dict())
    with torch.no_grad():  # of the same weights and statistics
        assert torch.equal(*(each.train()(images, LOGITS).logits for each in (network, other)))
        assert torch.equal(*(each.eval()(images, LOGITS).logits for each in (network, other)))
    assert torch.equal(*(each.eval()(images, LOGITS).logits for each in (network, other)))


def test_frozen_weights_get_no_gradient_and_gradients_of_gradients_are_right():
    layer = nn.Conv2d(64, 64, 3, padding=1)
    fast = learning(copy.deepcopy(layer))
    maps = torch.randn(32, 64, 8, 8, requires_grad=True)
    found = []
    for module in (layer, fast):
        [slope] = torch.autograd.grad(module(maps).pow(3).sum(), maps, create_graph=True)
        found.append(torch.autograd.grad(slope.square().sum(), [maps, *module.parameters()]))
    for one, two in zip(*found, strict=True):
        assert torch.allclose(one, two, rtol=0, atol=1e-4 * one.abs().max().item())
    fast.requires_grad_(False)
    [slope] = torch.autograd.grad(fast(maps).sum(), maps)
    assert torch.allclose(slope, torch.autograd.grad(layer(maps).sum(), maps)[0], rtol=0, atol=1e-4)
    fast.requires_grad_(True)
    fast(maps.detach()).sum().backward()
    assert fast[0].weight.grad is not None


def of_each_image(module, maps, slopes):
    def loss(weights, one, slope):
        return (functional_call(module, weights, one[None])[0] * slope).sum()

    return vmap(grad(loss, argnums=(0, 1)), in_dims=(None, 0, 0))(dict(module.named_parameters()), maps, slopes)


def of_two_losses(module, maps, slopes):
    maps = maps.requires_grad_()
    both = torch.stack([slopes, slopes.square()])
    return torch.autograd.grad(module(maps), [maps, *module.parameters()], both, is_grads_batched=True)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("gradients", [of_each_image, of_two_losses])
@pytest.mark.parametrize(("images", "channels", "side"), [(2, 64, 46), (3, 256, 2)])
def test_gradients_may_be_asked_for_each_image_and_for_several_losses(gradients, images, channels, side):
    layer = nn.Conv2d(channels, channels, 3, padding=1)
    maps, slopes = torch.randn(2, images, channels, side, side)
    found = leaves(gradients(learning(copy.deepcopy(layer)), maps, slopes))
    for one, other in zip(found, leaves(gradients(nn.Sequential(layer), maps, slopes)), strict=True):
        assert torch.allclose(one, other, rtol=0, atol=1e-4 * other.abs().max().item())


@pytest.mark.parametrize("side", [8, 7])
def test_what_follows_may_write_to_its_maps(side):
    layer, maps = nn.Conv2d(64, 64, 3, padding=1), torch.randn(64, 64, side, side)
    slopes = torch.randn(64, 64, side, side)
    found = gradients(nn.Sequential(learning(copy.deepcopy(layer)), nn.ReLU(inplace=True)), maps, slopes)
    for one, other in zip(found, gradients(nn.Sequential(layer, nn.ReLU()), maps, slopes), strict=True):
        assert torch.linalg.norm(one - other) < 1e-2 * torch.linalg.norm(other)
    with torch.no_grad():
        frozen = nn.Sequential(Winograd(layer), nn.ReLU(inplace=True))(maps)
        assert torch.allclose(frozen, layer(maps).relu(), rtol=0, atol=1e-4)


def test_few_tiles_learn_by_the_layer_itself():
    layer = nn.Conv2d(64, 64, 3, padding=1)
    fast = learning(copy.deepcopy(layer))
    for images, side, same in ((31, 8, True), (32, 8, False), (400, 3, True), (127, 4, True), (128, 4, False)):
        maps = torch.randn(images, 64, side, side)
        assert torch.equal(fast(maps), layer(maps)) == same


@pytest.mark.slow(reason="torch.compile takes seconds")
def test_it_compiles_where_it_learns():
    torch.compiler.reset()
    fast, maps = learning(nn.Conv2d(64, 64, 3, padding=1)), torch.randn(32, 64, 8, 8)
    slopes = torch.randn(32, 64, 8, 8)
    compiled = torch.compile(fast, fullgraph=True, backend="aot_eager")
    for one, two in zip(gradients(compiled, maps, slopes), gradients(fast, maps, slopes), strict=True):
        assert torch.allclose(one, two, rtol=0, atol=1e-6 * two.abs().max().item())


def test_it_is_one_operation_for_torchs_compiler():
    layer = nn.Conv2d(64, 64, 3, padding=1).requires_grad_(False)
    fast, maps = Winograd(layer), torch.randn(2, 64, 7, 8)
    torch.library.opcheck(winograd.winograd, (maps, fast.products, fast.bias))
    torch.library.opcheck(winograd.winograd_weight, (maps, torch.randn(2, 64, 7, 8)))
    torch.compiler.reset()
    with torch.no_grad():
        compiled = torch.compile(fast, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(maps), fast(maps))


def test_a_network_of_bf16_is_cast_instead():
    network = create("resnet8x4", DATA).eval().requires_grad_(False)
    assert winograds(frozen(network, PRECISIONS["bf16"])) == []
    assert len(winograds(frozen(network, PRECISIONS["float32"]))) == WIDE["resnet8x4"]


def test_a_network_that_cannot_be_folded_says_so_and_still_needs_fewer_products(monkeypatch):
    monkeypatch.setattr("kdzoo.models.frozen_copy.fold_norms", lambda network: None)
    network, said = create("resnet8x4", DATA).eval().requires_grad_(False), []
    fast = frozen(network, PRECISIONS["float32"], said.append)
    assert len(said) == 1
    assert said[0].startswith("batch norms of resnet8x4 stay")
    with torch.no_grad():
        images = torch.rand(2, 3, 32, 32)
        assert torch.allclose(fast(images, LOGITS).logits, network(images, LOGITS).logits, rtol=0, atol=1e-4)
