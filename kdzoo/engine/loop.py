"""The training loop: one teacher pass and one batch for all lanes, read from top to bottom."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from kdzoo.data import Dataset, Loader
from kdzoo.engine import graphs, kept_logits, remembered
from kdzoo.engine.compiling import Compiling
from kdzoo.engine.faults import Shared, check_finite
from kdzoo.engine.lane import Lane
from kdzoo.engine.measure import Measures, evaluate, measured
from kdzoo.engine.micro_batches import check_micro_batches
from kdzoo.engine.passes import TeacherPasses
from kdzoo.engine.progress import Progress
from kdzoo.engine.termination import Termination
from kdzoo.errors import AskedToEnd, UserError
from kdzoo.store import checkpoint
from kdzoo.store.result import MEASURED_BY

SAVE_EVERY, SAVE_SHARE = 60.0, 1 / 30  # seconds between checkpoints, and what part of them writing may take
READ_EVERY = 0.5  # seconds between two looks at the terms, which make the host wait for the device


def train(
    lanes: Sequence[Lane],
    teacher: TeacherPasses | None,
    dataset: Dataset,
    loader: Loader,
    progress: Progress,
    termination: Termination,
) -> None:
    """Train every lane from its newest common checkpoint to the end of the protocol, or of ``engine.stop_after``.

    All lanes share data, protocol, seed and engine settings. A lane that fails stops alone, with its reason in
    ``lane.failure``; the others continue.

    Raises:
        AskedToEnd: the process was asked to end; checkpoints are written.
        UserError: batches cannot be cut as ``engine.accumulate`` asks.
    """
    (settings, place), ranks = lanes[0].run, lanes[0].ranks
    check_micro_batches(loader, settings.engine.accumulate)
    per_epoch, shared = loader.steps_per_epoch, Shared(teacher, len(lanes))
    stop = lanes[0].run.last_epoch * per_epoch
    progress.measure = MEASURED_BY[measured(dataset, lanes[0].distillation.student)]
    start = begin(lanes, teacher, loader, shared, progress, termination)
    clock = Clock()
    known: graphs.Plain | None = kept_logits.steps(lanes, teacher, dataset, loader, start, progress.say)
    if known is None and start < stop:
        known = remembered.steps(lanes, teacher, loader, progress, termination)
    steps = known or graphs.steps(lanes[0], teacher, progress.say)
    for moment in ("first step", "epoch"):
        clock.reset(moment)
    pause = until_next_save(place.engine.checkpoint_seconds)
    compiling = Compiling(lanes, teacher if steps.asks_teacher else None, stop, progress)

    for step, batch in enumerate(loader.batches(start, stop), start):
        if compiling.is_due(step, step - start, clock.since("first step")):
            with clock.without("epoch"):
                if step > start:  # a request to end need not wait for the compiler, nor lose what was done
                    save(lanes, step, clock.since("start"))
                with termination.at_once():
                    compiled = compiling.decide(batch)
            if compiled:
                steps = known or graphs.steps(lanes[0], teacher, progress.say)  # graphs of plain networks are no use
        batch = steps.begin(batch, step)
        shared.watch(batch)
        for lane in alive(lanes):
            with lane.failing_alone():
                steps.step(lane, batch, step)
            if shared.was_written_by(lane):
                batch = steps.begin(next(loader.batches(step)), step)  # drawn again, for the lanes after it
                shared.watch(batch)
        steps.end()
        progress.step(step + 1)
        images = (step + 1 - max(start, step - step % per_epoch)) * loader.batch_size  # of this epoch

        if clock.since("show") >= READ_EVERY:
            clock.reset("show")
            show(lanes, step + 1, images / clock.since("epoch"), progress)

        if (step + 1) % per_epoch == 0:
            finish_epoch(lanes, dataset, step, images, clock, progress)
            clock.reset("epoch")

        if ranks.agree(termination.requested or clock.since("save") >= pause):
            clock.reset("save")
            save(lanes, step + 1, clock.since("start"))
            pause = until_next_save(place.engine.checkpoint_seconds, clock.since("save"))
            clock.reset("save")
            if ranks.agree(termination.requested):
                progress.say(f"asked to end: saved after step {step + 1}; the same command continues from there")
                raise AskedToEnd

        if not any(alive(lanes)):
            break
    if start < stop < loader.total_steps:
        save(lanes, stop, clock.since("start"))
    for lane in alive(lanes):
        lane.seconds += clock.since("start")


def begin(
    lanes: Sequence[Lane],
    teacher: TeacherPasses | None,
    loader: Loader,
    shared: Shared,
    progress: Progress,
    termination: Termination,
) -> int:
    """Continue from a checkpoint, or let methods prepare where there is none; return the first step to do."""
    start = resume(lanes, progress)
    if start is None:
        start = 0
        for lane in lanes:
            doing = progress.doing(f"phase of {lane.title} before training")
            with doing, termination.at_once(), lane.failing_alone():
                lane.prepare(loader, teacher)
            shared.was_written_by(lane)
    titles = [lane.title for lane in lanes]
    stop = lanes[0].run.last_epoch * loader.steps_per_epoch
    progress.begin(describe(lanes), loader.steps_per_epoch, stop, start, titles)
    return start


class Clock:
    """Seconds since named moments; all of them are the clock's start until they are reset."""

    def __init__(self) -> None:
        self.start = time.perf_counter()
        self.moments: dict[str, float] = {}

    def since(self, name: str) -> float:
        """Return the seconds since that moment."""
        return time.perf_counter() - self.moments.get(name, self.start)

    def reset(self, name: str) -> None:
        """Move that moment to now."""
        self.moments[name] = time.perf_counter()

    @contextmanager
    def without(self, name: str) -> Iterator[None]:
        """Leave the time of a block out of the seconds since that moment."""
        begun = time.perf_counter()
        yield
        self.moments[name] = self.moments.get(name, self.start) + time.perf_counter() - begun


def alive(lanes: Sequence[Lane]) -> Iterator[Lane]:
    """Iterate over the lanes that have not failed, each asked when its turn comes."""
    return (lane for lane in lanes if lane.failure is None)


def describe(lanes: Sequence[Lane]) -> str:
    """Say what is trained, for people."""
    first = lanes[0].run.settings
    student, teacher, method = first.student.name, first.teacher.title, first.distiller.name
    if len(lanes) > 1:
        what = f"training {len(lanes)} runs side by side"
    elif method == "none":
        what = f"training {student}"
    else:
        what = f"distilling {student} from {teacher} with {method}" if teacher else f"training {student} with {method}"
    return f"{what} on {first.data.name}"


def show(lanes: Sequence[Lane], step: int, speed: float, progress: Progress) -> None:
    """Show the terms of each lane's loss."""
    for lane in alive(lanes):
        with lane.failing_alone():
            progress.show(step, lane.meter.read(), speed, lane.title)


def finish_epoch(
    lanes: Sequence[Lane], dataset: Dataset, step: int, images: int, clock: Clock, progress: Progress
) -> None:
    """Measure each student, where it is due, and write the epoch down."""
    for lane in alive(lanes):
        with lane.failing_alone():
            lane.meter.read()  # waits for the device, so that the speed is true
    speed = images / clock.since("epoch")
    for lane in alive(lanes):
        with lane.failing_alone():
            record_epoch(lane, dataset, step, speed, progress)


def record_epoch(lane: Lane, dataset: Dataset, step: int, speed: float, progress: Progress) -> None:
    """Measure a lane's student, where it is due, and write the epoch down."""
    settings, place = lane.run
    terms, epoch = lane.meter.read(), (step + 1) // lane.steps_per_epoch
    found: dict[str, float | None] = dict.fromkeys(Measures._fields)
    if epoch % place.output.measure_every == 0 or epoch == lane.run.last_epoch:
        with progress.doing(f"measuring {settings.student.name} ({lane.title}) after epoch {epoch}"):
            student, crop = lane.deployed(), settings.protocol.test_crop
            found = evaluate(student, dataset, settings.engine.precision, crop)._asdict()
    record = {
        "epoch": epoch,
        "step": step + 1,
        "lr": lane.rate(step),
        "loss": terms,
        **found,
        "images_per_second": round(speed, 1),
    }
    lane.record(record)
    progress.epoch(record, lane.title)


def until_next_save(asked: float | None, writing: float = 0.0) -> float:
    """Return the seconds until the next checkpoint, where writing the last one took so many."""
    return max(SAVE_EVERY, writing / SAVE_SHARE) if asked is None else asked


def save(lanes: Sequence[Lane], step: int, seconds: float) -> None:
    """Write a checkpoint of each lane, unless a term or a weight of it has gone bad since the last."""
    for lane in alive(lanes):
        with lane.failing_alone():
            lane.meter.read()
            check_finite(lane.trained, f"a weight or statistic before step {step}")
            state = {**lane.state_dict(), "seconds": lane.seconds + seconds}
            lane.ranks.once(checkpoint.save, lane.folder.checkpoints, step, state)


def resume(lanes: Sequence[Lane], progress: Progress) -> int | None:
    """Restore all lanes from the newest checkpoint that each of them has; return its step, None where there is none.

    Lanes are saved one after the other, so a kill between two of them leaves the newest step to some only.
    """
    whole = []
    for lane in lanes:
        steps, damaged = checkpoint.whole(lane.folder.checkpoints)
        whole.append(steps)
        for line in damaged:
            progress.say(line)
    common = set.intersection(*(set(steps) for steps in whole))
    if not common:
        if any(whole):
            raise UserError("the lanes' checkpoints stand at different steps; start anew with --fresh")
        return None
    start = max(common)
    for lane, steps in zip(lanes, whole, strict=True):
        state = checkpoint.load(steps[start])
        try:
            lane.load_state_dict(state, start)
        except (RuntimeError, LookupError, ValueError, TypeError, AttributeError) as error:
            raise UserError(
                f"{steps[start]} is damaged, or belongs to another run; move {steps[start].parent} away and run the "
                "same command again"
            ) from error
        lane.ranks.once(lane.folder.write_history, lane.history)
    progress.say(f"resumed at step {start}")
    return start
