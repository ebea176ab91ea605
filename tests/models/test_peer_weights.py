"""Weights of other libraries' networks: their names and shapes written by rule, their logits as their code gave them.

Weights are a closed form of a parameter's name and of each element's index, so that a block in the wrong place changes
the logits. The expected numbers were computed once by the definitions that ``source`` names, in float64.
"""

import json
import math
import zlib
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from kdzoo import DataSpec
from kdzoo.errors import UserError
from kdzoo.models import create, load_weights

CLASSES, SIDE = 10, 32
DATA = DataSpec("fake", CLASSES, tuple("abcdefghij"), SIDE, torch.arange(CLASSES), mean=(0.0,) * 3, std=(1.0,) * 3)
EXPECTED = json.loads(Path(__file__).with_name("peer_logits.json").read_text(encoding="utf-8"))


def closed_form(name, shape):
    """A tensor in float64 that its name and shape alone decide."""
    count = math.prod(shape)
    phase = zlib.crc32(name.encode()) % 1000
    wave = torch.sin(torch.arange(count, dtype=torch.float64) * 1.7 + phase).view(shape)
    if name.endswith("running_var"):
        return 1 + wave / 4
    if len(shape) == 1:
        return (1.0 if name.endswith("weight") else 0.0) + wave / 5
    return wave * (2 / math.prod(shape[1:])) ** 0.5


def pictures(count=2):
    return (torch.sin(torch.arange(count * 3 * SIDE * SIDE, dtype=torch.float64) * 0.37) / 2 + 0.5).view(
        count, 3, SIDE, SIDE
    )


class Shapes(dict):
    """Names and shapes of a network's tensors, layer by layer."""

    def conv(self, name, inputs, outputs, kernel, bias=False):
        self[f"{name}.weight"] = (outputs, inputs, kernel, kernel)
        if bias:
            self[f"{name}.bias"] = (outputs,)

    def norm(self, name, width):
        self.update({f"{name}.{leaf}": (width,) for leaf in ("weight", "bias", "running_mean", "running_var")})

    def linear(self, name, inputs):
        self.update({f"{name}.weight": (CLASSES, inputs), f"{name}.bias": (CLASSES,)})


def resnet(depths, widths, stem, bottleneck=False, shortcut="downsample", head="fc"):
    """``conv1, bn1, layerS.B.convN``: RepDistiller's and mdistiller's resnet.py and resnetv2.py, chenyaofo's."""
    net, inputs = Shapes(), stem
    net.conv("conv1", 3, stem, 3)
    net.norm("bn1", stem)
    for stage, (depth, width) in enumerate(zip(depths, widths, strict=True), start=1):
        for block in range(depth):
            name, outputs = f"layer{stage}.{block}", width * (4 if bottleneck else 1)
            plan = [(inputs, width, 1), (width, width, 3), (width, outputs, 1)]
            for number, (i, o, k) in enumerate(
                plan if bottleneck else [(inputs, width, 3), (width, width, 3)], start=1
            ):
                net.conv(f"{name}.conv{number}", i, o, k)
                net.norm(f"{name}.bn{number}", o)
            if (stage > 1 and block == 0) or inputs != outputs:
                net.conv(f"{name}.{shortcut}.0", inputs, outputs, 1)
                net.norm(f"{name}.{shortcut}.1", outputs)
            inputs = outputs
    net.linear(head, inputs)
    return net


def residual_function(depths, widths):
    """``convS_x.B.residual_function.N``: weiaicunzai's resnet.py."""
    net, inputs = Shapes(), 64
    net.conv("conv1.0", 3, 64, 3)
    net.norm("conv1.1", 64)
    for stage, (depth, width) in enumerate(zip(depths, widths, strict=True), start=2):
        for block in range(depth):
            name = f"conv{stage}_x.{block}"
            net.conv(f"{name}.residual_function.0", inputs, width, 3)
            net.norm(f"{name}.residual_function.1", width)
            net.conv(f"{name}.residual_function.3", width, width, 3)
            net.norm(f"{name}.residual_function.4", width)
            if inputs != width:
                net.conv(f"{name}.shortcut.0", inputs, width, 1)
                net.norm(f"{name}.shortcut.1", width)
            inputs = width
    net.linear("fc", inputs)
    return net


def wrn(depth, factor):
    """``blockS.layer.B.bnN``: RepDistiller's and mdistiller's wrn.py."""
    net, inputs = Shapes(), 16
    net.conv("conv1", 3, 16, 3)
    for stage, width in enumerate((16 * factor, 32 * factor, 64 * factor), start=1):
        for block in range((depth - 4) // 6):
            name = f"block{stage}.layer.{block}"
            net.norm(f"{name}.bn1", inputs)
            net.conv(f"{name}.conv1", inputs, width, 3)
            net.norm(f"{name}.bn2", width)
            net.conv(f"{name}.conv2", width, width, 3)
            if inputs != width:
                net.conv(f"{name}.convShortcut", inputs, width, 1)
            inputs = width
    net.norm("bn1", inputs)
    net.linear("fc", inputs)
    return net


def vgg(depths):
    """``blockI.J``: RepDistiller's and mdistiller's vgg.py, with batch norm."""
    net, inputs = Shapes(), 3
    for block, (depth, width) in enumerate(zip(depths, (64, 128, 256, 512, 512), strict=True)):
        for number in range(depth):
            net.conv(f"block{block}.{3 * number}", inputs, width, 3, bias=True)
            net.norm(f"block{block}.{3 * number + 1}", width)
            inputs = width
    net.linear("classifier", inputs)
    return net


def mobilenetv2():
    """``blocks.I.J.conv.N``: RepDistiller's and mdistiller's mobilenetv2.py at half width."""
    net, inputs = Shapes(), 16
    net.conv("conv1.0", 3, 16, 3)
    net.norm("conv1.1", 16)
    rows = [(1, 8, 1), (6, 12, 2), (6, 16, 3), (6, 32, 4), (6, 48, 3), (6, 80, 3), (6, 160, 1)]
    for row, (expansion, width, count) in enumerate(rows):
        for block in range(count):
            name, hidden = f"blocks.{row}.{block}.conv", inputs * expansion
            for number, (i, o, k) in enumerate([(inputs, hidden, 1), (1, hidden, 3), (hidden, width, 1)]):
                net.conv(f"{name}.{3 * number}", i, o, k)
                net.norm(f"{name}.{3 * number + 1}", o)
            inputs = width
    net.conv("conv2.0", inputs, 1280, 1)
    net.norm("conv2.1", 1280)
    net.linear("classifier.0", 1280)
    return net


def shufflenetv1():
    """``layerS.B.convN``: RepDistiller's and mdistiller's ShuffleNetv1.py, three groups."""
    net, inputs = Shapes(), 24
    net.conv("conv1", 3, 24, 1)
    net.norm("bn1", 24)
    for stage, (width, depth) in enumerate(((240, 4), (480, 8), (960, 4)), start=1):
        for block in range(depth):
            name, outputs = f"layer{stage}.{block}", width - (inputs if block == 0 else 0)
            middle, first = outputs // 4, 1 if inputs == 24 else 3
            for number, (i, o, k) in enumerate(
                [(inputs // first, middle, 1), (1, middle, 3), (middle // 3, outputs, 1)], 1
            ):
                net.conv(f"{name}.conv{number}", i, o, k)
                net.norm(f"{name}.bn{number}", o)
            inputs = width
    net.linear("linear", inputs)
    return net


def shufflenetv2():
    """``layerS.B.convN``, five of them in strided units: RepDistiller's and mdistiller's ShuffleNetv2.py."""
    net, inputs = Shapes(), 24
    net.conv("conv1", 3, 24, 1)
    net.norm("bn1", 24)
    for stage, (width, depth) in enumerate(((116, 4), (232, 8), (464, 4)), start=1):
        half = width // 2
        for block in range(depth):
            strided = [(1, inputs, 3), (inputs, half, 1), (inputs, half, 1), (1, half, 3), (half, half, 1)]
            plan = strided if block == 0 else [(half, half, 1), (1, half, 3), (half, half, 1)]
            for number, (i, o, k) in enumerate(plan, start=1):
                net.conv(f"layer{stage}.{block}.conv{number}", i, o, k)
                net.norm(f"layer{stage}.{block}.bn{number}", o)
        inputs = width
    net.conv("conv2", inputs, 1024, 1)
    net.norm("bn2", 1024)
    net.linear("linear", 1024)
    return net


def torchvision_mobilenetv2():
    """``features.I.conv.N``: chenyaofo's mobilenetv2.py at full width, and torchvision's."""
    net, inputs = Shapes(), 32
    net.conv("features.0.0", 3, 32, 3)
    net.norm("features.0.1", 32)
    number = 1
    for expansion, width, count in [
        (1, 16, 1),
        (6, 24, 2),
        (6, 32, 3),
        (6, 64, 4),
        (6, 96, 3),
        (6, 160, 3),
        (6, 320, 1),
    ]:
        for _ in range(count):
            name, hidden = f"features.{number}.conv", inputs * expansion
            layers = ([(inputs, hidden, 1)] if expansion > 1 else []) + [(1, hidden, 3)]
            for index, (i, o, k) in enumerate(layers):
                net.conv(f"{name}.{index}.0", i, o, k)
                net.norm(f"{name}.{index}.1", o)
            net.conv(f"{name}.{len(layers)}", hidden, width, 1)
            net.norm(f"{name}.{len(layers) + 1}", width)
            inputs, number = width, number + 1
    net.conv("features.18.0", inputs, 1280, 1)
    net.norm("features.18.1", 1280)
    net.linear("classifier.1", 1280)
    return net


def mobilenetv1():
    """``model.I.N``: mdistiller's imagenet/mobilenetv1.py."""
    net = Shapes()
    net.conv("model.0.0", 3, 32, 3)
    net.norm("model.0.1", 32)
    widths = [32, 64, 128, 128, 256, 256, *[512] * 6, 1024, 1024]
    for block, (i, o) in enumerate(pairwise(widths), start=1):
        net.conv(f"model.{block}.0", 1, i, 3)
        net.norm(f"model.{block}.1", i)
        net.conv(f"model.{block}.3", i, o, 1)
        net.norm(f"model.{block}.4", o)
    net.linear("fc", 1024)
    return net


NARROW, WIDE, DEEP = (16, 32, 64), (64, 128, 256), (64, 128, 256, 512)
PEERS = {  # kdzoo's name, names and shapes
    "resnet8": ("resnet8", resnet((1, 1, 1), NARROW, 16)),
    "resnet20": ("resnet20", resnet((3, 3, 3), NARROW, 16)),
    "resnet32x4": ("resnet32x4", resnet((5, 5, 5), WIDE, 32)),
    "ResNet50": ("resnet50_cifar", resnet((3, 4, 6, 3), DEEP, 64, True, "shortcut", "linear")),
    "ResNet18": ("resnet18", resnet((2, 2, 2, 2), DEEP, 64, False, "shortcut", "linear")),
    "pytorch-cifar100 resnet18": ("resnet18", residual_function((2, 2, 2, 2), DEEP)),
    "wrn_16_2": ("wrn_16_2", wrn(16, 2)),
    "wrn_40_1": ("wrn_40_1", wrn(40, 1)),
    "vgg8": ("vgg8", vgg((1, 1, 1, 1, 1))),
    "vgg13": ("vgg13", vgg((2, 2, 2, 2, 2))),
    "MobileNetV2": ("mobilenetv2_half", mobilenetv2()),
    "ShuffleV1": ("shufflenetv1", shufflenetv1()),
    "ShuffleV2": ("shufflenetv2", shufflenetv2()),
}


def weights_of(shapes):
    return {name: closed_form(name, shape) for name, shape in shapes.items()}


def logits_of(name, state, tmp_path, **options):
    network = create(name, DATA, **options).double().eval()
    torch.save({"epoch": 240, "model": state}, tmp_path / "ckpt_epoch_240.pth")
    said = load_weights(network, tmp_path / "ckpt_epoch_240.pth")
    return network.body(pictures()).detach(), said


def distance(logits, expected):
    """The largest difference as a share of the largest logit."""
    expected = torch.tensor(expected, dtype=torch.float64)
    return ((logits - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.slow(reason="passes through large networks")
@pytest.mark.parametrize("peer", PEERS)
def test_weights_of_other_libraries_give_the_logits_that_their_code_gives(peer, tmp_path):
    name, shapes = PEERS[peer]
    logits, said = logits_of(name, weights_of(shapes), tmp_path)
    assert "names translated" in said
    assert distance(logits, EXPECTED[peer]) < 1e-6


def test_two_blocks_in_each_others_place_would_be_noticed(tmp_path):
    state = weights_of(PEERS["resnet20"][1])
    swapped = {
        key.replace("layer2.1.", "X").replace("layer2.2.", "layer2.1.").replace("X", "layer2.2."): value
        for key, value in state.items()
    }
    logits, _ = logits_of("resnet20", swapped, tmp_path)
    assert distance(logits, EXPECTED["resnet20"]) > 1e-4


@pytest.mark.parametrize("name", ["mobilenetv2", "mobilenetv2_half"])
def test_another_mobilenet_is_refused_though_order_and_shapes_agree(name, tmp_path):
    state = weights_of(torchvision_mobilenetv2())
    shapes = [
        tuple(value.shape) for key, value in create("mobilenetv2", DATA).body.state_dict().items() if "num_" not in key
    ]
    assert [tuple(value.shape) for value in state.values()] == shapes
    with pytest.raises(UserError, match=r"chenyaofo's keeps the resolution in its second stage.*another network"):
        logits_of(name, state, tmp_path)


def test_a_mobilenet_of_other_activations_is_refused_and_loads_where_they_agree(tmp_path):
    state = weights_of(mobilenetv1())
    with pytest.raises(UserError, match=r"ReLU where timm's has ReLU6; pass teacher\.options\.act_layer=relu"):
        logits_of("mobilenetv1", state, tmp_path)
    network = create("mobilenetv1", DATA._replace(image_size=224), act_layer="relu").double().eval()
    torch.save(state, tmp_path / "mobilenet.pth")
    assert "names translated" in load_weights(network, tmp_path / "mobilenet.pth")
    assert distance(network.body(pictures()).detach(), EXPECTED["MobileNetV1"]) < 1e-6


@pytest.mark.slow(reason="passes through large networks")
def test_a_file_of_the_network_as_timm_has_it_is_refused_where_the_stem_keeps_resolution(tmp_path):
    timms = create("mobilenetv2", DATA._replace(image_size=224)).body.state_dict()
    torch.save(timms, tmp_path / "weights.pth")
    with pytest.raises(UserError, match=r"another stem .*3x3 stride 2 -> 3x3 stride 1.*image_size=224"):
        load_weights(create("mobilenetv2", DATA), tmp_path / "weights.pth")
    said = load_weights(create("mobilenetv2", DATA._replace(image_size=224)), tmp_path / "weights.pth")
    assert "stem as defined" in said
