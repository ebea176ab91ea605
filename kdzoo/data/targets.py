"""Make the targets of cross-entropy: labels smoothed, and mixed together with their images."""

import torch
from timm.data.mixup import Mixup, one_hot
from torch import Tensor

from kdzoo.randomness import globally_seeded
from kdzoo.recipe import Protocol


class Targets:
    """Make targets as timm does: smoothing leaves eps / K at every class, a mix pairs row i with B-1-i.

    Args:
        protocol: its label smoothing, mixup and cutmix are read.
        num_classes: K.
    """

    def __init__(self, protocol: Protocol, num_classes: int):
        mixup, cutmix = protocol.augmentation.mixup, protocol.augmentation.cutmix
        self.num_classes = num_classes
        self.smoothing = protocol.label_smoothing
        self.mixup = (
            Mixup(mixup, cutmix, label_smoothing=self.smoothing, num_classes=num_classes or 1)
            if mixup > 0 or cutmix > 0
            else None
        )

    def __call__(self, images: Tensor, labels: Tensor | None, seed: int) -> tuple[Tensor, Tensor | None]:
        """Mix images (B, 3, H, W) in place if the protocol mixes, and return them with their targets (B, K), if any."""
        if self.mixup is not None:
            with globally_seeded(seed):
                images, targets = self.mixup(
                    images, images.new_zeros(len(images), dtype=torch.int64) if labels is None else labels
                )
            return images, None if labels is None else targets
        if labels is None:
            return images, None
        off = self.smoothing / self.num_classes
        return images, one_hot(labels, self.num_classes, on_value=1.0 - self.smoothing + off, off_value=off)
