"""Ending on request: SIGTERM and SIGHUP wait for the end of a step, whose checkpoint is then written."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from kdzoo.errors import AskedToEnd

NUMBERS = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]


class Termination:
    """Note the signals that ask a process to end, inside this context.

    A second one ends the process at once, as all do outside of it. A signal that the user ignores, as ``nohup`` does,
    or handles stays the user's; so do all of them where this is not the main thread.
    """

    def __init__(self) -> None:
        self.requested = False
        self.handled: list[int] = []

    def __enter__(self) -> "Termination":
        if threading.current_thread() is threading.main_thread():
            self.handled = [number for number in NUMBERS if signal.getsignal(number) is signal.SIG_DFL]
        for number in self.handled:
            signal.signal(number, self.note)
        return self

    def note(self, number: int, frame: FrameType | None) -> None:
        """Note the request, once."""
        self.requested = True
        self.restore()

    def __exit__(self, *_: object) -> None:
        self.restore()

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Let the signals end the process at once inside, where there is no step whose end could be saved.

        Raises:
            AskedToEnd: the process was asked to end before.
        """
        if self.requested:
            raise AskedToEnd
        self.restore()
        try:
            yield
        finally:
            for number in self.handled:
                signal.signal(number, self.note)

    def restore(self) -> None:
        """Let the signals end the process again."""
        for number in self.handled:
            signal.signal(number, signal.SIG_DFL)
