"""Decoded pictures on disk: written whole or not at all, checked when opened, rebuilt when not right."""

import json
import logging
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torchvision import transforms

from kdzoo.data.pictures import Files, Pixels
from kdzoo.files import write_atomically, write_text

_HEADER = 4096  # bytes of JSON before the pixels: a page, so the pixels can be mapped
_CHUNK = 256  # pictures decoded before they are written

_log = logging.getLogger(__name__)


def square(files: Files, row: int, side: int) -> NDArray[np.uint8]:
    """One picture (side, side, 3): its short side resized to ``side``, then its centre."""
    cut = transforms.Compose([transforms.Resize(side), transforms.CenterCrop(side)])
    return np.asarray(cut(files.decoded(row, side)), dtype=np.uint8)


def cached_pixels(files: Files, side: int, digest: str, path: Path, report: Callable[[str], object] | None) -> Pixels:
    """The pictures as squares, mapped from the cache file ``path``, which is built where it must be.

    Args:
        files: the pictures.
        side: of the squares, in pixels.
        digest: of the files as they are now; another one in the cache makes it outdated.
        path: the cache file: a page of JSON, then (N, side, side, 3) uint8.
        report: is called with how many are decoded.
    """
    if path.exists():
        try:
            return Pixels(_mapped(path, digest, (len(files), side, side, 3)), files.labels)
        except ValueError as reason:
            _log.warning("cache '%s' is %s; rebuilding it", path, reason)
    _build(files, side, digest, path, report)
    return Pixels(_mapped(path, digest, (len(files), side, side, 3)), files.labels)


def _build(files: Files, side: int, digest: str, path: Path, report: Callable[[str], object] | None) -> None:
    def write(temporary: Path) -> None:
        checksum = 0
        with temporary.open("wb") as out, ThreadPoolExecutor() as pool:
            out.write(bytes(_HEADER))
            for start in range(0, len(files), _CHUNK):
                if report is not None:
                    report(f"decoding {files.split}: {start} of {len(files)} images")
                rows = range(start, min(start + _CHUNK, len(files)))
                chunk = np.stack(list(pool.map(lambda row: square(files, row, side), rows)))
                checksum = zlib.crc32(chunk.data, checksum)
                out.write(chunk.data)
            out.seek(0)
            header = {"digest": digest, "shape": [len(files), side, side, 3], "crc32": checksum}
            out.write(json.dumps(header).encode().ljust(_HEADER))

    write_atomically(path, write)


def _mapped(path: Path, digest: str, shape: tuple[int, ...]) -> NDArray[np.uint8]:
    """The cache's pixels; a ValueError says in a word what is wrong with them."""
    try:
        with path.open("rb") as file:
            header = json.loads(file.read(_HEADER))
        # Copy on write, as torch warns of memory that it must not write to; no code writes.
        pixels = np.memmap(path, np.uint8, "c", offset=_HEADER, shape=tuple(header["shape"]))
        recorded, checksum = header["digest"], header["crc32"]
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise ValueError("damaged") from error
    if recorded != digest or pixels.shape != shape:
        raise ValueError("outdated")
    if path.stat().st_size != _HEADER + pixels.size or zlib.crc32(pixels.data) != checksum:
        raise ValueError("damaged")
    return pixels


def read_facts(path: Path, digest: str) -> dict[str, Any]:
    """What was measured of the files of this digest; empty where nothing is known."""
    try:
        facts = json.loads(path.read_text())
        return facts if facts["digest"] == digest else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def write_facts(path: Path, digest: str, facts: dict[str, Any]) -> None:
    """Keeps what was measured for the next time."""
    write_text(path, json.dumps({**facts, "digest": digest}))
