"""Errors that the user can fix: one line of what was given, what was expected and what to do next."""

from collections.abc import Iterable
from difflib import get_close_matches


class UserError(Exception):
    """An error that the user can fix: one line of what was given, what was expected and what to do next.

    The command line prints the message without a traceback and exits with 2.

    Example:
        >>> kdzoo.distill(cnn, wider_cnn, "lffc", num_classes=10, image_size=32)
        Traceback (most recent call last):
        kdzoo.errors.UserError: unknown distiller 'lffc'; did you mean lfcc? ('kdzoo list distillers' lists all; ...
    """


class StorageError(UserError):
    """A full disk, or a folder that cannot be written to.

    It is never counted as the failure of a run.
    """


class OutOfMemory(UserError):
    """A run that does not fit into memory beside the others. It may fit alone."""


LONGEST = 300  # characters of what an error of others says


def told(error: BaseException) -> str:
    """Say an error of others in one line: its type, and the first line of its text, if it has any."""
    try:
        lines = str(error).strip().splitlines()
    except Exception:  # of a class that cannot say what it is
        lines = []
    return f"{type(error).__name__}: {lines[0][:LONGEST]}" if lines else type(error).__name__


def unknown(kind: str, name: str, known: Iterable[str], hint: str = "") -> UserError:
    """Make the error for an unknown ``name``, with the nearest of the ``known`` names."""
    names = sorted(known)
    near = get_close_matches(name, names, n=3, cutoff=0.5)
    guess = f"; did you mean {' or '.join(near)}?" if near else f"; known: {', '.join(names[:30])}"
    return UserError(f"unknown {kind} '{name}'{guess}{' ' + hint if hint else ''}")
