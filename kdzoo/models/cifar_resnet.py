"""ResNets for 32x32 images: 6n+2 layers in three stages, their wider variants, and ResNet-50 with a small stem."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from torch import Tensor, nn

from kdzoo.models.staged import StagedNet, conv_norm, init_weights, register


class Residual(nn.Module):
    """A residual block: the ReLU of a path plus a shortcut, a strided 1x1 convolution where the shapes differ."""

    def __init__(self, path: nn.Module, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.path = path
        same = stride == 1 and inputs == outputs
        self.shortcut = nn.Identity() if same else conv_norm(inputs, outputs, 1, stride, relu=False)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, C', H / stride, W / stride)."""
        return self.act(self.path(x) + self.shortcut(x))


def _basic(inputs: int, width: int, stride: int) -> nn.Sequential:
    return nn.Sequential(conv_norm(inputs, width, 3, stride), conv_norm(width, width, 3, relu=False))


def _bottleneck(inputs: int, width: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        conv_norm(inputs, width, 1),
        conv_norm(width, width, 3, stride),
        conv_norm(width, 4 * width, 1, relu=False),
    )


def cifar_resnet(
    depths: Sequence[int],
    widths: Sequence[int],
    bottleneck: bool = False,
    num_classes: int = 100,
    in_chans: int = 3,
    drop_rate: float = 0.0,
) -> StagedNet:
    """Make a ResNet that starts at full resolution and halves it between stages.

    Args:
        depths: blocks of each stage.
        widths: channels of the stem and of each stage (a quarter of them with bottlenecks).
        bottleneck: blocks of 1x1, 3x3 and 1x1 convolutions instead of two 3x3.
        num_classes: K.
        in_chans: channels of the images.
        drop_rate: dropout before the classifier.

    Source: He et al. 2016, section 4.2, with 1x1 convolutions as shortcuts (RepDistiller, models/resnet.py).
    """
    path, expansion = (_bottleneck, 4) if bottleneck else (_basic, 1)
    channels = widths[0]
    stages = []
    for index, (depth, width) in enumerate(zip(depths, widths[1:], strict=True)):
        blocks = []
        for block in range(depth):
            stride = 2 if index > 0 and block == 0 else 1
            blocks.append(Residual(path(channels, width, stride), channels, width * expansion, stride))
            channels = width * expansion
        stages.append(nn.Sequential(*blocks))
    net = StagedNet(
        stem=conv_norm(in_chans, widths[0], 3),
        stages=stages,
        neck=nn.Identity(),
        widths=[widths[0], *(w * expansion for w in widths[1:])],
        reductions=[1, *(2**stage for stage in range(len(depths)))],
        num_classes=num_classes,
        drop_rate=drop_rate,
    )
    init_weights(net)
    return net


NARROW, WIDE = (16, 16, 32, 64), (32, 64, 128, 256)
for layers in (8, 14, 20, 32, 44, 56, 110):
    register(f"resnet{layers}", partial(cifar_resnet, ((layers - 2) // 6,) * 3, NARROW))
for layers in (8, 32):
    register(f"resnet{layers}x4", partial(cifar_resnet, ((layers - 2) // 6,) * 3, WIDE))
register("resnet50_cifar", partial(cifar_resnet, (3, 4, 6, 3), (64, 64, 128, 256, 512), True))
