"""What a suite will take: time and memory of its groups, from a few measured steps of each of their runs."""

import json
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from statistics import median
from typing import NamedTuple

import psutil
import torch
from torch import Tensor, nn

from kdzoo import models
from kdzoo.data import Dataset, Loader
from kdzoo.distiller import Batch, Needs
from kdzoo.engine import memory, remembered
from kdzoo.engine.device import use
from kdzoo.engine.faults import caught
from kdzoo.engine.lane import Lane
from kdzoo.engine.measure import test_rows
from kdzoo.engine.memory import Cost
from kdzoo.engine.passes import Teacher
from kdzoo.engine.progress import Progress
from kdzoo.engine.training import build_all, common_loader, shared_passes
from kdzoo.errors import OutOfMemory, UserError
from kdzoo.experiments import teachers
from kdzoo.experiments.run import open_data
from kdzoo.modes import evaluating
from kdzoo.precision import PRECISIONS, autocast
from kdzoo.quantities import counted
from kdzoo.settings import Run, Settings
from kdzoo.store.folder import RunFolder

CALLS, ENOUGH = 3, 1.0  # a time is the median of so many calls, or of fewer that took so many seconds
TURNS = 7  # of runs whose times are compared
NOTHING, TOO_MUCH = Cost(0, 0), Cost(2**62, 0)  # of runs that cannot be trained: at all, or beside any other


class Counted:
    """Batches for a method's phase before training that count the epochs it asks for: each has one batch."""

    def __init__(self, batch: Batch):
        self.batch, self.epochs = batch, 0

    def __iter__(self) -> Iterator[Batch]:
        self.epochs += 1
        return iter([self.batch])


class LaneCost(NamedTuple):
    """What one run takes beside what it shares."""

    step: float  # seconds
    test: float  # seconds of one pass over the test set
    memory: Cost
    phase: int = 0  # epochs of the method's phase before training
    made: float = 0.0  # seconds of what is done once: building it, weighing it, writing its result


@dataclass(frozen=True)
class GroupCost:
    """What a group takes, its runs by their numbers."""

    shared: float  # seconds of making a batch and of the teacher's pass
    once: float  # seconds of measuring the teacher
    steps: int  # of an epoch
    epochs: int
    measured: int  # epochs after which students are measured
    lanes: dict[int, LaneCost]
    failed: dict[int, UserError]  # runs that cannot be trained
    base: int  # bytes of process, data and teacher
    room: float  # bytes that the lanes may take
    teacher: float = 0.0  # seconds of the teacher's pass, over all steps, which are part of ``shared``

    def packs(self, chosen: Sequence[int]) -> list[list[LaneCost]]:
        """Pack those of the chosen runs that can be trained, as many side by side as memory holds."""
        lanes = [self.lanes[i] for i in chosen if i in self.lanes]
        packed = memory.packed([lane.memory for lane in lanes], self.room)
        return [[lanes[i] for i in pack] for pack in packed]

    def seconds(self, chosen: Sequence[int]) -> float:
        """Estimate the seconds of these runs. Each pack makes its batches and asks the teacher anew."""
        packs = self.packs(chosen)
        lanes = [lane for pack in packs for lane in pack]
        step = len(packs) * self.shared + sum(lane.step for lane in lanes)
        test, made = sum(lane.test for lane in lanes), sum(lane.made for lane in lanes)
        training = self.epochs * self.steps * step + self.phases(lanes)
        return training + self.measured * test + made + (self.once if packs else 0.0)

    def phases(self, lanes: Iterable[LaneCost]) -> float:
        """Estimate the seconds of phases before training, whose steps are taken for those of training."""
        return sum(lane.phase * self.steps * (lane.step + self.shared) for lane in lanes)

    def bytes(self, chosen: Sequence[int]) -> int:
        """Estimate the bytes of the largest pack, with process, data and teacher."""
        packs = self.packs(chosen)
        return self.base + max((memory.together(lane.memory for lane in pack) for pack in packs), default=0)


@dataclass(frozen=True)
class Estimate:
    """What a group is expected to take, on this machine, with no other at work beside it."""

    finished: int = 0  # of its runs
    seconds: float = 0.0  # of all its runs
    left: float = 0.0  # of those that are still to do
    teaching: float = 0.0  # of its teacher's own training, unless an earlier group pays for that
    memory: int = 0  # bytes, with the process and the data
    packs: int = 1  # that memory divides it into
    failed: Mapping[int, UserError] = field(default_factory=dict)  # runs that cannot be trained, by their numbers
    missing: str = ""  # why nothing could be measured


def estimate(groups: Sequence[Sequence[Run]], retry: bool, progress: Progress) -> list[Estimate]:
    """Estimate what each group of a suite will take. Nothing is trained: networks have random weights.

    Groups that differ by their seed only are measured once. The teacher's passes over further views are not counted.
    """
    known: dict[str, tuple[GroupCost, dict[str, float]] | UserError] = {}
    paid: set[str] = set()
    found = []
    for group in groups:
        key = json.dumps([{**run.plain(), "seed": 0} for run in group], sort_keys=True)
        if key not in known:
            first = group[0].settings
            progress.say(f"measuring {first.task}: {counted(len(group), 'run')}")
            try:
                with progress.doing(f"timing a few steps of {counted(len(group), 'run')}"):
                    known[key] = measure(group, progress)
            except UserError as error:
                known[key] = error
        left = [i for i, run in enumerate(group) if not RunFolder.of(run).is_done(retry)]
        finished = len(group) - len(left)
        measured = known[key]
        if isinstance(measured, UserError):
            found.append(Estimate(finished, missing=str(measured)))
            continue
        cost, teaching = measured
        everything = range(len(group))
        unpaid = {teacher: seconds for teacher, seconds in teaching.items() if left and teacher not in paid}
        found.append(
            Estimate(
                finished,
                cost.seconds(everything),
                cost.seconds(left),
                sum(unpaid.values()),
                cost.bytes(everything),
                max(1, len(cost.packs(everything))),
                cost.failed,
            )
        )
        paid |= unpaid.keys()
    return found


def measure(
    group: Sequence[Run], progress: Progress, report: Callable[[str], object] = lambda text: None
) -> tuple[GroupCost, dict[str, float]]:
    """Measure what a group takes, and the seconds of each training of a teacher that is still to be done.

    ``report`` is told which run is measured.

    Raises:
        UserError: the data or the teacher cannot be opened.
    """
    first = group[0]
    dataset = open_data(first, use(first.place), progress)
    if first.settings.teacher.name is None:
        return cost_of(group, dataset, None, report), {}
    lacking = teachers.lacking(first, dataset)
    teaching = {one.settings.identity(): cost_of([one], dataset, None).seconds([0]) for one in lacking}
    network = teachers.untrained(first, dataset).eval().requires_grad_(False)
    models.channels_last(network.to(dataset.device))
    return cost_of(group, dataset, network, report), teaching


def cost_of(
    runs: Sequence[Run],
    dataset: Dataset,
    teacher: models.Network | None,
    report: Callable[[str], object] = lambda text: None,
) -> GroupCost:
    """Measure what these runs take beside this teacher; ``report`` is told which of them is measured."""
    (first, place), device = runs[0], dataset.device
    room = memory.ROOM * memory.free(device, place.engine.memory)
    base = torch.cuda.memory_allocated(device) if device.type == "cuda" else psutil.Process().memory_info().rss
    lanes: dict[int, LaneCost] = {}
    needs: list[Needs] = []
    failed: dict[int, UserError] = {}
    tests: dict[str, float] = {}  # by what goes through them: most methods deploy the student as it is
    begun, made = time.perf_counter(), 0.0
    for i, lane, batch in stepped(runs, dataset, teacher, failed):
        with lane.failing_alone():
            weight = memory.weigh(lane, batch)
            made += time.perf_counter() - begun
            step = seconds(partial(lane.step, batch, 2), device)
            deployed = lane.deployed()
            architecture = f"{runs[i].settings.student} {deployed}"
            if architecture not in tests:
                tests[architecture] = test_seconds(deployed, dataset, first)
            phase = Counted(batch)
            lane.distillation.prepare(phase)
            lanes[i] = LaneCost(step, tests[architecture], weight, phase.epochs)
            needs.append(lane.distillation.distiller.needs)
            method = runs[i].settings.distiller.name
            report(f"measured {len(lanes)} of {counted(len(runs), 'method')}, the last {method}")
        if lane.failure is not None:
            failed[i] = lane.failure
        begun = time.perf_counter()
    times = 1 if place.engine.lanes or len(runs) == 1 else 2  # the first to measure the memory of all, as here
    for i, cost in lanes.items():  # a result takes one more pass over the test set
        lanes[i] = cost._replace(made=times * made / len(lanes) + cost.test)
    loader = dataset.loader(first.protocol, seed=first.seed)
    batches = cycle_of(loader)
    batch = next(batches)
    drawing, looking, once = seconds(partial(next, batches), device), 0.0, 0.0
    if teacher is not None:
        fast = shared_passes(teacher, runs[0]).fast
        looking = seconds(partial(look, fast, batch.images, first.engine.precision), device)
        looking *= remembered.share(first, device, teacher, needs, loader)
        answers = remembered.bytes_kept(first, device, teacher, needs, loader)
        base, room = base + answers, room - answers
        once = test_seconds(teacher, dataset, first)
    return GroupCost(
        shared=drawing + looking,
        once=once,
        steps=loader.steps_per_epoch,
        epochs=first.protocol.epochs,
        measured=math.ceil(first.protocol.epochs / place.output.measure_every),
        lanes=lanes,
        failed=failed,
        base=base,
        room=math.inf if place.engine.lanes else room,
        teacher=looking,
    )


def by_turns(runs: Sequence[Run], progress: Progress) -> dict[int, float]:
    """Time a step of each run as if it were trained alone, with its batch and the teacher's pass where it asks for one.

    The runs share a teacher and data, and take turns, so that other work on the machine meets all of them; of several
    times the least counts.

    Returns:
        Seconds by the run's number, without those that cannot be trained.
    """
    first = runs[0]
    dataset, teacher = open_data(first, use(first.place), progress), None
    if first.settings.teacher.name is not None:
        teacher = teachers.untrained(first, dataset).eval().requires_grad_(False)
        models.channels_last(teacher.to(dataset.device))
    lanes = {i: (lane, batch) for i, lane, batch in stepped(runs, dataset, teacher, {})}
    if not lanes:
        return {}
    _, batch = next(iter(lanes.values()))
    loader = dataset.loader(first.settings.protocol, seed=first.settings.seed)
    works: dict[str, Callable[[], object]] = {"batch": partial(next, cycle_of(loader))}
    if teacher is not None:
        fast = shared_passes(teacher, first).fast
        works["teacher"] = partial(look, fast, batch.images, first.settings.engine.precision)
    least = dict.fromkeys([*works, *lanes], math.inf)
    for _ in range(TURNS):
        for name, work in works.items():
            least[name] = min(least[name], once(work, dataset.device))
        for i, (lane, batch) in lanes.items():
            with lane.failing_alone():
                least[i] = min(least[i], once(partial(lane.step, batch, 2), dataset.device))
    found = {}
    for i, (lane, _) in lanes.items():
        if lane.failure is None:
            found[i], needs = least[i] + least["batch"], lane.distillation.distiller.needs
            if teacher is not None and needs.teacher:
                share = remembered.share(lane.run.settings, dataset.device, teacher, [needs], loader)
                found[i] += share * least["teacher"]
    return found


def packs(runs: Sequence[Run], dataset: Dataset, teacher: Teacher | None, progress: Progress) -> list[list[Run]]:
    """Part a group into runs that memory holds side by side, with data and teacher; ``engine.lanes`` keeps it whole."""
    place = runs[0].place.engine
    if place.lanes or len(runs) == 1:
        return [list(runs)]
    room = memory.ROOM * memory.free(dataset.device, place.memory)
    failed: dict[int, UserError] = {}
    lanes = stepped(runs, dataset, None if teacher is None else teacher.network, failed)
    weights: dict[int, Cost] = {}
    needs: list[Needs] = []
    full = set(range(len(runs)))  # where memory does not even hold what is measured, each is tried alone
    with suppress(OutOfMemory), progress.doing(f"measuring the memory of {counted(len(runs), 'run')}"):
        for i, lane, batch in lanes:
            with lane.failing_alone():
                weights[i] = memory.weigh(lane, batch)
                needs.append(lane.distillation.distiller.needs)
            if lane.failure is not None:
                failed[i] = lane.failure
        full = {i for i, error in failed.items() if isinstance(error, OutOfMemory)}
    costs = [weights.get(i, TOO_MUCH if i in full else NOTHING) for i in range(len(runs))]
    if teacher is not None:
        settings = runs[0].settings
        loader = dataset.loader(settings.protocol, seed=settings.seed)
        room -= remembered.bytes_kept(settings, dataset.device, teacher.network, needs, loader)
    found = memory.packed(costs, room)
    if len(found) > 1:
        progress.say(f"memory does not hold all {len(runs)} runs side by side: {len(found)} parts, one after the other")
    return [[runs[i] for i in pack] for pack in found]


def stepped(
    runs: Sequence[Run],
    dataset: Dataset,
    teacher: models.Network | None,
    failed: dict[int, UserError],
) -> Iterator[tuple[int, Lane, Batch]]:
    """Yield the number of each run, its lane after two steps, and their batch; one lane at a time.

    Runs that cannot be built or set up, or make no step, are put into ``failed``, with the reason.
    """
    shared = None if teacher is None else shared_passes(teacher, runs[0])
    built, reasons = build_all(runs, dataset, shared)
    failed |= reasons
    if not built:
        return
    loader = common_loader(runs[0].settings, built.values(), dataset)
    batch = next(loader.batches())
    device, per_epoch = batch.images.device, loader.steps_per_epoch
    for i in list(built):
        with caught(runs[i], lambda: "while its training was set up", partial(failed.__setitem__, i)):
            lane = Lane(runs[i], built.pop(i), RunFolder.of(runs[i]), device, per_epoch)
        if i in failed:
            continue
        with lane.failing_alone():
            for step in range(2):  # optimisers take their memory at the end of the first
                lane.step(batch, step)
        if lane.failure is None:
            yield i, lane, batch
        else:
            failed[i] = lane.failure


def cycle_of(loader: Loader) -> Iterator[Batch]:
    """Yield the loader's batches, again and again."""
    while True:
        yield from loader.batches()


def look(network: nn.Module, images: Tensor, precision: str) -> None:
    """Make a pass without gradients."""
    with torch.inference_mode(), autocast(images.device.type, PRECISIONS[precision]):
        network(images)


def test_seconds(network: nn.Module, dataset: Dataset, settings: Settings) -> float:
    """Estimate the seconds of a pass over the test set by those of its first batch."""
    rows = test_rows(dataset.spec)

    def first_batch() -> None:
        images, _ = next(dataset.test_batches(rows, settings.protocol.test_crop))
        look(network, images, settings.engine.precision)

    batches = dataset.test_size / min(rows, dataset.test_size)
    with evaluating(network):
        first_batch()
        return batches * seconds(first_batch, dataset.device)


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """Time a call by the median of a few; the first call is to be made before."""
    times: list[float] = []
    while len(times) < CALLS and sum(times) < ENOUGH:
        times.append(once(work, device))
    return median(times)


def once(work: Callable[[], object], device: torch.device) -> float:
    """Time one call."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    begun = time.perf_counter()
    work()
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter() - begun
