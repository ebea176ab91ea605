"""The commands that look at what runs left: eval, table and spectrum."""

from pathlib import Path
from typing import Any

import click

from kdzoo.commands.options import DEBUG, FILE, PATH, elsewhere, tell, write_out
from kdzoo.errors import UserError


@click.command("eval")
@click.argument("folder", type=PATH, metavar="RUN")
@elsewhere
@DEBUG
def evaluate(folder: Path, **here: Any) -> None:
    """Measure the student of a finished run again.

    \b
      kdzoo eval runs/digits-resnet8-none-s0-0123456789ab --device cpu

    Prints its top-1 and top-5 on the test images, and what they are shares of where that is not accuracy. The run may
    come from another machine: its relative paths are looked up in the folder where it was made, if that is there, else
    in the working folder.
    """
    from kdzoo.experiments.run import Here, measure_run
    from kdzoo.store.result import MEASURED

    top1, top5, measured = measure_run(folder, Here(**here))
    of = "" if measured == "accuracy" else f"  of the {MEASURED[measured]}"
    click.echo(f"top-1 {top1:.2f} %  top-5 {top5:.2f} %{of}")


@click.command(short_help="Print a table of finished runs.")
@click.argument("folders", nargs=-1, required=True, type=PATH, metavar="RUNS...")
@click.option(
    "--format",
    "style",
    type=click.Choice(["markdown", "csv", "latex", "html"]),
    default="markdown",
    help="Form of the table (default: markdown).",
)
@click.option("--baseline", metavar="METHOD", help="Method that the others are compared with (default: kd).")
@click.option(
    "--pivot",
    is_flag=True,
    help="Show one row for each method and one column for each teacher-student pair, compared over all pairs.",
)
@click.option(
    "--ranks",
    type=FILE,
    metavar="FILE.png",
    help="Also draw a diagram of average ranks over pairs into this file.",
)
@DEBUG
def table(folders: tuple[Path, ...], style: str, baseline: str | None, pivot: bool, ranks: Path | None) -> None:
    """Print a table of finished runs: means over seeds, differences by paired t-tests, published numbers.

    RUNS are folders of runs, or folders that hold some. Damaged and unfinished ones are left out, and named after the
    table.

    \b
      kdzoo table runs/digits --baseline kd
      kdzoo table runs/cifar100-crd --pivot --format latex
    """
    from kdzoo.results import layout, table
    from kdzoo.results.ranks import draw
    from kdzoo.results.unfinished import find_searches, none_finished, trials, unfinished
    from kdzoo.store.folder import find_runs

    found = table.rows(find_runs(list(folders)))
    waiting = unfinished(folders, trials(find_searches(folders)))
    if found.empty:
        raise none_finished(folders, waiting)
    if baseline is not None:
        table.check_baseline(found, baseline)
    if ranks is not None:
        draw(found, ranks)
    rendered = layout.render(found, style, baseline or table.BASELINE, pivot)
    click.echo(rendered, nl=False) if style == "markdown" else write_out(rendered)
    tell([*found.attrs["left_out"], *waiting])


@click.command(short_help="Show what feature maps hold in each frequency band.")
@click.argument("folders", nargs=-1, type=PATH, metavar="[RUN]...")
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
    type=PATH,
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
      kdzoo spectrum runs/NAME runs/OTHER
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
