"""A frozen network whose batch norms are folded away shows what it showed, but for rounding."""

import threading
from functools import partial
from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from kdzoo import DataSpec
from kdzoo.models import create, fault_of_copies, fold_norms, frozen, wrap
from kdzoo.outputs import EVERYTHING
from kdzoo.precision import PRECISIONS, autocast

DATA = DataSpec("fake", 7, tuple("abcdefg"), 32, torch.arange(7))

CIFAR = [
    *("resnet8", "resnet14", "resnet20", "resnet32", "resnet44", "resnet56", "resnet110", "resnet8x4", "resnet32x4"),
    *("resnet50_cifar", "wrn_16_1", "wrn_16_2", "wrn_40_1", "wrn_40_2"),
    *("vgg8_cifar", "vgg11_cifar", "vgg13_cifar", "vgg16_cifar", "vgg19_cifar"),
    *("mobilenetv2_half", "shufflenetv1", "shufflenetv2"),
]
FAMILIES = [
    *("test_convnext", "test_efficientnet", "test_resnet", "test_vit", "test_byobnet", "regnetx_002", "densenet121"),
    *("mobilenetv2_035", "levit_128s", "ghostnet_050", "dla46x_c", "efficientvit_b0", "fastvit_t8", "mobilevit_xxs"),
    *("swin_pico_patch4_window7_224", "torchvision:resnet18", "torchvision:googlenet"),
]
QUICK = ["resnet8x4", "wrn_16_1", "test_efficientnet", "test_resnet", "test_vit"]


def taught(network):
    """The network, frozen, with the statistics and weights of norms that training leaves."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            for tensor in filter(torch.is_tensor, (module.running_var, module.weight)):
                tensor.data.uniform_(0.8, 1.25)
            for tensor in filter(torch.is_tensor, (module.running_mean, module.bias)):
                tensor.data.uniform_(-0.2, 0.2)
    return network.eval().requires_grad_(False)


def outputs(network, images):
    with torch.no_grad():
        output = network(images, EVERYTHING)
    final = [] if output.final is None else [output.final]
    return [output.logits, output.embedding, *output.features, *output.preactivations, *final]


def norms(network):
    return sum(isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d) for module in network.modules())


def rounded(one, other):
    return one.shape == other.shape and (one - other).abs().max() <= 1e-4 * other.abs().max()


SLOW = pytest.mark.slow(reason="each makes another network, and there are many")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in QUICK else SLOW) for name in [*CIFAR, *FAMILIES]]
)
def test_a_folded_network_shows_the_same_but_for_rounding(name):
    network = taught(create(name, DATA)).to(memory_format=torch.channels_last)
    images = torch.rand(5, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    before = outputs(network, images)
    folded = fold_norms(network)
    assert all(rounded(one, other) for one, other in zip(outputs(folded, images), before, strict=True))
    assert all(torch.equal(one, other) for one, other in zip(outputs(network, images), before, strict=True))
    assert not all(rounded(one, other) for one, other in zip(outputs(folded, images.flip(0)), before, strict=True))


@pytest.mark.parametrize(("name", "left"), [("resnet8x4", 0), ("test_resnet", 0), ("wrn_16_1", 7)])
def test_norms_that_read_a_layer_are_gone(name, left):
    network = taught(create(name, DATA))
    assert norms(network) > left
    assert norms(fold_norms(network)) == left


def test_a_network_without_batch_norms_is_left_as_it_is():
    network = taught(create("test_vit", DATA))
    assert fold_norms(network) is network


def test_weights_that_stay_the_same_are_shared():
    network = taught(create("wrn_16_1", DATA))
    folded = fold_norms(network)
    assert folded.classifier.weight is network.classifier.weight
    assert folded.body.stem.weight is network.body.stem.weight


class Layered(nn.Module):
    """Convolutions and norms, between which a subclass does something else."""

    def __init__(self):
        super().__init__()
        widths = [3, 4, 4, 4, 4]
        self.convolutions = nn.ModuleList(nn.Conv2d(one, two, 3, stride=2, padding=1) for one, two in pairwise(widths))
        self.norms = nn.ModuleList(nn.BatchNorm2d(4) for _ in range(4))
        self.head = nn.Linear(4, 7)

    def forward(self, images):
        for convolution, norm in zip(self.convolutions, self.norms, strict=True):
            images = self.between(convolution(images), norm)
        return self.head(images.mean((2, 3)))

    def between(self, maps, norm):
        return norm(maps)


class Read(Layered):
    def between(self, maps, norm):
        return norm(maps) + maps


class Rectified(Layered):
    def between(self, maps, norm):
        return norm(F.relu(maps))


class Twice(Layered):
    def between(self, maps, norm):
        return norm(norm(maps))


class Named(Layered):
    """Calls all its layers by the name of what they read."""

    def forward(self, images):
        for convolution, norm in zip(self.convolutions, self.norms, strict=True):
            images = norm(input=convolution(input=images))
        return self.head(input=images.mean((2, 3)))


class Plain(Layered):
    """Norms without weights, the last after a linear layer."""

    def __init__(self):
        super().__init__()
        self.norms = nn.ModuleList(nn.BatchNorm2d(4, affine=False) for _ in range(4))
        self.head = nn.Sequential(self.head, nn.BatchNorm1d(7, affine=False))


def layered(kind):
    return taught(wrap(kind(), image_size=32, num_classes=7))


@pytest.mark.parametrize(
    ("kind", "left"), [(Layered, 0), (Named, 0), (Plain, 0), (Read, 4), (Rectified, 4), (Twice, 4)]
)
def test_a_norm_is_folded_where_it_reads_a_layer_and_that_alone(kind, left):
    folded = fold_norms(layered(kind))
    assert norms(folded) == left


class Reading(Layered):
    """Reads the weight of its first convolution by itself."""

    def between(self, maps, norm):
        return norm(maps) * self.convolutions[0].weight.norm()


def test_a_network_whose_outputs_would_change_is_not_folded():
    assert fold_norms(layered(Reading)) is None


def test_a_layer_that_is_a_tap_stays():
    taps = [f"convolutions.{i}" for i in range(4)]
    network = taught(wrap(Layered(), image_size=32, num_classes=7, taps=taps))
    images = torch.rand(2, 3, 32, 32)
    folded = fold_norms(network)
    assert norms(folded) == 4
    assert all(
        torch.equal(one, other) for one, other in zip(outputs(folded, images), outputs(network, images), strict=True)
    )


class Noting(Layered):
    """Reads a map that a hook notes on the network, which is a method of it, or bound to it for ever."""

    def __init__(self, bound):
        super().__init__()
        self.noted = None
        self.convolutions[1].register_forward_hook((lambda *call: self.note(*call)) if bound else self.note)

    def note(self, module, inputs, output):
        self.noted = output

    def forward(self, images):
        logits = super().forward(images)
        return logits + self.noted.mean()


class Locked(Layered):
    def __init__(self):
        super().__init__()
        self.lock = threading.Lock()


class Drawing(Layered):
    def between(self, maps, norm):
        return F.dropout(norm(maps), training=True)


@pytest.mark.parametrize("precision", ["float32", "bf16"])
@pytest.mark.parametrize(
    ("make", "why"),
    [
        (Layered, None),
        (partial(Noting, bound=False), None),
        (partial(Noting, bound=True), "a hook is a lambda that refers to the network"),
        (Locked, "it cannot be copied"),
    ],
)
def test_a_network_whose_copies_do_not_answer_by_themselves_makes_its_passes_itself(make, why, precision):
    network = layered(make)
    said = []
    fast = frozen(network, PRECISIONS[precision], said.append)
    assert (fast is network) == bool(why)
    assert [why in line for line in said] == ([True] if why else [])
    images = torch.rand(5, 3, 32, 32)
    with autocast("cpu", PRECISIONS[precision]):
        for one, other in zip(outputs(fast, images), outputs(network, images), strict=True):
            assert (one - other).abs().max() <= 0.05 * other.abs().max()


@pytest.mark.parametrize(("make", "fails"), [(Drawing, False), (partial(Noting, bound=True), True), (Locked, True)])
def test_what_is_wrong_with_copies_is_told_and_nothing_is_disturbed(make, fails):
    network = wrap(make(), image_size=32, num_classes=7)
    before = torch.get_rng_state()
    assert bool(fault_of_copies(network)) == fails
    assert network.training
    assert torch.equal(torch.get_rng_state(), before)
