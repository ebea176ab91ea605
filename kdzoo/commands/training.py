"""The commands that train: run and bench."""

from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import click

from kdzoo.commands.options import (
    DEBUG,
    INPUT_FILE,
    OVERRIDES,
    PATH,
    TEACHER_WEIGHTS,
    TEACHERS,
    GivenPath,
    loading,
    show_rich,
)
from kdzoo.quantities import counted

FAILED = 2  # the exit code of a bench with runs that cannot be trained
UNFINISHED = 3  # the exit code of a bench that leaves runs to other processes


def flag(name: str, key: str, **options: Any) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """An option that sets the setting ``key``."""
    return click.option(name, key.replace(".", "__"), **options)


@click.command()
@click.option(
    "--config",
    type=INPUT_FILE,
    help="YAML file with settings by section, such as the recommended.yaml of 'kdzoo recommend'; settings on the "
    "command line take precedence (default: none).",
)
@flag(
    "--distiller",
    "distiller.name",
    help="Distillation method: a name of 'kdzoo list distillers', or the path of a Python file that holds one; none "
    "trains the student on labels alone, and needs no teacher.",
)
@flag(
    "--student",
    "student.name",
    help="Network to train: a name of 'kdzoo list models', any name of timm, torchvision:NAME, or your own "
    "package.module:factory.",
)
@TEACHERS
@TEACHER_WEIGHTS
@flag(
    "--data",
    "data.name",
    help="Data set: a name of 'kdzoo list data', folder:PATH, images:PATH for pictures without classes, or the path of "
    "a Python file that holds one (default: digits).",
)
@flag("--data-root", "data.root", type=GivenPath(), help="Folder of downloaded data sets (default: data).")
@flag(
    "--protocol",
    "protocol.name",
    help="Training recipe: a name of 'kdzoo list protocols', or the path of a YAML file (default: quick).",
)
@flag(
    "--epochs",
    "protocol.epochs",
    type=int,
    help="Number of epochs; the milestones and the warm-up of the learning rate are scaled with it (default: the "
    "protocol's, which a teacher's own training has in any case; teacher.epochs=N changes that).",
)
@flag(
    "--batch-size", "protocol.batch_size", type=int, help="Total batch size over all devices (default: the protocol's)."
)
@flag(
    "--seed",
    "seed",
    type=int,
    help="Seed of the initial weights, and of the order and augmentation of the batches (default: 0).",
)
@flag(
    "--device",
    "engine.device",
    help="Device to train on: cpu, cuda, cuda:1 or mps (default: the first GPU, else the CPU).",
)
@flag(
    "--precision",
    "engine.precision",
    help="Precision of the networks: float32, tf32 (CUDA only) or bf16 (default: bf16 where the hardware has it).",
)
@flag("--devices", "engine.devices", type=int, help="Number of devices for one run, one process each (default: 1).")
@flag("--out", "output.root", type=GivenPath(), help="Folder that holds the runs (default: runs).")
@flag(
    "--allow-weak-teacher",
    "teacher.allow_weak",
    is_flag=True,
    default=None,
    help="Distil even from a teacher whose accuracy is close to guessing (default: stop).",
)
@click.option(
    "--resume/--fresh",
    default=True,
    help="Continue an interrupted run, or start again; a finished result stays until the new one is there (default: "
    "continue).",
)
@DEBUG
@OVERRIDES
def run(
    config: Path | None,
    resume: bool,
    overrides: tuple[str, ...],
    teachers: tuple[str, ...],
    teacher_weights: tuple[str, ...],
    **flags: Any,
) -> None:
    """Distil one student from one teacher, or from several together.

    The run's folder then holds the student and its accuracy on the test images, after the last epoch and the best.
    Without --data and --protocol it is a first look: digits of 8 x 8 pixels, and a recipe of few epochs. The teacher is
    trained once, and runs of all methods and seeds share it.

    Any setting may follow as KEY=VALUE, and wins over an option that says otherwise: 'kdzoo list settings' lists them,
    'kdzoo show METHOD' those of a method.

    \b
      kdzoo run --distiller uhkd --teacher vit_s --student resnet18
      kdzoo run --distiller kd --teacher resnet50 --teacher-weights best.pth --student resnet18 --data folder:pictures
      kdzoo run --distiller crd --teacher resnet32x4 --student resnet8x4 --data cifar100 --protocol crd seed=1
    """
    from kdzoo.engine.progress import Progress

    values: dict[str, Any] = {}
    for key, value in flags.items():
        if value is not None:
            section, _, name = key.partition("__")
            if name:
                values.setdefault(section, {})[name] = value
            else:
                values[section] = value
    with Progress() as progress, loading(progress) as rename:
        from kdzoo.engine.ranks import is_first
        from kdzoo.errors import UserError
        from kdzoo.experiments.run import execute
        from kdzoo.resolve import merged, resolve, several
        from kdzoo.results.last_screen import next_steps, result_table

        rename("reading settings and data")
        if teachers or teacher_weights:
            given = several(teachers, teacher_weights)
            if teachers:
                given.setdefault("others", [])  # else those of the file would stay
            values.setdefault("teacher", {}).update(given)
        if config is not None:
            settings = read_settings(config, values)
            if teacher_weights and not teachers and settings.get("teacher", {}).get("others"):
                raise UserError(
                    f"{config} names several teachers, and --teacher-weights does not say whose weights it gives; "
                    "name each with --teacher too, or write their weights into the file"
                )
            values = merged(settings, (), values)
        made = resolve(values, overrides)
    result = execute(made, fresh=not resume)
    if is_first():
        show_rich(result_table(result))
        click.echo(next_steps(result))


def read_settings(file: Path, given: Mapping[str, Any] = MappingProxyType({})) -> dict[str, Any]:
    """Read settings by section from a YAML file; a section for which another name is ``given`` is left out.

    Raises:
        UserError: there is no such file, or it holds something else.
    """
    from kdzoo.errors import UserError
    from kdzoo.files import read_text
    from kdzoo.keywords import read_yaml

    if not file.exists():
        raise UserError(f"no file {file}; expected a YAML file with settings, such as recommended.yaml")
    settings = read_yaml(read_text(file, piped=True), str(file))
    for section, value in settings.items():
        if section != "seed" and not isinstance(value, dict):
            raise UserError(
                f"{file}: {section}: {value}: expected settings by section, such as distiller: {{name: kd}}"
            )
    names = {section: value["name"] for section, value in given.items() if isinstance(value, dict) and "name" in value}
    other = [section for section, name in names.items() if settings.get(section, {}).get("name", name) != name]
    return {section: value for section, value in settings.items() if section not in other}


def spread(command: Callable[..., None]) -> Callable[..., None]:
    """Options that say where a bench trains."""
    for option in (
        click.option(
            "--gpus-per-group",
            type=click.FloatRange(min=0),
            help="GPUs for each group on Ray, such as 0.5 (default: 1 where the cluster has GPUs, else 0).",
        ),
        click.option(
            "--jobs",
            type=click.IntRange(min=1),
            help="Number of groups trained at the same time, one process each (default: one for each GPU).",
        ),
        click.option(
            "--on",
            type=click.Choice(["local", "ray"]),
            default="local",
            help="Train on this machine, or on a Ray cluster: the one at RAY_ADDRESS, else this machine's, else a new "
            "one (default: local).",
        ),
    ):
        command = option(command)
    return command


@click.command(short_help="Train all runs of a suite, then print their table.")
@click.argument("suite")
@click.option(
    "--seeds", type=click.IntRange(min=1), help="Number of seeds, counted from 0 (default: the suite's own seeds)."
)
@click.option("--out", type=PATH, help="Folder of the suite's runs (default: runs/SUITE).")
@click.option("--retry", is_flag=True, help="Train runs again that failed before.")
@click.option(
    "--dry-run", is_flag=True, help="List the groups of runs and estimate their time and memory, without training."
)
@spread
@click.option("--worker", is_flag=True, hidden=True, help="Be one of several: end with the process that started this.")
@DEBUG
@OVERRIDES
def bench(
    suite: str,
    seeds: int | None,
    out: Path | None,
    retry: bool,
    dry_run: bool,
    on: str,
    jobs: int | None,
    gpus_per_group: float | None,
    worker: bool,
    overrides: tuple[str, ...],
) -> None:
    """Train every method, teacher-student pair and seed of a suite, then print the table.

    \b
      kdzoo bench digits-short --dry-run
      kdzoo bench mine.yaml --seeds 3 protocol.epochs=100

    SUITE is a name of 'kdzoo list suites', or the path of a YAML file. Runs that share teacher, data, protocol and seed
    are a group, trained side by side. The same command continues a suite that was stopped, and several processes
    may work on one suite. Settings may follow as KEY=VALUE, as in 'kdzoo run'; they apply to every run.

    Exit code: 0 if all runs are finished, 2 if some failed or stopped, 3 if other processes are still at work on some.
    With --dry-run: 2 if some runs cannot be trained, or lack what they need to be measured.
    """
    from kdzoo.engine.progress import Progress

    with Progress() as progress, loading(progress) as rename:
        from kdzoo.experiments import bench as engine
        from kdzoo.experiments import suites, workers
        from kdzoo.experiments.estimate import estimate
        from kdzoo.experiments.work import grouped
        from kdzoo.results import layout, table
        from kdzoo.results.plan import plan
        from kdzoo.store.folder import find_runs
        from kdzoo.store.lock import RunLock

        executor = workers.find(on, jobs, gpus_per_group)
        rename("reading settings and data")
        found = suites.load(suite, seeds or 0, overrides, rename)
    folder = out or Path("runs") / found.name
    if dry_run:
        with Progress() as progress:
            groups = grouped(engine.placed(found, folder, workers.Local(), progress))  # it measures here
            estimates = estimate(groups, retry, progress)
        click.echo(plan(found.name, groups, estimates))
        if any(each.failed or each.missing for each in estimates):
            click.get_current_context().exit(FAILED)
        return
    if worker:
        workers.end_with_starter()
        engine.bench(found, folder, executor=executor)
        return
    report = engine.bench(found, folder, retry, executor=executor)
    runs = table.rows(find_runs([folder]))
    if not runs.empty:
        click.echo(layout.render(runs, "markdown"), nl=False)
    if report.elsewhere:
        owners = engine.by_reason({path: RunLock(path).who() for path in report.elsewhere})
        click.echo(
            f"not finished: other processes are at work on {counted(len(report.elsewhere), 'run')} ({owners})", err=True
        )
    if report.on_the_way:
        click.echo(
            f"stopped as engine.stop_after asks: {counted(len(report.on_the_way), 'run')}; the same command without it "
            "continues",
            err=True,
        )
    report.check()
    if report.elsewhere:
        click.get_current_context().exit(UNFINISHED)
