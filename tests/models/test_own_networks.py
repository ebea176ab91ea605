"""Networks of the user's own: what they may return, where their stages are, how many channels they read."""

import re
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import kdzoo
from kdzoo import Batch, DataSpec, distill
from kdzoo.errors import UserError
from kdzoo.experiments.run import evaluate_run
from kdzoo.models import channels_last, create, wrap
from kdzoo.outputs import EVERYTHING

IMAGES = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
DATA = DataSpec("fake", 10, tuple("abcdefghij"), 32, torch.arange(10))


def four_stages(channels=3, classes=10):
    """A chain of four stages and a linear classifier."""
    stages = [
        nn.Sequential(nn.Conv2d(fan_in, fan_out, 3, 2, 1), nn.BatchNorm2d(fan_out), nn.ReLU())
        for fan_in, fan_out in ((channels, 8), (8, 12), (12, 16), (16, 20))
    ]
    return nn.Sequential(*stages, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(20, classes))


class Returns(nn.Module):
    """The same network, whose logits are packed by a function that also gets its embedding."""

    def __init__(self, pack):
        super().__init__()
        self.inner, self.auxiliary, self.pack = four_stages(), nn.Linear(3, 10), pack

    def forward(self, images):
        logits = self.inner(images)
        return self.pack(logits, self.auxiliary(images.mean((2, 3))))


class Fields(SimpleNamespace):
    """An object with attributes, as transformers returns."""


PACKS = {
    "a tuple whose first is logits": lambda logits, aux: (logits, {"features": aux}),
    "a list": lambda logits, aux: [logits, aux],
    "a mapping": lambda logits, aux: {"loss": aux.mean(), "logits": logits, "hidden_states": (aux, aux)},
    "an object": lambda logits, aux: Fields(aux=aux, logits=logits),
}


class Block(nn.Module):
    """A residual block; the last of a stage returns its map beside what goes into its ReLU, as in RepDistiller."""

    def __init__(self, fan_in, fan_out, stride, pack=None):
        super().__init__()
        self.conv = nn.Conv2d(fan_in, fan_out, 3, stride, 1)
        self.norm = nn.BatchNorm2d(fan_out)
        self.downsample = nn.Sequential(nn.Conv2d(fan_in, fan_out, 1, stride), nn.BatchNorm2d(fan_out))
        self.pack = pack

    def forward(self, x):
        before = self.norm(self.conv(x)) + self.downsample(x)
        after = F.relu(before)
        return after if self.pack is None else self.pack(after, before)


class Stages(nn.Module):
    """A stem and three stages, which return more than one tensor."""

    def __init__(self, pack, unpack):
        super().__init__()
        self.conv1, self.bn1, self.relu = nn.Conv2d(3, 8, 3, 1, 1), nn.BatchNorm2d(8), nn.ReLU()
        self.layer1 = nn.Sequential(Block(8, 8, 1), Block(8, 8, 1, pack))
        self.layer2 = nn.Sequential(Block(8, 16, 2), Block(16, 16, 1, pack))
        self.layer3 = nn.Sequential(Block(16, 32, 2), Block(32, 32, 1, pack))
        self.fc = nn.Linear(32, 10)
        self.unpack, self.seen = unpack, []

    def forward(self, x):
        self.seen = [self.relu(self.bn1(self.conv1(x)))]
        for stage in (self.layer1, self.layer2, self.layer3):
            self.seen.append(self.unpack(stage(self.seen[-1])))
        return self.fc(self.seen[-1].mean((2, 3)))


OUTPUTS_OF_STAGES = {
    "tuples": (lambda after, before: (after, before), lambda output: output[0]),
    "lists": (lambda after, before: [after, before], lambda output: output[0]),
    "mappings": (lambda after, before: {"out": after, "preact": before}, lambda output: output["out"]),
    "nested": (lambda after, before: {"maps": (after, [before])}, lambda output: output["maps"][0]),
}


class Sums(nn.Module):
    """Stages that are sums of branches in the network's own forward, so that no submodule returns one."""

    def __init__(self):
        super().__init__()
        self.long = nn.ModuleList(nn.Conv2d(*widths, 3, 2, 1) for widths in ((3, 8), (8, 8), (8, 8), (8, 8)))
        self.short = nn.ModuleList(nn.Conv2d(*widths, 1, 2) for widths in ((3, 8), (8, 8), (8, 8), (8, 8)))
        self.head = nn.Linear(8, 10)

    def forward(self, x):
        for long, short in zip(self.long, self.short, strict=True):
            x = F.relu(long(x) + short(x))
        return self.head(x.mean((2, 3)))


@pytest.mark.parametrize("pack", PACKS.values(), ids=PACKS)
def test_logits_are_found_in_what_a_network_returns(pack):
    network = wrap(Returns(pack), image_size=32, num_classes=10).eval()
    torch.testing.assert_close(network(IMAGES).logits, network.body.inner(IMAGES))
    assert len(network(IMAGES, EVERYTHING).features) == 4


def test_what_holds_no_logits_is_named():
    with pytest.raises(UserError, match=r"returns dict with loss, scores, expected logits"):
        wrap(Returns(lambda logits, aux: {"loss": aux.mean(), "scores": logits}), image_size=32, num_classes=10)


@pytest.mark.parametrize("role", ["student", "teacher"])
def test_heads_that_appear_in_training_only_do_not_stop_it(role):
    class Auxiliary(Returns):
        def forward(self, images):
            return super().forward(images) if self.training else self.inner(images)

    networks = {"student": four_stages(), "teacher": four_stages(), role: Auxiliary(PACKS["a mapping"])}
    distillation = distill(networks["student"], networks["teacher"], "fitnet", num_classes=10, image_size=32).train()
    terms = distillation(Batch.of(IMAGES, torch.arange(4), num_classes=10))
    sum(terms.values()).backward()
    assert all(term.isfinite() for term in terms.values())


@pytest.mark.parametrize(("pack", "unpack"), OUTPUTS_OF_STAGES.values(), ids=OUTPUTS_OF_STAGES)
def test_stages_that_return_several_tensors_are_read(pack, unpack):
    body = Stages(pack, unpack).eval()
    features = wrap(body, image_size=32, num_classes=10).eval()(IMAGES, EVERYTHING).features
    assert all(found.equal(own) for found, own in zip(features, body.seen, strict=True))


def test_maps_that_something_goes_past_are_no_stages():
    network = wrap(Sums(), image_size=32, num_classes=10)
    assert re.fullmatch(r"'short.\d' is a part of a stage, whose output no submodule returns", network.stageless)
    assert network(IMAGES, EVERYTHING).features == ()
    named = wrap(Sums(), image_size=32, num_classes=10, taps=["long.0", "long.1", "long.2", "long.3"])
    assert len(named(IMAGES, EVERYTHING).features) == 4


def test_a_network_that_normalises_its_images_in_place_shows_its_stages():
    class Normalising(nn.Sequential):
        def forward(self, images):
            return super().forward(images.sub_(0.5).div_(0.25))

    widths = ((3, 4), (4, 4), (4, 4), (4, 4))
    stages = [nn.Sequential(nn.Conv2d(a, b, 3, 2, 1), nn.ReLU()) for a, b in widths]
    network = Normalising(*stages, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5))
    assert len(wrap(network, image_size=32, num_classes=5).shapes().features) == 4


def test_a_network_without_stages_serves_methods_that_read_none():
    def two_stages():
        return nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.ReLU(), nn.Conv2d(8, 8, 4, 4), nn.Flatten(), nn.Linear(32, 10))

    terms = distill(two_stages(), four_stages(), "kd", num_classes=10, image_size=32)(
        Batch.of(IMAGES, torch.arange(4), num_classes=10)
    )
    assert all(term.isfinite() for term in terms.values())
    with pytest.raises(UserError, match=r"FitNet reads four stages of the student, .*student\.taps="):
        distill(two_stages(), four_stages(), "fitnet", num_classes=10, image_size=32)
    with pytest.raises(UserError, match=r"of the teacher, .*teacher\.taps="):
        distill(four_stages(), two_stages(), "fitnet", num_classes=10, image_size=32)
    named = wrap(two_stages(), image_size=32, num_classes=10, taps=["0", "0", "1", "2"])
    distill(named, four_stages(), "fitnet", num_classes=10, image_size=32)


def test_a_network_of_one_channel_reads_the_images_luma():
    network = wrap(four_stages(channels=1), image_size=32, num_classes=10, mean=[0.5], std=[0.25]).eval()
    gray = torch.rand(4, 1, 32, 32)
    output = network(gray.expand(-1, 3, -1, -1), EVERYTHING)
    torch.testing.assert_close(output.logits, network.body((gray - 0.5) / 0.25))
    red = torch.zeros(1, 3, 32, 32)
    red[:, 0] = 1.0
    bright = wrap(network.body, image_size=32, num_classes=10).eval()(red).logits
    torch.testing.assert_close(bright, network.body(torch.full((1, 1, 32, 32), 0.299)))


def test_a_network_that_fails_is_told_with_the_line_of_its_own_code():
    def of_another_size(logits, auxiliary):
        return F.linear(logits, auxiliary.new_zeros(7, 11))

    line = of_another_size.__code__.co_firstlineno + 1
    with pytest.raises(
        UserError, match=rf"\(RuntimeError: .*\) at test_own_networks\.py, line {line}; correct that, or"
    ):
        wrap(Returns(of_another_size), image_size=32, num_classes=10)


def test_a_network_that_ends_in_a_softmax_is_refused():
    with pytest.raises(UserError, match="ends in a softmax"):
        wrap(nn.Sequential(four_stages(), nn.Softmax(1)), image_size=32, num_classes=10)
    wrap(nn.Sequential(four_stages(), nn.LogSoftmax(1)), image_size=32, num_classes=10)  # is its own logits


FACTORIES = """
from torch import nn

def bare():
    return nn.Linear(3, 10)

def net(num_classes, width=8):
    first = nn.Sequential(nn.Conv2d(3, width, 4, 4), nn.ReLU())
    return nn.Sequential(first, nn.Conv2d(width, 8, 4, 4), nn.Flatten(), nn.Linear(32, num_classes))

class Viewing(nn.Module):
    def __init__(self, num_classes, width=256, stride=2):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, width, 3, stride, 1), nn.Conv2d(width, width, 3, stride, 1)
        self.norm, self.third = nn.BatchNorm2d(width), nn.Conv2d(width, width, 3, 1, 1)
        self.head = nn.Linear(width * (8 // stride**2) ** 2, num_classes)

    def forward(self, x):
        x = self.norm(self.second(self.first(x).relu()))
        x = self.third(x.view(x.size(0), -1).view(x.shape))
        return self.head(x.view(x.size(0), -1))

class Laid(Viewing):
    def forward(self, x):
        return super().forward(x.contiguous())

def large(num_classes):
    return Viewing(num_classes, 128, 1)
"""


@pytest.fixture
def factories(tmp_path, monkeypatch):
    (tmp_path / "ownfactories.py").write_text(FACTORIES)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.chdir(tmp_path)
    yield "ownfactories"
    sys.modules.pop("ownfactories", None)


def test_a_factory_that_fails_is_shown_with_the_call_that_was_tried(factories):
    with pytest.raises(UserError, match=r"bare\(num_classes=10\) failed \(TypeError.*takes num_classes"):
        create(f"{factories}:bare", DATA)
    with pytest.raises(UserError, match=r"net\(num_classes=10, depth=3\) failed"):
        create(f"{factories}:net", DATA, depth=3)
    assert create(f"{factories}:net", DATA, width=12).body[0][0].out_channels == 12


@pytest.mark.parametrize("kind", ["Viewing", "Laid"])
def test_a_network_that_asks_for_views_of_its_maps_is_given_contiguous_ones(factories, kind):
    data = DATA._replace(image_size=8)
    viewing, plain = (channels_last(create(name, data).eval()) for name in (f"{factories}:{kind}", "resnet8"))
    assert all(weight.is_contiguous() for weight in viewing.parameters())
    assert not all(weight.is_contiguous() for weight in plain.parameters())
    images = torch.rand(3, 3, 8, 8)
    other = images.contiguous(memory_format=torch.channels_last)
    for network in (viewing, plain):
        torch.testing.assert_close(network(other).logits, network(images).logits, rtol=1e-3, atol=1e-4)


@pytest.mark.slow(reason="trains two networks")
@pytest.mark.parametrize(("name", "precision"), [("Viewing", "float32"), ("Viewing", "bf16"), ("large", "float32")])
def test_a_network_that_asks_for_views_of_its_maps_teaches_and_learns(tmp_path, factories, name, precision):
    short = ["protocol.epochs=2", "data.limit=128", "teacher.epochs=1", "teacher.allow_weak=true"]
    name = f"{factories}:{name}"
    found = kdzoo.run(
        "kd", name, name, overrides=[*short, f"engine.precision={precision}"], out=tmp_path / "runs", quiet=True
    )
    assert evaluate_run(found.folder) == (found.top1, found.top5)


@pytest.mark.parametrize("name", ["ownfactories:net", "resnet8", "torchvision:resnet18"])
def test_taps_may_be_named_for_any_network(factories, name):
    bare = create(name, DATA)
    first = next(part for part, module in bare.body.named_modules() if isinstance(module, nn.Conv2d))
    named = create(name, DATA, taps=[first] * 4).eval()
    maps = named(IMAGES, EVERYTHING).features
    assert len(maps) == 4
    assert all(one.equal(maps[0]) for one in maps)
    assert len(bare(IMAGES, EVERYTHING).features) == (0 if name.startswith("own") else 4)
