"""Keep decoded images on disk: written whole or not at all, checked when opened, rebuilt when damaged or outdated.

They are a NumPy array in FILE.npy. FILE.json beside it has its checksum, the digest of the files it was made from, and
a checksum of both.
"""

import json
import logging
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray
from torchvision import transforms

from kdzoo.data.pictures import Files, Pixels
from kdzoo.errors import UserError
from kdzoo.files import is_file, make_folder, read_json, write_atomically, write_text
from kdzoo.quantities import counted

FORMAT = 1  # of the facts; those of another version are measured again
_CHUNK = 256  # images decoded before they are written

_log = logging.getLogger(__name__)


def square(files: Files, row: int, side: int) -> NDArray[np.uint8]:
    """Decode one image to (side, side, 3): resize its short side to ``side``, then cut out the centre."""
    cut = transforms.Compose([transforms.Resize(side), transforms.CenterCrop(side)])
    return np.asarray(cut(files.decoded(row, side)), dtype=np.uint8)


def cached_pixels(files: Files, side: int, digest: str, path: Path, report: Callable[[str], object] | None) -> Pixels:
    """Map the images as squares from the cache file ``path``; build it first where it is missing, old or damaged.

    Args:
        files: the images.
        side: of the squares, in pixels.
        digest: of the files as they are now; another one in the cache makes it outdated.
        path: the cache file, an array (N, side, side, 3) of uint8 in NumPy's format.
        report: is called with how many are decoded.
    """
    shape = len(files), side, side, 3
    if path.exists():
        try:
            return Pixels(_mapped(path, digest, shape), files.labels)
        except ValueError as reason:
            _log.warning("cache '%s' is %s; rebuilding it", path, reason)
    _build(files, shape, digest, path, report)
    return Pixels(_mapped(path, digest, shape), files.labels)


def _build(
    files: Files, shape: tuple[int, ...], digest: str, path: Path, report: Callable[[str], object] | None
) -> None:
    def write(temporary: Path) -> None:
        checksum = 0
        # Written one part after the other: where a disk fills up, a write is an error, and a mapped array is a crash.
        with temporary.open("wb") as out, ThreadPoolExecutor() as pool:
            npy.write_array_header_1_0(out, {"descr": "|u1", "fortran_order": False, "shape": shape})
            for start in range(0, len(files), _CHUNK):
                if report is not None:
                    report(f"decoding {files.split}: {start} of {counted(len(files), 'image')}")
                rows = range(start, min(start + _CHUNK, len(files)))
                chunk = np.stack(list(pool.map(lambda row: square(files, row, shape[1]), rows)))
                checksum = zlib.crc32(chunk.data, checksum)
                out.write(chunk.data)
        # Before the array is there, so that no process finds an array without them.
        write_facts(path.with_suffix(".json"), digest, {"crc32": checksum})
        # A process that has mapped a file ends by a signal where another cuts it short; kdzoo itself only replaces it.
        temporary.chmod(0o444)

    make_folder(path.parent)
    write_atomically(path, write)


def _mapped(path: Path, digest: str, shape: tuple[int, ...]) -> NDArray[np.uint8]:
    """Map the images of the cache; a ValueError says in a word what is wrong with them."""
    facts = read_facts(path.with_suffix(".json"), digest)
    if not facts:
        raise ValueError("outdated")
    if not is_file(path):
        raise ValueError("damaged")
    try:
        # Copy on write, as torch warns of memory that it must not write to; no code writes.
        pixels = npy.open_memmap(path, mode="c")
    except Exception as error:  # NumPy reads the header by Python's parser, which raises nearly anything
        raise ValueError("damaged") from error
    right = pixels.dtype == np.uint8 and pixels.shape == shape and pixels.flags.c_contiguous
    if not right or zlib.crc32(pixels.data) != facts.get("crc32"):
        raise ValueError("damaged")
    return pixels


def read_facts(path: Path, digest: str) -> dict[str, Any]:
    """Read what was measured of the files of this digest; empty where nothing whole is known."""
    try:
        noted = read_json(path)
        facts = noted["facts"]
        return facts if noted == _noted(digest, facts) else {}
    except (UserError, KeyError):
        return {}


def write_facts(path: Path, digest: str, facts: dict[str, Any]) -> None:
    """Keep what was measured of the files of this digest for the next time."""
    make_folder(path.parent)
    write_text(path, json.dumps(_noted(digest, facts)))


def _noted(digest: str, facts: Any) -> dict[str, Any]:
    checksum = blake2b(json.dumps([digest, facts]).encode(), digest_size=8).hexdigest()
    return {"format": FORMAT, "digest": digest, "facts": facts, "checksum": checksum}
