"""One process at a time works on a run: an advisory lock that the system drops when its owner dies, however it dies."""

import json
import os
import socket
from pathlib import Path

from filelock import FileLock, Timeout

from kdzoo.errors import StorageError, UserError
from kdzoo.files import write_text


class RunLock:
    """The lock of a run's folder.

    A context manager; entering raises ``UserError`` where another process holds it, naming that process.
    """

    def __init__(self, folder: Path):
        self.owner = folder / "owner.json"
        self._file = folder / ".lock"
        self._lock = FileLock(self._file)

    def acquire(self, wait: bool = False) -> bool:
        """Takes the lock, waiting for it if asked; False where another process holds it."""
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            self._lock.acquire(timeout=-1 if wait else 0)
        except Timeout:
            return False
        except OSError as error:
            raise StorageError(
                f"{self._file.parent} cannot be written ({error.strerror}); choose another folder"
            ) from error
        write_text(self.owner, json.dumps({"host": socket.gethostname(), "process": os.getpid()}) + "\n")
        return True

    def release(self) -> None:
        """Gives it up, if it is held."""
        if self._lock.is_locked:
            self.owner.unlink(missing_ok=True)
            self._lock.release()

    def __enter__(self) -> "RunLock":
        if not self.acquire():
            raise UserError(
                f"{self._file.parent} is being worked on by {self.who()}; wait for it, or choose another --out"
            )
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def who(self) -> str:
        """The owner in words."""
        try:
            owner = json.loads(self.owner.read_text(encoding="utf-8"))
            return f"process {owner['process']} on {owner['host']}"
        except (OSError, ValueError, KeyError):
            return "another process"
