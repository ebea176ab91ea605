"""The command that answers which method to take: recommend."""

from pathlib import Path
from typing import Any

import click

from kdzoo.commands.options import DEBUG, OVERRIDES, PATH, TEACHER_WEIGHTS, TEACHERS, GivenPath, loading, show_rich
from kdzoo.commands.training import spread
from kdzoo.errors import UserError

COMMAS = "NAME[,NAME]..."


@click.command(short_help="Find the best method for your teacher, student and data.")
@TEACHERS
@TEACHER_WEIGHTS
@click.option(
    "--student",
    "--students",
    "students",
    required=True,
    help="Network to train; for several names, separated by commas, there is an answer for each.",
    metavar=COMMAS,
)
@click.option("--data", default="digits", help="Data set, named as in 'kdzoo run' (default: digits).")
@click.option("--data-root", type=GivenPath(), help="Folder of downloaded data sets (default: data).")
@click.option("--protocol", default="quick", help="Training recipe, named as in 'kdzoo run' (default: quick).")
@click.option(
    "--epochs",
    type=click.IntRange(min=1),
    help="Epochs of a training at full length (default: the recipe's, or as many as it takes to halve all candidates "
    "until three are left).",
)
@click.option("--methods", help="Methods to try, besides none, kd and logitmse (default: all).", metavar=COMMAS)
@click.option(
    "--settings",
    type=click.IntRange(1, 9),
    default=3,
    help="Number of settings of its main weight to try for each method; 1 is the usual setting (default: 3).",
)
@click.option(
    "--budget",
    help="Time for everything, such as 4h or 90min, or the number of epochs of all trainings together, such as "
    "600epochs: trainings are as long as that allows (default: --epochs for each finalist).",
)
@click.option(
    "--seed",
    type=click.IntRange(min=0),
    default=0,
    help="Seed of the search; the finalists take those after it (default: 0).",
)
@click.option(
    "--seeds",
    type=click.IntRange(3, 100),
    default=3,
    help="Number of trainings of each finalist, each with its own seed: more tell smaller differences apart "
    "(default: 3).",
)
@click.option(
    "--out",
    type=PATH,
    help="Folder of the search (default: runs/recommend-TEACHER-STUDENTS-DATA).",
)
@click.option("--retry", is_flag=True, help="Train runs again that failed before.")
@click.option("--dry-run", is_flag=True, help="List the methods that fit and what the budget buys, without training.")
@spread
@DEBUG
@OVERRIDES
def recommend(
    teachers: tuple[str, ...],
    teacher_weights: tuple[str, ...],
    students: str,
    data: str,
    data_root: str | None,
    protocol: str,
    epochs: int | None,
    methods: str | None,
    settings: int,
    budget: str | None,
    seed: int,
    seeds: int,
    out: Path | None,
    retry: bool,
    dry_run: bool,
    on: str,
    jobs: int | None,
    gpus_per_group: float | None,
    overrides: tuple[str, ...],
) -> None:
    """Find the best method for your teacher, student and data, and say how sure that is.

    All methods that fit start side by side. The worse half stops early, again and again, ranked on a part of the
    training images that is held out. The last few are trained anew with other seeds, and measured on the test
    images: only these numbers count.

    \b
      kdzoo recommend --teacher resnet14 --student resnet8 --budget 20min
      kdzoo recommend --teacher swin_t --teacher-weights mine.pth --student mobilenetv2 --data folder:pictures --dry-run

    The same command continues a search that was stopped, and several processes may share one. Settings may follow as
    KEY=VALUE, as in 'kdzoo run'; they apply to every training.
    """
    from kdzoo.engine.progress import Progress

    if methods is not None and not split(methods):
        raise UserError("no method is named; leave --methods out to try all")
    if budget == "":
        raise UserError("the budget is empty; leave --budget out to set none")
    with Progress() as progress, loading(progress):
        from kdzoo.experiments import workers
        from kdzoo.experiments.question import Question
        from kdzoo.experiments.recommend import search, tried
        from kdzoo.results.recommendation import Recommendation
        from kdzoo.results.recommendation_screen import plan, screen, table

        executor = workers.find(on, jobs, gpus_per_group)
    given: dict[str, Any] = {"root": data_root} if data_root else {}
    question = Question(
        teachers,
        split(students),
        split(methods or ""),
        settings,
        budget or "",
        {"name": data, **given},
        {"name": protocol, **({"epochs": epochs} if epochs else {})},
        teacher_weights,
        seed,
        overrides,
        seeds,
    )
    if dry_run:
        click.echo(plan(tried(question, out, executor)))
        return
    found = Recommendation.read(search(question, out, executor, retry=retry))
    files = found.write()
    show_rich(table(found))
    click.echo(screen(found, files))


def split(names: str) -> tuple[str, ...]:
    """Split names at commas."""
    return tuple(name.strip() for name in names.split(",") if name.strip())
