"""CIFAR-10 as torchvision keeps it under data.root; downloaded where it is missing."""

from pathlib import Path

from torchvision import datasets

from kdzoo import ImageSet
from kdzoo.datasets._cifar import read
from kdzoo.image_set import Loaded


class CIFAR10(ImageSet):
    """CIFAR-10: 50,000 training and 10,000 test images of 10 classes."""

    num_classes = 10
    image_size = 32

    def load(self, root: Path) -> Loaded:
        """Load torchvision's files."""
        return read("cifar10", datasets.CIFAR10, root)

    def fingerprint(self, root: Path) -> str:
        """Return an empty text: torchvision checks its archive."""
        return ""
