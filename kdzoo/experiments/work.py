"""The work on a suite: groups of runs that share teacher, data, recipe and seed train as lanes side by side.

Any number of processes may work on one suite in one folder; each run has one owner at a time. What is finished
stays finished, and what was interrupted continues.
"""

import json
import math
from collections.abc import Iterable, Sequence

from kdzoo.data import Dataset
from kdzoo.engine.device import current, give_back_memory, use
from kdzoo.engine.passes import Teacher
from kdzoo.engine.progress import Progress
from kdzoo.engine.training import Outcome, train_lanes
from kdzoo.errors import OutOfMemory, StorageError, UserError, out_of_memory_told
from kdzoo.experiments import teachers
from kdzoo.experiments.estimate import packs
from kdzoo.experiments.run import open_data
from kdzoo.files import write_text
from kdzoo.quantities import counted
from kdzoo.randomness import restored
from kdzoo.resolve import changed_files
from kdzoo.settings import Run
from kdzoo.store import checkpoint
from kdzoo.store.folder import RunFolder
from kdzoo.store.lock import RunLock, await_signs


def grouped(runs: Iterable[Run]) -> list[list[Run]]:
    """Group the runs that share a teacher pass and a batch, in even shares where ``engine.lanes`` bounds them."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        plain = run.plain()
        key = json.dumps([plain[part] for part in ("teacher", "data", "protocol", "engine", "seed")], sort_keys=True)
        groups.setdefault(key, []).append(run)
    found = []
    for group in groups.values():
        shares = math.ceil(len(group) / (group[0].place.engine.lanes or len(group)))
        found += [group[len(group) * i // shares : len(group) * (i + 1) // shares] for i in range(shares)]
    return found


def work_through(groups: Sequence[Sequence[Run]], progress: Progress, wait: bool = False) -> None:
    """Train the runs that no other process is at work on, group by group, until none of them is left.

    The groups are gone through again as long as something was trained, since another process may have been lost
    meanwhile; one on another machine is lost that gives no sign in the end. With ``wait``, runs that other processes
    hold are waited for in the end.

    Raises:
        StorageError: a group's folder cannot be written; the other groups are trained first.
        UserError: the runs cannot be trained as their settings ask.
    """
    progress.suite([sum(run.last_epoch for run in group if not is_done(run)) for group in groups])
    broken: dict[int, StorageError] = {}

    def turn(wait: bool = False) -> int:
        trained = 0
        for number in range(len(groups)):
            try:
                trained += 0 if number in broken else work_on(groups, number, progress, wait)
            except StorageError as error:
                broken[number] = error
        return trained

    while turn():
        pass
    held = [RunLock(RunFolder.of(run).path) for group in groups for run in group if not is_done(run)]
    if any(lock.beat() is not None for lock in held):
        with progress.doing("waiting for a sign of the processes on other machines that hold runs"):
            await_signs(held)
        while turn():
            pass
    if wait:
        turn(wait=True)
    for error in broken.values():
        raise error


def work_on(groups: Sequence[Sequence[Run]], number: int, progress: Progress, wait: bool) -> int:
    """Train those runs of a group that no other process is at work on, as many side by side as memory holds.

    What a group cannot do without, its data or its teacher, is missed by all of its runs and by no others.

    Returns:
        how many runs that were.
    """
    group = groups[number]
    locks = {i: RunLock(RunFolder.of(run).path) for i, run in enumerate(group) if not is_done(run)}
    try:
        with progress.doing(f"waiting for the locks of {counted(len(locks), 'run')}"):
            mine = [group[i] for i, lock in locks.items() if lock.acquire(wait)]
        # While we waited, another process may have been there, and the user's files may have been edited.
        mine = [run for run in mine if not is_done(run) and not changed_files(run.settings)]
        if not mine:
            return 0
        progress.group(number, f"{title(group)}: {len(mine)} of {counted(len(group), 'run')} to do")
        device = use(mine[0].place)
        with current(device), restored(device):
            try:
                with out_of_memory_told(lambda: "getting data and teacher"):
                    dataset = open_data(mine[0], device, progress)
                    teacher = teachers.obtain(mine[0], dataset, progress) if mine[0].settings.teacher.name else None
            except StorageError:
                raise
            except UserError as error:
                for run in mine:
                    record(run, error, progress)
                return len(mine)
            for pack in packs(mine, dataset, teacher, progress):
                train_together(pack, dataset, teacher, progress)
        return len(mine)
    finally:
        for lock in locks.values():
            lock.release()


def is_done(run: Run) -> bool:
    """Tell whether nothing is left to do for a run: it is finished, it failed, or it stands where it is to stop."""
    folder = RunFolder.of(run)
    return folder.is_done() or (not run.is_trained_whole and folder.has_reached(run.last_epoch))


def title(group: Sequence[Run]) -> str:
    """Say what a group of runs shares."""
    first = group[0].settings
    return f"{first.task}, {first.protocol.name}, seed {first.seed}"


def train_together(runs: Sequence[Run], dataset: Dataset, teacher: Teacher | None, progress: Progress) -> None:
    """Train runs side by side; those that memory did not hold are tried again, half as many at a time."""
    for lanes in by_checkpoint(runs):
        progress.count_next(sum(run.last_epoch for run in lanes))
        outcomes = dict(enumerate(train_lanes(lanes, dataset, teacher, progress)))
        give_back_memory()  # before anything else is made
        full = [i for i, outcome in outcomes.items() if isinstance(outcome, OutOfMemory) and len(lanes) > 1]
        for i in outcomes.keys() - set(full):
            record(lanes[i], outcomes[i], progress)
        if full:
            fewer = len(lanes) // 2
            progress.say(f"memory did not hold {len(full)} of {len(lanes)} runs: trying them {fewer} at a time")
            for start in range(0, len(full), fewer):
                train_together([lanes[i] for i in full[start : start + fewer]], dataset, teacher, progress)


def record(run: Run, outcome: Outcome, progress: Progress) -> None:
    """Write a failure down; results are written already."""
    if isinstance(outcome, UserError):
        write_text(RunFolder.of(run).failure, str(outcome) + "\n")
        progress.say(f"{RunFolder.of(run).path.name} failed: {outcome}")


def by_checkpoint(runs: Sequence[Run]) -> list[list[Run]]:
    """Part runs by where they can start together: at a step of which all have a checkpoint, or from nothing."""
    together: list[tuple[set[int], list[Run]]] = []
    for run in runs:
        steps = set(checkpoint.whole(RunFolder.of(run).checkpoints)[0])
        for i, (common, others) in enumerate(together):
            if (common & steps) or (not common and not steps):
                together[i] = common & steps, [*others, run]
                break
        else:
            together.append((steps, [run]))
    return [others for _, others in together]
