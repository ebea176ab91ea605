"""Translate the parameter names of other libraries to those of the same networks here.

A rule holds for one definition of one architecture, and speaks of names alone: weights that fit by order and shape may
belong to another network. Sources: RepDistiller (models/), mdistiller (mdistiller/models/), chenyaofo's
pytorch-cifar-models (pytorch_cifar_models/resnet.py) and weiaicunzai's pytorch-cifar100 (models/resnet.py).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from typing import NamedTuple

from torch import nn

from kdzoo.models.staged import StagedNet

# From a pattern of a layer's whole name to its name here, given the numbers in it.
Rules = Mapping[str, str | Callable[..., str]]


def _is_ours(body: nn.Module) -> bool:
    return isinstance(body, StagedNet)


def _keeps_resolution(body: nn.Module) -> bool:
    """Tell whether a ResNet of timm or torchvision has the stem for small images, as those of the peers have."""
    stem = getattr(body, "conv1", None)
    return isinstance(stem, nn.Conv2d) and stem.stride == (1, 1) and isinstance(body.maxpool, nn.Identity)


def _is_rectified(body: nn.Module) -> bool:
    """Tell whether a MobileNet has ReLU everywhere, not ReLU6."""
    return hasattr(body, "conv_stem") and not any(isinstance(module, nn.ReLU6) for module in body.modules())


class Dialect(NamedTuple):
    """The names of one definition of an architecture elsewhere."""

    origin: str
    suits: Callable[[nn.Module], bool]  # whether a network here can be that architecture
    rules: Rules

    def translate(self, name: str) -> str:
        """Return the name here of a parameter; one that no rule speaks of stays as it is."""
        layer, _, leaf = name.rpartition(".")
        for pattern, target in self.rules.items():
            if found := re.fullmatch(pattern, layer):
                return f"{target if isinstance(target, str) else target(*map(int, found.groups()))}.{leaf}"
        return name


STEM: Rules = {"conv1": "stem.0", "bn1": "stem.1", "linear": "fc"}
REPDISTILLER = "RepDistiller and mdistiller"

DIALECTS = (
    Dialect(
        f"{REPDISTILLER} (ResNet)",
        _is_ours,
        {
            **STEM,
            r"layer(\d+)\.(\d+)\.conv(\d+)": lambda s, b, n: f"stages.{s - 1}.{b}.path.{n - 1}.0",
            r"layer(\d+)\.(\d+)\.bn(\d+)": lambda s, b, n: f"stages.{s - 1}.{b}.path.{n - 1}.1",
            r"layer(\d+)\.(\d+)\.(?:downsample|shortcut)\.(\d+)": lambda s, b, n: f"stages.{s - 1}.{b}.shortcut.{n}",
        },
    ),
    Dialect(
        f"{REPDISTILLER} (WRN)",
        _is_ours,
        {
            "conv1": "stem",
            "bn1": "neck.0",
            r"block(\d+)\.layer\.(\d+)\.bn1": lambda s, b: f"stages.{s - 1}.{b}.enter.0",
            r"block(\d+)\.layer\.(\d+)\.conv1": lambda s, b: f"stages.{s - 1}.{b}.path.0",
            r"block(\d+)\.layer\.(\d+)\.bn2": lambda s, b: f"stages.{s - 1}.{b}.path.1.0",
            r"block(\d+)\.layer\.(\d+)\.conv2": lambda s, b: f"stages.{s - 1}.{b}.path.2",
            r"block(\d+)\.layer\.(\d+)\.convShortcut": lambda s, b: f"stages.{s - 1}.{b}.shortcut",
        },
    ),
    Dialect(
        f"{REPDISTILLER} (VGG)",
        _is_ours,
        {  # convolution, norm and ReLU are counted on; pooling stands before all blocks here but the first
            r"block0\.(\d+)": lambda j: f"stem.{j // 3}.{j % 3}",
            r"block(\d+)\.(\d+)": lambda i, j: f"stages.{i - 1}.{j // 3 + 1}.{j % 3}",
            "classifier": "fc",
        },
    ),
    Dialect(
        f"{REPDISTILLER} (MobileNetV2)",
        _is_ours,
        {  # their seven rows of blocks are four stages here, by resolution
            r"conv1\.(\d+)": lambda n: f"stem.{n}",
            r"blocks\.0\.0\.conv\.(\d+)": lambda n: f"stages.0.0.path.{n // 3}.{n % 3}",
            r"blocks\.1\.(\d+)\.conv\.(\d+)": lambda b, n: f"stages.0.{b + 1}.path.{n // 3}.{n % 3}",
            r"blocks\.2\.(\d+)\.conv\.(\d+)": lambda b, n: f"stages.1.{b}.path.{n // 3}.{n % 3}",
            r"blocks\.3\.(\d+)\.conv\.(\d+)": lambda b, n: f"stages.2.{b}.path.{n // 3}.{n % 3}",
            r"blocks\.4\.(\d+)\.conv\.(\d+)": lambda b, n: f"stages.2.{b + 4}.path.{n // 3}.{n % 3}",
            r"blocks\.5\.(\d+)\.conv\.(\d+)": lambda b, n: f"stages.3.{b}.path.{n // 3}.{n % 3}",
            r"blocks\.6\.0\.conv\.(\d+)": lambda n: f"stages.3.3.path.{n // 3}.{n % 3}",
            r"conv2\.(\d+)": lambda n: f"neck.{n}",
            r"classifier\.0": "fc",
        },
    ),
    Dialect(
        f"{REPDISTILLER} (ShuffleNet)",
        _is_ours,
        {
            **STEM,
            r"layer(\d+)\.(\d+)\.conv1": lambda s, b: f"stages.{s - 1}.{b}.squeeze.0",
            r"layer(\d+)\.(\d+)\.bn1": lambda s, b: f"stages.{s - 1}.{b}.squeeze.1",
            r"layer(\d+)\.(\d+)\.conv2": lambda s, b: f"stages.{s - 1}.{b}.depthwise.0",
            r"layer(\d+)\.(\d+)\.bn2": lambda s, b: f"stages.{s - 1}.{b}.depthwise.1",
            r"layer(\d+)\.(\d+)\.conv3": lambda s, b: f"stages.{s - 1}.{b}.expand.0",
            r"layer(\d+)\.(\d+)\.bn3": lambda s, b: f"stages.{s - 1}.{b}.expand.1",
        },
    ),
    Dialect(
        f"{REPDISTILLER} (ShuffleNetV2)",
        _is_ours,
        {  # in a strided unit, their first two convolutions are those of the other half
            **STEM,
            r"layer(\d+)\.0\.conv([12])": lambda s, n: f"stages.{s - 1}.0.other.{n - 1}.0",
            r"layer(\d+)\.0\.bn([12])": lambda s, n: f"stages.{s - 1}.0.other.{n - 1}.1",
            r"layer(\d+)\.0\.conv([345])": lambda s, n: f"stages.{s - 1}.0.path.{n - 3}.0",
            r"layer(\d+)\.0\.bn([345])": lambda s, n: f"stages.{s - 1}.0.path.{n - 3}.1",
            r"layer(\d+)\.(\d+)\.conv(\d+)": lambda s, b, n: f"stages.{s - 1}.{b}.path.{n - 1}.0",
            r"layer(\d+)\.(\d+)\.bn(\d+)": lambda s, b, n: f"stages.{s - 1}.{b}.path.{n - 1}.1",
            "conv2": "neck.0",
            "bn2": "neck.1",
        },
    ),
    Dialect(
        "weiaicunzai's pytorch-cifar100 (ResNet)",
        _is_ours,
        {
            r"conv1\.(\d+)": lambda n: f"stem.{n}",
            r"conv(\d+)_x\.(\d+)\.residual_function\.(\d+)": lambda s, b, n: (
                f"stages.{s - 2}.{b}.path.{n // 3}.{n % 3}"
            ),
            r"conv(\d+)_x\.(\d+)\.shortcut\.(\d+)": lambda s, b, n: f"stages.{s - 2}.{b}.shortcut.{n}",
        },
    ),
    Dialect(
        "mdistiller (ResNet of CIFAR and TinyImageNet)",
        _keeps_resolution,
        {
            r"layer(\d+)\.(\d+)\.shortcut\.(\d+)": lambda s, b, n: f"layer{s}.{b}.downsample.{n}",
            "linear": "fc",
        },
    ),
    Dialect(
        "weiaicunzai's pytorch-cifar100 (ResNet)",
        _keeps_resolution,
        {
            r"conv1\.0": "conv1",
            r"conv1\.1": "bn1",
            r"conv(\d+)_x\.(\d+)\.residual_function\.(\d+)": lambda s, b, n: (
                f"layer{s - 1}.{b}.{('conv', 'bn')[n % 3]}{n // 3 + 1}"
            ),
            r"conv(\d+)_x\.(\d+)\.shortcut\.(\d+)": lambda s, b, n: f"layer{s - 1}.{b}.downsample.{n}",
        },
    ),
    Dialect(
        "mdistiller (MobileNetV1)",
        _is_rectified,
        {
            r"model\.0\.0": "conv_stem",
            r"model\.0\.1": "bn1",
            r"model\.(\d+)\.0": lambda b: f"{_separable(b)}.conv_dw",
            r"model\.(\d+)\.1": lambda b: f"{_separable(b)}.bn1",
            r"model\.(\d+)\.3": lambda b: f"{_separable(b)}.conv_pw",
            r"model\.(\d+)\.4": lambda b: f"{_separable(b)}.bn2",
            "fc": "classifier",
        },
    ),
)


def _separable(number: int) -> str:
    """Name the block of timm's MobileNetV1 that is the given one, counted from 1 through all of its stages."""
    stage, before = next((i, first) for i, first in reversed(list(enumerate((1, 2, 4, 6, 12)))) if number >= first)
    return f"blocks.{stage}.{number - before}"


# Layers by which another library's network is known, and why its weights belong to none here under another name.
OTHERS = (
    (
        {"features.0.0.weight", "features.1.conv.0.0.weight"},
        "its names are those of MobileNetV2 in torchvision and in chenyaofo's pytorch-cifar-models, which have the "
        "same shapes but other strides (chenyaofo's keeps the resolution in its second stage), so this is another "
        "network; torchvision's is torchvision:mobilenet_v2, and the other is given as a module, mymodule:factory",
    ),
    (
        {"pre.0.weight", "stage1.residual.0.weight"},
        "its names are those of MobileNetV2 in weiaicunzai's pytorch-cifar100, whose stem and strides are others",
    ),
    (
        {"pre.0.weight", "stage2.0.residual.0.weight"},
        "its names are those of ShuffleNetV2 in weiaicunzai's pytorch-cifar100, whose units have other convolutions",
    ),
    (
        {"conv1.0.weight", "stage2.0.branch1.0.weight"},
        "its names are those of ShuffleNetV2 in torchvision and in chenyaofo's pytorch-cifar-models, whose stem is "
        "3x3; torchvision's is torchvision:shufflenet_v2_x1_0",
    ),
    (
        {"features.0.weight", "classifier.0.weight"},
        "its names are those of a VGG with hidden fully connected layers, which is another network; torchvision's is "
        "torchvision:vgg16_bn",
    ),
    (
        {"stem.0.conv.weight", "stem.1.pointwise.0.bias"},
        "its names are those of MobileNet in weiaicunzai's pytorch-cifar100, whose convolutions have biases",
    ),
    (
        {"model.0.0.weight", "model.1.3.weight"},
        "its names are those of mdistiller's MobileNetV1, which has ReLU where timm's has ReLU6; pass "
        "teacher.options.act_layer=relu",
    ),
)


def dialects(body: nn.Module) -> list[Dialect]:
    """List the definitions elsewhere that can be this architecture."""
    return [dialect for dialect in DIALECTS if dialect.suits(body)]


def known_as(names: Collection[str]) -> str:
    """Say which network elsewhere has parameters of these names, if it is one that is none of kdzoo's; else nothing."""
    return next((reason for marks, reason in OTHERS if marks <= set(names)), "")
