"""Check what a data set loads: class names, and images with their labels for training and test."""

import os
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any
from unicodedata import category

import numpy as np
from numpy.typing import NDArray

from kdzoo.data.pictures import USUAL, Files, Pictures, Pixels, Reading, warn_once
from kdzoo.errors import UserError
from kdzoo.image_set import ImageSet
from kdzoo.quantities import counted

UNPRINTABLE = ("Cc", "Cs", "Zl", "Zp")  # Unicode's categories: controls, halves of characters, and ends of lines


def checked(
    name: str, image_set: ImageSet, loaded: Any, root: Path, reading: Reading = USUAL
) -> tuple[tuple[str, ...], Pictures, Pictures]:
    """Check what ``image_set.load`` gave, and return class names, training images and test images, if any.

    Args:
        name: how the user named the set.
        image_set: its number of classes and image size must be right where it tells them.
        loaded: what its ``load`` gave.
        root: where relative paths of image files start.
        reading: how image files are read.

    Raises:
        UserError: a part is missing, or has another shape or type.
    """
    try:
        class_names, trained, tested = loaded
        splits = {"train": trained} if tested is None else {"train": trained, "test": tested}
        images = {split: given for split, (given, _) in splits.items()}
        unlabelled = [given is None for _, given in splits.values()]
        labels = {
            split: np.asarray(np.zeros(len(its), np.int64) if given is None else given)
            for split, (its, given) in splits.items()
        }
        sizes = {split: len(each) for split, each in images.items()}
    except (TypeError, ValueError) as error:
        expected = "(class names, (training images, labels), (test images, labels))"
        raise _wrong(name, f"load gives {_kinds(loaded)}", expected) from error
    if not isinstance(class_names, list | tuple) or not all(isinstance(word, str) for word in class_names):
        raise _wrong(name, f"class names are {_kind(class_names)}", "a list of words")
    if strange := next((word for word in class_names if any(category(c) in UNPRINTABLE for c in word)), None):
        raise UserError(f"data '{name}': class {strange!a} holds characters that no text shows; rename it")
    count = len(class_names)
    if image_set.num_classes not in (None, count):
        raise _wrong(name, f"load gives {count} class names", f"{image_set.num_classes}, as num_classes says")
    if any(unlabelled) and (count or not all(unlabelled)):
        raise _wrong(name, "labels are None", "None for all images, and no class names, or labels for all")
    for split, each in labels.items():
        labels[split] = _labels(name, split, each, sizes[split], max(count, 1))
    if absent := without_images(class_names, labels["train"]):
        warn_once(f"data '{name}': no training image shows {absent}; the student cannot learn what they look like")
    found: Mapping[str, Pictures]
    if all(isinstance(each, list | tuple) for each in images.values()):
        found = _files(name, images, labels, root, reading)
    else:
        found = _arrays(name, images, labels, image_set.image_size)
    train = found["train"]
    return tuple(class_names), train, found.get("test") or train.take(np.zeros(0, np.int64))


def without_images(class_names: Sequence[str], labels: NDArray[np.int64]) -> str:
    """Name the first few classes that no label stands for; empty where there are none."""
    found = set(labels.tolist())
    absent = [name for label, name in enumerate(class_names) if label not in found]
    return ", ".join(absent[:3]) + ", ..." * (len(absent) > 3)


def _labels(name: str, split: str, labels: NDArray[Any], images: int, classes: int) -> NDArray[np.int64]:
    if not images or labels.shape != (images,) or labels.dtype.kind not in "iu":
        found = f"{counted(images, f'{split} image')} with labels {_kind(labels)}"
        raise _wrong(name, found, "a whole number for each image")
    if labels.min() < 0 or labels.max() >= classes:
        found = f"{split} labels from {labels.min()} to {labels.max()}"
        raise _wrong(name, found, f"0 to {classes - 1}, positions in the class names")
    return labels.astype(np.int64, copy=False)


def _files(
    name: str, images: dict[str, Any], labels: dict[str, NDArray[np.int64]], root: Path, reading: Reading
) -> dict[str, Files]:
    for split, given in images.items():
        for path in given:
            if not isinstance(path, str | os.PathLike):
                raise _wrong(
                    name, f"{split} images are a list that holds {_kind(path)}", "an array, or a list of paths"
                )
    start = os.path.abspath(root)
    paths = {
        split: [os.path.normpath(path if os.path.isabs(path) else os.path.join(start, path)) for path in given]
        for split, given in images.items()
    }
    everything = list(chain.from_iterable(paths.values()))
    # Folders that the first and the last path by name have in common are those of all paths.
    above = Path(os.path.commonpath([os.path.dirname(path) for path in (min(everything), max(everything))]))
    return {split: Files.below(above, paths[split], labels[split], split, reading) for split in images}


def _arrays(
    name: str, images: dict[str, Any], labels: dict[str, NDArray[np.int64]], side: int | None
) -> dict[str, Pixels]:
    pixels = {split: _pixels(name, split, given) for split, given in images.items()}
    sides = {split: each.shape[1] for split, each in pixels.items()}
    if len({*sides.values()} | {side or sides["train"]}) > 1:
        found = f"sides of {' and '.join(f'{each} ({split})' for split, each in sides.items())} pixels"
        raise _wrong(name, found, f"{side or 'the same'} in both")
    return {split: Pixels(pixels[split], labels[split]) for split in images}


def _pixels(name: str, split: str, given: Any) -> NDArray[np.uint8]:
    """Check an array of images, and bring it to (N, S, S, 3), without a copy if possible."""
    pixels = np.asarray(given)
    if pixels.ndim == 3:
        pixels = pixels[..., None]
    if (
        pixels.dtype != np.uint8
        or pixels.ndim != 4
        or pixels.shape[1] != pixels.shape[2]
        or pixels.shape[3] not in (1, 3)
    ):
        expected = "uint8 (N, S, S, 3), or (N, S, S) for gray, or lists of paths for both train and test"
        raise _wrong(name, f"{split} images are {_kind(given)}", expected)
    if pixels.shape[3] == 1:
        return np.repeat(pixels, 3, axis=3)
    # Memory that is only read, or that runs backwards, is no tensor's.
    return pixels if pixels.flags.writeable and min(pixels.strides) > 0 else pixels.copy()


def _kind(value: Any) -> str:
    shape, dtype = getattr(value, "shape", None), getattr(value, "dtype", None)
    return type(value).__name__ if shape is None else f"{dtype} {tuple(shape)}"


def _kinds(value: Any) -> str:
    """Describe what short tuples hold, too."""
    if isinstance(value, tuple) and len(value) <= 3:
        return f"({', '.join(map(_kinds, value))})"
    return _kind(value)


def _wrong(name: str, given: str, expected: str) -> UserError:
    return UserError(f"data '{name}': {given}; expected {expected}")
