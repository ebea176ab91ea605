"""Times the report of made-up runs, and weighs its file.

    python benchmarks/report.py [--runs 100] [--epochs 240] [--classes 100]

The runs have a learning curve of four terms, predictions on 10,000 test images and twelve pictures of noise, which pack
worse than photographs. Each report is made by a new process, so that imports count; the median of three is shown.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import pandas as pd
from measuring import file_of, publish, this_machine

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
from tests.made_runs import many  # noqa: E402

METHODS = ("none", "kd", "dkd", "at", "sp", "uhkd", "figkd", "lfcc", "ofa", "crd")
STUDENTS = ("resnet8", "resnet14", "resnet20", "resnet32", "resnet44")
LIMITS = {"seconds": 10.0, "megabytes": 5.0}


def main() -> None:
    """Make the runs, time their report, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=100)
    parser.add_argument("--epochs", type=int, default=240)
    parser.add_argument("--classes", type=int, default=100)
    given = parser.parse_args()
    seeds = max(1, round(given.runs / len(METHODS) / len(STUDENTS)))
    with tempfile.TemporaryDirectory() as folder:
        classes = [f"class {i}" for i in range(given.classes)]
        made = many(
            Path(folder), METHODS, STUDENTS, seeds, classes, epochs=given.epochs, images=10_000, side=64, terms=4
        )
        out, times = Path(folder) / "report.html", []
        for _ in range(3):
            begun = time.perf_counter()
            subprocess.run([sys.executable, "-m", "kdzoo.cli", "report", folder, "--out", str(out)], check=True)
            times.append(time.perf_counter() - begun)
        row = {"runs": len(made), "epochs": given.epochs, "classes": given.classes}
        row |= {"seconds": round(median(times), 2), "megabytes": round(out.stat().st_size / 1e6, 2)}
    file = file_of(Path(__file__).parent / "results", f"report-{len(made)}runs", this_machine())
    publish(pd.DataFrame([row]), file)
    if any(row[name] > limit for name, limit in LIMITS.items()):
        sys.exit(f"beyond the limits {LIMITS}")


if __name__ == "__main__":
    main()
