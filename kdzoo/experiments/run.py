"""One run from its settings to its result: what ``kdzoo run`` does, and ``kdzoo.run`` from Python."""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kdzoo import data, models, registry
from kdzoo.distiller import Distiller
from kdzoo.engine import ranks as processes
from kdzoo.engine.device import resolve_auto, use
from kdzoo.engine.lane import TeacherPasses
from kdzoo.engine.measure import evaluate
from kdzoo.engine.progress import Progress
from kdzoo.engine.training import build, train_one
from kdzoo.errors import UserError
from kdzoo.experiments import teachers
from kdzoo.settings import EnginePlace, Run, resolve
from kdzoo.store import checkpoint
from kdzoo.store.folder import Result, RunFolder
from kdzoo.store.lock import RunLock

__all__ = ["Result", "evaluate_run", "execute", "run"]


def run(
    distiller: str,
    student: str,
    teacher: str | None = None,
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
        teacher: the same; None for a method that needs none.
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
        "distiller": {"name": distiller},
        "student": {"name": student},
        "teacher": {"name": teacher},
        "data": {"name": data},
        "protocol": {"name": protocol},
        "output": {"root": str(out)},
        "seed": seed,
    }
    return execute(resolve(values, overrides), fresh=fresh, quiet=quiet)


def execute(run: Run, fresh: bool = False, quiet: bool = False) -> Result:
    """Train a run, or show the one that is already finished. Global random state is left as it was.

    With several devices this starts a process for each, which comes here again; those of torchrun come by themselves.
    """
    run = processes.check(resolve_auto(run))
    folder = RunFolder.of(run)
    if processes.to_start(run):
        processes.start(execute, run, fresh, quiet)
        result = folder.read_result()
        assert result is not None, "processes that end well leave a result"
        return result
    device = use(run.place)
    with processes.joined(run) as ranks, Progress(quiet or not ranks.first) as progress:
        device = ranks.device(device)
        with (
            RunLock(folder.path) if ranks.first else nullcontext(),
            torch.random.fork_rng(
                devices=[device] if device.type == "cuda" else None,  # a process touches no other's device
                device_type=device.type if device.type != "cpu" else "cuda",
            ),
        ):
            with ranks.in_turn():
                if fresh:
                    ranks.once(folder.clear)
                    ranks.once(checkpoint.remove, folder.checkpoints)
                finished = folder.read_result()
                if finished is not None:
                    progress.say(f"finished before: {folder.path}  (--fresh runs it again)")
                    return finished
                ranks.once(folder.open, run)
                dataset = open_data(run, device, progress)
                has_teacher = run.settings.teacher.name is not None
                if has_teacher and teachers.lacking(run, dataset) is not None:
                    # A method that does not fit the pair says so before hours are spent on its teacher.
                    with progress.doing(f"checking that {run.settings.distiller.name} fits the pair"):
                        build(run, dataset, TeacherPasses(teachers.untrained(run, dataset)), fetch=False)
                teacher = teachers.obtain(run, dataset, progress) if has_teacher else None
            return train_one(run, dataset, teacher, progress, ranks)


def open_data(run: Run, device: torch.device, progress: Progress) -> data.Dataset:
    """Open the data set of a run, at the size that its protocol asks for."""
    wanted = run.settings.data
    with progress.doing(f"opening {wanted.name}") as report:
        return data.open_dataset(
            wanted.name,
            root=run.place.data.root,
            image_size=run.settings.protocol.image_size,
            limit=wanted.limit,
            device=device,
            report=report,
            options=wanted.options,
            workers=run.place.data.workers,
        )


def evaluate_run(path: Path) -> tuple[float, float]:
    """Measure a finished run's shipped student again, on this machine: top-1 and top-5 in percent.

    Raises:
        UserError: there is no finished run at ``path``.
    """
    folder = RunFolder(path)
    made = folder.run()
    if folder.read_result() is None:
        raise UserError(f"{path} is not finished; run its command again, and it continues")
    with torch.random.fork_rng(), Progress() as progress:
        run = resolve_auto(elsewhere(made))
        settings = run.settings
        dataset = open_data(run, use(run.place), progress)
        with progress.doing(f"measuring {settings.student.name} on {settings.data.name}"):
            deployed = shape_of_shipped(run, dataset)
            models.load_weights(deployed, folder.student)
            deployed.to(dataset.device).to(memory_format=torch.channels_last)
            return evaluate(deployed, dataset, settings.engine.precision, settings.protocol.test_crop)


def elsewhere(run: Run) -> Run:
    """Place a run on the first device of this machine, which need not be the one that trained it."""
    return run._replace(place=replace(run.place, engine=EnginePlace()))


def shape_of_shipped(run: Run, dataset: data.Dataset) -> nn.Module:
    """Make the module that a run ships, its weights yet to be loaded; a teacher is fetched only where it ships too."""
    settings = run.settings
    if registry.load(settings.distiller.name).deploy is Distiller.deploy:
        wanted = settings.student
        return models.create(wanted.name, dataset.spec, pretrained=wanted.pretrained, fetch=False, **wanted.options)
    teacher = teachers.obtain(run, dataset, Progress(quiet=True))
    return build(run, dataset, TeacherPasses(teacher.network), fetch=False).deploy()
