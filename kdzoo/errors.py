"""Errors that the user can fix: one line of what was given, what was expected and what to do next."""

import errno
import signal
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches


class UserError(Exception):
    """An error that the user can fix: one line of what was given, what was expected and what to do next.

    The command line prints the message without a traceback and exits with 2.

    Example:
        >>> kdzoo.distill(cnn, wider_cnn, "fitnett", num_classes=10, image_size=32)
        Traceback (most recent call last):
        kdzoo.errors.UserError: unknown distiller 'fitnett'; did you mean fitnet? ('kdzoo list distillers' lists ...
    """


class StorageError(UserError):
    """A full disk, or a folder that cannot be written to.

    It is never counted as the failure of a run.
    """


class AskedToEnd(SystemExit):
    """A signal asked the process to end, which it does with a signal's exit code, after it saved its work."""

    def __init__(self) -> None:
        super().__init__(128 + signal.SIGTERM)


class OutOfMemory(UserError):
    """Work that memory does not hold. A run that does not fit beside others may fit alone."""


# What libraries say that found no memory, no addresses for a file of theirs, or no stack for a thread.
SHORTAGES = (
    "allocate memory",
    "not enough memory",
    "out of memory",
    "bad_alloc",
    "bad allocation",
    "could not create a primitive",  # oneDNN's words
    "could not create a memory",
    "can't start new thread",
    "failed to map segment",
    "unable to mmap",
)


def is_shortage(error: BaseException | None) -> bool:
    """Tell whether an error, or one that it came from, says that memory is full."""
    while error is not None:
        said = _text(error).lower()
        if isinstance(error, MemoryError | OutOfMemory) or getattr(error, "errno", None) == errno.ENOMEM:
            return True
        if not isinstance(error, UserError) and any(words in said for words in SHORTAGES):
            return True
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return False


@contextmanager
def out_of_memory_told(doing: Callable[[], str]) -> Iterator[None]:
    """Raise ``OutOfMemory`` in place of any error inside this context that says that memory is full.

    Args:
        doing: says what is tried, such as "building resnet8".
    """
    try:
        yield
    except OutOfMemory:
        raise
    except Exception as error:
        if is_shortage(error):
            raise OutOfMemory(
                f"out of memory while {doing()}; give this process more, or lower --batch-size, protocol.image_size, "
                "engine.threads or data.workers"
            ) from error
        raise


LONGEST = 300  # characters of what an error of others says


def told(error: BaseException) -> str:
    """Say an error of others in one line: its type, and the first line of its text, if it has any.

    A first line that ends in a colon says nothing without the next.
    """
    lines = [line.strip() for line in _text(error).strip().splitlines()]
    said = " ".join(lines[: 2 if lines[0].endswith(":") else 1]) if lines else ""
    return f"{type(error).__name__}: {said[:LONGEST]}" if lines else type(error).__name__


def visible(text: str) -> str:
    """Write characters that would not be seen, such as those that command a terminal, as ``\\x1b``."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def _text(error: BaseException) -> str:
    """Return what an error says; nothing of a class that cannot say what it is."""
    try:
        return str(error)
    except Exception:
        return ""


def unknown(kind: str, name: object, known: Iterable[str], hint: str = "") -> UserError:
    """Make the error for an unknown ``name``, with the nearest of the ``known`` names."""
    names, section = sorted(set(known)), str(name)[: str(name).rfind(".") + 1]
    if inside := [one for one in names if one.startswith(section)]:  # a section that is right is no part of the mistake
        names = inside
    else:
        section = ""
    rests = [one.removeprefix(section) for one in names]
    near = [section + rest for rest in get_close_matches(str(name).removeprefix(section), rests, n=3, cutoff=0.5)]
    near = [one for one in names if one.endswith(f".{name}")] or near
    more = f" and {len(names) - 30} more" if len(names) > 30 else ""
    guess = f"; did you mean {' or '.join(near)}?" if near else f"; known: {', '.join(names[:30])}{more}"
    return UserError(f"unknown {kind} '{name}'{guess}{' ' + hint if hint else ''}")
