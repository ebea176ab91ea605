"""Look at every image of a data set once: which are damaged, how large they are, and which are nearly the same."""

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from kdzoo.data.cache import read_facts, write_facts
from kdzoo.data.pictures import Files, Pictures, reason_of, warn_once
from kdzoo.data.sources import Source
from kdzoo.data.stream import lost_workers_told
from kdzoo.errors import UserError
from kdzoo.quantities import counted

WIDTH, HEIGHT = 9, 8  # of a thumbnail: its neighbours side by side make 64 bits
CLOSE_BITS = 6  # of 64 that may differ between images that are nearly the same
NEIGHBOURS = 16  # in mean brightness, either way, that an image is compared with
CLOSE_SHADES = 8.0  # of 255, and their mean difference
_CHUNK = 256  # images that a process looks at before it tells of them
_BITS = np.array([bin(number).count("1") for number in range(2**16)], np.uint8)

Report = Callable[[str], object]


@dataclass(frozen=True)
class Looks:
    """What every image of a split shows.

    Attributes:
        sizes: (N, 2) width and height; zeros where an image is damaged.
        thumbs: (N, 8, 9, 3) uint8, each image at 9 by 8 pixels.
        damaged: by row, why an image cannot be decoded.
    """

    sizes: NDArray[np.int64]
    thumbs: NDArray[np.uint8]
    damaged: dict[int, str]

    @classmethod
    def joined(cls, parts: Sequence["Looks"]) -> "Looks":
        """Join what consecutive images show."""
        sizes = [np.zeros((0, 2), np.int64), *(part.sizes for part in parts)]
        thumbs = [np.zeros((0, HEIGHT, WIDTH, 3), np.uint8), *(part.thumbs for part in parts)]
        damaged = {row: reason for part in parts for row, reason in part.damaged.items()}
        return cls(np.concatenate(sizes), np.concatenate(thumbs), damaged)


class _Chunks(Dataset[Looks]):
    """Look at images by their rows, some at a time."""

    def __init__(self, pictures: Pictures):
        self.pictures = pictures

    def __len__(self) -> int:
        return math.ceil(len(self.pictures) / _CHUNK)

    def __getitem__(self, number: int) -> Looks:
        rows = range(number * _CHUNK, min((number + 1) * _CHUNK, len(self.pictures)))
        sizes, thumbs, damaged = [], [], {}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what Pillow says of metadata, without a file's name
            for row in rows:
                try:
                    image, size = self.pictures.seen(row, 8 * WIDTH)
                    thumb = image.resize((WIDTH, HEIGHT), Image.Resampling.BILINEAR).tobytes()
                except UserError as error:
                    damaged[row] = reason_of(error.__cause__ or error)
                    size, thumb = (0, 0), bytes(HEIGHT * WIDTH * 3)
                sizes.append(size)
                thumbs.append(thumb)
        pixels = np.frombuffer(b"".join(thumbs), np.uint8).reshape(-1, HEIGHT, WIDTH, 3)
        return Looks(np.array(sizes, np.int64), pixels, damaged)


def look(pictures: Pictures, split: str, workers: int = 0, report: Report | None = None) -> Looks:
    """Decode every image once, a large JPEG in part of its size.

    Args:
        pictures: the images.
        split: what they are for.
        workers: processes that decode; 0: this process does.
        report: is called with a line of progress.
    """
    chunks = _Chunks(pictures)
    workers = min(workers, len(chunks) // 2)  # a process pays for its start with two chunks
    loader = DataLoader(chunks, batch_size=None, num_workers=workers, collate_fn=_as_it_is, generator=torch.Generator())
    found = []
    with lost_workers_told(workers):
        for number, some in enumerate(loader if len(chunks) else ()):
            if report is not None:
                report(f"looking at {split} images: {number * _CHUNK} of {counted(len(pictures), 'image')}")
            found.append(some)
    return Looks.joined(found)


def _as_it_is(looks: Any) -> Any:
    return looks


def without_damaged(source: Source, folder: Path, workers: int = 0, report: Report | None = None) -> Source:
    """Leave out the images that cannot be decoded. Which these are is kept in ``folder`` until a file changes.

    Raises:
        UserError: nothing is left to train on of some class.
    """
    kept = []
    for split, files in (("train", source.train), ("test", source.test)):
        if isinstance(files, Files):
            notes, digest = folder / source.key / f"{split}-damaged.json", files.digest()
            facts = read_facts(notes, digest)
            if "damaged" not in facts:
                facts = {"damaged": list(look(files, split, workers, report).damaged)}
                write_facts(notes, digest, facts)
            rows = np.delete(np.arange(len(files)), np.array(facts["damaged"], np.int64))
            files = replace(files.take(rows), split=files.split)
        kept.append(files)
    train, test = kept
    lost = len(source.train) - len(train) + len(source.test) - len(test)
    if lost:
        warn_once(f"data '{source.name}': left out: {lost} damaged images; 'kdzoo data {source.name}' lists them")
    for label in np.setdiff1d(source.train.labels, train.labels):
        which = f" of class '{source.class_names[label]}'" if source.labelled else ""
        raise UserError(f"data '{source.name}': every training image{which} is damaged; replace them")
    return replace(source, train=train, test=test)


def near(ours: NDArray[np.uint8], theirs: NDArray[np.uint8]) -> dict[int, int]:
    """Find for each of ``ours`` the one of ``theirs`` that is nearly the same, where there is one, by their rows.

    Whether a pixel is brighter than its left neighbour makes 64 bits, in four groups. An image is compared with those
    that share a group and are the nearest in mean brightness: first by all bits, then by shades. So blank images, which
    share every group, cost no more than others.

    Args:
        ours: thumbnails (N, 8, 9, 3).
        theirs: thumbnails (M, 8, 9, 3).
    """
    found = np.full(len(ours), -1)
    best = np.full(len(ours), CLOSE_SHADES)
    bits, others = _bits(ours), _bits(theirs)
    for group in range(bits.shape[1] if len(theirs) else 0):
        keys = _keys(theirs, others[:, group])
        order = np.argsort(keys)
        places = np.searchsorted(keys[order], _keys(ours, bits[:, group]))
        for step in range(-NEIGHBOURS, NEIGHBOURS):
            other = order[(places + step).clip(0, len(order) - 1)]
            mine = np.flatnonzero(_BITS[bits ^ others[other]].sum(1) <= CLOSE_BITS)
            shades = np.abs(ours[mine].astype(np.int16) - theirs[other[mine]]).mean((1, 2, 3))
            better = shades < best[mine]
            best[mine[better]], found[mine[better]] = shades[better], other[mine[better]]
    return {row: int(found[row]) for row in np.flatnonzero(found >= 0).tolist()}


def _keys(thumbs: NDArray[np.uint8], group: NDArray[np.uint16]) -> NDArray[np.int64]:
    """Make numbers that sort images (N,) by a group of their bits, then by their mean brightness."""
    return (group.astype(np.int64) << 16) + (thumbs.mean((1, 2, 3)) * 64).astype(np.int64)


def _bits(thumbs: NDArray[np.uint8]) -> NDArray[np.uint16]:
    """Tell where a thumbnail (N, 8, 9, 3) is brighter than at its left neighbour: (N, 4) of 16 bits each."""
    gray = thumbs.astype(np.uint16).sum(3)
    brighter = np.packbits((gray[:, :, 1:] > gray[:, :, :-1]).reshape(len(thumbs), HEIGHT * (WIDTH - 1)), axis=1)
    return brighter.view(np.uint16)


@dataclass(frozen=True)
class Inspection:
    """What a data set holds.

    Attributes:
        class_names: (K,) in their order.
        counts: by split, (K,) images of each class; (1,) all images where they have no labels.
        smallest: (width, height) of the image with the shortest side.
        largest: that of the largest by area.
        damaged: by path, why it cannot be decoded.
        doubles: test images by their path, each with the training image that is nearly the same.
        fingerprint: of the set; empty where its name and options say everything.
    """

    class_names: tuple[str, ...]
    counts: dict[str, NDArray[np.int64]]
    smallest: tuple[int, int]
    largest: tuple[int, int]
    damaged: dict[str, str]
    doubles: dict[str, str]
    fingerprint: str


def inspect(source: Source, fingerprint: str, workers: int = 0, report: Report | None = None) -> Inspection:
    """Decode every image of a set once, and collect what it holds."""
    splits = {"train": source.train, "test": source.test}
    looks = {split: look(pictures, split, workers, report) for split, pictures in splits.items()}
    damaged = {
        splits[split].title(row): reason for split, seen in looks.items() for row, reason in seen.damaged.items()
    }
    whole = {
        split: np.delete(np.arange(len(splits[split])), np.array(list(seen.damaged), np.int64))
        for split, seen in looks.items()
    }
    sizes = np.concatenate([looks[split].sizes[rows] for split, rows in whole.items()])
    if report is not None:
        report("comparing test images with training images")
    doubles = near(*(looks[split].thumbs[whole[split]] for split in ("test", "train")))
    names = {
        source.test.title(int(whole["test"][ours])): source.train.title(int(whole["train"][theirs]))
        for ours, theirs in doubles.items()
    }
    kinds = {"train": source.class_names, "test": source.test_names}
    return Inspection(
        source.class_names,
        {split: np.bincount(pictures.labels, minlength=len(kinds[split]) or 1) for split, pictures in splits.items()},
        _size(sizes, int(sizes.min(1).argmin()) if len(sizes) else 0),
        _size(sizes, int(sizes.prod(1).argmax()) if len(sizes) else 0),
        damaged,
        names,
        fingerprint,
    )


def _size(sizes: NDArray[np.int64], row: int) -> tuple[int, int]:
    return (int(sizes[row, 0]), int(sizes[row, 1])) if len(sizes) else (0, 0)
