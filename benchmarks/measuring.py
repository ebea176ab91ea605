"""What the measurements share: works that take turns, lanes on random images, tables named by their conditions."""

import statistics
import time
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
import pandas as pd
import torch

from kdzoo import DataSpec, models
from kdzoo.data import Dataset
from kdzoo.data.pictures import Pixels
from kdzoo.distiller import Batch
from kdzoo.engine import graphs
from kdzoo.engine.compiling import WATCHED, Compiling
from kdzoo.engine.device import resolve_auto, use
from kdzoo.engine.lane import Lane
from kdzoo.engine.progress import Progress
from kdzoo.engine.training import build, common_loader, shared_passes
from kdzoo.files import make_folder, slug, write_text
from kdzoo.resolve import resolve
from kdzoo.settings import Place, Run, Settings
from kdzoo.store.folder import RunFolder

CLASSES = 100
PARTS = ("data", "teacher", "student", "loss", "backward", "optimiser", "rest")
Work = Callable[[], object]
Mark = tuple[str, object, str]  # a part, and the object and attribute that do its work


def arguments_of(documentation: str | None) -> ArgumentParser:
    """A parser of command lines that shows the script's own documentation."""
    parser = ArgumentParser(description=documentation, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results", help="folder of tables")
    return parser


def compiling(title: str, compile: str) -> str:
    """The title of a table, with what is compiled where that is not nothing."""
    return title if compile == "off" else f"{title}-compile-{compile}"


def waiting(device: torch.device) -> Callable[[], None]:
    """What returns when the device has done all that it was given."""
    return torch.accelerator.synchronize if device.type != "cpu" else lambda: None


def timed(work: Work, wait: Callable[[], None], repeats: int = 1) -> float:
    """Seconds of one call, on the mean of ``repeats``."""
    wait()
    begun = time.perf_counter()
    for _ in range(repeats):
        work()
    wait()
    return (time.perf_counter() - begun) / repeats


def take_turns(
    works: Mapping[str, Work], rounds: int, wait: Callable[[], None], repeats: Mapping[str, int] | None = None
) -> dict[str, list[float]]:
    """Seconds of one call of each work in each round, so that a slow moment of the machine slows all of them."""
    measured: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(rounds):
        for name, work in works.items():
            measured[name].append(timed(work, wait, repeats[name] if repeats else 1))
    return measured


def medians(measured: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """The median of each work."""
    return {name: statistics.median(times) for name, times in measured.items()}


def by_part(work: Work, marks: Sequence[Mark], wait: Callable[[], None], repeats: int) -> dict[str, float]:
    """Seconds of one call by part; "rest" is what no mark names, and a part within another is not counted twice.

    It waits for the device at each change of part, so it tells what is large, not what overlaps.
    """
    seconds, open_parts, since = dict.fromkeys(PARTS, 0.0), ["rest"], time.perf_counter()

    def turn() -> None:
        nonlocal since
        wait()
        now = time.perf_counter()
        seconds[open_parts[-1]] += (now - since) / repeats
        since = now

    def marked(name: str, part: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*arguments: Any, **keywords: Any) -> Any:
            turn()
            open_parts.append(name)
            try:
                return part(*arguments, **keywords)
            finally:
                turn()
                open_parts.pop()

        return wrapped

    with ExitStack() as stack:
        for name, owner, attribute in marks:
            stack.enter_context(patch.object(owner, attribute, marked(name, getattr(owner, attribute))))
        turn()
        seconds["rest"] = 0.0
        for _ in range(repeats):
            work()
        turn()
    return seconds


def network(name: str, spec: DataSpec) -> models.Network:
    """The network on the data's device, with random weights, as the engine lays it out."""
    return models.create(name, spec).to(spec.labels.device).to(memory_format=torch.channels_last)


def random_set(size: int, device: torch.device) -> Dataset:
    """Noise with labels of 100 classes: as many images as CIFAR-100 has, or fewer where they are large."""
    count = 50_000 if size <= 64 else 4096
    draw = np.random.default_rng(0)
    pixels = Pixels(draw.integers(256, size=(count, size, size, 3), dtype=np.uint8), np.arange(count) % CLASSES)
    labels = torch.from_numpy(pixels.labels).to(device)
    spec = DataSpec("noise", CLASSES, tuple(map(str, range(CLASSES))), size, labels)
    return Dataset(spec, pixels, pixels, device=device, fits=True)


class Machine(NamedTuple):
    """Where a benchmark computes, and in which precision: what ``auto`` means here."""

    device: torch.device
    precision: str


def this_machine() -> Machine:
    """Set this process up as a run does, and return what it computes on."""
    run = resolve_auto(Run(Settings(), Place()))
    return Machine(use(run.place), run.settings.engine.precision)


class Group:
    """Lanes with one teacher and one loader, whose steps are those of the training loop.

    Args:
        teacher: the teacher's name.
        student: the student's name.
        methods: one lane for each.
        dataset: what is trained on.
        machine: where they compute.
        batch_size: None: the protocol's.
        compile: as ``engine.compile``; ``auto`` decides as in a training of a million steps.
    """

    def __init__(
        self,
        teacher: str,
        student: str,
        methods: Sequence[str],
        dataset: Dataset,
        machine: Machine,
        batch_size: int | None = None,
        compile: str = "off",
    ):
        self.device = dataset.device
        self.runs = [self._run(teacher, student, method, machine, batch_size, compile) for method in methods]
        self.teacher = shared_passes(network(teacher, dataset.spec).eval().requires_grad_(False), self.runs[0])
        distillations = [build(run, dataset, self.teacher).train() for run in self.runs]
        loader = common_loader(self.runs[0].settings, distillations, dataset)
        self.loader, self.batch_size, self.done = loader, loader.batch_size, 0
        self.plain = graphs.Plain(self.teacher)
        self._batches = self._for_ever(loader.batches)
        nowhere = RunFolder(Path("nowhere"))  # nothing is written before an epoch's end
        self.lanes = [
            Lane(run, distillation, nowhere, self.device, loader.steps_per_epoch)
            for run, distillation in zip(self.runs, distillations, strict=True)
        ]
        for distillation in distillations:
            distillation.prepare([self.batch()])
        with Progress() as progress:
            compiling = Compiling(self.lanes, self.teacher, 10**6, progress)
            if compiling.is_due(0, 1, WATCHED):
                compiling.decide(self.batch())
        self.steps = graphs.steps(self.lanes[0], self.teacher, print)

    def batch(self) -> Batch:
        """The next one."""
        return next(self._batches)

    def step(self, lanes: Sequence[Lane] | None = None, graph: bool = True) -> None:
        """One step of these lanes, of all by default; ``graph`` as the training loop does it, else kernel by kernel."""
        steps = self.steps if graph else self.plain
        batch = steps.begin(self.batch(), self.done)
        for lane in self.lanes if lanes is None else lanes:
            steps.step(lane, batch, self.done)
        steps.end()
        self.done += 1

    @staticmethod
    def _run(teacher: str, student: str, method: str, machine: Machine, batch_size: int | None, compile: str) -> Run:
        protocol = {"name": "crd"} | ({"batch_size": batch_size} if batch_size else {})
        names = {"distiller": method, "student": student, "teacher": teacher}
        engine = {"device": str(machine.device), "precision": machine.precision, "compile": compile}
        return resolve({**{key: {"name": name} for key, name in names.items()}, "protocol": protocol, "engine": engine})

    @staticmethod
    def _for_ever(batches: Callable[[], Iterator[Batch]]) -> Iterator[Batch]:
        while True:
            yield from batches()


def parts_of(group: Group) -> list[Mark]:
    """Where the parts of a group's steps are done."""
    marks: list[Mark] = [("data", group, "batch"), ("teacher", group.teacher.fast, "forward")]
    for lane in group.lanes:
        marks += [("student", lane.distillation.student, "forward"), ("loss", lane.distillation.distiller, "forward")]
        marks.append(("optimiser", lane.optimizer, "step"))
    return [*marks, ("backward", torch.Tensor, "backward")]


def file_of(results: Path, what: str, machine: Machine) -> Path:
    """The table's file, whose name holds what was measured, on which device, in which precision and when.

    Of a processor, the instructions that torch uses, which environment variables may have cut down.
    """
    threads = f"cpu-{torch.backends.cpu.get_cpu_capability().lower()}-{torch.get_num_threads()}threads"
    device = slug(torch.cuda.get_device_name(machine.device)) if machine.device.type == "cuda" else threads
    title = f"{what}-{device}-{machine.precision}-torch{torch.__version__}-{date.today()}"
    return results / f"{title.replace('+', '_')}.csv"


def publish(table: pd.DataFrame, file: Path) -> None:
    """Writes the table and shows it."""
    make_folder(file.parent)
    write_text(file, table.to_csv(index=False))
    print(table.to_string(index=False), f"\n{file}")
