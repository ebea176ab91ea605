"""End a training at the end of a step when the system asks for it, as schedulers do before they kill."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


class Terminated(KeyboardInterrupt):
    """The system asked this process to end."""


@contextmanager
def asked_to_end() -> Iterator[Callable[[], bool]]:
    """Make a context in which a first SIGTERM is noted and a second ends the process; gives whether one came."""
    asked = threading.Event()

    def note(before: signal.Handlers) -> None:
        asked.set()
        signal.signal(signal.SIGTERM, before)

    with _told_of_sigterm(note):
        yield asked.is_set


@contextmanager
def ended_by_sigterm() -> Iterator[None]:
    """Make a context that SIGTERM leaves by ``Terminated``, so that what it holds is given up in order."""

    def leave(before: signal.Handlers) -> None:
        raise Terminated

    with _told_of_sigterm(leave):
        yield


@contextmanager
def _told_of_sigterm(tell: Callable[[signal.Handlers], None]) -> Iterator[None]:
    """Call ``tell`` with the handler of before at every SIGTERM; only a program's main thread is told of signals."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handle(number: int, frame: FrameType | None) -> None:
        tell(before)  # type: ignore[arg-type]  # the type of what signal.signal takes

    before = signal.signal(signal.SIGTERM, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
