"""One run from its settings to its result: what ``kdzoo run`` does, and ``kdzoo.run`` from Python."""

from collections.abc import Collection, Sequence
from contextlib import nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from kdzoo import data
from kdzoo.data import option_settings
from kdzoo.engine import ranks as processes
from kdzoo.engine.device import find_device, resolve_auto, use
from kdzoo.engine.measure import evaluate, measured
from kdzoo.engine.memory import check_reserve
from kdzoo.engine.passes import TeacherPasses
from kdzoo.engine.progress import Progress
from kdzoo.engine.training import build, train_one
from kdzoo.errors import UserError, out_of_memory_told, unknown
from kdzoo.experiments import teachers
from kdzoo.experiments.students import shipped
from kdzoo.files import output_path, path_of, read_text
from kdzoo.keywords import name, names
from kdzoo.models import channels_last
from kdzoo.precision import PRECISIONS
from kdzoo.randomness import restored
from kdzoo.resolve import changed_files, fingerprint_of, resolve, several, stored
from kdzoo.settings import EnginePlace, Run
from kdzoo.store import checkpoint, predictions
from kdzoo.store.folder import RunFolder
from kdzoo.store.lock import RunLock
from kdzoo.store.loggers import check_installed
from kdzoo.store.result import Result
from kdzoo.store.trust import PARTS

__all__ = ["Result", "evaluate_run", "execute", "run"]


class Here(NamedTuple):
    """Where a finished run is looked at, and on what: on this machine, which need not be the one that trained it."""

    data: str | None = None  # the data set's name or path, where it is another than the run's
    root: str | None = None  # where torchvision's sets lie, where it is another folder than the run's
    device: str = "auto"
    precision: str | None = None  # None: the run's, or float32 where this machine lacks it
    trust_code: bool = False  # import the files and modules that the run names, whoever wrote them

    def place(self, folder: RunFolder, parts: Collection[str] = PARTS) -> Run:
        """Read the run of a folder and place it here; its fingerprint is that of the data that lie here.

        Code of other ``parts`` of the run is not used.

        Raises:
            UserError: the device is not there or has no such precision, or the run names code that is not trusted.
        """
        name, working = "" if self.data is None else _absolute(self.data), Path.cwd()
        with folder.home():
            settings, place = folder.run(self.trust_code, working, parts)
            images = settings.data
            if name:
                kept = images.options if name.partition(":")[0] == images.name.partition(":")[0] else {}
                images = replace(images, name=name, options=option_settings(name, kept))
        device, precision = find_device(self.device), self.precision or settings.engine.precision
        if self.precision is None and precision == "tf32" and device.type != "cuda":
            precision = "float32"
        if precision not in ("auto", *PRECISIONS):
            raise unknown("precision", precision, ("auto", *PRECISIONS))
        engine = replace(settings.engine, precision=precision)  # type: ignore[arg-type]  # checked above
        root = place.data.root if self.root is None else str(path_of(self.root).resolve())
        place = replace(place, engine=EnginePlace(device=self.device), data=replace(place.data, root=root))
        with folder.home():
            images = replace(images, fingerprint=fingerprint_of(images, root))
        return resolve_auto(Run(replace(settings, engine=engine, data=images), place))


HERE = Here()


def _absolute(name: str) -> str:
    """Make the path in a data set's name absolute, where it is one."""
    head, colon, argument = name.partition(":")
    if head.endswith(".py"):
        head = str(path_of(head).resolve())
    with suppress(UserError):  # of what can be no path, such as an address that a data set of one's own reads
        if argument and path_of(argument).exists():
            argument = str(path_of(argument).resolve())
    return f"{head}{colon}{argument}"


def run(
    distiller: str,
    student: str,
    teacher: str | Sequence[str] | None = None,
    *,
    data: str = "digits",
    protocol: str = "quick",
    seed: int = 0,
    out: str | Path = "runs",
    overrides: Sequence[str] = (),
    fresh: bool = False,
    quiet: bool = False,
) -> Result:
    """Distil one student from one teacher, and return what the command line prints.

    A run that was finished before is not run again; one that was interrupted continues where it stopped.

    Args:
        distiller: a method's name, or the path of a file that holds one.
        student: a network's name: timm's, a short name, ``torchvision:NAME`` or ``package.module:factory``.
        teacher: the same, or several that answer together; None for a method that needs none.
        data: a data set of ``kdzoo list data``, or the path of a Python file that holds one.
        protocol: a recipe's name, or the path of a YAML file.
        seed: decides initial weights, order and augmentation of the batches.
        out: the folder of runs.
        overrides: further settings as ``key=value``, such as ``distiller.size=5`` or ``protocol.epochs=30``.
        fresh: start again from nothing, also where the run is finished.
        quiet: show nothing.

    Raises:
        UserError: a name, a setting, a file or a loss that the user can fix, in one line.

    Example:
        >>> quick = ["protocol.epochs=1", "data.limit=128", "teacher.epochs=1", "teacher.allow_weak=true"]
        >>> result = kdzoo.run("kd", teacher="resnet14", student="resnet8", overrides=quick, quiet=True)
        >>> result.distiller, 0 <= result.top1 <= 100
        ('kd', True)
    """
    values: dict[str, Any] = {
        "distiller": {"name": name(distiller=distiller)},
        "student": {"name": name(student=student)},
        "teacher": several(names(teacher=teacher or ())),
        "data": {"name": name(data=data)},
        "protocol": {"name": name(protocol=protocol)},
        "output": {"root": str(output_path(out))},
        "seed": seed,
    }
    with Progress(quiet) as progress, progress.doing(f"reading the settings and {data}"):
        made = resolve(values, overrides)
    return execute(made, fresh=fresh, quiet=quiet)


@out_of_memory_told(lambda: "running")
def execute(run: Run, fresh: bool = False, quiet: bool = False) -> Result:
    """Train a run, or show the one that is already finished. Global random state is left as it was.

    With several devices this starts a process for each, which comes here again; those of torchrun come by themselves.
    """
    if not run.is_trained_whole:
        raise UserError("engine.stop_after belongs to kdzoo bench; kdzoo run trains to the end of its recipe")
    run = processes.check(resolve_auto(run))
    check_installed(run.place)
    folder = RunFolder.of(run)
    if processes.to_start(run):
        processes.start(execute, run, fresh, quiet)
        result = folder.read_result()
        assert result is not None, "processes that end well leave a result"
        return result
    device = use(run.place)
    with processes.joined(run) as ranks, Progress(quiet or not ranks.first) as progress:
        device = ranks.device(device)
        if not fresh and folder.result.is_file() and (finished := _finished(run, folder, progress)):
            return finished  # without the lock: the folder may be one that cannot be written
        with RunLock(folder.path) if ranks.first else nullcontext(), restored(device):
            with ranks.in_turn():
                if fresh and folder.config.is_file():
                    folder.check_config(run)
                elif finished := _finished(run, folder, progress):
                    return finished
                if other := folder.of_other_data(run):
                    progress.say(f"data differ from those of {other.path}: this is another run")
                dataset = open_data(run, device, progress)
                has_teacher = run.settings.teacher.name is not None
                if has_teacher and teachers.lacking(run, dataset):
                    # A method that does not fit the pair says so before hours are spent on its teacher.
                    with progress.doing(f"checking that {run.settings.distiller.name} fits the pair"):
                        build(run, dataset, TeacherPasses(teachers.untrained(run, dataset)), fetch=False)
                teacher = teachers.obtain(run, dataset, progress) if has_teacher else None
                if fresh:  # now that nothing is missing
                    ranks.once(folder.set_aside)
                    ranks.once(checkpoint.remove, folder.checkpoints)
            return train_one(run, dataset, teacher, progress, ranks)


def _finished(run: Run, folder: RunFolder, progress: Progress) -> Result | None:
    """Check what lies in the run's folder, and show its result where it is finished."""
    folder.check(run)
    if finished := folder.read_result():
        progress.say(f"finished before: {folder.path}  (--fresh runs it again)")
    return finished


def open_data(run: Run, device: torch.device, progress: Progress, finished: RunFolder | None = None) -> data.Dataset:
    """Open the data set of a run, at the size that its protocol asks for.

    Where it has no labels, the teacher says what outputs stand for, or the folder of a ``finished`` run, which has the
    teacher's answers for test images too.
    """
    wanted = run.settings.data
    with progress.doing(f"opening {wanted.name}") as report:
        check_reserve()
        dataset = data.open_dataset(
            **wanted.opening(),
            root=run.place.data.root,
            image_size=run.settings.protocol.image_size,
            device=device,
            report=report,
            workers=run.place.data.workers,
        )
        if not dataset.is_labelled:
            dataset.name_outputs(teachers.output_names(run) if finished is None else finished.read_classes())
        if finished is not None and not dataset.is_judged:
            if not finished.predictions.is_file():
                raise UserError(
                    f"{finished.path} has lost its {finished.predictions.name}, which holds the teacher's answers; "
                    "copy the whole folder"
                )
            answers = predictions.read(finished.predictions, dataset.spec.num_classes).labels
            if len(answers) != dataset.test_size:
                raise UserError(
                    f"{finished.path.name} was measured by its teacher's answers for {len(answers)} test images, and "
                    f"data {wanted.name} have {dataset.test_size}; bring back the data that the run was trained with"
                )
            dataset.answered_by(answers.astype(np.int64))
        return dataset


def evaluate_run(path: Path, here: Here = HERE) -> tuple[float, float]:
    """Measure a finished run's shipped student again, on this machine: top-1 and top-5 in percent.

    Raises:
        UserError: as by ``measure_run``.
    """
    return measure_run(path, here)[:2]


@out_of_memory_told(lambda: "measuring a run again")
def measure_run(path: Path, here: Here = HERE) -> tuple[float, float, str]:
    """Measure a finished run's shipped student as ``evaluate_run`` does, and name what is measured, as a result does.

    Raises:
        UserError: there is no finished run at ``path``, its data are not where they were, or they are other images than
            its teacher answered for.
    """
    folder = RunFolder(path.resolve())
    result = folder.finished()
    run = here.place(folder)
    settings, device = run.settings, use(run.place)
    with restored(device), Progress() as progress:
        with folder.home():
            dataset = open_data(run, device, progress, folder)
            differ = compare_data(run, folder, dataset, progress)
            if differ and not dataset.is_judged:
                raise UserError(
                    f"{folder.path.name} was measured by its teacher's answers, which are for other images than data "
                    f"{settings.data.name} have now; bring back the data that the run was trained with, or pass "
                    "--data with labelled images"
                )
            deployed = shipped_of(run, dataset, folder, progress)
        with progress.doing(f"measuring {settings.student.name} on {settings.data.name}"):
            channels_last(deployed.to(dataset.device))
            top1, top5, _ = evaluate(deployed, dataset, settings.engine.precision, settings.protocol.test_crop)
        known = result.shipped_top1, result.top5 if result.shipped_top5 is None else result.shipped_top5
        kind = measured(dataset, deployed)
        if kind == result.measured and (round(top1, 2), round(top5, 2)) != tuple(round(share, 2) for share in known):
            progress.say(
                f"{folder.result} says top-1 {known[0]:.2f} %, top-5 {known[1]:.2f} %: that differs from what is "
                "measured now, as it may a little on another device or in another precision, and by more on other data"
            )
        return top1, top5, kind


def shipped_of(run: Run, dataset: data.Dataset, folder: RunFolder, progress: Progress) -> nn.Module:
    """Load the module that a run ships, and say so where a file of the user's changed since."""
    folder.check_student(folder.finished())
    if changed := changed_files(run.settings):
        progress.say(f"{folder.path.name}: {', '.join(changed)} changed since this run was made")
    return shipped(run.settings, dataset.spec, folder)


def compare_data(run: Run, folder: RunFolder, dataset: data.Dataset, progress: Progress) -> bool:
    """Tell whether the data of a finished run have changed since, and say so.

    Raises:
        UserError: the outputs of its student stand for other classes, or in another order.
    """
    made, class_names = stored(folder.read_config()).settings.data, dataset.spec.class_names
    differ = made.fingerprint not in ("", run.settings.data.fingerprint)
    if differ:
        progress.say(f"data differ from those of {folder.path}: its own numbers are of other images")
    if folder.classes.is_file() and read_text(folder.classes).splitlines() != list(class_names):
        raise UserError(
            f"the classes of the data are not those of {folder.classes}, or stand in another order; bring back the "
            "data, or the file of data.classes, that the run was trained with"
        )
    return differ
