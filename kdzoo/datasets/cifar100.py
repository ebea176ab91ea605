"""CIFAR-100 as torchvision keeps it under data.root; downloaded where it is missing."""

from pathlib import Path

from torchvision import datasets

from kdzoo import ImageSet
from kdzoo.datasets._cifar import read
from kdzoo.image_set import Loaded


class CIFAR100(ImageSet):
    """CIFAR-100: 50,000 training and 10,000 test images of 100 classes."""

    num_classes = 100
    image_size = 32

    def load(self, root: Path) -> Loaded:
        """Load torchvision's files."""
        return read("cifar100", datasets.CIFAR100, root)

    def fingerprint(self, root: Path) -> str:
        """Return an empty text: torchvision checks its archive."""
        return ""
