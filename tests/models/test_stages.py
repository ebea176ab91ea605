"""Stages as callables: one after the other they are the plain pass, on maps of one's own and of others."""

import copy
from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from kdzoo import Batch, DataSpec, Distillation, Distiller, Fidelity, Needs, models
from kdzoo.errors import UserError
from kdzoo.outputs import NetworkView, Show

CIFAR = ("resnet8", "shufflenetv1", "shufflenetv2", "wrn_16_2", "vgg8_cifar", "mobilenetv2_half")
CIFAR = (*CIFAR, "resnet8x4", "resnet50_cifar", "wrn_40_1", "resnet20", "vgg13_cifar", "resnet32x4")
TIMM = (
    "convnext_atto",
    "mobilenetv3_small_050",
    "regnety_002",
    "vit_pico_patch16_224",  # a class token
    "swin_pico_patch4_window7_224",  # (B, H, W, C)
    "pvt_v2_b0",
)
SLOW = (
    "resnet18",
    "levit_128s",  # blocks that change nothing at first, batch norms in its heads
    "ghostnet_050",
    "edgenext_xx_small",
    "poolformer_s12",
    "deit_tiny_distilled_patch16_224",  # two tokens, two heads
    "densenet121",
    "efficientnet_b0",
    "mixer_s32_224",
    "resmlp_12_224",
    "swinv2_cr_tiny_224",
    "cait_xxs24_224",
)


def network(name, classes=7, side=32):
    torch.manual_seed(0)
    names = tuple(f"class {k}" for k in range(classes))
    return models.create(name, DataSpec("toy", classes, names, side, torch.arange(classes)))


def view(of):
    return NetworkView(of, Show(), stages=True)


@pytest.fixture
def images():
    return torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def assert_same(found, wanted):
    assert torch.equal(found.logits, wanted.logits)
    assert torch.equal(found.embedding, wanted.embedding)
    for one, other in zip(found.features, wanted.features, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    "name",
    [
        *CIFAR[:6],
        *TIMM,
        *(pytest.param(n, marks=pytest.mark.slow(reason="more of the same families")) for n in (*CIFAR[6:], *SLOW)),
    ],
)
@torch.no_grad()
def test_stages_one_after_the_other_give_the_bits_of_the_plain_pass(name, images):
    side = 16 if name in CIFAR else 32
    images, net = images[:, :, :side, :side], network(name, side=side).eval()
    assert not net.inseparable
    for some in (images, images[:1]):  # one for bf16, which many processors only emulate
        with torch.autocast("cpu", torch.bfloat16, enabled=len(some) == 1):
            assert_same(view(net).run_from(0, some), net(some, Show()))
    training, same = net.train(), copy.deepcopy(net)
    torch.manual_seed(3)  # for dropout
    found = view(training).run_from(0, images)
    torch.manual_seed(3)
    assert_same(found, same(images, Show()))


@pytest.mark.parametrize("name", ["resnet8x4", "vit_pico_patch16_224", "swin_pico_patch4_window7_224"])
@torch.no_grad()
def test_any_stage_can_be_entered_with_the_map_of_the_one_before(name, images):
    net = network(name).eval()
    wanted = net(images, Show())
    maps, prefix = images, None
    for number in range(4):
        maps, prefix = view(net).stage(number, maps, prefix)
        found = view(net).run_from(number + 1, maps, prefix)
        assert torch.equal(found.logits, wanted.logits)
        assert len(found.features) == 3 - number
    moved = view(net).run_from(2, wanted.features[1] + torch.linspace(0, 1, wanted.features[1].shape[-1]))
    assert not moved.logits.allclose(wanted.logits)


@torch.no_grad()
def test_without_its_class_token_a_map_is_given_its_mean_in_that_place(images):
    net = network("vit_pico_patch16_224").eval()
    maps, prefix = view(net).stage(0, images)
    assert prefix.shape == (3, 1, 96)
    mean = maps.mean((2, 3))[:, None]
    assert torch.allclose(view(net).run_from(1, maps).logits, view(net).run_from(1, maps, mean).logits, atol=1e-6)
    assert not torch.allclose(view(net).run_from(1, maps).logits, view(net).run_from(1, maps, prefix).logits, atol=1e-3)


@pytest.mark.parametrize("name", ["resnet8x4", "shufflenetv2", "resnet18", "levit_128s"])
def test_maps_of_others_move_no_running_statistics_and_plain_passes_do(name, images):
    net = network(name).train()
    before = copy.deepcopy(net.state_dict())
    first, _ = view(net).stage(0, images)
    view(net).run_from(1, torch.randn(first.shape)).logits.sum().backward()
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    assert all(m.track_running_stats for m in net.modules() if isinstance(m, nn.BatchNorm2d))
    net(images)
    assert not all(torch.equal(value, before[key]) for key, value in net.state_dict().items())


def test_in_training_foreign_maps_are_normalised_by_their_own_batch():
    net = network("wrn_16_2").train()
    maps = 5 + 3 * torch.randn(4, 128, 8, 8, generator=torch.Generator().manual_seed(2))
    embedding = view(net).run_from(4, maps).embedding  # norm, ReLU and mean
    scaled = view(net).run_from(4, 10 * maps - 2).embedding
    assert torch.allclose(embedding, scaled, atol=1e-4)
    assert not torch.allclose(embedding, view(net.eval()).run_from(4, maps).embedding, atol=0.1)


@pytest.mark.parametrize("name", ["resnet8", "vit_pico_patch16_224"])
def test_gradients_pass_a_frozen_network_and_none_stay_in_it(name, images):
    net = network(name).requires_grad_(False).eval()
    with torch.no_grad():
        maps, _ = view(net).stage(2, view(net).stage(1, view(net).stage(0, images).maps).maps)
    entered = maps.clone().requires_grad_()
    view(net).run_from(3, entered).logits.sum().backward()
    assert entered.grad.any()
    assert all(p.grad is None for p in net.parameters())


def test_a_network_that_ran_by_stages_can_still_be_copied(images):
    net = network("wrn_16_2").train()
    found = view(net).run_from(0, images)
    copied = copy.deepcopy(net)
    assert torch.equal(view(copied).run_from(0, images).logits, found.logits)


class Chain(nn.Module):
    """Four stages and a linear layer; ``skips`` adds an early map to a late one."""

    def __init__(self, skips=False, branches=False):
        super().__init__()
        widths = (3, 4, 8, 16, 24)
        self.blocks = nn.ModuleList(nn.Conv2d(a, b, 3, 2, 1) for a, b in pairwise(widths))
        self.norms = nn.ModuleList(nn.BatchNorm2d(width) for width in widths[1:])
        self.late, self.fc = nn.Conv2d(4, 24, 1), nn.Linear(24, 7)
        self.skips, self.branches = skips, branches

    def forward(self, x):
        if self.branches and x.sum() > 0:
            x = x + 1
        first = x = self.norms[0](self.blocks[0](x)).relu()
        for block, norm in list(zip(self.blocks, self.norms, strict=True))[1:]:
            x = norm(block(x)).relu()
        if self.skips:
            x = x + self.late(F.adaptive_avg_pool2d(first, x.shape[2:]))
        return self.fc(x.mean((2, 3)))


def wrapped(**options):
    torch.manual_seed(0)
    return models.wrap(Chain(**options), image_size=32, num_classes=7, taps=[f"norms.{i}" for i in range(4)])


@torch.no_grad()
def test_ones_own_network_runs_by_stages_where_they_make_a_chain(images):
    net = wrapped().eval()
    assert_same(view(net).run_from(0, images), net(images, Show()))


class ByStages(Distiller):
    """A method that calls the teacher's stages."""

    paper, fidelity = "none", Fidelity.EXACT
    needs = Needs(stages=("teacher",))

    def __init__(self, *, ce: float = 1.0, way: float = 1.0):
        super().__init__(ce=ce, way=way)

    def forward(self, student, teacher, batch):
        return {"way": (teacher.run_from(0, batch.images).logits - student(batch.images).logits).square().mean()}


class Undeclared(ByStages):
    needs = Needs()


@pytest.mark.parametrize(
    ("options", "why"), [({"skips": True}, "reads more than the map"), ({"branches": True}, "torch.fx cannot trace it")]
)
def test_a_network_that_is_no_chain_is_refused_in_one_line_before_training(options, why):
    with pytest.raises(UserError, match=f"calls the teacher's stages one by one, .*{why}") as refused:
        Distillation(wrapped(), wrapped(**options), ByStages(), num_classes=7, image_size=32)
    assert "\n" not in str(refused.value)
    Distillation(wrapped(**options), wrapped(), ByStages(), num_classes=7, image_size=32)  # its stages are not called


def test_only_methods_whose_needs_name_a_network_may_call_its_stages(images):
    batch = Batch.of(images, torch.tensor([0, 1, 2]), 7)
    assert Distillation(wrapped(), wrapped(), ByStages(), num_classes=7, image_size=32)(batch)["way"].isfinite()
    with pytest.raises(AssertionError, match="names the networks whose stages are called"):
        Distillation(wrapped(), wrapped(), Undeclared(), num_classes=7, image_size=32)(batch)
