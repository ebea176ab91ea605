"""Hold the images of one split: in memory as one array, or on disk as one file each."""

import logging
import multiprocessing
import os
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from hashlib import blake2b
from itertools import islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageColor

from kdzoo.errors import UserError, is_shortage
from kdzoo.files import is_file

TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # by EXIF orientation
LONGEST = 100  # times the short side that a long side may have; a resize of it would take all memory
_ORIENTED = ("exif", "xmp", "XML:com.adobe.xmp", "Raw profile type exif")  # where Pillow keeps what a camera said

_log = logging.getLogger(__name__)

# ``opened`` refuses such an image by its name, which the warning lacks. Filters of a context would be lost in threads.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


@cache
def warn_once(text: str) -> None:
    """Log a warning, if this process has not logged it yet; workers leave it to the process that started them."""
    if multiprocessing.parent_process() is None:
        _log.warning(text)


@dataclass(frozen=True)
class Reading:
    """Say how a picture becomes RGB.

    Args:
        exif: whether it is turned and mirrored as its camera noted.
        alpha: the colour that transparent pixels are laid on: a name, or ``#rrggbb``.

    Raises:
        UserError: a colour that Pillow does not know.
    """

    exif: bool = True
    alpha: str = "white"

    def __post_init__(self) -> None:
        try:
            ImageColor.getrgb(self.alpha)
        except ValueError as error:
            raise UserError(f"data.alpha={self.alpha}: expected a colour, such as white, black or '#808080'") from error

    def rgb(self, image: Image.Image) -> Image.Image:
        """Convert an image to RGB of 8 bits: turned, scaled to 256 shades, and without transparency."""
        turn = TURNS.get(self._orientation(image))
        if image.mode[0] in "IF":
            image = _in_256_shades(image)
        if image.has_transparency_data:
            background = Image.new("RGBA", image.size, self.alpha)
            background.alpha_composite(image.convert("RGBA"))
            image = background
        image = image.convert("RGB")
        if turn is None:
            return image
        warn_once("images are turned as their EXIF orientation says; data.exif=false reads them as they are stored")
        return image.transpose(turn)

    def size(self, image: Image.Image) -> tuple[int, int]:
        """Tell the (width, height) that ``rgb`` will give, by the header."""
        return image.size if self._orientation(image) < 5 else image.size[::-1]

    def _orientation(self, image: Image.Image) -> int:
        """Read the EXIF orientation, 1 to 8: 1 is as it is stored, and 5 to 8 lie on their sides."""
        if not self.exif or not any(key in image.info for key in _ORIENTED):
            return 1
        try:
            found = image.getexif().get(ExifTags.Base.Orientation, 1)
        except Exception:  # a damaged note, on which Pillow raises nearly anything, says nothing
            return 1
        return found if found in TURNS else 1


USUAL = Reading()


def _in_256_shades(image: Image.Image) -> Image.Image:
    """Scale gray values of 16 or 32 bits, or floats, to 8 bits.

    Integers of 16 bits span 0 to 65535. Of other values the range tells what they span: 0 to 1 (floats), 0 to 255 or
    0 to 65535; beyond that, those of the image span from its darkest to its brightest.
    """
    values = np.nan_to_num(np.asarray(image).astype(np.float64), posinf=0, neginf=0)
    low, high = values.min(), values.max()
    if image.mode.startswith("I;16") or image.format == "PNG" or (low >= 0 and 255 < high <= 65535):
        scaled = values / 257
    elif image.mode == "F" and low >= 0 and high <= 1:
        scaled = values * 255
    elif low >= 0 and high <= 255:
        scaled = values
    else:
        scaled = (values - low) * (255 / max(high - low, 1e-9))
    return Image.fromarray(scaled.round().astype(np.uint8))


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

    def seen(self, row: int, side: int) -> tuple[Image.Image, tuple[int, int]]:
        """Convert one image, and tell its width and height."""
        image = self.decoded(row, side)
        return image, image.size

    def title(self, row: int) -> str:
        """Name an image."""
        return f"image {row}"

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
    reading: Reading = USUAL

    @classmethod
    def below(
        cls, root: Path, paths: Sequence[str], labels: NDArray[np.int64], split: str, reading: Reading = USUAL
    ) -> "Files":
        """List the files of these absolute paths, all below ``root``."""
        start = len(os.path.join(root, ""))
        return cls(root, np.array([os.fsencode(path[start:]) for path in paths]), labels, split, reading)

    def __len__(self) -> int:
        return len(self.labels)

    def decoded(self, row: int, side: int) -> Image.Image:
        """Decode one image in RGB, a large JPEG at a half, quarter or eighth if its short side keeps ``side`` pixels.

        Decoding is most of a worker's time, and a scaled decoder never computes the pixels that a resize drops.
        """
        return self.seen(row, side)[0]

    def seen(self, row: int, side: int) -> tuple[Image.Image, tuple[int, int]]:
        """Decode one image as ``decoded`` does, and tell the width and height that it has in full."""
        path = self._path(self.names[row])
        try:
            with opened(path) as image:
                size = self.reading.size(image)
                image.draft(None, (side, side))  # None keeps the mode
                image.load()
                return self.reading.rgb(image), size
        except Exception as error:  # Pillow's decoders raise nearly anything on damaged files
            if is_shortage(error):  # an image that is whole is never left out
                raise
            raise _unreadable(path, error) from error

    def title(self, row: int) -> str:
        """Name an image by its path."""
        return os.fsdecode(self.names[row])

    def take(self, rows: NDArray[np.int64]) -> "Files":
        """Keep the images of these rows."""
        return replace(self, names=self.names[rows], labels=self.labels[rows], split=f"{self.split}-{len(rows)}")

    def digest(self) -> str:
        """Hash every file's path, size, times of change of content and of state, and label."""
        digest = blake2b(b"\0".join(self.names.tolist()), digest_size=16)
        digest.update(states_of(self.root, self.names)[:, :3].tobytes())
        digest.update(self.labels.tobytes())
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

    def _path(self, name: bytes) -> str:
        return os.path.join(self.root, os.fsdecode(name))

    def _size(self, name: bytes) -> tuple[int, int]:
        path = self._path(name)
        try:
            with opened(path) as image:
                return self.reading.size(image)
        except Exception as error:
            if is_shortage(error):
                raise
            raise _unreadable(path, error) from error


Pictures = Pixels | Files


def paths_of(root: Path, names: NDArray[np.bytes_]) -> list[bytes]:
    """Join names of files to their folder."""
    start = os.fsencode(os.path.join(root, ""))
    return [start + name for name in names.tolist()]


def states_of(root: Path, names: NDArray[np.bytes_]) -> NDArray[np.int64]:
    """Look up size, times of change of content and of state, and inode of files: (N, 4); zeros where there is none."""
    return np.array([_state(path) for path in paths_of(root, names)], np.int64).reshape(-1, 4)


def _state(path: bytes) -> tuple[int, int, int, int]:
    try:
        found = os.stat(path)
    except OSError:
        return 0, 0, 0, 0
    return found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino & (2**63 - 1)


class Unfit(Exception):
    """A file that Pillow may decode, and that is no image to train on."""


@contextmanager
def opened(path: str) -> Iterator[Image.Image]:
    """Open an image file and read its header.

    Raises:
        Unfit: it is a pipe or a device, or so large that decoding or resizing it would take all memory.
        Exception: nearly anything, from Pillow.
    """
    if os.path.exists(path) and not is_file(path):
        raise Unfit("no regular file")
    with Image.open(path) as image:
        (width, height), most = image.size, Image.MAX_IMAGE_PIXELS
        if most is not None and width * height > most:
            raise Unfit(f"{width} x {height} pixels, more than {most:,}")
        if max(width, height) > LONGEST * min(width, height):
            raise Unfit(f"{width} x {height} pixels, one side more than {LONGEST} times the other")
        yield image


def reason_of(error: BaseException) -> str:
    """Say in a few words why an image cannot be read; without its path, which Pillow quotes."""
    said = str(error).split("\n")[0]
    if isinstance(error, Unfit):
        return said
    return type(error).__name__ if not said or "'" in said else f"{type(error).__name__}: {said}"


def _unreadable(path: str, error: Exception) -> UserError:
    return UserError(
        f"cannot read image '{path}' ({reason_of(error)}); replace or remove it, or set data.skip_damaged=true, which "
        "leaves out all that are damaged"
    )
