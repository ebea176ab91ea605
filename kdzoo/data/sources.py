"""Where pictures come from: a name becomes classes, labels and pictures, before any of them is decoded."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from kdzoo.data.folder import Files, open_folder
from kdzoo.data.superclasses import superclasses_of
from kdzoo.errors import UserError, unknown


@dataclass(frozen=True)
class Pixels:
    """Pictures of one size that are in memory, or mapped from a file."""

    array: NDArray[np.uint8]  # (N, H, W, 3)
    labels: NDArray[np.int64]  # (N,)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, row: int) -> Image.Image:
        return Image.fromarray(self.array[row])

    def take(self, rows: NDArray[np.int64]) -> "Pixels":
        """The pictures of these rows."""
        return Pixels(self.array[rows], self.labels[rows])


Pictures = Pixels | Files


@dataclass(frozen=True)
class Source:
    """A data set as it lies on disk or in a package."""

    name: str
    class_names: tuple[str, ...]
    train: Pictures
    test: Pictures

    @property
    def superclasses(self) -> tuple[int, ...]:
        """(K,) the coarse class of each class; empty where none are defined."""
        return superclasses_of(self.class_names)

    def limited(self, limit: int | None) -> "Source":
        """The same with ``limit`` training pictures, spread over the classes as in the whole set."""
        if limit is None or limit >= len(self.train):
            return self
        if limit < 1:
            raise UserError(f"limit is {limit}; expected at least one training image")
        return replace(self, train=self.train.take(stratified(self.train.labels, limit)))


def stratified(labels: NDArray[np.int64], limit: int) -> NDArray[np.int64]:
    """``limit`` sorted rows out of labels (N,), each class with its share; the same rows at every call."""
    shuffled = np.random.default_rng(0).permutation(len(labels))
    share = np.empty(len(labels))  # of its own class that lies before a row: classes advance together
    for label in np.unique(labels):
        rows = shuffled[labels[shuffled] == label]
        share[rows] = (np.arange(len(rows)) + 0.5) / len(rows)
    return np.sort(np.lexsort((labels, share))[:limit])


def open_source(name: str, root: Path) -> Source:
    """The source of this name: ``digits``, ``cifar10``, ``cifar100`` or ``folder:PATH``."""
    if name.startswith("folder:"):
        path = Path(name.removeprefix("folder:")).expanduser()
        return Source(name, *open_folder(path))
    if name not in _SOURCES:
        raise unknown("data", name, [*_SOURCES, "folder:PATH"])
    return _SOURCES[name](name, root)


def _digits(name: str, root: Path) -> Source:
    """scikit-learn's 1797 scans of 8 x 8 pixels in 16 shades of gray, a fifth of them for the test."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    scans = load_digits()
    gray = np.round(scans.images * (255 / 16)).astype(np.uint8)
    everything = Pixels(np.repeat(gray[..., None], 3, axis=3), scans.target.astype(np.int64))
    rows = np.arange(len(everything))
    train, test = train_test_split(rows, test_size=0.2, stratify=everything.labels, random_state=0)
    names = tuple(str(digit) for digit in scans.target_names)
    return Source(name, names, everything.take(np.sort(train)), everything.take(np.sort(test)))


def _cifar(name: str, root: Path) -> Source:
    """CIFAR-10 or CIFAR-100 as torchvision keeps them under ``root``, downloaded where they are missing."""
    from torchvision import datasets

    kind: Callable[..., Any] = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name]
    try:
        try:
            splits = [kind(root, train=train) for train in (True, False)]
        except RuntimeError:  # not there, or damaged
            splits = [kind(root, train=train, download=True) for train in (True, False)]
    except (OSError, RuntimeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"{name} is not under '{root}' and cannot be downloaded ({reason}); "
            "put torchvision's files there, or name an image tree as folder:PATH"
        ) from error
    train, test = (Pixels(split.data, np.asarray(split.targets, np.int64)) for split in splits)
    return Source(name, tuple(splits[0].classes), train, test)


_SOURCES: dict[str, Callable[[str, Path], Source]] = {
    "digits": _digits,
    "cifar10": _cifar,
    "cifar100": _cifar,
}
