"""Checkpoints that survive being killed at any moment: atomic, checksummed, the last two kept."""

import hashlib
import io
import re
from pathlib import Path
from typing import Any

import torch

from kdzoo.errors import StorageError, UserError
from kdzoo.files import storing, write_atomically

_NAME = re.compile(r"step-(\d{9})-([0-9a-f]{16})\.pt")
FORMAT = 2  # of a checkpoint; another version's are refused
KEPT = 2
_AGAIN = "move {} away and run the same command again"


def save(folder: Path, step: int, state: dict[str, Any]) -> None:
    """Write ``state`` (tensors and plain values) as the checkpoint of ``step``, and keep it and the one before it.

    Those of later steps go too: training went back behind them, since they are damaged or runs beside it lack them.
    """
    buffer = io.BytesIO()
    torch.save({"format": FORMAT, "step": step, "state": state}, buffer)

    def write(temporary: Path) -> None:
        # Not by write_bytes: on an error its frame keeps a view of the buffer, and where the garbage collector of
        # CPython clears the buffer before the view, the process ends by a segmentation fault.
        with temporary.open("wb") as file:
            file.write(content)

    with buffer.getbuffer() as content, storing(folder.parent):
        name = f"step-{step:09d}-{_digest(content)}.pt"
        folder.mkdir(exist_ok=True)
        write_atomically(folder / name, write)
        kept = [folder / name, *(file for file in _files(folder) if _step(file) < step)][:KEPT]
        for file in [*_files(folder), *folder.glob(".step-*.part")]:  # parts are what a kill left behind
            if file not in kept:
                file.unlink(missing_ok=True)


def whole(folder: Path) -> tuple[dict[int, Path], list[str]]:
    """Find the whole checkpoints in ``folder`` by their step, and give a line for each damaged one.

    Raises:
        StorageError: one cannot be read.
        UserError: there are checkpoints and every one is damaged.
    """
    found: dict[int, Path] = {}
    damaged: list[str] = []
    for file in _files(folder):
        match = _NAME.fullmatch(file.name)
        assert match is not None
        try:
            content = file.read_bytes()
        except FileNotFoundError:  # the run's owner has removed it meanwhile
            continue
        except OSError as error:
            raise StorageError(f"{file} cannot be read ({error.strerror}); run the same command again") from error
        if _digest(content) == match[2]:
            found[int(match[1])] = file
        else:
            damaged.append(f"checkpoint {file} is damaged (its checksum differs); using the one before it")
    if damaged and not found:
        raise UserError(f"every checkpoint in {folder} is damaged; {_AGAIN.format('it')}")
    return found, damaged


def steps(folder: Path) -> list[int]:
    """List the steps of the checkpoints in ``folder``, newest first, without looking into them."""
    return [_step(file) for file in _files(folder)]


def load(file: Path) -> dict[str, Any]:
    """Read the state that ``save`` was given, on the CPU.

    Raises:
        UserError: the file holds something else, or the state of another step, or another version wrote it.
    """
    match = _NAME.fullmatch(file.name)
    try:
        saved = torch.load(file, map_location="cpu", weights_only=True)
        version, step, state = saved.get("format"), saved["step"], dict(saved["state"])
    except Exception as error:  # on what is damaged, torch's reader raises errors of many kinds
        raise UserError(f"{file} is no checkpoint of kdzoo; {_AGAIN.format(file.parent)}") from error
    if version != FORMAT:
        raise UserError(
            f"{file} was written by another version of kdzoo; continue with that version, or "
            f"{_AGAIN.format(file.parent)}"
        )
    if match is not None and step == int(match[1]):
        return state
    raise UserError(f"{file} holds the state of another step than its name says; {_AGAIN.format(file.parent)}")


def remove(folder: Path) -> None:
    """Delete all checkpoints in ``folder``."""
    with storing(folder):
        for file in _files(folder):
            file.unlink(missing_ok=True)


def _files(folder: Path) -> list[Path]:
    """List the checkpoints, newest first."""
    return sorted((f for f in folder.glob("step-*.pt") if _NAME.fullmatch(f.name) and f.is_file()), reverse=True)


def _step(file: Path) -> int:
    return int(file.name[5:14])


def _digest(content: bytes | memoryview) -> str:
    return hashlib.sha256(content).hexdigest()[:16]
