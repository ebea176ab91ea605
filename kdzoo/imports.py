"""Import what is large without searches for garbage: it is there to stay, and they take a fifth of the time."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache


@contextmanager
def not_searched() -> Iterator[None]:
    """Make a context in which Python searches for no garbage that it cannot free by counting references."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@cache
def never_searched() -> None:
    """Leave what is there now out of all searches to come; only once, since what a process leaves later is garbage."""
    gc.freeze()
