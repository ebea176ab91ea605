"""Atomic file writes, and the folders that kdzoo reads from and writes to."""

import errno
import hashlib
import json
import os
import re
import secrets
import shutil
import stat
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from importlib.resources import files
from importlib.resources.abc import Traversable
from io import BytesIO, TextIOWrapper
from math import inf
from pathlib import Path
from typing import Any

from kdzoo.errors import StorageError, UserError

LONGEST_NAME, LONGEST_PATH = 255, 4000  # bytes that file systems take
LARGEST = 2**26  # bytes of a text file that is read
DAY = 86400.0  # seconds
DEVICES = Path("/dev")  # where links such as stdout may lead to regular files
_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_PART = re.compile(r"\..*\.\d+-[0-9a-f]{8}\.part")
MOVE_AWAY = "move its folder away and run the same command again"


def path_of(given: str | Path) -> Path:
    """Make a path of what a user gives; ``~`` stands for the home folder.

    Raises:
        UserError: it can be no path: of another type, an address, an unknown user's home, or a name that no file
            system takes.
    """
    if not isinstance(given, str | Path):
        raise UserError(f"{given!r} is of type {type(given).__name__}; expected a path")
    shown = given if len(str(given)) < 100 else f"{str(given)[:40]}...{str(given)[-40:]}"
    if _ADDRESS.match(str(given)):
        raise UserError(f"{shown} is an address; expected a path on this machine")
    try:
        path = Path(given).expanduser()
    except RuntimeError as error:
        raise UserError(f"{shown}: there is no such user; write the folder's whole path") from error
    sizes = [len(os.fsencode(part)) for part in path.parts]
    if max(sizes, default=0) > LONGEST_NAME or sum(sizes) + len(sizes) > LONGEST_PATH or "\0" in str(given):
        raise UserError(f"{shown} can be no path; expected names of at most {LONGEST_NAME} bytes, without NUL")
    return path


def files_named(name: str, *suffixes: str) -> list[str]:
    """List the files that ``name`` would mean with one of these suffixes."""
    return [file for file in (name + suffix for suffix in suffixes) if path_of(file).is_file()]


def files_below(folders: Iterable[Path], name: str) -> Iterator[Path]:
    """Find the files of a name in or below folders; links are followed, and no folder is entered twice."""
    seen: set[str] = set()
    for folder in folders:
        for place, inner, names in os.walk(folder, followlinks=True):
            inner.sort()
            if (real := os.path.realpath(place)) in seen:
                inner.clear()
            elif name in names:
                yield Path(place, name)
            seen.add(real)


def output_path(given: str | Path) -> Path:
    """Make the path of what is to be written, as ``path_of`` does.

    Raises:
        UserError: as by ``path_of``, or it is empty, which would be the working folder.
    """
    if given == "":
        raise UserError("out is empty; the working folder is '.'")
    return path_of(given)


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file completely or not at all: ``write`` fills a temporary file, which is then renamed to ``path``.

    No folder is made: one that was removed or renamed meanwhile does not come back with this file alone.

    Raises:
        StorageError: the disk is full, the folder cannot be written, or a device has that name; what stood at ``path``
            is untouched.
    """
    if _is_device(path):
        raise StorageError(f"{path} is a device; name a file to write")
    temporary = part_of(path)
    with storing(path.parent):
        try:
            write(temporary)
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            temporary.replace(path)
            _sync_folder(path.parent)
            remove_parts(path.parent, older_than=DAY)
        except BaseException:  # an interruption leaves nothing behind either
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise


@contextmanager
def appearing(target: Path) -> Iterator[Path]:
    """Make a folder to write into, which takes the name ``target`` when all is written; one that was there goes.

    What killed processes left half-written beside it is removed after a day.

    Raises:
        StorageError: the disk is full or the folder cannot be written; what stood at ``target`` is untouched.
    """
    make_folder(target.parent)
    folder, former = part_of(target), part_of(target)
    with storing(target.parent):
        try:
            folder.mkdir()
            yield folder
            if target.exists():
                target.rename(former)
            folder.rename(target)
            remove_parts(target.parent, older_than=DAY)
        except BaseException:
            if former.exists() and not target.exists():  # nor has another process made one meanwhile
                former.rename(target)
            raise
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            shutil.rmtree(former, ignore_errors=True)


@contextmanager
def storing(folder: Path) -> Iterator[None]:
    """Raise ``StorageError`` in place of an error of the system at work on the files of a folder.

    A lack of memory stays what it is.
    """
    try:
        yield
    except Exception as error:
        said = getattr(error, "strerror", None) or str(error)
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left" in said:
            raise StorageError(
                f"the disk of {folder} is full; free some space and run the same command again"
            ) from error
        if not isinstance(error, OSError) or error.errno == errno.ENOMEM:
            raise
        if isinstance(error, FileNotFoundError):
            raise StorageError(
                f"the folder {folder} is not there; if it was removed or renamed, run the same command again"
            ) from error
        shown = "the working folder" if folder == Path() else folder
        raise StorageError(f"{shown} cannot be written ({said}); choose another folder") from error


def make_folder(folder: Path, mode: int = 0o777) -> None:
    """Make a folder and those above it, where they are missing.

    Raises:
        StorageError: that is not possible.
    """
    try:
        with storing(folder if folder.exists() else folder.parent):
            folder.mkdir(mode=mode, parents=True, exist_ok=True)
    except StorageError as error:
        for path in (folder, *folder.parents):
            if os.path.lexists(path) and not os.path.isdir(path):
                what = "a link that leads nowhere" if path.is_symlink() and not path.exists() else "no folder"
                raise StorageError(f"{path} cannot be written (it is {what}); choose another folder") from error
        raise


def remove_parts(folder: Path, older_than: float = -inf) -> None:
    """Remove what killed processes left half-written in a folder, where it is older than so many seconds."""
    for part in folder.glob(".*.part"):
        with suppress(OSError):  # another process may have been first
            if _PART.fullmatch(part.name) and time.time() - part.lstat().st_mtime > older_than:
                if part.is_dir() and not part.is_symlink():
                    shutil.rmtree(part)
                else:
                    part.unlink()


def part_of(path: Path) -> Path:
    """Name what is written before it becomes ``path``.

    Not by the process alone: in two containers that share a folder two processes may have one number. Of the name as
    many characters as fit the 255 bytes of a file system in any script.
    """
    return path.with_name(f".{path.name[:50]}.{os.getpid()}-{secrets.token_hex(4)}.part")


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file completely or not at all; bytes of a path that are no text are written as ``\\udcff``."""
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8", errors="backslashreplace"))


def read_text(path: Path, largest: int = LARGEST, piped: bool = False) -> str:
    """Read a UTF-8 text file.

    Args:
        path: the file.
        largest: the bytes that it may have; 64 MiB are more than kdzoo ever writes.
        piped: whether it may also be a pipe, which is read until it ends.

    Raises:
        UserError: it cannot be read, is too large, or is no text.
    """
    try:
        if not (path.is_file() or (piped and path.exists() and not path.is_dir())):
            raise UserError(f"{path} is no file")
        with path.open("rb") as file:
            content = file.read(largest + 1)
        if len(content) > largest:
            raise UserError(f"{path} is larger than {largest:,} bytes; expected a text file of at most that size")
        return TextIOWrapper(BytesIO(content), encoding="utf-8").read()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error})") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is no UTF-8 text; save it as UTF-8") from error


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON file that holds a mapping, without NaN or infinity.

    Raises:
        UserError: it is damaged.
    """

    def refuse(constant: str) -> None:
        raise ValueError(f"it holds {constant}")

    text = read_text(path)
    try:
        values = json.loads(text, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({str(error) or type(error).__name__}); {MOVE_AWAY}") from error
    if not isinstance(values, dict):
        raise UserError(f"{path} is damaged (it holds no mapping); {MOVE_AWAY}")
    return values


def is_file(path: str | bytes | os.PathLike[str]) -> bool:
    """Tell whether there is a regular file, which ends when it is read: no pipe, device or socket."""
    try:
        return stat.S_ISREG(os.stat(path).st_mode)
    except (OSError, ValueError):
        return False


def _is_device(path: Path) -> bool:
    """Tell whether this is a device itself, or a name in its folder; not whether it is a link to one elsewhere."""
    if path.absolute().parent == DEVICES:
        return True
    try:
        mode = os.lstat(path).st_mode
    except OSError:
        return False
    return stat.S_ISCHR(mode) or stat.S_ISBLK(mode)


def digest(path: Path) -> str:
    """Compute the SHA-256 of a file's content; while its size and time stay, it is read once."""
    state = path.stat()
    return _digest(path.resolve(), state.st_size, state.st_mtime_ns)


@cache
def _digest(path: Path, size: int, changed: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def slug(name: str) -> str:
    """Turn ``name`` into a safe part of a path: letters, digits, dot, underscore and hyphen only."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.")[-60:] or "unnamed"


def shipped_folder() -> Traversable:
    """Return the folder of protocols, suites and tables that come with kdzoo (``configs/`` in a checkout)."""
    beside = Path(__file__).parents[1] / "configs"
    if (beside / "presets.csv").is_file():  # a checkout's own, whichever other one is installed
        return beside
    return files("kdzoo.configs")


def cache_folder() -> Path:
    """Return the folder for decoded data sets and trained teachers: ``$KDZOO_CACHE``, or ``~/.cache/kdzoo``.

    It is made for its owner alone: what lies there is used as if this user had made it.

    Raises:
        StorageError: it cannot be made.
        UserError: others can write to it.
    """
    folder = path_of(os.environ.get("KDZOO_CACHE") or "~/.cache/kdzoo")
    try:
        make_folder(folder, mode=0o700)
    except StorageError as error:
        raise StorageError(f"no cache: {error} (KDZOO_CACHE names the cache, by default ~/.cache/kdzoo)") from error
    if os.name == "posix" and folder.stat().st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise UserError(
            f"other users can write to the cache {folder}, and could put teachers of theirs there; "
            f"run 'chmod go-w {folder}', or name another folder by KDZOO_CACHE"
        )
    return folder


def _sync_folder(folder: Path) -> None:
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
