"""The command line: its commands, and how a mistake is said."""

import codecs
import os
import select
import sys
from contextlib import suppress
from io import TextIOWrapper
from pathlib import Path
from typing import Any

import click

from kdzoo import __version__
from kdzoo.commands.answers import check, inspect_data, list_names, show
from kdzoo.commands.recommend import recommend
from kdzoo.commands.report import plot, report
from kdzoo.commands.runs import evaluate, spectrum, table
from kdzoo.commands.students import export, predict
from kdzoo.commands.training import bench, run
from kdzoo.errors import AskedToEnd, UserError, out_of_memory_told, visible


class Commands(click.Group):
    """A group of commands that says what broke: click takes any broken pipe for that to a reader such as ``head``."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except BrokenPipeError as error:
            if reader_is_gone():
                raise SystemExit(1) from error
            raise UserError("a connection to another process or machine broke; --debug shows where") from error


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="kdzoo")
def cli() -> None:
    """Distil any teacher into any student with any method, and compare methods fairly.

    A first look, on small pictures of digits that need no download (minutes on a laptop):

    \b
      kdzoo run --distiller uhkd --teacher vit_s --student resnet18
    """


COMMANDS = (
    *(run, bench, recommend, evaluate, predict, export, table, report),
    *(plot, spectrum, inspect_data, list_names, show, check),
)
for command in COMMANDS:
    cli.add_command(command)


def main() -> None:
    """The entry point: the user's mistakes are one line and exit code 2."""
    open_streams()
    try:
        check_folders()
        with out_of_memory_told(lambda: " ".join(["running kdzoo", *sys.argv[1:2]])):
            code = cli(standalone_mode=False)
    except AskedToEnd:
        raise
    except (UserError, click.ClickException, SystemExit) as error:
        if "--debug" in sys.argv:
            raise
        if isinstance(error, SystemExit) and isinstance(error.__context__, BrokenPipeError):  # of stdout, by rich too
            with suppress(OSError):  # what is still in the buffer goes nowhere
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(1)
        message = error.format_message() if isinstance(error, click.ClickException) else str(error)
        if isinstance(error, SystemExit):  # click returns its own
            message = f"code of a method, a network or a data set called exit({error}); --debug shows where"
        click.echo(f"error: {visible(' '.join(message.split()))}", err=True)
        sys.exit(2)
    except OSError as error:  # a disk that fails
        if "--debug" in sys.argv:
            raise
        click.echo(f"error: {error.filename or 'reading or writing'}: {error.strerror or error}", err=True)
        sys.exit(2)
    except (KeyboardInterrupt, click.Abort):
        click.echo("interrupted; the same command continues a training where it stopped", err=True)
        sys.exit(130)
    sys.exit(code if isinstance(code, int) else 0)


# What is written for a character of ours that the encoding of a terminal or a pipe lacks.
PLAIN = {"→": "->", "±": "+/-", "†": "(1)", "‡": "(2)", "…": "..."}


def plain(error: UnicodeError) -> tuple[str, int]:
    """Write characters that an encoding lacks by others: ours as in ``PLAIN``, those of names as ``\\xe9``."""
    assert isinstance(error, UnicodeEncodeError)
    strange = error.object[error.start : error.end]
    return "".join(PLAIN.get(c) or c.encode("ascii", "backslashreplace").decode() for c in strange), error.end


def open_streams() -> None:
    """Have the standard streams take every text, in the encoding that they have.

    Those that are closed lead to nowhere, or the next files to be opened would stand in for them.
    """
    codecs.register_error("kdzoo.plain", plain)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper) and stream.errors in ("strict", "backslashreplace"):
            stream.reconfigure(errors="kdzoo.plain")
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_RDWR), mode, encoding="utf-8"))


def reader_is_gone() -> bool:
    """Tell whether the standard output is a pipe whose other end is closed."""
    with suppress(OSError, AttributeError):  # it is no file, or this is Windows
        state = select.poll()
        state.register(sys.stdout.fileno(), 0)
        return bool(state.poll(0))
    return False


def check_folders() -> None:
    """Check folders without which torch ends the process while it is imported.

    Raises:
        UserError: the working folder was removed, or that of compiled code cannot be made.
    """
    try:
        Path.cwd()
    except FileNotFoundError as error:
        raise UserError(
            "the working folder was removed; change to another one (cd) and run the same command"
        ) from error
    compiled = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    try:
        if compiled:
            os.makedirs(compiled, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"TORCHINDUCTOR_CACHE_DIR={compiled}: torch's compiler can make no such folder ({error.strerror}); "
            "name another one, or unset that variable"
        ) from error


if __name__ == "__main__":
    main()
