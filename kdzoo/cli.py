"""The command line: parse, call, print. Nothing heavy is imported before a command needs it."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from kdzoo import __version__
from kdzoo.errors import AskedToEnd, UserError, out_of_memory_told

DEBUG = click.option("--debug", is_flag=True, expose_value=False, help="Show the full traceback of an error.")
UNFINISHED = 3  # the exit code of a bench that leaves runs to other processes
OVERRIDES = click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")


def flag(name: str, key: str, **options: Any) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """An option that sets the setting ``key``."""
    return click.option(name, key.replace(".", "__"), **options)


def elsewhere(command: Callable[..., None]) -> Callable[..., None]:
    """Options that say where a finished run is looked at, and on what."""
    for option in (
        click.option(
            "--trust-code",
            is_flag=True,
            help="Run the Python files that the run names, though they are not yours (default: refuse, and name them).",
        ),
        click.option(
            "--precision",
            help="Precision of the networks: float32, tf32 or bf16 (default: that of the run if possible).",
        ),
        click.option("--device", default="auto", help="Device to compute on (default: the first GPU, else the CPU)."),
        click.option("--data-root", "root", help="Folder of downloaded data sets (default: the one of the run)."),
        click.option(
            "--data",
            help="Data set, or where it lies now, such as folder:PATH (default: that of the run).",
        ),
    ):
        command = option(command)
    return command


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="kdzoo")
def cli() -> None:
    """Distil any teacher into any student with any method, and compare methods fairly.

    A first look, on small pictures of digits that need no download (minutes on a laptop):

    \b
      kdzoo run --distiller uhkd --teacher vit_s --student resnet18
    """


@cli.command()
@flag(
    "--distiller",
    "distiller.name",
    required=True,
    help="Distillation method: a name of 'kdzoo list distillers', or the path of a Python file that holds one; none "
    "trains the student on labels alone.",
)
@flag(
    "--student",
    "student.name",
    required=True,
    help="Network to train: a name of 'kdzoo list models', any name of timm, torchvision:NAME, or your own "
    "package.module:factory.",
)
@flag(
    "--teacher", "teacher.name", help="Network to learn from, named in the same way (not needed by --distiller none)."
)
@flag(
    "--data",
    "data.name",
    help="Data set: a name of 'kdzoo list data', folder:PATH, or the path of a Python file that holds one "
    "(default: digits).",
)
@flag("--data-root", "data.root", help="Folder of downloaded data sets (default: data).")
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
    "protocol's).",
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
@flag("--out", "output.root", help="Folder that holds the runs (default: runs).")
@flag(
    "--teacher-weights",
    "teacher.weights",
    help="Checkpoint with the teacher's weights, a file or folder (default: train the teacher on the same data, "
    "and keep "
    "it in the cache for later runs).",
)
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
def run(resume: bool, overrides: tuple[str, ...], **flags: Any) -> None:
    """Distil one student from one teacher.

    The run's folder then holds the student and its accuracy on the test images, after the last epoch and the best.
    Without --data and --protocol it is a first look: digits of 8 x 8 pixels, and a recipe of few epochs. The teacher is
    trained once, and runs of all methods and seeds share it.

    Any setting may follow as KEY=VALUE: 'kdzoo list settings' lists them, 'kdzoo show METHOD' those of a method.

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
    with Progress() as progress, progress.doing("loading torch") as rename:
        from kdzoo.engine.ranks import is_first
        from kdzoo.experiments.run import execute
        from kdzoo.resolve import resolve
        from kdzoo.results.last_screen import next_steps, result_table

        rename("reading settings and data")
        made = resolve(values, overrides)
    result = execute(made, fresh=not resume)
    if is_first():
        _print(result_table(result))
        click.echo(next_steps(result))


@cli.command()
@click.argument("suite")
@click.option(
    "--seeds", type=click.IntRange(min=1), help="Number of seeds, counted from 0 (default: the suite's own seeds)."
)
@click.option("--out", type=click.Path(path_type=Path), help="Folder of the suite's runs (default: runs/SUITE).")
@click.option("--retry", is_flag=True, help="Train runs again that failed before.")
@click.option(
    "--dry-run", is_flag=True, help="List the groups of runs and estimate their time and memory, without training."
)
@click.option(
    "--on",
    type=click.Choice(["local", "ray"]),
    default="local",
    help="Train on this machine, or on a Ray cluster: the one at RAY_ADDRESS, else this machine's, else a new one.",
)
@click.option(
    "--jobs",
    type=click.IntRange(min=1),
    help="Number of groups trained at the same time, one process each (default: one for each GPU).",
)
@click.option(
    "--gpus-per-group",
    type=click.FloatRange(min=0),
    help="GPUs for each group on Ray, such as 0.5 (default: 1 where the cluster has GPUs, else 0).",
)
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
      kdzoo bench digits --dry-run
      kdzoo bench mine.yaml --seeds 3 protocol.epochs=100

    SUITE is a name of 'kdzoo list suites', or the path of a YAML file. Runs that share teacher, data, protocol and seed
    are a group, trained side by side. The same command continues a suite that was stopped, and several processes
    may work on one suite. Settings may follow as KEY=VALUE, as in 'kdzoo run'; they apply to every run.

    Exit code: 0 if all runs are finished, 2 if some failed or stopped, 3 if other processes are still at work on some.
    """
    from kdzoo.engine.progress import Progress

    with Progress() as progress, progress.doing("loading torch") as rename:
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
            f"not finished: {len(report.elsewhere)} runs that other processes are at work on ({owners})", err=True
        )
    report.check()
    if report.elsewhere:
        click.get_current_context().exit(UNFINISHED)


@cli.command("eval")
@click.argument("folder", type=click.Path(path_type=Path), metavar="RUN")
@elsewhere
@DEBUG
def evaluate(folder: Path, **here: Any) -> None:
    """Measure the student of a finished run again.

    \b
      kdzoo eval runs/digits-none-resnet8-s0-0123456789ab --device cpu

    Prints its top-1 and top-5 on the test images. The run may come from another machine: its relative paths are looked
    up in the folder where it was made, if that is there, else in the working folder.
    """
    from kdzoo.experiments.run import Here, evaluate_run

    top1, top5 = evaluate_run(folder, Here(**here))
    click.echo(f"top-1 {top1:.2f} %  top-5 {top5:.2f} %")


@cli.command()
@click.argument("folders", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="RUNS...")
@click.option("--format", "style", type=click.Choice(["markdown", "csv", "latex", "html"]), default="markdown")
@click.option("--baseline", metavar="METHOD", help="Method that the others are compared with (default: kd).")
@click.option(
    "--pivot",
    is_flag=True,
    help="Show one row for each method and one column for each teacher-student pair, compared over all pairs.",
)
@click.option(
    "--ranks",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE.png",
    help="Also draw a diagram of average ranks over pairs into this file.",
)
@DEBUG
def table(folders: tuple[Path, ...], style: str, baseline: str | None, pivot: bool, ranks: Path | None) -> None:
    """Print a table of finished runs: means over seeds, differences by paired t-tests, published numbers.

    RUNS are folders of runs, or folders that hold some. Damaged ones are left out, and named after the table.

    \b
      kdzoo table runs/digits --baseline kd
      kdzoo table runs/cifar100-crd --pivot --format latex
    """
    from kdzoo.results import layout, table
    from kdzoo.results.ranks import draw
    from kdzoo.store.folder import find_runs

    found = table.rows(find_runs(list(folders)))
    if found.empty:
        raise UserError(f"no finished run in {', '.join(map(str, folders))}")
    if baseline is not None:
        table.check_baseline(found, baseline)
    if ranks is not None:
        draw(found, ranks)
    click.echo(layout.render(found, style, baseline or table.BASELINE, pivot), nl=False)
    for line in found.attrs["left_out"]:
        click.echo(" ".join(line.split()), err=True)


@cli.command()
@click.argument("folders", nargs=-1, type=click.Path(path_type=Path), metavar="[RUN]...")
@click.option("--teacher", help="Compare this untrained network with --student, instead of finished runs.")
@click.option("--student", help="Untrained student to compare with --teacher.")
@click.option(
    "--batches",
    type=click.IntRange(min=0),
    default=8,
    help="Number of batches of 128 images to read; 0 reads all (default: 8).",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default="spectrum",
    help="Path of the files to write, OUT.csv and OUT.png (default: spectrum).",
)
@elsewhere
@DEBUG
def spectrum(
    folders: tuple[Path, ...],
    teacher: str | None,
    student: str | None,
    batches: int,
    out: Path,
    **here: Any,
) -> None:
    """Show what teacher and students hold in each frequency band of their feature maps, and where they agree.

    It tells which bands a method passes on from teacher to student, and which are left to improve. Give finished runs
    that share a teacher, or two networks before training, which see digits unless --data names others. Add a run of
    --distiller none to see the student without a teacher.

    \b
      kdzoo spectrum runs/digits
      kdzoo spectrum --teacher vit_s --student resnet18
    """
    from kdzoo.experiments import spectrum
    from kdzoo.experiments.run import Here
    from kdzoo.results import spectrum_plot

    spectrum_plot.require_matplotlib()
    if folders and not (teacher or student):
        found = spectrum.of_runs(folders, batches, Here(**here))
    elif teacher and student and not folders:
        found = spectrum.of_networks(teacher, student, here["data"] or "digits", batches, Here(**here))
    else:
        raise UserError("expected finished runs, or both --teacher and --student without any run")
    for file in spectrum_plot.save(found, out):
        click.echo(f"wrote {file}")


@cli.command("data")
@click.argument("name", metavar="NAME|folder:PATH")
@DEBUG
@OVERRIDES
def inspect_data(name: str, overrides: tuple[str, ...]) -> None:
    """Decode every image of a data set once, and show what it holds.

    Lists all damaged images, the number of images of each class, and test images that training images repeat. Settings
    of the data may follow as KEY=VALUE: data.val=0.1 measures on a tenth of the training images, data.labels=FILE takes
    the classes from a CSV file with the columns path and label.

    \b
      kdzoo data folder:pictures
      kdzoo data folder:pictures data.labels=labels.csv data.val=0.1
    """
    from kdzoo.engine.progress import Progress

    with Progress() as progress, progress.doing("loading torch") as rename:
        from kdzoo.resolve import resolve_data
        from kdzoo.results.data_page import inspected, page

        rename(f"reading the files of {name}")
        made = resolve_data(name, overrides)
        found = inspected(made, rename)
    click.echo(page(name, found))
    if found.damaged and made.settings.data.skip_damaged:
        click.echo(f"\nleft out in training: the {len(found.damaged)} damaged images (data.skip_damaged=true)")
    elif found.damaged:
        raise UserError(
            f"damaged images: {len(found.damaged)}; replace or remove them, or train with data.skip_damaged=true"
        )


@cli.command("list")
@click.argument("kind", type=click.Choice(["distillers", "models", "data", "protocols", "suites", "settings"]))
@click.option("--format", "style", type=click.Choice(["text", "markdown"]), default="text")
@DEBUG
def list_names(kind: str, style: str) -> None:
    """List the names of methods, models, data sets, protocols or suites, or every setting with its default."""
    from kdzoo.results.catalogue import listing

    click.echo(listing(kind, style))


@cli.command()
@click.argument("name")
@click.option(
    "--data",
    default="cifar100",
    help="Data set whose image size and classes the network is made for (default: cifar100).",
)
@DEBUG
def show(name: str, data: str) -> None:
    """Explain a method or a network.

    For a method: its paper, its formula and its keywords. For a network: its size and its feature maps.

    \b
      kdzoo show uhkd
      kdzoo show swin_t --data cifar100
    """
    from kdzoo.results.catalogue import distiller_page, is_distiller, model_page

    _print(distiller_page(name) if is_distiller(name) else model_page(name, data))


@cli.command()
@click.argument("name", metavar="NAME|FILE.py")
@DEBUG
def check(name: str) -> None:
    """Check that a method does what training relies on.

    Each check is a line: shapes, gradients, seeds, precision, compilation, learning, and others. 'kdzoo show kd' names
    a file to begin from.

    \b
      kdzoo check ./mine.py
    """
    from kdzoo.checks import Outcome
    from kdzoo.checks import check as check_all

    failed = 0
    for result in check_all(name, on_fail=None):
        click.echo(f"{result.outcome:8}  {result.name}" + (f": {result.message}" if result.message else ""))
        failed += result.outcome is Outcome.FAILED
    if failed:
        raise UserError(f"{name} fails {failed} checks")


def _print(renderable: Any) -> None:
    from kdzoo.engine.progress import plain_console

    plain_console().print(renderable)


def main() -> None:
    """The entry point: the user's mistakes are one line and exit code 2."""
    try:
        with out_of_memory_told(lambda: " ".join(["running kdzoo", *sys.argv[1:2]])):
            code = cli(standalone_mode=False)
    except AskedToEnd:
        raise
    except (UserError, click.ClickException, SystemExit) as error:
        if "--debug" in sys.argv:
            raise
        message = error.format_message() if isinstance(error, click.ClickException) else str(error)
        if isinstance(error, SystemExit):  # click returns its own
            message = f"code of a method, a network or a data set called exit({error}); --debug shows where"
        click.echo(f"error: {' '.join(message.split())}", err=True)
        sys.exit(2)
    except OSError as error:  # a disk that fails
        if "--debug" in sys.argv:
            raise
        click.echo(f"error: {error.filename or 'reading or writing'}: {error.strerror or error}", err=True)
        sys.exit(2)
    except (KeyboardInterrupt, click.Abort):
        click.echo("interrupted; the same command continues where it stopped", err=True)
        sys.exit(130)
    sys.exit(code if isinstance(code, int) else 0)


if __name__ == "__main__":
    main()
