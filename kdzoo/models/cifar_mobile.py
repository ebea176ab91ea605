"""Mobile networks for 32x32 images: ShuffleNet v1 and v2, and MobileNetV2 at half width."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kdzoo.connectors import keep_layout
from kdzoo.models.staged import StagedNet, conv_norm, init_classifier, init_weights, register

REDUCTIONS = (1, 2, 4, 8)  # of the stem and the stages of both ShuffleNets


def _shuffle(x: Tensor, groups: int) -> Tensor:
    """Mix the channels of maps (B, C, H, W), and leave them laid out as they are."""
    if x.is_contiguous(memory_format=torch.channels_last):
        return x.movedim(1, -1).unflatten(-1, (groups, -1)).transpose(-1, -2).flatten(-2).movedim(-1, 1)
    return x.unflatten(1, (groups, -1)).transpose(1, 2).flatten(1, 2)


class ShuffleUnitV1(nn.Module):
    """ShuffleNet's unit: grouped 1x1, depthwise 3x3 and grouped 1x1 convolutions, with a shortcut.

    The shortcut is added; with a stride it is pooled and concatenated.
    """

    def __init__(self, inputs: int, outputs: int, stride: int, groups: int, first_groups: int):
        super().__init__()
        self.stride, self.first_groups = stride, first_groups
        added = outputs - inputs if stride == 2 else outputs
        middle = added // 4
        self.squeeze = conv_norm(inputs, middle, 1, groups=first_groups)
        self.depthwise = conv_norm(middle, middle, 3, stride, groups=middle)
        self.expand = conv_norm(middle, added, 1, groups=groups, relu=False)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, C', H / stride, W / stride)."""
        path = self.expand(self.depthwise(_shuffle(self.squeeze(x), self.first_groups)))
        if self.stride == 2:
            return self.act(torch.cat([keep_layout(path), F.avg_pool2d(x, 3, 2, 1)], 1))
        return self.act(path + x)


class ShuffleUnitV2(nn.Module):
    """ShuffleNetV2's unit: one half of the channels through 1x1, depthwise 3x3 and 1x1 convolutions.

    The other half is passed on. With a stride, both halves are convolved.
    """

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        half = outputs // 2
        entering = inputs if stride == 2 else half
        self.path = nn.Sequential(
            conv_norm(entering, half, 1),
            conv_norm(half, half, 3, stride, groups=half, relu=False),
            conv_norm(half, half, 1, relu=False),
        )
        self.strided = stride == 2
        if self.strided:
            self.other = nn.Sequential(
                conv_norm(inputs, inputs, 3, stride, groups=inputs, relu=False), conv_norm(inputs, half, 1, relu=False)
            )
        self.act = nn.ReLU()  # in place, it would cost autograd copies: shuffled maps are a view

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, C', H / stride, W / stride)."""
        kept, changed = (keep_layout(self.other(x)), x) if self.strided else x.chunk(2, 1)
        # What is kept was rectified before; one ReLU for both leaves it, and the unit's map before it, whole.
        return self.act(_shuffle(torch.cat([kept, keep_layout(self.path(changed))], 1), 2))


class InvertedResidual(nn.Module):
    """MobileNetV2's block: 1x1 expansion, depthwise 3x3 and linear 1x1, with a shortcut where the shapes agree."""

    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int):
        super().__init__()
        hidden = inputs * expansion
        self.path = nn.Sequential(
            conv_norm(inputs, hidden, 1),
            conv_norm(hidden, hidden, 3, stride, groups=hidden),
            conv_norm(hidden, outputs, 1, relu=False),
        )
        self.adds = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, C', H / stride, W / stride)."""
        return x + self.path(x) if self.adds else self.path(x)


def shufflenetv1(num_classes: int = 100, in_chans: int = 3, drop_rate: float = 0.0) -> StagedNet:
    """Make a ShuffleNet with three groups and a 1x1 stem that keeps the resolution.

    Source: Zhang et al. 2018, table 1, as trained on CIFAR (RepDistiller, models/ShuffleNetv1.py).
    """
    widths, groups = [24, 240, 480, 960], 3
    stages = []
    for index, depth in enumerate((4, 8, 4)):
        inputs, width = widths[index], widths[index + 1]
        # Groups would starve the first convolution after the narrow stem.
        first = ShuffleUnitV1(inputs, width, 2, groups, 1 if index == 0 else groups)
        rest = [ShuffleUnitV1(width, width, 1, groups, groups) for _ in range(depth - 1)]
        stages.append(nn.Sequential(first, *rest))
    return StagedNet(conv_norm(in_chans, 24, 1), stages, nn.Identity(), widths, REDUCTIONS, num_classes, drop_rate)


def shufflenetv2(num_classes: int = 100, in_chans: int = 3, drop_rate: float = 0.0) -> StagedNet:
    """Make a ShuffleNetV2 1x with a 1x1 stem that keeps the resolution.

    Source: Ma et al. 2018, table 5, as trained on CIFAR (RepDistiller, models/ShuffleNetv2.py).
    """
    widths = [24, 116, 232, 464]
    stages = []
    for index, depth in enumerate((4, 8, 4)):
        inputs, width = widths[index], widths[index + 1]
        rest = [ShuffleUnitV2(width, width, 1) for _ in range(depth - 1)]
        stages.append(nn.Sequential(ShuffleUnitV2(inputs, width, 2), *rest))
    neck = conv_norm(widths[-1], 1024, 1)
    return StagedNet(conv_norm(in_chans, 24, 1), stages, neck, [*widths, 1024], REDUCTIONS, num_classes, drop_rate)


def mobilenetv2_half(num_classes: int = 100, in_chans: int = 3, drop_rate: float = 0.0) -> StagedNet:
    """Make a MobileNetV2 at half width and expansion 6, which maps a 32x32 image to a 2x2 map.

    Source: Sandler et al. 2018, table 2, as trained on CIFAR (RepDistiller, models/mobilenetv2.py).
    """
    table = [  # stages of (expansion, channels, blocks, stride)
        [(1, 8, 1, 1), (6, 12, 2, 1)],
        [(6, 16, 3, 2)],
        [(6, 32, 4, 2), (6, 48, 3, 1)],
        [(6, 80, 3, 2), (6, 160, 1, 1)],
    ]
    channels, stages, widths = 16, [], [16]
    for rows in table:
        blocks = []
        for expansion, width, count, stride in rows:
            for index in range(count):
                blocks.append(InvertedResidual(channels, width, stride if index == 0 else 1, expansion))
                channels = width
        stages.append(nn.Sequential(*blocks))
        widths.append(channels)
    neck = conv_norm(channels, 1280, 1)
    net = StagedNet(
        conv_norm(in_chans, 16, 3, 2), stages, neck, [*widths, 1280], [2, 2, 4, 8, 16], num_classes, drop_rate
    )
    init_weights(net)
    init_classifier(net, 0.01)
    return net


for build in (shufflenetv1, shufflenetv2, mobilenetv2_half):
    register(build.__name__, build)
