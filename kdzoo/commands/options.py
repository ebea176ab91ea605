"""What several commands share: options, and how something rich and what was left out are printed."""

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from kdzoo.errors import visible
from kdzoo.imports import never_searched, not_searched

if TYPE_CHECKING:
    from kdzoo.engine.progress import Progress


WIDEST = 1000  # columns of a table that goes to a file or pipe


class GivenPath(click.Path):
    """A path that is not empty: the working folder is '.', and an empty text comes of a variable that is not set."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if value == "":
            self.fail("the path is empty; the working folder is '.'", param, ctx)
        return super().convert(value, param, ctx)


class GivenFile(GivenPath):
    """The path of a file to write, in whose place there is no device and no pipe, which would be lost."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        path = super().convert(value, param, ctx)
        if path.exists() and not path.is_file():
            self.fail(f"{path} is a device or a pipe; name a file to write", param, ctx)
        return path


PATH, FILE = GivenPath(path_type=Path), GivenFile(path_type=Path, dir_okay=False)
INPUT_FILE = GivenPath(path_type=Path, dir_okay=False)  # it is read, so that it may be a pipe
DEBUG = click.option("--debug", is_flag=True, expose_value=False, help="Show the full traceback of an error.")
OVERRIDES = click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
TRUST_CODE = click.option(
    "--trust-code",
    is_flag=True,
    help="Run the Python files that the run names, though they are not yours (default: refuse, and name them).",
)

TEACHERS = click.option(
    "--teacher",
    "teachers",
    multiple=True,
    help="Network to learn from, named as the student; several times for several that answer together.",
)
TEACHER_WEIGHTS = click.option(
    "--teacher-weights",
    multiple=True,
    help="Checkpoint with the teacher's weights, a file or folder; with several teachers once for each, in their order "
    "(default: train the teacher on the same data, and keep it in the cache for later runs).",
)

Command = Callable[..., None]


def with_data(command: Command) -> Command:
    """Options that say where the data of a finished run lie now, and whether its code is trusted."""
    for option in (
        TRUST_CODE,
        click.option(
            "--data-root",
            "root",
            type=GivenPath(),
            help="Folder of downloaded data sets (default: the one of the run).",
        ),
        click.option(
            "--data",
            help="Data set, or where it lies now, such as folder:PATH (default: that of the run).",
        ),
    ):
        command = option(command)
    return command


def computing(command: Command) -> Command:
    """Options that say on what a finished run is looked at."""
    for option in (
        click.option(
            "--precision",
            help="Precision of the networks: float32, tf32 or bf16 (default: that of the run if possible).",
        ),
        click.option("--device", default="auto", help="Device to compute on (default: the first GPU, else the CPU)."),
    ):
        command = option(command)
    return command


def elsewhere(command: Command) -> Command:
    """Options that say where a finished run is looked at, and on what."""
    return with_data(computing(command))


def show_rich(renderable: Any) -> None:
    """Print a table or text of rich. In a file or pipe a table is as wide as it needs, so that no cell is folded."""
    from rich.measure import Measurement
    from rich.table import Table

    from kdzoo.engine.progress import plain_console

    console = plain_console()
    if isinstance(renderable, Table) and not (console.is_terminal or console.is_jupyter or "COLUMNS" in os.environ):
        needed = Measurement.get(console, console.options.update(max_width=WIDEST), renderable)
        console.width = max(console.width, needed.maximum)
    console.print(renderable)


@contextmanager
def loading(progress: "Progress", what: str = "torch") -> Iterator[Callable[[str], None]]:
    """Name what is loaded at the start of a command, all of which stays; gives the function that renames it."""
    with not_searched(), progress.doing(f"loading {what}") as rename:
        yield rename
    never_searched()


def write_out(text: str) -> None:
    """Print the content of a file on the standard output in UTF-8, as it is written in a file."""
    click.echo(text.encode("utf-8", "backslashreplace"), nl=False)


def tell(lines: Iterable[str]) -> None:
    """Print lines on the standard error, each as one line."""
    for line in lines:
        click.echo(visible(" ".join(line.split())), err=True)
