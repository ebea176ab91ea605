"""scikit-learn's 1797 scans of digits in 16 shades of gray; a fifth of them are for the test."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kdzoo import ImageSet
from kdzoo.datasets._kept import kept
from kdzoo.image_set import Loaded

SHAPES = {"train": (1437, 8, 8), "train_labels": (1437,), "test": (360, 8, 8), "test_labels": (360,)}


class Digits(ImageSet):
    """Handwritten digits that come with scikit-learn, split by class in the same way at every call."""

    num_classes = 10
    image_size = 8

    def load(self, root: Path) -> Loaded:
        """Load the scans from scikit-learn's package; later from the cache, as its import takes most of a second."""
        found = kept("digits", SHAPES, split_scans)
        names = [str(digit) for digit in range(self.num_classes)]
        return names, (found["train"], found["train_labels"]), (found["test"], found["test_labels"])

    def fingerprint(self, root: Path) -> str:
        """Return an empty text: scikit-learn's scans never change."""
        return ""


def split_scans() -> dict[str, NDArray]:
    """Read the scans, and hold out a fifth of each class for the test."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    scans = load_digits()
    gray = np.round(scans.images * (255 / 16)).astype(np.uint8)
    rows = np.arange(len(gray))
    train, test = map(np.sort, train_test_split(rows, test_size=0.2, stratify=scans.target, random_state=0))
    labels = scans.target
    return {"train": gray[train], "train_labels": labels[train], "test": gray[test], "test_labels": labels[test]}
