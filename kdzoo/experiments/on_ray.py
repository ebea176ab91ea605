"""Workers of a bench on a Ray cluster: each is a task, tried again elsewhere when its node is lost.

The working folder, the folder of runs and the cache must be shared by all nodes.
"""

import os
import socket
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from kdzoo.engine.device import resolve_auto
from kdzoo.engine.progress import Progress
from kdzoo.errors import UserError
from kdzoo.experiments.suites import Suite
from kdzoo.experiments.work import is_done, work_through
from kdzoo.files import cache_folder, make_folder, path_of
from kdzoo.settings import Place, Run

RETRIES = 3  # of a worker whose node or process was lost, and of all workers where runs were left
PATIENCE = 10.0  # seconds for a cluster to take a connection; Ray would try for minutes and then end the process


@dataclass(frozen=True)
class OnRay:
    """A worker for each group, on the cluster that ``connect`` finds. It takes ``engine.threads`` cores, or one.

    Args:
        gpus: that a worker takes, such as 0.5; None: one where the cluster has any, unless the device is the CPU.

    Raises:
        UserError: a share of more than one GPU.
    """

    gpus: float | None = None

    def __post_init__(self) -> None:
        if self.gpus is not None and self.gpus > 1 and self.gpus % 1:
            raise UserError(f"--gpus-per-group {self.gpus}: expected a share of one GPU, such as 0.5, or whole ones")

    def resolve_auto(self, runs: Sequence[Run], progress: Progress) -> list[Run]:
        """Ask a node, since the machine that starts a bench may lack what the nodes have."""
        ray = connect(progress.quiet)
        task = self.task(ray, runs[0].place, "device and precision")
        make_folder(path_of(runs[0].place.output.root))
        asked = task.remote(Origin.here(runs[0].place), partial(resolved, runs))
        [(_, found, reason)] = answers(ray, {asked: ""})
        if reason:
            raise UserError(reason)
        return list(found)

    def is_here(self, runs: Sequence[Run]) -> bool:
        return False

    def start(self, suite: Suite, groups: Sequence[Sequence[Run]], progress: Progress) -> list[str]:
        ray = connect(progress.quiet)
        place = groups[0][0].place
        keys = {"threads": place.engine.threads or 1, "memory": place.engine.memory * self.share(ray, place)}
        out = {"root": Origin.here(place).out}  # the user of a node may have another home
        placed = [[run.within(engine=keys, output=out) for run in group] for group in groups]
        reasons: list[str] = []
        for turn in range(RETRIES + 1):
            left = sum(not all(map(is_done, group)) for group in groups)
            if not left or reasons:
                break
            # Runs that are held in the end, such as by a lost node's process, are waited for in a second turn.
            work = partial(work_there, placed, progress.quiet, turn > 0)
            tasks: dict[Any, str] = {}
            for number in range(1, left + 1):
                name = f"worker {number}"
                tasks[self.task(ray, place, name).remote(Origin.here(place), work)] = name
            for name, _, reason in answers(ray, tasks):
                if reason:
                    reasons.append(reason)
                    progress.say(f"{name} stopped: {reason}")
        return list(dict.fromkeys(reasons))

    def task(self, ray: ModuleType, place: Place, name: str) -> Any:
        """Make a task of a worker's size.

        Raises:
            UserError: no node could ever run it.
        """
        nodes, cores, gpus = self.resources(ray, place)
        if not any(node.get("CPU", 0) >= cores and node.get("GPU", 0) >= gpus for node in nodes):
            raise UserError(
                f"no node of the cluster has {cores} cores and {gpus:g} GPUs, which a group takes; lower "
                "engine.threads or --gpus-per-group"
            )
        return ray.remote(on_node).options(num_cpus=cores, num_gpus=gpus, max_retries=RETRIES, name=name)

    def share(self, ray: ModuleType, place: Place) -> float:
        """Compute a worker's share of the memory of a GPU or, on CPUs, of the largest node."""
        nodes, cores, gpus = self.resources(ray, place)
        return min(1.0, gpus or cores / max(node.get("CPU", cores) for node in nodes))

    def resources(self, ray: ModuleType, place: Place) -> tuple[list[dict[str, float]], int, float]:
        """Find what each node has, and the cores and GPUs that a worker takes."""
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        gpus = self.gpus
        if gpus is None:
            gpus = float(place.engine.device != "cpu" and any(node.get("GPU", 0) for node in nodes))
        return nodes, place.engine.threads or 1, gpus


def connect(quiet: bool) -> ModuleType:
    """Connect Ray to the cluster of ``RAY_ADDRESS``, else to this machine's, else to one that is started now.

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


class Origin(NamedTuple):
    """Where and as what the bench was started; its workers must find the same."""

    folder: str  # settings name files relative to it
    out: str
    cache: str  # a teacher that one node trains is the teacher of all
    command: tuple[str, ...]

    @classmethod
    def here(cls, place: Place) -> "Origin":
        """Describe this process, for runs at this place."""
        out = path_of(place.output.root).absolute()
        return cls(os.getcwd(), str(out), str(cache_folder().absolute()), tuple(sys.argv))

    def enter(self) -> None:
        """Give this process the folder, cache and command of the one that started the bench.

        Raises:
            UserError: a folder is not there.
        """
        for folder in (self.folder, self.out):
            if not Path(folder).is_dir():
                raise UserError(
                    f"node {socket.gethostname()} has no folder {folder}; start the bench in a folder that all nodes "
                    "share, and give --out one too"
                )
        os.chdir(self.folder)
        os.environ["KDZOO_CACHE"] = self.cache
        sys.argv[:] = self.command


def on_node(origin: Origin, work: Callable[[], object]) -> tuple[object, str]:
    """Run a task: return what ``work`` gives and nothing, or None and the user's error."""
    try:
        origin.enter()
        return work(), ""
    except UserError as error:
        return None, str(error)


def resolved(runs: Sequence[Run]) -> list[Run]:
    """Replace every ``auto`` of the runs by what this node has."""
    return [resolve_auto(run) for run in runs]


def work_there(groups: Sequence[Sequence[Run]], quiet: bool, wait: bool) -> None:
    """Work through the groups on this node."""
    with Progress(quiet) as progress:
        work_through(groups, progress, wait)


def answers(ray: ModuleType, tasks: Mapping[Any, str]) -> Iterator[tuple[str, Any, str]]:
    """Yield for each task, as it ends, its name and what ``on_node`` gave, or None and why it gave nothing."""
    waiting = list(tasks)
    while waiting:
        [ended], waiting = ray.wait(waiting)
        try:
            yield tasks[ended], *ray.get(ended)
        except ray.exceptions.RayError as error:
            cause = getattr(error, "cause", None) or error
            yield tasks[ended], None, f"{type(cause).__name__}: {' '.join(str(cause).split())}"
