"""Where a bench trains its groups: in this process, or in several processes of this machine.

``on_ray`` is a third place, of the same interface. A group whose process is lost stops alone.
"""

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess

import torch
from rich.console import Console

from kdzoo.engine.device import settle
from kdzoo.engine.progress import Progress
from kdzoo.errors import UserError
from kdzoo.experiments.groups import Executor, Group, Work, begin
from kdzoo.settings import Settings


def find(on: str = "local", jobs: int | None = None, gpus: float | None = None) -> Executor:
    """The executor of this name.

    Args:
        on: ``local`` or ``ray``.
        jobs: of ``local``, how many groups train at a time.
        gpus: of ``ray``, the GPUs that a group takes.

    Raises:
        UserError: a number that the executor has no use for.
    """
    if on == "local":
        if gpus is not None:
            raise UserError("--gpus-per-group is for --on ray; --jobs N shares the GPUs of this machine")
        return Local(jobs)
    if jobs is not None:
        raise UserError("--jobs is for --on local; on Ray, --gpus-per-group and engine.threads say what a group takes")
    from kdzoo.experiments.on_ray import OnRay

    return OnRay(gpus)


@dataclass(frozen=True)
class Local:
    """This machine: groups train one after the other in this process, or several at a time in processes of their own.

    Args:
        jobs: groups at a time; None: one for each GPU, and one where there is none. A script that asks for several
            keeps its own work under ``if __name__ == "__main__":``, as every process imports it.
    """

    jobs: int | None = None

    def settle(self, runs: Sequence[Settings], quiet: bool) -> None:
        for run in runs:
            settle(run.engine)

    def train(self, groups: Sequence[Group], work: Work, progress: Progress, quiet: bool) -> dict[str, str]:
        device = next((run.engine.device for group in groups for run in group.runs), "cpu")
        devices = slots(device, torch.cuda.device_count(), self.jobs)
        if len(devices) > 1:
            return side_by_side(groups, devices, work, progress, quiet)
        progress.suite([sum(run.protocol.epochs for run in group.runs) for group in groups])
        for number, group in enumerate(groups):
            progress.group(number, group.text)
            if group.runs:
                work(group.runs, progress)
        return {}


def slots(device: str, gpus: int, jobs: int | None) -> list[str]:
    """The devices of the groups that train at the same time, one for each.

    Args:
        device: what the settings name; ``cuda`` means every GPU.
        gpus: how many this machine has.
        jobs: groups at a time; None: one for each device.
    """
    devices = [f"cuda:{i}" for i in range(gpus)] if device == "cuda" and gpus > 1 else [device]
    return [devices[i % len(devices)] for i in range(jobs or len(devices))]


def side_by_side(
    groups: Sequence[Group], devices: Sequence[str], work: Work, progress: Progress, quiet: bool
) -> dict[str, str]:
    """Train a group on each of the ``devices`` at a time, one process each; they share the cores."""
    spawn = multiprocessing.get_context("spawn")
    threads = max(1, torch.get_num_threads() // len(devices))
    waiting, free = [group for group in groups if group.runs], list(devices)
    running: dict[int, tuple[Group, str, SpawnProcess, Connection]] = {}  # by the handle that tells a process's end
    stopped: dict[str, str] = {}
    try:
        while waiting or running:
            while waiting and free:
                group, device = waiting.pop(0), free.pop(0)
                progress.say(f"group {group.title}: {group.text}")
                for engine in (run.engine for run in group.runs):
                    engine.device, engine.threads = device, engine.threads or threads
                    engine.memory /= devices.count(device)
                here, there = spawn.Pipe(duplex=False)
                process = spawn.Process(target=train_in_child, args=(there, group, work, quiet))
                process.start()
                there.close()
                running[process.sentinel] = group, device, process, here
            for ended in wait(list(running)):
                assert isinstance(ended, int)
                group, device, process, here = running.pop(ended)
                process.join()
                reason = here.recv() if process.exitcode == 0 else end_of(process)
                here.close()
                if reason is not None:
                    stopped[group.title] = reason
                    progress.say(f"group {group.title} stopped: {reason}")
                free.append(device)
    finally:
        for _, _, process, _ in running.values():
            process.terminate()
    return stopped


def train_in_child(answer: Connection, group: Group, work: Work, quiet: bool) -> None:
    """What such a process does: it answers None, or why the group stopped, and ends when the bench ends."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # an interrupt reaches all processes of a terminal: no tracebacks
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        with Lines(group.title, quiet) as progress:
            begin(group, work, progress)
        answer.send(None)
    except UserError as error:
        answer.send(str(error))


def end_of(process: SpawnProcess) -> str:
    """How a process ended that gave no answer."""
    code = process.exitcode or 0
    return f"its process was killed by signal {-code}" if code < 0 else f"its process ended with code {code}"


class Lines(Progress):
    """Plain lines that name their group, since several groups share one terminal."""

    def __init__(self, title: str, quiet: bool):
        super().__init__(quiet, Console(file=sys.stderr, quiet=quiet, highlight=False, force_terminal=False))
        self.title = title

    def say(self, text: str) -> None:
        super().say(f"[{self.title}] {text.strip()}")


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
