"""VGGs for 32x32 images: with batch norm, without hidden fully connected layers."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from torch import Tensor, nn
from torch.nn import functional as F

from kdzoo.models.staged import StagedNet, conv_norm, init_classifier, init_weights, register

WIDTHS = (64, 128, 256, 512, 512)


class PoolAbove(nn.Module):
    """Max pooling of maps that are larger than ``side`` pixels; smaller ones are passed on."""

    def __init__(self, side: int):
        super().__init__()
        self.side = side

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, C, H / 2, W / 2), or to itself."""
        return F.max_pool2d(x, 2) if x.shape[-1] > self.side else x


def cifar_vgg(depths: Sequence[int], num_classes: int = 100, in_chans: int = 3, drop_rate: float = 0.0) -> StagedNet:
    """Make a VGG of five blocks, the last of which gives a 4x4 map for a 32x32 image.

    Args:
        depths: convolutions of each block.
        num_classes: K.
        in_chans: channels of the images.
        drop_rate: dropout before the classifier.

    Source: Simonyan and Zisserman 2015, table 1, as trained on CIFAR (RepDistiller, models/vgg.py).
    """
    blocks = []
    channels = in_chans
    for index, (depth, width) in enumerate(zip(depths, WIDTHS, strict=True)):
        # The small maps of images below 32 pixels are not pooled away.
        block: list[nn.Module] = [] if index == 0 else [PoolAbove(4 if index == 4 else 1)]
        for _ in range(depth):
            block.append(conv_norm(channels, width, 3, bias=True))
            channels = width
        blocks.append(nn.Sequential(*block))
    net = StagedNet(blocks[0], blocks[1:], nn.Identity(), WIDTHS, [1, 2, 4, 8, 8], num_classes, drop_rate)
    init_weights(net)
    init_classifier(net, 0.01)
    return net


for layers, depths in {
    8: (1, 1, 1, 1, 1),
    11: (1, 1, 2, 2, 2),
    13: (2, 2, 2, 2, 2),
    16: (2, 2, 3, 3, 3),
    19: (2, 2, 4, 4, 4),
}.items():
    register(f"vgg{layers}_cifar", partial(cifar_vgg, depths))
