"""Measures one command in two versions of kdzoo that take turns, each time from nothing: no cache, no finished run.

    python benchmarks/versions.py OTHER-CHECKOUT [--rounds 2] [--command "bench digits-short --seeds 1"]

A checkout's code runs in the environment of this script, in place of the version that is installed there; ``--python``
gives the other one an environment in which its own methods are installed.
"""

import os
import resource
import shlex
import subprocess
import sys
import time
from argparse import ArgumentParser
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import pandas as pd
from measuring import arguments_of, file_of, publish, this_machine

from kdzoo.files import slug

HERE = Path(__file__).resolve().parent.parent


def revision(checkout: Path) -> str:
    """The short name of the commit that is checked out there."""
    told = subprocess.run(["git", "-C", checkout, "rev-parse", "--short", "HEAD"], capture_output=True, check=True)
    return told.stdout.decode().strip()


def measure(python: str, checkout: Path, command: Sequence[str]) -> dict[str, float]:
    """Seconds of a checkout's kdzoo command in a new folder, by the clock and of processors.

    Raises:
        RuntimeError: the command failed; its output is the message.
    """
    with TemporaryDirectory() as folder:
        environment = {**os.environ, "KDZOO_CACHE": str(Path(folder) / "cache"), "PYTHONPATH": str(checkout)}
        before, begun = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
        done = subprocess.run(
            [python, "-m", "kdzoo.cli", *command],
            cwd=folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        seconds, after = time.monotonic() - begun, resource.getrusage(resource.RUSAGE_CHILDREN)
        if done.returncode:
            raise RuntimeError(done.stdout.decode(errors="replace"))
        used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        return {"seconds": round(seconds, 1), "cpu_seconds": round(used, 1)}


def arguments_of_versions(documentation: str | None, rounds: int) -> ArgumentParser:
    """A parser of command lines that name the version to compare with."""
    parser = arguments_of(documentation)
    parser.add_argument("other", type=Path, help="a checkout of the version to compare with")
    parser.add_argument("--python", default=sys.executable, help="the Python that runs the other checkout")
    parser.add_argument("--rounds", type=int, default=rounds, help="turns of each version")
    return parser


def main() -> None:
    """Parses, measures, prints and writes the table."""
    parser = arguments_of_versions(__doc__, rounds=2)
    parser.add_argument("--command", default="bench digits-short --seeds 1", help="what kdzoo is asked")
    given = parser.parse_args()
    machine = this_machine()
    rows: list[dict[str, object]] = []
    for turn in range(given.rounds):
        for python, checkout in ((given.python, given.other.resolve()), (sys.executable, HERE)):
            measured = measure(python, checkout, shlex.split(given.command))
            rows.append({"round": turn, "version": revision(checkout), **measured})
            print(rows[-1], flush=True)
    publish(pd.DataFrame(rows), file_of(given.results, f"versions-{slug(given.command)}", machine))


if __name__ == "__main__":
    main()
