"""Image trees: PATH/train/CLASS/* with ``val`` or ``test`` beside it, listed and checked before use."""

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from hashlib import blake2b
from itertools import islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from kdzoo.errors import UserError, unknown

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


@dataclass(frozen=True)
class Files:
    """Pictures of any size, one file each, decoded when asked for."""

    root: Path
    names: NDArray[np.bytes_]  # (N,) paths below root; one array, as worker processes share it without copies
    labels: NDArray[np.int64]  # (N,)
    split: str  # "train", "val" or "test"; with its number of pictures where only some were taken

    def __len__(self) -> int:
        return len(self.labels)

    def decoded(self, row: int, side: int) -> Image.Image:
        """One picture in RGB, a large JPEG at a half, quarter or eighth if its short side keeps ``side`` pixels.

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
        """The pictures of these rows."""
        return Files(self.root, self.names[rows], self.labels[rows], f"{self.split}-{len(rows)}")

    def digest(self) -> str:
        """Changes with any file's path, size, time of change or label."""
        digest = blake2b(digest_size=16)
        for name, label in zip(self.names, self.labels, strict=True):
            stat = os.stat(self._path(name))
            digest.update(b"%b\0" % name + f"{stat.st_size}\0{stat.st_mtime_ns}\0{label}\n".encode())
        return digest.hexdigest()

    def common_size(self) -> tuple[int, int] | None:
        """(width, height) where all pictures have the same, else None. Reads headers only."""
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


def _unreadable(path: Path, error: Exception) -> UserError:
    return UserError(f"cannot read image '{path}' ({type(error).__name__}); replace or remove it")


def open_folder(path: Path) -> tuple[tuple[str, ...], Files, Files]:
    """The class names, sorted, and the training and test pictures of an image tree.

    ``val`` is the test split where there is one, else ``test``.
    """
    if not path.is_dir():
        raise UserError(f"no folder '{path}'; expected train/CLASS/*.png and val or test beside train")
    path = path.resolve()
    if not (path / "train").is_dir():
        raise UserError(f"no folder 'train' in '{path}'; expected train/CLASS/*.png")
    beside = [split for split in ("val", "test") if (path / split).is_dir()]
    if not beside:
        raise UserError(f"neither 'val' nor 'test' in '{path}', beside 'train'")
    classes = _subfolders(path / "train")
    if not classes:
        raise UserError(f"no class folders in '{path / 'train'}'; expected train/CLASS/*.png")
    tested = _subfolders(path / beside[0])
    for name in tested:
        if name not in classes:
            raise unknown("test class", name, classes, f"('{path / beside[0] / name}' is not in train)")
    if not tested:
        raise UserError(f"no class folders in '{path / beside[0]}'; expected {beside[0]}/CLASS/*.png")
    return tuple(classes), _listed(path, "train", classes), _listed(path, beside[0], classes, tested)


def _subfolders(path: Path) -> list[str]:
    return sorted(entry.name for entry in os.scandir(path) if entry.is_dir() and entry.name[0] != ".")


def _listed(root: Path, split: str, classes: list[str], present: list[str] | None = None) -> Files:
    """The pictures of the ``present`` classes (all by default), with their rows in ``classes`` as labels."""
    names: list[str] = []
    labels: list[int] = []
    for name in present or classes:
        found = sorted(
            os.path.relpath(os.path.join(folder, file), root)
            for folder, _, files in os.walk(root / split / name)
            for file in files
            if file.lower().endswith(SUFFIXES) and file[0] != "."
        )
        if not found:
            raise UserError(f"no images in '{root / split / name}'; expected {', '.join(SUFFIXES)}")
        names += found
        labels += [classes.index(name)] * len(found)
    return Files(root, np.array([os.fsencode(name) for name in names]), np.array(labels, np.int64), split)
