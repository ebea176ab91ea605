"""Measures how soon a run's first step begins, in two versions of kdzoo that take turns.

    python benchmarks/first_step.py OTHER-CHECKOUT [--rounds 7] [--teacher resnet14] [--student resnet8]

Each version has trained the teacher before; the time is from the start of the process to the first loss. A process
that imports torch and ends takes its turn beside them: no version can be sooner than that.
"""

import os
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import pandas as pd
from measuring import file_of, publish, this_machine
from versions import HERE, arguments_of_versions, revision

METHOD = HERE / "benchmarks" / "clocked.py"
SHORT = ("data.limit=256", "protocol.epochs=1", "teacher.epochs=1", "teacher.allow_weak=true")


def seconds_to_first_step(python: str, checkout: Path, names: list[str], folder: Path) -> float:
    """Of a run in the folder, in which the checkout's earlier runs left their teacher.

    Raises:
        subprocess.CalledProcessError: the run failed; its output is on the terminal.
    """
    clock = folder / "clock"
    clock.unlink(missing_ok=True)
    paths = {"KDZOO_CACHE": str(folder / "cache"), "PYTHONPATH": str(checkout), "CLOCKED": str(clock)}
    begun = time.time()
    with TemporaryDirectory() as runs:
        given = ["run", "--distiller", str(METHOD), *names, *SHORT]
        subprocess.run([python, "-m", "kdzoo.cli", *given], cwd=runs, env={**os.environ, **paths}, check=True)
    return round(float(clock.read_text(encoding="utf-8")) - begun, 2)


def main() -> None:
    """Parses, measures, prints and writes the table."""
    parser = arguments_of_versions(__doc__, rounds=7)
    parser.add_argument("--teacher", default="resnet14")
    parser.add_argument("--student", default="resnet8")
    given = parser.parse_args()
    names = ["--teacher", given.teacher, "--student", given.student]
    versions = ((given.python, given.other.resolve()), (sys.executable, HERE))
    rows: list[dict[str, object]] = []
    with TemporaryDirectory() as there, TemporaryDirectory() as here:
        for turn in range(given.rounds + 1):
            for (python, checkout), folder in zip(versions, (there, here), strict=True):
                seconds = seconds_to_first_step(python, checkout, names, Path(folder))
                if turn:  # the first trains the teacher
                    rows.append({"round": turn - 1, "version": revision(checkout), "seconds": seconds})
            begun = time.perf_counter()
            subprocess.run([sys.executable, "-c", "import torch"], check=True)
            if turn:
                rows.append(
                    {"round": turn - 1, "version": "import torch", "seconds": round(time.perf_counter() - begun, 2)}
                )
    publish(pd.DataFrame(rows), file_of(given.results, f"first-step-{given.teacher}-{given.student}", this_machine()))


if __name__ == "__main__":
    main()
