"""Fingerprint a data set: the same wherever its files lie, another as soon as an image or a label changes."""

import os
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import Any
from unicodedata import normalize

import numpy as np
from numpy.typing import NDArray

from kdzoo.data.pictures import Files, Pictures, Pixels, paths_of, states_of
from kdzoo.data.sources import Source, at_work, image_set, open_source
from kdzoo.errors import StorageError
from kdzoo.files import cache_folder, is_file, make_folder, write_atomically

SIZE = 16  # bytes of a digest
_CHUNK = 256  # files that a thread reads before it takes others
_SETTLED = (
    2 * 10**9
)  # nanoseconds: a file that changed later than this ago may change again within one tick of its clock


def fingerprint(
    name: str,
    root: Path | str = "data",
    *,
    options: Mapping[str, Any] | None = None,
    classes: str | None = None,
    val: float = 0.0,
    select: float = 0.0,
    test: str | None = None,
    cache: Path | None = None,
) -> str:
    """Hash the class names, labels and images of a data set; empty where its name and options say everything.

    The content of a file is read again only if its size, its times or its inode changed.

    Args:
        name: the set, as ``open_dataset`` is given it.
        root: the folder of sets that are files.
        options: keywords of the set's constructor.
        classes: the order of the classes, as ``open_dataset`` is given it.
        val: the share of training images that is held out, as ``open_dataset`` is given it.
        select: the share of those left that is held out, in the same way.
        test: another set, whose test images are measured on, as ``open_dataset`` is given it.
        cache: folder that holds what is known of the files; None: ``data`` in $KDZOO_CACHE, else in ~/.cache/kdzoo.

    Raises:
        UserError: an unknown name or option, or files that are missing.
    """
    images = image_set(name, options)
    with at_work(name, "fingerprint"):
        told = images.fingerprint(Path(root))
    if told is not None and test is None:
        return told
    source = open_source(name, Path(root), options, classes=classes, val=val, select=select, test=test)
    return fingerprint_of(source, cache or cache_folder() / "data")


def fingerprint_of(source: Source, cache: Path) -> str:
    """Hash the class names, labels and images of a set that is loaded, in their order."""
    digest = blake2b("\0".join(source.class_names).encode(), digest_size=SIZE)
    splits = {"train": source.train, "test": source.test}
    for split, content in zip(splits, _contents(list(splits.values()), cache), strict=True):
        digest.update(f"\n{split} {len(splits[split])}\n".encode())
        digest.update(splits[split].labels.astype("<i8").tobytes())
        digest.update(content)
    return digest.hexdigest()


def _contents(splits: list[Pictures], cache: Path) -> list[bytes]:
    """Give bytes that stand for the images of each split, and for their names where they have any."""
    files = [split for split in splits if isinstance(split, Files)]
    if not files:
        return [_of_array(split) for split in splits if isinstance(split, Pixels)]
    lines: dict[tuple[Path, bytes], bytes] = {}
    for root in dict.fromkeys(each.root for each in files):
        names = np.unique(np.concatenate([each.names for each in files if each.root == root]))
        for name, digest in zip(names.tolist(), file_digests(root, names, cache), strict=True):
            lines[root, name] = b"%b\0%b\n" % (_portable(name), digest)
    return [b"".join([lines[each.root, name] for name in each.names.tolist()]) for each in files]


def _of_array(pixels: Pixels) -> bytes:
    array = np.ascontiguousarray(pixels.array)
    return blake2b(array.data, digest_size=SIZE, key=str(array.shape).encode()).digest()


def _portable(name: bytes) -> bytes:
    """Write a relative path as every system does: slashes, and letters in one Unicode form."""
    if name.isascii() and os.sep == "/":
        return name
    return normalize("NFC", os.fsdecode(name).replace(os.sep, "/")).encode("utf-8", "surrogateescape")


def file_digests(root: Path, names: NDArray[np.bytes_], cache: Path) -> list[bytes]:
    """Hash the content of each of the files ``names`` (N,), sorted, below ``root``; those of before are remembered."""
    # By its path, so that the digests of a tree are found whichever set reads it.
    notes = cache / "contents" / f"{root.name[:40]}-{blake2b(os.fsencode(root), digest_size=6).hexdigest()}.npz"
    begun = time.time_ns()
    states = states_of(root, names)
    digests, known = _remembered(notes, names, states)
    unknown = np.flatnonzero(~known)
    if len(unknown):
        read = _hashed(paths_of(root, names[unknown]))
        digests[unknown] = np.frombuffer(b"".join(read), np.uint8).reshape(-1, SIZE)
        states[states[:, 1:3].max(1) > begun - _SETTLED] = 0
        with suppress(StorageError):  # then they are read again the next time
            make_folder(notes.parent)
            write_atomically(notes, partial(_write, names, states, digests))
    return [row.tobytes() for row in digests]


def _remembered(
    notes: Path, names: NDArray[np.bytes_], states: NDArray[np.int64]
) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    """Read the digests (N, SIZE) of the files that are as they were, and tell which these are (N,)."""
    digests = np.zeros((len(names), SIZE), np.uint8)
    try:
        if not is_file(notes):
            raise FileNotFoundError
        with notes.open("rb") as file:
            arrays = np.load(file)
            before = {name: arrays[name] for name in ("names", "states", "digests")}
        places = np.searchsorted(before["names"], names).clip(max=len(before["names"]) - 1)
        same = (before["names"][places] == names) & (before["states"][places] == states).all(1)
        known = same & states.any(1)  # without a state a file is missing, or changed only just
        digests[known] = before["digests"][places[known]]
    except Exception:  # none yet, or damaged, on which NumPy raises nearly anything
        return digests, np.zeros(len(names), bool)
    return digests, known


def _write(names: NDArray[np.bytes_], states: NDArray[np.int64], digests: NDArray[np.uint8], path: Path) -> None:
    with path.open("wb") as file:
        np.savez(file, names=names, states=states, digests=digests)


def _hashed(paths: list[bytes]) -> list[bytes]:
    def hash_some(start: int) -> list[bytes]:
        return [_digest(path) for path in paths[start : start + _CHUNK]]

    with ThreadPoolExecutor() as pool:
        return [digest for some in pool.map(hash_some, range(0, len(paths), _CHUNK)) for digest in some]


def _digest(path: bytes) -> bytes:
    """Hash a file; zeros where there is none that can be read."""
    digest = blake2b(digest_size=SIZE)
    try:
        if not is_file(path):
            return bytes(SIZE)
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
    except OSError:
        return bytes(SIZE)
    try:
        while block := os.read(handle, 2**20):
            digest.update(block)
    except OSError:
        return bytes(SIZE)
    finally:
        os.close(handle)
    return digest.digest()
