"""Hold the images of one split: in memory as one array, or on disk as one file each."""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from hashlib import blake2b
from itertools import islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from kdzoo.errors import UserError


@dataclass(frozen=True)
class Pixels:
    """Hold images of one size in memory, or mapped from a file."""

    array: NDArray[np.uint8]  # (N, S, S, 3)
    labels: NDArray[np.int64]  # (N,)

    def __len__(self) -> int:
        return len(self.labels)

    def decoded(self, row: int, side: int) -> Image.Image:
        """Convert one image to Pillow's; ``side`` is ignored, as the pixels are already decoded."""
        return Image.fromarray(self.array[row])

    def take(self, rows: NDArray[np.int64]) -> "Pixels":
        """Keep the images of these rows."""
        return Pixels(self.array[rows], self.labels[rows])


@dataclass(frozen=True)
class Files:
    """List images of any size, one file each, which are decoded one at a time."""

    root: Path
    names: NDArray[np.bytes_]  # (N,) paths below root; one array, as worker processes share it without copies
    labels: NDArray[np.int64]  # (N,)
    split: str  # "train" or "test"; with its number of images where only some were taken

    @classmethod
    def below(cls, root: Path, paths: Sequence[str], labels: NDArray[np.int64], split: str) -> "Files":
        """List the files of these absolute paths, all below ``root``."""
        start = len(os.path.join(root, ""))
        return cls(root, np.array([os.fsencode(path[start:]) for path in paths]), labels, split)

    def __len__(self) -> int:
        return len(self.labels)

    def decoded(self, row: int, side: int) -> Image.Image:
        """Decode one image in RGB, a large JPEG at a half, quarter or eighth if its short side keeps ``side`` pixels.

        Decoding is most of a worker's time, and a scaled decoder never computes the pixels that a resize drops.
        """
        path = self._path(self.names[row])
        try:
            with Image.open(path) as image:
                image.draft(None, (side, side))  # None keeps the mode
                return image.convert("RGB")
        except Exception as error:  # Pillow's decoders raise nearly anything on damaged files
            raise _unreadable(path, error) from error

    def take(self, rows: NDArray[np.int64]) -> "Files":
        """Keep the images of these rows."""
        return Files(self.root, self.names[rows], self.labels[rows], f"{self.split}-{len(rows)}")

    def digest(self) -> str:
        """Hash every file's path, size, time of change and label."""
        digest = blake2b(digest_size=16)
        for name, label in zip(self.names, self.labels, strict=True):
            path = self._path(name)
            try:
                stat = os.stat(path)
            except OSError as error:
                raise _unreadable(path, error) from error
            digest.update(b"%b\0" % name + f"{stat.st_size}\0{stat.st_mtime_ns}\0{label}\n".encode())
        return digest.hexdigest()

    def common_size(self) -> tuple[int, int] | None:
        """Find the (width, height) that all images have; None where they differ. Only headers are read."""
        first: tuple[int, int] | None = None
        with ThreadPoolExecutor() as pool:
            names = iter(self.names)
            while chunk := list(islice(names, 1024)):  # by chunks, so that a mixed set is known at once
                sizes = set(pool.map(self._size, chunk))
                first = first or next(iter(sizes))
                if sizes != {first}:
                    return None
        return first

    def _path(self, name: bytes) -> Path:
        return self.root / os.fsdecode(name)

    def _size(self, name: bytes) -> tuple[int, int]:
        path = self._path(name)
        try:
            with Image.open(path) as image:
                return image.size
        except Exception as error:
            raise _unreadable(path, error) from error


Pictures = Pixels | Files


def _unreadable(path: Path, error: Exception) -> UserError:
    return UserError(f"cannot read image '{path}' ({type(error).__name__}); replace or remove it")
