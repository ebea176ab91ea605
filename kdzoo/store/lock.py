"""One process at a time works on a run, and a dead owner holds nothing, however it died.

An advisory lock that the system drops when its owner dies tells the processes of one machine apart, and those of
several where their file system carries locks. Where it does not, the owner's heartbeat does: the owner touches its
file for as long as it lives.
"""

import json
import os
import socket
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from threading import Event, Thread

from filelock import FileLock, Timeout

from kdzoo.errors import UserError
from kdzoo.files import is_file, make_folder, read_json, storing, write_text

HEARTBEAT = 10.0  # seconds
LOOK = 0.1  # seconds that a lock is tried for, since another process may hold it just to look
LIFETIME = 60.0  # seconds without a heartbeat after which an owner on another machine is dead
_BOOT = Path("/proc/sys/kernel/random/boot_id")  # one for all containers of a machine, which share its locks


class RunLock:
    """The lock of a run's folder.

    A context manager; entering raises ``UserError`` where another process holds it, naming that process.
    """

    def __init__(self, folder: Path):
        self.owner = folder / "owner.json"
        self._file = folder / ".lock"
        self._lock = FileLock(self._file)
        self._released = Event()

    def acquire(self, wait: bool = False) -> bool:
        """Take the lock, waiting for it if asked; return False where another process holds it."""
        make_folder(self._file.parent)
        with storing(self._file.parent):
            if not self._take(wait):
                return False
            while self._lives_elsewhere():
                self._lock.release()
                if not wait:
                    return False
                time.sleep(HEARTBEAT)
                self._lock.acquire()
        self._released = Event()
        owner = {"host": socket.gethostname(), "process": os.getpid(), "machine": machine()}
        try:
            write_text(self.owner, json.dumps(owner) + "\n")
        except BaseException:
            self.release()
            raise
        Thread(target=_beat, args=(self.owner, self._released), daemon=True).start()
        return True

    def release(self) -> None:
        """Give the lock up, if it is held."""
        if self._lock.is_locked:
            self._released.set()
            with suppress(OSError):  # of a folder that is gone, or a disk that fails
                self.owner.unlink(missing_ok=True)
            self._lock.release()

    def is_held(self) -> bool:
        """Tell whether another process holds the lock. Looking takes it for less time than others try to take it."""
        try:
            if not self._file.is_file():
                return False
            if not self._take():
                return True
            self._lock.release()
            return self._lives_elsewhere()
        except OSError:
            return False

    def __enter__(self) -> "RunLock":
        if not self.acquire():
            raise UserError(
                f"{self._file.parent} is being worked on by {self.who()}; wait for it, or choose another --out (one on "
                f"another machine counts as lost after {LIFETIME:.0f} s without a sign)"
            )
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def who(self) -> str:
        """Name the owner."""
        try:
            owner = read_json(self.owner)
            return f"process {owner['process']} on {owner['host']}"
        except (UserError, KeyError):
            return "another process"

    def beat(self) -> float | None:
        """Return when an owner on another machine last showed that it lives; None where there is no such owner."""
        try:
            if not is_file(self.owner):
                return None
            with self.owner.open(encoding="utf-8") as file:  # opened: what a client remembers of a file may be old
                owner, beaten = json.load(file), os.fstat(file.fileno()).st_mtime
            here = owner["machine"] == machine() if "machine" in owner else owner["host"] == socket.gethostname()
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return None
        return None if here else beaten

    def _take(self, wait: bool = False) -> bool:
        """Take the lock of this machine, waiting for it if asked, and else for as long as others may look at it."""
        try:
            self._lock.acquire(timeout=-1 if wait else LOOK, poll_interval=LOOK / 5)
        except Timeout:
            return False
        return True

    def _lives_elsewhere(self) -> bool:
        """Tell whether an owner on another machine is alive. Only the file server's clock is read."""
        beaten = self.beat()
        if beaten is None:
            return False
        self._file.touch()
        silent = self._file.stat().st_mtime - beaten
        if silent < -HEARTBEAT:  # a clock was set back since; an owner that lives beats again
            with suppress(OSError):
                os.utime(self.owner)
        return silent < LIFETIME


def machine() -> str:
    """Name this machine; all containers on it have the same name."""
    try:
        return _BOOT.read_text(encoding="ascii").strip()
    except OSError:
        return socket.gethostname()


def await_signs(locks: Iterable[RunLock]) -> None:
    """Wait until each of these owners on other machines showed that it lives, or is dead."""
    begun = time.perf_counter()
    seen = {lock: beaten for lock in locks if (beaten := lock.beat()) is not None}
    while seen and time.perf_counter() - begun < LIFETIME:
        time.sleep(HEARTBEAT / 10)
        seen = {lock: beaten for lock, beaten in seen.items() if lock.beat() == beaten}


def _beat(owner: Path, released: Event) -> None:
    def beat(file: Path | int) -> None:
        while not released.wait(HEARTBEAT):
            with suppress(OSError):  # a file system may fail for a moment
                os.utime(file)

    if os.utime not in os.supports_fd:  # Windows, where a file that is open cannot be removed either
        beat(owner)
        return
    with suppress(OSError), owner.open() as file:  # this very file, even if another owner puts its own in its place
        beat(file.fileno())
