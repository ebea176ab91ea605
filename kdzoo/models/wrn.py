"""Wide residual networks for 32x32 images, with pre-activation."""

from __future__ import annotations

from functools import partial
from itertools import pairwise

from torch import Tensor, nn

from kdzoo.models.staged import StagedNet, init_classifier, init_weights, register


def _norm_act(width: int) -> nn.Sequential:
    return nn.Sequential(nn.BatchNorm2d(width), nn.ReLU(inplace=True))


class PreActivation(nn.Module):
    """A pre-activation block: norm, ReLU and 3x3 convolution, twice, with a shortcut.

    Where the width changes, the shortcut reads the input after norm and ReLU.
    """

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.enter = _norm_act(inputs)
        self.path = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False),
            _norm_act(outputs),
            nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False),
        )
        self.widens = inputs != outputs
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False) if self.widens else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, C', H / stride, W / stride)."""
        entered = self.enter(x)
        return self.shortcut(entered if self.widens else x) + self.path(entered)


def wide_resnet(
    depth: int, factor: int, num_classes: int = 100, in_chans: int = 3, drop_rate: float = 0.0
) -> StagedNet:
    """Make a WRN-depth-factor, such as WRN-40-2.

    Args:
        depth: 6n + 4.
        factor: how many times wider than 16, 32 and 64 channels the stages are.
        num_classes: K.
        in_chans: channels of the images.
        drop_rate: dropout before the classifier.

    Source: Zagoruyko and Komodakis 2016, table 1 (RepDistiller, models/wrn.py).
    """
    widths = [16, 16 * factor, 32 * factor, 64 * factor]
    stages = []
    for index, (inputs, width) in enumerate(pairwise(widths)):
        # A stage that keeps the width (factor 1) still halves the resolution from the second on.
        blocks = [PreActivation(inputs, width, 2 if index else 1)]
        blocks += [PreActivation(width, width, 1) for _ in range((depth - 4) // 6 - 1)]
        stages.append(nn.Sequential(*blocks))
    net = StagedNet(
        stem=nn.Conv2d(in_chans, 16, 3, 1, 1, bias=False),
        stages=stages,
        neck=_norm_act(widths[-1]),
        widths=widths,
        reductions=[1, 1, 2, 4],
        num_classes=num_classes,
        drop_rate=drop_rate,
    )
    init_weights(net)
    init_classifier(net)
    return net


for layers, times in ((16, 1), (16, 2), (40, 1), (40, 2)):
    register(f"wrn_{layers}_{times}", partial(wide_resnet, layers, times))
