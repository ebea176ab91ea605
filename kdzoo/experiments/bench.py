"""Run a whole suite: groups of runs that share teacher, data, recipe and seed train as lanes side by side.

Any number of processes may work on one suite in one folder; each run has one owner at a time. What is finished
stays finished, and what was interrupted continues.
"""

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from kdzoo.data import Dataset
from kdzoo.engine.progress import Progress
from kdzoo.engine.training import Teacher, train_lanes
from kdzoo.errors import OutOfMemory, StorageError, UserError
from kdzoo.experiments import suites, teachers
from kdzoo.experiments.estimate import parts
from kdzoo.experiments.executors import Local
from kdzoo.experiments.groups import Executor, Group
from kdzoo.experiments.run import open_data
from kdzoo.experiments.suites import Suite
from kdzoo.files import write_text
from kdzoo.settings import Settings
from kdzoo.store import checkpoint
from kdzoo.store.folder import Result, RunFolder
from kdzoo.store.lock import RunLock


@dataclass
class Report:
    """What became of a suite's runs.

    Example:
        >>> report = Report(failed={Path("runs/mine/kd-0"): "the loss term 'kd' is not finite at step 9"})
        >>> report.results, len(report.failed)
        ([], 1)
    """

    finished: list[Path] = field(default_factory=list)
    failed: dict[Path, str] = field(default_factory=dict)
    stopped: dict[str, str] = field(default_factory=dict)  # groups that their executor lost: their titles, and why
    elsewhere: list[Path] = field(default_factory=list)  # another process is at work on them

    @property
    def results(self) -> list[Result]:
        """The results of the finished runs, in the suite's order."""
        found = (RunFolder(path).read_result() for path in self.finished)
        return [result for result in found if result is not None]


def bench(
    suite: Suite | str | Path,
    out: str | Path | None = None,
    retry: bool = False,
    quiet: bool = False,
    executor: Executor | None = None,
    *,
    seeds: int = 0,
    overrides: Sequence[str] = (),
) -> Report:
    """Train every run of a suite that is not finished yet, and report on all of them.

    Args:
        suite: a suite's name, the path of its YAML file, or the suite itself.
        out: the folder of its runs (default: runs/SUITE).
        retry: whether to try again what failed before.
        quiet: whether to show nothing.
        executor: where to train; None for this machine.
        seeds: this many seeds, from 0, instead of the suite's.
        overrides: settings for every run as ``key=value``, such as ``protocol.epochs=30``.

    Raises:
        UserError: an unknown suite or setting, or a folder that belongs to another suite, cannot be written, or holds a
            run that was edited by hand.

    Example:
        >>> suite = Path("mine.yaml")
        >>> _ = suite.write_text("{pairs: [[resnet14, resnet8]], distillers: [none, kd]}")
        >>> quick = ["protocol.epochs=1", "data.limit=128", "teacher.epochs=1", "teacher.allow_weak=true"]
        >>> report = kdzoo.bench(suite, overrides=quick, quiet=True)
        >>> [result.distiller for result in report.results], report.failed
        (['none', 'kd'], {})
    """
    if not isinstance(suite, Suite):
        suite = suites.load(str(suite), range(seeds), overrides)
    out = Path("runs") / suite.name if out is None else Path(out)
    executor = executor or Local()
    own(out, suite)
    groups = laid_out(suite, out, executor, quiet)
    named = [named_group(group, f"{i}/{len(groups)}", retry) for i, group in enumerate(groups, 1)]
    with Progress(quiet) as progress:
        stopped = executor.train(named, work_on, progress, quiet)
    report = survey(suite)
    report.stopped = stopped
    lost = {RunFolder.of(run).path for group in named if group.title in stopped for run in group.runs}
    report.elsewhere = [path for path in report.elsewhere if path not in lost]
    return report


def laid_out(suite: Suite, out: Path, executor: Executor | None = None, quiet: bool = False) -> list[list[Settings]]:
    """The suite's groups, its runs' folders below ``out`` and every ``auto`` settled for where they are trained."""
    for settings in suite.runs:
        settings.output.root = str(out)
        if settings.engine.devices != 1:
            raise UserError("engine.devices belongs to kdzoo run; a suite trains one group on each device (--jobs)")
    (executor or Local()).settle(suite.runs, quiet)
    return grouped(suite.runs)


def named_group(runs: Sequence[Settings], title: str, retry: bool) -> Group:
    """What is to do of a group's runs."""
    first, waiting = runs[0], [run for run in runs if not is_settled(run, retry)]
    text = f"{first.teacher.name} on {first.data.name}, {first.protocol.name}, seed {first.seed}"
    return Group(title, f"{text}: {len(waiting)} of {len(runs)} runs to do", waiting)


def own(out: Path, suite: Suite) -> None:
    """Marks the folder as this suite's, so that no table mixes two.

    Raises:
        UserError: it is another suite's already.
    """
    mark = out / "suite.json"
    if mark.is_file():
        try:
            other = json.loads(mark.read_text(encoding="utf-8"))["name"]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{mark} is damaged; if {out} holds the suite '{suite.name}', remove that file") from error
        if other != suite.name:
            raise UserError(f"{out} holds the suite '{other}', not '{suite.name}'; choose another --out")
    else:
        write_text(mark, json.dumps({"name": suite.name}) + "\n")


def grouped(runs: Iterable[Settings]) -> list[list[Settings]]:
    """The runs that share a teacher pass and a batch, in even parts where ``engine.lanes`` bounds them."""
    groups: dict[str, list[Settings]] = {}
    for run in runs:
        plain = run.plain()
        key = json.dumps([plain[part] for part in ("teacher", "data", "protocol", "engine", "seed")], sort_keys=True)
        groups.setdefault(key, []).append(run)
    found = []
    for group in groups.values():
        parts = math.ceil(len(group) / (group[0].engine.lanes or len(group)))
        found += [group[len(group) * i // parts : len(group) * (i + 1) // parts] for i in range(parts)]
    return found


def is_settled(settings: Settings, retry: bool) -> bool:
    """Whether there is nothing to do for a run: it is finished, or failed before and is not to be retried.

    Raises:
        UserError: its folder was edited by hand, or lost its settings, its student or every whole checkpoint.
    """
    folder = RunFolder.of(settings)
    if folder.config.is_file():
        found = {key: value for key, value in folder.read_config().items() if key not in ("output", "engine")}
        wanted = {key: value for key, value in settings.plain().items() if key not in ("output", "engine")}
        if found != wanted:
            raise UserError(f"{folder.config} was edited by hand; remove the folder {folder.path} and run this again")
    if folder.read_result() is not None:
        for file, name in ((folder.config, "settings"), (folder.student, "student")):
            if not file.is_file():
                raise UserError(f"{folder.path} has lost its {name}; remove the folder and run this again")
        return True
    checkpoint.survey(folder.checkpoints)
    if folder.failure.is_file() and retry:
        folder.failure.unlink()
    return folder.failure.is_file()


def work_on(runs: Sequence[Settings], progress: Progress, wait: bool = False) -> None:
    """Trains those of a group's runs that no other process is at work on, as many side by side as memory holds.

    What a group cannot do without, its data or its teacher, is missed by all of its runs and by no others. With
    ``wait``, runs that other processes hold are waited for.
    """
    locks = {i: RunLock(RunFolder.of(run).path) for i, run in enumerate(runs)}
    try:
        mine = [run for i, run in enumerate(runs) if locks[i].acquire(wait)]
        mine = [run for run in mine if not is_settled(run, retry=False)]  # while we waited, another may have been there
        if not mine:
            return
        device = torch.device(mine[0].engine.device)
        with torch.random.fork_rng(device_type="cuda" if device.type == "cpu" else device.type):
            try:
                dataset = open_data(mine[0], device, progress)
                teacher = teachers.obtain(mine[0], dataset, progress) if mine[0].teacher.name else None
            except StorageError:
                raise
            except UserError as error:
                for run in mine:
                    record(run, error, progress)
                return
            for part in parts(mine, dataset, teacher, progress):
                train(part, dataset, teacher, progress)
    finally:
        for lock in locks.values():
            lock.release()


def train(runs: Sequence[Settings], dataset: Dataset, teacher: Teacher | None, progress: Progress) -> None:
    """Trains runs side by side; those that memory did not hold are tried again, half as many at a time."""
    for lanes in alike(runs):
        progress.worth(sum(run.protocol.epochs for run in lanes))
        outcomes = dict(enumerate(train_lanes(lanes, dataset, teacher, progress)))
        full = [i for i, outcome in outcomes.items() if isinstance(outcome, OutOfMemory) and len(lanes) > 1]
        for i in outcomes.keys() - set(full):
            record(lanes[i], outcomes[i], progress)
        if full:
            fewer = len(lanes) // 2
            progress.say(f"memory did not hold {len(full)} of {len(lanes)} runs: trying them {fewer} at a time")
            for start in range(0, len(full), fewer):
                train([lanes[i] for i in full[start : start + fewer]], dataset, teacher, progress)


def record(run: Settings, outcome: Result | UserError, progress: Progress) -> None:
    """Writes a failure down; results are written already."""
    if isinstance(outcome, UserError):
        write_text(RunFolder.of(run).failure, str(outcome) + "\n")
        progress.say(f"{run.distiller['name']} failed: {outcome}")


def alike(runs: Sequence[Settings]) -> list[list[Settings]]:
    """The runs by where they can start together: at a step of which all have a checkpoint, or anew."""
    together: list[tuple[set[int], list[Settings]]] = []
    for run in runs:
        steps = set(checkpoint.survey(RunFolder.of(run).checkpoints)[0])
        for i, (common, others) in enumerate(together):
            if (common & steps) or (not common and not steps):
                together[i] = common & steps, [*others, run]
                break
        else:
            together.append((steps, [run]))
    return [others for _, others in together]


def survey(suite: Suite) -> Report:
    """How the suite stands on disk."""
    report = Report()
    for settings in suite.runs:
        folder = RunFolder.of(settings)
        if folder.read_result() is not None:
            report.finished.append(folder.path)
        elif folder.failure.is_file():
            report.failed[folder.path] = folder.failure.read_text(encoding="utf-8").strip()
        else:
            report.elsewhere.append(folder.path)
    return report
