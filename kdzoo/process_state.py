"""What the whole process shares, and code of others must leave as it is."""

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch

from kdzoo.errors import UserError, told
from kdzoo.own_code import at_own_place


def _set_device(device: torch.device) -> None:
    torch.set_default_device(None if device.type == "cpu" else device)  # set, the CPU too would slow every call


def _folder() -> str | None:
    with suppress(OSError):  # it was deleted under way
        return os.getcwd()
    return None


def _enter(folder: str | None) -> None:
    if folder is not None:
        os.chdir(folder)


# By what errors call it: how it is read and set.
SHARED: dict[str, tuple[Callable[[], Any], Callable[[Any], object]]] = {
    "torch's default dtype": (torch.get_default_dtype, torch.set_default_dtype),
    "torch's default device": (torch.get_default_device, _set_device),
    "whether torch computes gradients": (torch.is_grad_enabled, torch.set_grad_enabled),
    "the working folder": (_folder, _enter),
}


def process_state() -> dict[str, Any]:
    """Read what the whole process shares."""
    return {name: read() for name, (read, _) in SHARED.items()}


def put_back(before: dict[str, Any]) -> list[str]:
    """Restore what is no longer as it was read before, and name it."""
    now = process_state()
    changed = [name for name in SHARED if now[name] != before[name]]
    for name in changed:
        SHARED[name][1](before[name])
    return changed


@contextmanager
def unchanged(who: str) -> Iterator[None]:
    """Make a context in which code of others runs, after which the process's state is what it was.

    Raises:
        UserError: it was another; says what ``who`` changed.
    """
    before, changed = process_state(), []
    try:
        yield
    finally:
        changed = put_back(before)
    if changed:
        raise UserError(f"{who} changed {changed[0]}, which all other code reads too; leave it as it is")


@contextmanager
def foreign(who: str, failed: str, todo: str) -> Iterator[None]:
    """Make a context for code of others: any error inside but Ctrl-C becomes one line, and the state is put back.

    Args:
        who: whose code it is.
        failed: what failed then, with what separates it from ``who``.
        todo: what was expected of it, or what to do.

    Raises:
        UserError: the code failed, or changed what the process shares.
    """
    try:
        with unchanged(who):
            yield
    except (UserError, KeyboardInterrupt):
        raise
    except BaseException as error:
        raise UserError(f"{who}{failed} ({told(error)}){at_own_place(error)}; {todo}") from error


def check_compiler() -> None:
    """Check that torch compiles at all, as a variable of the environment may turn that off without a word.

    Raises:
        UserError: it does not.
    """
    if not torch.compile(lambda: torch.compiler.is_compiling(), backend="eager")():
        raise UserError("torch compiles nothing here; unset TORCH_COMPILE_DISABLE and TORCHDYNAMO_DISABLE")


@contextmanager
def only_errors_of(library: str) -> Iterator[None]:
    """Keep a library from logging warnings inside this context."""
    logger = logging.getLogger(library)
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)
