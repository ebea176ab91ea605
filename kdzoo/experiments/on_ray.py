"""Train a bench's groups on a Ray cluster: one task a group, tried again elsewhere when its node is lost.

The working folder, the folder of runs and the cache must be shared by all nodes.
"""

import os
import socket
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from kdzoo.engine.device import settle
from kdzoo.engine.progress import Progress
from kdzoo.errors import UserError
from kdzoo.experiments.groups import Group, Work, begin
from kdzoo.files import cache_folder
from kdzoo.settings import EngineSettings, Settings

RETRIES = 3  # of a group whose node or worker was lost
PATIENCE = 10.0  # seconds for a cluster to take a connection; Ray would try for minutes and then end the process


@dataclass(frozen=True)
class OnRay:
    """One task a group, on the cluster that ``connect`` finds. A group takes ``engine.threads`` cores, or one.

    Args:
        gpus: that a group takes, such as 0.5; None: one where the cluster has any, unless the device is the CPU.

    Raises:
        UserError: a share of more than one GPU.
    """

    gpus: float | None = None

    def __post_init__(self) -> None:
        if self.gpus is not None and self.gpus > 1 and self.gpus % 1:
            raise UserError(f"--gpus-per-group {self.gpus}: expected a share of one GPU, such as 0.5, or whole ones")

    def settle(self, runs: Sequence[Settings], quiet: bool) -> None:
        """Asks a node, since the machine that starts a bench may lack what the nodes have."""
        ray = connect(quiet)
        task = self.task(ray, runs[0].engine, "settle")
        place = Place.of(runs)
        for _, (engines, reason) in answers(ray, {task.remote(place, partial(settled, [r.engine for r in runs])): ""}):
            if reason is not None:
                raise UserError(reason)
            for run, engine in zip(runs, engines, strict=True):
                run.engine.device, run.engine.precision = engine.device, engine.precision

    def train(self, groups: Sequence[Group], work: Work, progress: Progress, quiet: bool) -> dict[str, str]:
        ray = connect(quiet)
        tasks: dict[Any, str] = {}
        for group in groups:
            progress.say(f"group {group.title}: {group.text}")
            if group.runs:
                share = self.share(ray, group.runs[0].engine)
                for engine in (run.engine for run in group.runs):
                    engine.threads, engine.memory = engine.threads or 1, engine.memory * share
                task = self.task(ray, group.runs[0].engine, f"group {group.title}")
                tasks[task.remote(Place.of(group.runs), partial(train_there, group, work, quiet))] = group.title
        stopped: dict[str, str] = {}
        for title, (_, reason) in answers(ray, tasks):
            if reason is not None:
                stopped[title] = reason
                progress.say(f"group {title} stopped: {reason}")
        return stopped

    def task(self, ray: ModuleType, engine: EngineSettings, name: str) -> Any:
        """A task of a group's size.

        Raises:
            UserError: no node could ever run it.
        """
        nodes, cores, gpus = self.resources(ray, engine)
        if not any(node.get("CPU", 0) >= cores and node.get("GPU", 0) >= gpus for node in nodes):
            raise UserError(
                f"no node of the cluster has {cores} cores and {gpus:g} GPUs, which a group takes; lower "
                "engine.threads or --gpus-per-group"
            )
        return ray.remote(on_node).options(num_cpus=cores, num_gpus=gpus, max_retries=RETRIES, name=name)

    def share(self, ray: ModuleType, engine: EngineSettings) -> float:
        """Of the memory of a GPU or, on CPUs, of the largest node: what falls to a group."""
        nodes, cores, gpus = self.resources(ray, engine)
        return min(1.0, gpus or cores / max(node.get("CPU", cores) for node in nodes))

    def resources(self, ray: ModuleType, engine: EngineSettings) -> tuple[list[dict[str, float]], int, float]:
        """What each node has, and the cores and GPUs that a group takes."""
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        gpus = self.gpus
        if gpus is None:
            gpus = float(engine.device != "cpu" and any(node.get("GPU", 0) for node in nodes))
        return nodes, engine.threads or 1, gpus


def connect(quiet: bool) -> ModuleType:
    """Ray, connected to the cluster of ``RAY_ADDRESS``, else to this machine's, else to one that is started now.

    It stays connected until the process ends, as programs on Ray do.

    Raises:
        UserError: Ray is not installed, or no cluster answers.
    """
    os.environ.setdefault("RAY_DEDUP_LOGS", "0")  # groups' lines look alike, and none of them may be left out
    os.environ.setdefault("RAY_COLOR_PREFIX", "0")  # plain lines
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ImportError as error:
        raise UserError("--on ray needs Ray, which is not installed; pip install 'kdzoo[ray]'") from error
    if not ray.is_initialized():
        address = os.environ.get("RAY_ADDRESS", "")
        host, _, port = address.removeprefix("ray://").rpartition(":")
        try:
            if port.isdigit():
                socket.create_connection((host, int(port)), PATIENCE).close()
            ray.init(include_dashboard=False, log_to_driver=not quiet, logging_level="WARNING")
        except (OSError, RuntimeError, ValueError, ImportError) as error:
            said = str(error).partition("\n")[0]
            raise UserError(
                f"no Ray cluster answers at {address or 'this machine'} ({said}); start one by 'ray start --head', or "
                "unset RAY_ADDRESS to have one started"
            ) from error
    return ray


class Place(NamedTuple):
    """Where and as what the bench was started; its tasks must find the same."""

    folder: str  # settings name files relative to it
    outputs: tuple[str, ...]
    cache: str  # a teacher that one node trains is the teacher of all
    command: tuple[str, ...]

    @classmethod
    def of(cls, runs: Iterable[Settings]) -> "Place":
        """This process's, for these runs."""
        outputs = tuple({str(Path(run.output.root).absolute()): None for run in runs})
        return cls(os.getcwd(), outputs, str(cache_folder().absolute()), tuple(sys.argv))

    def enter(self) -> None:
        """Makes this process as the one that started the bench.

        Raises:
            UserError: a folder is not there.
        """
        for folder in (self.folder, *self.outputs):
            if not Path(folder).is_dir():
                raise UserError(
                    f"node {socket.gethostname()} has no folder {folder}; start the bench in a folder that all nodes "
                    "share, and give --out one too"
                )
        os.chdir(self.folder)
        os.environ["KDZOO_CACHE"] = self.cache
        sys.argv[:] = self.command


def on_node(place: Place, work: Callable[[], object]) -> tuple[object, str | None]:
    """Run a task: return what ``work`` gives and None, or None and the user's error."""
    try:
        place.enter()
        return work(), None
    except UserError as error:
        return None, str(error)


def settled(engines: Sequence[EngineSettings]) -> Sequence[EngineSettings]:
    """The engines without any ``auto``, by what this node has."""
    for engine in engines:
        settle(engine)
    return engines


def train_there(group: Group, work: Work, quiet: bool) -> None:
    """Trains a group on this node. Runs still held, such as by a lost node's process, are waited for."""
    with Progress(quiet) as progress:
        begin(group, work, progress, wait=True)


def answers(ray: ModuleType, tasks: Mapping[Any, str]) -> Iterator[tuple[str, tuple[Any, str | None]]]:
    """For each task, as it ends, its title with what ``on_node`` gave, or with why it gave nothing."""
    waiting = list(tasks)
    while waiting:
        [ended], waiting = ray.wait(waiting)
        try:
            yield tasks[ended], ray.get(ended)
        except ray.exceptions.RayError as error:
            cause = getattr(error, "cause", None) or error
            yield tasks[ended], (None, f"{type(cause).__name__}: {' '.join(str(cause).split())}")
