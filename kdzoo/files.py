"""Atomic file writes, and the folders that kdzoo reads from and writes to."""

import errno
import hashlib
import json
import os
import re
import secrets
import stat
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

from kdzoo.errors import StorageError, UserError

LARGEST = 2**26  # bytes of a text file that is read
MOVE_AWAY = "move its folder away and run the same command again"


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file completely or not at all: ``write`` fills a temporary file, which is then renamed to ``path``.

    Raises:
        StorageError: the disk is full or the folder cannot be written; what stood at ``path`` is untouched.
    """
    # Not by the process alone: in two containers that share a folder two processes may have one number.
    temporary = path.with_name(f".{path.name[:200]}.{os.getpid()}-{secrets.token_hex(4)}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
        _sync_folder(path.parent)
    except BaseException as error:  # an interruption leaves nothing behind either
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise _explained(error, path) from error


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file completely or not at all."""
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def read_text(path: Path) -> str:
    """Read a UTF-8 text file of at most 64 MiB, which is more than kdzoo ever writes.

    Raises:
        UserError: it cannot be read, is too large, or is no text.
    """
    try:
        if not path.is_file():
            raise UserError(f"{path} is no file")
        if path.stat().st_size > LARGEST:
            raise UserError(f"{path} has {path.stat().st_size:,} bytes; expected a text file of kdzoo's")
        return path.read_text(encoding="utf-8")
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
    folder = Path(os.environ.get("KDZOO_CACHE") or Path.home() / ".cache" / "kdzoo").expanduser()
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise _explained(error, folder) from error
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


def _explained(error: BaseException, path: Path) -> BaseException:
    code = getattr(error, "errno", None)
    said = str(error)
    if code in (errno.ENOSPC, errno.EDQUOT) or "No space left" in said:
        return StorageError(f"the disk of {path.parent} is full; free some space and run the same command again")
    if isinstance(error, OSError):
        return StorageError(f"{path.parent} cannot be written ({error.strerror or said}); choose another folder")
    return error
