"""Where a bench trains: in this process, or by workers, each of which is one process of ``kdzoo bench``.

A worker takes any group of the suite that no other process is at work on. ``on_ray`` starts them on a cluster.
"""

import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from subprocess import DEVNULL, PIPE, Popen
from typing import Protocol, runtime_checkable

import torch

from kdzoo.engine.device import resolve_auto
from kdzoo.engine.progress import Progress
from kdzoo.errors import UserError, unknown
from kdzoo.experiments.suites import Suite
from kdzoo.settings import Run

Groups = Sequence[Sequence[Run]]
# Modules come from where they do here: with "-m", a file in the working folder would stand in for one of Python's.
START = "import sys; sys.path[:] = {!r}; from kdzoo.cli import main; main()"


@runtime_checkable
class Executor(Protocol):
    """A place to train."""

    def resolve_auto(self, runs: Sequence[Run], progress: Progress) -> list[Run]:
        """Replace every ``auto`` of the runs by what it means where they will be trained."""

    def is_here(self, runs: Sequence[Run]) -> bool:
        """Tell whether this process trains the runs itself."""

    def start(self, suite: Suite, groups: Groups, progress: Progress) -> list[str]:
        """Start workers on a suite, wait for them, and return why some ended before their time.

        ``groups`` are those in which something is to do.
        """


def find(on: str = "local", jobs: int | None = None, gpus: float | None = None) -> Executor:
    """Find the executor of this name.

    Args:
        on: ``local`` or ``ray``.
        jobs: of ``local``, how many workers there are.
        gpus: of ``ray``, the GPUs that a worker takes.

    Raises:
        UserError: an unknown name, or a number that the executor has no use for.
    """
    if on not in ("local", "ray"):
        raise unknown("executor", on, ("local", "ray"))
    if on == "local":
        if gpus is not None:
            raise UserError("--gpus-per-group is for --on ray; --jobs N shares the GPUs of this machine")
        return Local(jobs)
    if jobs is not None:
        raise UserError("--jobs is for --on local; on Ray, --gpus-per-group and engine.threads say what a group takes")
    from kdzoo.experiments.on_ray import OnRay

    return OnRay(gpus)


def given_or_local(executor: Executor | None) -> Executor:
    """Return the executor that is given, or this machine where none is.

    Raises:
        UserError: it is of another type.
    """
    if executor is None:
        return Local()
    if not isinstance(executor, Executor):
        raise UserError(
            f"executor is of type {type(executor).__name__}; expected None for this machine, or what "
            'kdzoo.experiments.workers.find("ray") gives'
        )
    return executor


@dataclass(frozen=True)
class Local:
    """This machine: groups train one after the other in this process, or in several workers.

    Args:
        jobs: workers; None: one for each GPU, and none where there are fewer than two.
    """

    jobs: int | None = None

    def resolve_auto(self, runs: Sequence[Run], progress: Progress) -> list[Run]:
        return [resolve_auto(run) for run in runs]

    def is_here(self, runs: Sequence[Run]) -> bool:
        return len(self.devices(runs)) == 1

    def devices(self, runs: Sequence[Run]) -> list[str]:
        """Choose the device of each worker."""
        device = runs[0].place.engine.device if runs else "cpu"
        return slots(device, torch.cuda.device_count(), self.jobs)

    def start(self, suite: Suite, groups: Groups, progress: Progress) -> list[str]:
        (settings, place), out = groups[0][0], groups[0][0].place.output.root
        engine = place.engine
        devices = self.devices(groups[0])[: len(groups)]
        threads = engine.threads or max(1, torch.get_num_threads() // len(devices))
        commands = [
            [
                *(sys.executable, "-c", START.format(sys.path), "bench", *suite.arguments(), "--out", out, "--worker"),
                *(f"engine.device={device}", f"engine.threads={threads}"),
                f"engine.memory={engine.memory / devices.count(device)}",
                f"engine.precision={settings.engine.precision}",  # of a run's name, and another GPU may lack it
            ]
            for device in devices
        ]
        with (
            ThreadPoolExecutor(len(commands)) as pool,
            ExitStack() as stack,
        ):  # workers end first, then who watches them
            workers = [stack.enter_context(started(command)) for command in commands]
            names = [f"worker {i + 1}" for i in range(len(workers))]
            reasons = list(pool.map(partial(watched, progress=progress), workers, names))
        return list(dict.fromkeys(reason for reason in reasons if reason))


@contextmanager
def started(command: Sequence[str]) -> Iterator[Popen[str]]:
    """Start a worker, which ends with this context at the latest."""
    # Libraries write what they like, which need not be text in the encoding of this locale.
    with Popen(command, stdin=PIPE, stdout=DEVNULL, stderr=PIPE, text=True, errors="backslashreplace") as worker:
        try:
            yield worker
        finally:
            worker.terminate()


def watched(worker: Popen[str], name: str, progress: Progress) -> str:
    """Pass a worker's lines on, each with its name, until it ends; return why it did so before its time, or nothing."""
    assert worker.stderr is not None
    last = ""
    for line in worker.stderr:
        last = line.strip()
        progress.say(f"[{name}] {last}")
    code = worker.wait()
    if code < 0:
        reason = f"{name} was killed by signal {-code}"
    elif last.startswith("error: "):
        reason = last.removeprefix("error: ")
    else:
        reason = f"{name} ended with code {code}"
    return reason if code else ""


def end_with_starter() -> None:
    """End this process, a worker, as soon as the one that started it is gone; their pipe tells."""

    def watch() -> None:
        os.read(sys.stdin.fileno(), 1)  # not by the buffer, whose lock would be held when Python ends
        os.kill(os.getpid(), signal.SIGTERM)  # which lets training save its step

    threading.Thread(target=watch, daemon=True).start()


def slots(device: str, gpus: int, jobs: int | None) -> list[str]:
    """Choose the devices of workers that train at the same time, one for each.

    Args:
        device: what the settings name; ``cuda`` means every GPU.
        gpus: how many this machine has.
        jobs: workers; None: one for each device.
    """
    devices = [f"cuda:{i}" for i in range(gpus)] if device == "cuda" and gpus > 1 else [device]
    return [devices[i % len(devices)] for i in range(jobs or len(devices))]
