"""What befalls a process from outside: counts its file operations, and does harm at one of them."""

import errno
import os
import resource
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

OPERATIONS = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.utime", "os.scandir", "os.listdir"}
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT


@dataclass(frozen=True)
class Harm:
    """Something that happens to a process.

    Args:
        kind: a name of ``KINDS``.
        point: the file operation, from 1, at which it happens; a share of the undisturbed time for signals sent from
            outside; MiB beside those in use for a limit of memory.
        target: the folder that is lost, for kinds that lose one.
    """

    kind: str
    point: float
    target: str = ""

    def __str__(self) -> str:
        if self.kind == "memory":
            return f"{self.point:.0f} MiB of memory"
        if self.kind in SIGNALS:
            return f"{self.kind} after {self.point:.0%} of the time"
        return f"{self.kind} {self.target}{' ' * bool(self.target)}at operation {self.point:.0f}"


SIGNALS = {"kill": signal.SIGKILL, "term": signal.SIGTERM, "int": signal.SIGINT, "hangup": signal.SIGHUP}
AT_OPERATIONS = ("killed", "full", "EIO", "removed", "renamed", "clock")
KINDS = (*SIGNALS, *AT_OPERATIONS, "memory")


class Operations:
    """The file operations of this process below a folder, counted by Python's audit events and at ``os.fsync``."""

    def __init__(self, folder: Path, harm: Harm | None):
        self.folder, self.harm, self.count = str(folder) + os.sep, harm, 0
        self.busy = threading.local()
        fsync = os.fsync

        def counted_fsync(handle: int) -> None:
            self.passed(writes=True)
            fsync(handle)

        os.fsync = counted_fsync
        sys.addaudithook(self.heard)

    def heard(self, event: str, given: tuple) -> None:
        path = given[0] if event in OPERATIONS and given else None
        if isinstance(path, str | bytes | os.PathLike) and os.path.abspath(os.fsdecode(path)).startswith(self.folder):
            self.passed(writes=not (event in ("os.scandir", "os.listdir") or is_read(event, given)))

    def passed(self, writes: bool) -> None:
        if getattr(self.busy, "own", False):
            return
        self.count += 1
        if self.harm is None or self.harm.kind not in AT_OPERATIONS:
            return
        if self.count == self.harm.point or (self.harm.kind == "full" and writes and self.count > self.harm.point):
            self.busy.own = True
            try:
                getattr(self, self.harm.kind)(writes)
            finally:
                self.busy.own = False

    def killed(self, writes: bool) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def full(self, writes: bool) -> None:
        """From here on, nothing can be written."""
        if writes:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def EIO(self, writes: bool) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    def removed(self, writes: bool) -> None:
        for folder in self.targets():
            shutil.rmtree(folder, ignore_errors=True)

    def renamed(self, writes: bool) -> None:
        for folder in self.targets():
            folder.rename(folder.with_name(f"{folder.name}-moved-{os.getpid()}"))

    def clock(self, writes: bool) -> None:
        """The clock is set back by three days."""
        now = time.time
        time.time = lambda: now() - 3 * 86400

    def targets(self) -> list[Path]:
        assert self.harm is not None
        found = sorted(folder for folder in Path(self.folder).glob(self.harm.target) if folder.is_dir())
        return [folder for folder in found if "-moved-" not in folder.name][:1]


def is_read(event: str, given: tuple) -> bool:
    return event == "open" and not (given[2] or 0) & WRITING


def limit_memory(more: float) -> None:
    """Let this process have so many MiB of addresses beside those that it has."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + int(more * 2**20)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def forked(work: Callable[[], object], said: Path) -> int:
    """Run ``work`` in a copy of this process whose output goes to a file, and return its number."""
    number = os.fork()
    if number:
        return number
    code = 1
    try:
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        out = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(out, 1)
        os.dup2(out, 2)
        work()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        try:
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(code)
