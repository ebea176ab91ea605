"""Errors that the user can fix: one line of what was given, what was expected and what to do next."""

from collections.abc import Iterable
from difflib import get_close_matches


class UserError(Exception):
    """An error that the user can fix: its message is one line of what was given, expected, and to do next.

    The command line prints the message without a traceback and exits with 2.

    Example:
        >>> kdzoo.distill(cnn, wider_cnn, "lffc", num_classes=10, image_size=32)
        Traceback (most recent call last):
        kdzoo.errors.UserError: unknown distiller 'lffc'; did you mean lfcc? ('kdzoo list distillers' lists all; ...
    """


class StorageError(UserError):
    """A disk that is full or a folder that cannot be written: never a run's own failure."""


class OutOfMemory(UserError):
    """A run did not fit into memory beside the others; alone it may."""


def unknown(kind: str, name: str, known: Iterable[str], hint: str = "") -> UserError:
    """The error for a ``name`` that is none of the ``known`` names, with the nearest of them."""
    names = sorted(known)
    near = get_close_matches(name, names, n=3, cutoff=0.5)
    guess = f"; did you mean {' or '.join(near)}?" if near else f"; known: {', '.join(names[:30])}"
    return UserError(f"unknown {kind} '{name}'{guess}{' ' + hint if hint else ''}")
