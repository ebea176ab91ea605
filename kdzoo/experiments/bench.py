"""Run a whole suite, here or by workers, and report what became of its runs."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from kdzoo.engine.progress import Progress
from kdzoo.errors import StorageError, UserError
from kdzoo.experiments import suites
from kdzoo.experiments.suites import Suite
from kdzoo.experiments.work import grouped, is_done, work_through
from kdzoo.experiments.workers import Executor, given_or_local
from kdzoo.files import make_folder, output_path, read_json, read_text, storing, write_text
from kdzoo.quantities import counted
from kdzoo.resolve import changed_files
from kdzoo.settings import Run
from kdzoo.store import checkpoint
from kdzoo.store.folder import RunFolder
from kdzoo.store.lock import RunLock
from kdzoo.store.loggers import check_installed
from kdzoo.store.result import Result


@dataclass
class Report:
    """What became of a suite's runs.

    Example:
        >>> report = Report(failed={Path("runs/mine/kd-0"): "the loss term 'kd' is not finite at step 9"})
        >>> report.results, len(report.failed)
        ([], 1)
    """

    finished: list[Path] = field(default_factory=list)
    on_the_way: list[Path] = field(default_factory=list)  # they stand at the epoch of engine.stop_after
    failed: dict[Path, str] = field(default_factory=dict)
    stopped: dict[Path, str] = field(default_factory=dict)  # neither, and no process is at work on them; with a reason
    elsewhere: list[Path] = field(default_factory=list)  # another process is at work on them

    @property
    def results(self) -> list[Result]:
        """Read the results of the finished runs, in the suite's order."""
        found = (RunFolder(path).read_result() for path in self.finished)
        return [result for result in found if result is not None]

    def check(self) -> None:
        """Check that every run is finished, or that another process is at work on it.

        Raises:
            UserError: some stopped or failed; the reasons, each with its runs, and what to do.
        """
        if self.stopped:
            lines = by_reason(self.stopped)
            raise UserError(f"{counted(len(self.stopped), 'run')} stopped ({lines}); the same command continues")
        if self.failed:
            lines = by_reason(self.failed)
            raise UserError(f"{counted(len(self.failed), 'run')} failed ({lines}); --retry tries again")


def bench(
    suite: Suite | str | Path,
    out: str | Path | None = None,
    retry: bool = False,
    quiet: bool = False,
    executor: Executor | None = None,
    *,
    seeds: int = 0,
    overrides: Sequence[str] = (),
    wait: bool = False,
) -> Report:
    """Train every run of a suite that is not finished yet, and report on all of them.

    Args:
        suite: a suite's name, the path of its YAML file, or the suite itself.
        out: the folder of its runs (default: runs/SUITE).
        retry: whether to try again what failed before.
        quiet: whether to show nothing.
        executor: where to train, as ``kdzoo.experiments.workers.find("ray")`` gives it; None for this machine.
        seeds: this many seeds, from 0, instead of the suite's.
        overrides: settings for every run as ``key=value``, such as ``protocol.epochs=30``.
        wait: whether to wait, in the end, for runs that other processes are at work on, and to train what these leave.

    Raises:
        UserError: an unknown suite or setting, or a folder that belongs to another suite or cannot be written. A run
            whose folder is damaged, or was edited by hand, stops alone.

    Example:
        >>> suite = Path("mine.yaml")
        >>> _ = suite.write_text("{pairs: [[resnet14, resnet8]], distillers: [none, kd]}")
        >>> quick = ["protocol.epochs=1", "data.limit=128", "teacher.epochs=1", "teacher.allow_weak=true"]
        >>> report = kdzoo.bench(suite, overrides=quick, quiet=True)
        >>> [result.distiller for result in report.results], report.failed
        (['none', 'kd'], {})
    """
    if not isinstance(suite, Suite):
        suite = suites.load(str(suite), seeds, overrides)
    out = Path("runs") / suite.name if out is None else output_path(out)
    executor = given_or_local(executor)
    with Progress(quiet) as progress:
        runs = placed(suite, out, executor, progress)
        own(out, suite.name)
        if other := next(filter(None, (RunFolder.of(run).of_other_data(run) for run in runs)), None):
            progress.say(f"data differ from those of {other.path}: runs on them are other runs")
        sound, damaged = [], dict[Path, str]()
        for run in runs:
            try:
                check_folder(run)
                sound.append(run)
            except StorageError:
                raise
            except UserError as error:
                damaged[RunFolder.of(run).path] = str(error)
                progress.say(f"left as it is: {error}")
        if retry:
            for folder in map(RunFolder.of, sound):
                with storing(folder.path):
                    folder.failure.unlink(missing_ok=True)
        reasons: list[str] = []
        if executor.is_here(sound):
            work_through(grouped(sound), progress, wait)
        elif unfinished := [group for group in grouped(sound) if not all(map(is_done, group))]:
            reasons = executor.start(suite, unfinished, progress)
    report = survey(sound, reasons)
    report.stopped.update(damaged)
    return report


def placed(suite: Suite, out: Path, executor: Executor, progress: Progress) -> list[Run]:
    """Place the suite's runs below ``out``, and replace every ``auto`` for where they are trained."""
    if any(run.settings.engine.devices != 1 for run in suite.runs):
        raise UserError("engine.devices belongs to kdzoo run; a suite trains one group on each device (--jobs)")
    for run in suite.runs:
        check_installed(run.place)
    return executor.resolve_auto([run.within(output={"root": str(out)}) for run in suite.runs], progress)


def own(out: Path, suite: str) -> None:
    """Mark the folder as this suite's, so that no table mixes two.

    Raises:
        UserError: it is another suite's already.
    """
    mark = out / "suite.json"
    if mark.is_file():
        try:
            other = read_json(mark)["name"]
        except (UserError, KeyError) as error:
            raise UserError(f"{mark} is damaged; if {out} holds the suite '{suite}', remove that file") from error
        if other != suite:
            raise UserError(f"{out} holds the suite '{other}', not '{suite}'; choose another --out")
    else:
        make_folder(out)
        write_text(mark, json.dumps({"name": suite}) + "\n")


def check_folder(run: Run) -> None:
    """Check what lies in a run's folder.

    Raises:
        UserError: as by ``RunFolder.check``, or every checkpoint is damaged.
    """
    folder = RunFolder.of(run)
    folder.check(run)
    if folder.read_result() is None:
        checkpoint.whole(folder.checkpoints)


def survey(runs: Sequence[Run], reasons: Sequence[str] = ()) -> Report:
    """Report how a suite's runs stand on disk; ``reasons`` say why some may have stopped."""
    report = Report()
    for run in runs:
        folder = RunFolder.of(run)
        if folder.read_result() is not None:
            report.finished.append(folder.path)
        elif not run.is_trained_whole and folder.has_reached(run.last_epoch):
            report.on_the_way.append(folder.path)
        elif folder.failure.is_file():
            report.failed[folder.path] = read_text(folder.failure).strip()
        elif RunLock(folder.path).is_held():
            report.elsewhere.append(folder.path)
        else:
            changed = changed_files(run.settings)
            reason = f"{', '.join(changed)} changed since the suite was read" if changed else "; ".join(reasons)
            report.stopped[folder.path] = reason or "the process that was at work on it has ended"
    return report


def by_reason(reasons: Mapping[Path, str]) -> str:
    """Name the runs that share a reason together, each reason once."""
    runs: dict[str, list[str]] = {}
    for path, reason in reasons.items():
        runs.setdefault(reason, []).append(path.name)
    return "; ".join(f"{', '.join(names)}: {reason}" for reason, names in runs.items())
