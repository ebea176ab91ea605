"""Where pictures come from: a name becomes classes, labels and pictures, before any of them is decoded."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import wraps
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from kdzoo.data.bands import Labelled, bands
from kdzoo.data.folder import Files, open_folder
from kdzoo.data.superclasses import superclasses_of
from kdzoo.errors import UserError, unknown
from kdzoo.keywords import keyword_settings


@dataclass(frozen=True)
class Pixels:
    """Pictures of one size that are in memory, or mapped from a file."""

    array: NDArray[np.uint8]  # (N, H, W, 3)
    labels: NDArray[np.int64]  # (N,)

    def __len__(self) -> int:
        return len(self.labels)

    def decoded(self, row: int, side: int) -> Image.Image:
        """One picture; ``side`` is for those that have yet to be decoded."""
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
    share = np.empty(len(labels))  # of the row's class that lies before it: classes advance together
    for label in np.unique(labels):
        rows = shuffled[labels[shuffled] == label]
        share[rows] = (np.arange(len(rows)) + 0.5) / len(rows)
    return np.sort(np.lexsort((labels, share))[:limit])


def open_source(name: str, root: Path, options: Mapping[str, Any] | None = None) -> Source:
    """The source of this name: ``digits``, ``cifar10``, ``cifar100``, ``bands`` or ``folder:PATH``.

    ``options`` are keywords of what makes the source, where it has any.
    """
    return _opener(name)(name, root, **option_settings(name, options or {}))


def option_settings(name: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Read all options of the data set of this name: those ``given``, and the defaults of the others.

    Raises:
        UserError: an unknown data set or option, or a value of another type.
    """
    opener = _opener(name)
    if given and not keyword_settings(opener, {}):
        raise UserError(f"data '{name}' has no options, and data.options.{next(iter(given))} was given; leave it out")
    return keyword_settings(opener, given, "data.options.")


def _opener(name: str) -> Callable[..., Source]:
    open_it = _folder if name.startswith("folder:") else _SOURCES.get(name)
    if open_it is None:
        raise unknown("data", name, [*_SOURCES, "folder:PATH"])
    return open_it


def _folder(name: str, root: Path) -> Source:
    """An image tree at the path that the name gives."""
    return Source(name, *open_folder(Path(name.removeprefix("folder:")).expanduser()))


def _generated(generate: Callable[..., tuple[tuple[str, ...], Labelled, Labelled]]) -> Callable[..., Source]:
    """A set that is computed; its options are the keywords of ``generate``, whose signature it takes on."""

    @wraps(generate)
    def open_it(name: str, root: Path, **options: Any) -> Source:
        class_names, train, test = generate(**options)
        return Source(name, class_names, Pixels(*train), Pixels(*test))

    return open_it


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


_SOURCES: dict[str, Callable[..., Source]] = {
    "digits": _digits,
    "cifar10": _cifar,
    "cifar100": _cifar,
    "bands": _generated(bands),
}
