"""Runs a whole suite: groups of runs that share teacher, data, recipe and seed train as lanes side by side.

Any number of processes may work on one suite in one folder; each run has one owner at a time. Whatever is finished
stays finished, and what was interrupted goes on.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from kdzoo import config
from kdzoo.engine import checkpoint, teachers
from kdzoo.engine.device import settle
from kdzoo.engine.progress import Progress
from kdzoo.engine.run import open_data
from kdzoo.engine.training import train_lanes
from kdzoo.errors import UserError
from kdzoo.files import write_text
from kdzoo.results.folder import Result, RunFolder
from kdzoo.results.lock import RunLock
from kdzoo.suites import Suite


@dataclass
class Report:
    """What became of a suite's runs."""

    finished: list[Path] = field(default_factory=list)
    failed: dict[Path, str] = field(default_factory=dict)
    elsewhere: list[Path] = field(default_factory=list)  # another process is at work on them


def bench(suite: Suite, out: Path, retry: bool = False, quiet: bool = False) -> Report:
    """Trains whatever of the suite is not finished yet.

    Args:
        suite: the runs.
        out: their folder.
        retry: try again what failed before.
        quiet: show nothing.

    Raises:
        UserError: the folder belongs to another suite, cannot be written, or holds a run that was edited by hand.
    """
    own(out, suite)
    for settings in suite.runs:
        settings.output.root = str(out)
        if settings.engine.devices != 1:
            raise UserError(
                "engine.devices belongs to kdzoo run; a suite fills several devices with several kdzoo bench"
            )
    with Progress(quiet) as progress:
        for settings in suite.runs:
            settle(settings.engine)
        groups = grouped(suite.runs)
        for i, group in enumerate(groups, 1):
            first = group[0]
            waiting = [run for run in group if not is_settled(run, retry)]
            progress.say(
                f"group {i}/{len(groups)}: {first.teacher.name} on {first.data.name}, {first.protocol.name}, seed "
                f"{first.seed}: {len(waiting)} of {len(group)} runs to do"
            )
            if waiting:
                work_on(waiting, progress, quiet)
    return survey(suite)


def own(out: Path, suite: Suite) -> None:
    """Marks the folder as this suite's, so that no table mixes two.

    Raises:
        UserError: it is another suite's already.
    """
    mark = out / "suite.json"
    if mark.is_file():
        other = json.loads(mark.read_text(encoding="utf-8")).get("name")
        if other != suite.name:
            raise UserError(f"{out} holds the suite '{other}', not '{suite.name}'; choose another --out")
    else:
        write_text(mark, json.dumps({"name": suite.name}) + "\n")


def grouped(runs: Iterable[config.Settings]) -> list[list[config.Settings]]:
    """The runs that can share a teacher pass and a batch, in their order."""
    groups: dict[str, list[config.Settings]] = {}
    for run in runs:
        plain = run.plain()
        key = json.dumps([plain[part] for part in ("teacher", "data", "protocol", "engine", "seed")], sort_keys=True)
        groups.setdefault(key, []).append(run)
    return list(groups.values())


def is_settled(settings: config.Settings, retry: bool) -> bool:
    """Whether there is nothing to do for a run: it is finished, or failed before and is not to be retried.

    Raises:
        UserError: its folder was edited by hand or lost its student.
    """
    folder = RunFolder.of(settings)
    if folder.config.is_file():
        found = {key: value for key, value in folder.read_config().items() if key not in ("output", "engine")}
        wanted = {key: value for key, value in settings.plain().items() if key not in ("output", "engine")}
        if found != wanted:
            raise UserError(f"{folder.config} was edited by hand; remove the folder {folder.path} and run this again")
    if folder.read_result() is not None:
        if not folder.student.is_file():
            raise UserError(f"{folder.path} has lost its student; remove the folder and run this again")
        return True
    if folder.failure.is_file() and retry:
        folder.failure.unlink()
    return folder.failure.is_file()


def work_on(runs: Sequence[config.Settings], progress: Progress, quiet: bool) -> None:
    """Trains those of a group's runs that no other process is at work on, as many side by side as memory holds."""
    locks = {i: RunLock(RunFolder.of(run).path) for i, run in enumerate(runs)}
    try:
        mine = [run for i, run in enumerate(runs) if locks[i].acquire()]
        mine = [run for run in mine if not is_settled(run, retry=False)]  # while we waited, another may have been there
        if not mine:
            return
        device = torch.device(mine[0].engine.device)
        with torch.random.fork_rng(device_type="cuda" if device.type == "cpu" else device.type):
            dataset = open_data(mine[0], device, quiet)
            teacher = teachers.obtain(mine[0], dataset, progress) if mine[0].teacher.name else None
            for lanes in alike(mine):
                outcomes = train_lanes(lanes, dataset, teacher, progress)
                for run, outcome in zip(lanes, outcomes, strict=True):
                    record(run, outcome, progress)
    finally:
        for lock in locks.values():
            lock.release()


def record(run: config.Settings, outcome: Result | UserError, progress: Progress) -> None:
    """Writes a failure down; results are written already."""
    if isinstance(outcome, UserError):
        write_text(RunFolder.of(run).failure, str(outcome) + "\n")
        progress.say(f"{run.distiller['name']} failed: {outcome}")


def alike(runs: Sequence[config.Settings]) -> list[list[config.Settings]]:
    """The runs by where they can start together: at a step of which all have a checkpoint, or anew."""
    together: list[tuple[set[int], list[config.Settings]]] = []
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
