"""Maps before the last ReLU of a stage: what they are for each kind of network, and when they are shown."""

import copy
import pickle
from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from kdzoo import DataSpec, Show
from kdzoo.models import create, wrap

DATA = DataSpec("fake", 7, tuple("abcdefg"), 32, torch.arange(7))
IMAGES = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
BOTH = Show(features=True, preactivations=True)
RECTIFIED = ["resnet8x4", "resnet50_cifar", "resnet18", "vgg8", "shufflenetv1", "shufflenetv2", "torchvision:resnet18"]
NEVER_RECTIFIED = ["vit_t", "swin_pico", "test_convnext", "mixer_s32_224", "mobilenetv2_half", "mobilenetv2"]


def unlike_the_first_step(network):
    """Gives norms other weights than at first, where blocks may be identities."""
    for norm in (m for m in network.modules() if isinstance(m, nn.BatchNorm2d)):
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.uniform_(norm.bias, -0.5, 0.5)
    return network.eval()


@pytest.mark.parametrize("name", RECTIFIED)
def test_after_the_relu_they_are_the_features(name):
    output = unlike_the_first_step(create(name, DATA))(IMAGES, BOTH)
    assert len(output.preactivations) == len(output.features) == 4
    for before, feature in zip(output.preactivations, output.features, strict=True):
        assert (before < 0).any()
        assert torch.equal(before.relu(), feature)


@pytest.mark.parametrize("name", NEVER_RECTIFIED)
def test_maps_that_are_not_rectified_are_their_own(name):
    output = unlike_the_first_step(create(name, DATA))(IMAGES, BOTH)
    assert all(torch.equal(*pair) for pair in zip(output.preactivations, output.features, strict=True))


def test_in_a_resnet_they_are_the_sum_of_path_and_shortcut():
    network = unlike_the_first_step(create("resnet8x4", DATA))
    seen = network(IMAGES, BOTH)
    for stage, entering, before in zip(network.body.stages, seen.features, seen.preactivations[1:], strict=False):
        block = stage[-1]
        torch.testing.assert_close(before, block.path(entering) + block.shortcut(entering))


def test_in_pre_activation_networks_they_are_what_the_next_relu_reads():
    network = unlike_the_first_step(create("wrn_16_2", DATA))
    body, seen = network.body, network(IMAGES, BOTH)
    norms = [*(stage[0].enter[0] for stage in body.stages), body.neck[0]]
    for norm, feature, before in zip(norms, seen.features, seen.preactivations, strict=True):
        torch.testing.assert_close(before, norm(feature))
    other = unlike_the_first_step(create("resnetv2_18", DATA))
    seen = other(IMAGES, BOTH)
    assert not any(torch.equal(*pair) for pair in zip(seen.features, seen.preactivations, strict=True))


@pytest.mark.parametrize("features", [True, False])
def test_they_are_shown_only_where_they_are_asked_for_whatever_else_is(features):
    network = create("resnet8", DATA).eval()
    assert network(IMAGES, Show(features)).preactivations == ()
    shown = network(IMAGES, Show(features, preactivations=True))
    assert len(shown.preactivations) == 4
    assert len(shown.features) == 4 * features
    assert network(IMAGES, Show(features)).preactivations == ()


@pytest.mark.parametrize("name", ["resnet8", "wrn_16_1", "torchvision:resnet18"])
def test_a_student_learns_through_them(name):
    network = unlike_the_first_step(create(name, DATA)).train()
    network(IMAGES, BOTH).preactivations[-1].square().sum().backward()
    first = next(network.body.parameters())
    assert first.grad.any()


def test_they_keep_memory_format_and_leave_low_precision():
    network = unlike_the_first_step(create("resnet8", DATA)).to(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16):
        output = network(IMAGES.to(memory_format=torch.channels_last), BOTH)
    assert {f.dtype for f in output.preactivations} == {torch.float32}
    assert all(f.is_contiguous(memory_format=torch.channels_last) for f in output.preactivations)
    assert all(torch.equal(b.relu(), f) for b, f in zip(output.preactivations, output.features, strict=True))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda network: pickle.loads(pickle.dumps(network))])
def test_a_copy_shows_its_own(copied):
    network = unlike_the_first_step(create("resnet8", DATA))
    double = copied(network)
    for parameter in double.parameters():
        nn.init.zeros_(parameter)
    assert all((f == 0).all() for f in double(IMAGES, BOTH).preactivations)
    assert all((f != 0).any() for f in network(IMAGES, BOTH).preactivations)


class Own(nn.Module):
    """Four stages and one's own ways to rectify their maps."""

    def __init__(self, rectify):
        super().__init__()
        widths = (3, 4, 5, 6, 7)
        self.stages = nn.ModuleList(nn.Conv2d(a, b, 3, 2, 1) for a, b in pairwise(widths))
        self.rectify = nn.ModuleList(rectify)
        self.fc = nn.Linear(7, 7)

    def forward(self, x):
        for stage, rectify in zip(self.stages, self.rectify, strict=True):
            x = rectify(stage(x))
        return self.fc(x.mean((2, 3)))


class AsAFunction(nn.Module):
    def forward(self, x):
        return F.relu(x)


def wrapped(rectify):
    taps = [f"rectify.{i}" for i in range(4)]
    return wrap(Own(rectify), image_size=32, num_classes=7, taps=taps)


@pytest.mark.parametrize("rectify", [nn.ReLU, lambda: nn.ReLU(inplace=True), nn.ReLU6])
def test_ones_own_network_shows_them_too(rectify):
    network = unlike_the_first_step(wrapped([rectify() for _ in range(4)]))
    output = network(IMAGES, BOTH)
    for before, feature, stage in zip(output.preactivations, output.features, network.body.stages, strict=True):
        assert before.shape[1] == stage.out_channels
        assert (before < 0).any()
        assert torch.equal(before.relu(), feature)


def test_a_relu_that_is_no_module_hides_them():
    network = unlike_the_first_step(wrapped([AsAFunction() for _ in range(4)]))
    assert network(IMAGES, BOTH).preactivations == network.shapes().preactivations == ()


def test_one_module_for_all_stages_hides_them():
    """Hooks keep what it read last."""
    stages = Own([nn.ReLU()] * 4).stages

    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.stages, self.relu, self.fc = stages, nn.ReLU(), nn.Linear(7, 7)
            self.out = nn.ModuleList(nn.Identity() for _ in range(4))

        def forward(self, x):
            for stage, out in zip(self.stages, self.out, strict=True):
                x = out(self.relu(stage(x)))
            return self.fc(x.mean((2, 3)))

    network = wrap(Shared(), image_size=32, num_classes=7, taps=[f"out.{i}" for i in range(4)])
    assert unlike_the_first_step(network)(IMAGES, BOTH).preactivations == ()
