"""Measures what a newcomer waits for: the README's first command, then the same with another method.

    python benchmarks/first_run.py [--instructions all avx2] [--methods uhkd kd]

The first command starts with an empty cache and folder, so it trains the teacher too; those after it find the teacher.
Each is a process whose output goes to a pipe, as in a log: ``longest_silence`` is the longest wait for a byte of it.
``avx2`` cuts the instruction set down by environment variables, so bf16 is emulated as on most laptops.
"""

import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import pandas as pd
import yaml
from measuring import arguments_of, file_of, publish, this_machine

from kdzoo.store.folder import RunFolder

INSTRUCTIONS = {
    "all": {},
    "avx2": {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"},
}


def watched(command: Sequence[str], folder: Path, environment: Mapping[str, str]) -> tuple[float, float]:
    """Run a command in ``folder``; its seconds, and the most of them without a byte of output.

    Raises:
        RuntimeError: the command failed; its output is the message.
    """
    begun = heard = time.monotonic()
    silence, said = 0.0, b""
    with subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, bufsize=0
    ) as process:
        assert process.stdout is not None
        while True:
            piece = process.stdout.read(2**16)
            silence, heard = max(silence, time.monotonic() - heard), time.monotonic()
            said += piece
            if not piece:
                break
    if process.returncode:
        raise RuntimeError(said.decode(errors="replace"))
    return heard - begun, silence


def measure(instructions: str, methods: Sequence[str], overrides: Sequence[str]) -> list[dict[str, object]]:
    """One row for each method, the first with an empty cache."""
    rows: list[dict[str, object]] = []
    with TemporaryDirectory() as name:
        folder = Path(name)
        environment = {**os.environ, **INSTRUCTIONS[instructions], "KDZOO_CACHE": str(folder / "cache")}
        for method in methods:
            known = set(folder.glob("runs/*"))
            given = ["--distiller", method, "--teacher", "vit_s", "--student", "resnet18", *overrides]
            seconds, silence = watched([sys.executable, "-m", "kdzoo.cli", "run", *given], folder, environment)
            [made] = set(folder.glob("runs/*")) - known
            run = RunFolder(made)
            result = run.read_result()
            assert result is not None, "a run that ends well leaves a result"
            rows.append(
                {
                    "instructions": instructions,
                    "precision": yaml.safe_load(run.config.read_text(encoding="utf-8"))["engine"]["precision"],
                    "method": method,
                    "teacher_cached": bool(rows),
                    "seconds": round(seconds, 1),
                    "training_seconds": result.seconds,
                    "longest_silence": round(silence, 1),
                    "teacher_top1": result.teacher_top1,
                    "student_top1": result.top1,
                }
            )
            print(rows[-1], flush=True)
    return rows


def main() -> None:
    """Parses, measures, prints and writes the table."""
    parser = arguments_of(__doc__)
    parser.add_argument("--instructions", nargs="*", default=list(INSTRUCTIONS), choices=list(INSTRUCTIONS))
    parser.add_argument("--methods", nargs="*", default=["uhkd", "kd"])
    parser.add_argument("--overrides", nargs="*", default=[], help="further settings, such as protocol.epochs=1")
    given = parser.parse_args()
    machine = this_machine()
    rows = [row for kind in given.instructions for row in measure(kind, given.methods, given.overrides)]
    publish(pd.DataFrame(rows), file_of(given.results, "first-run-vit_s-resnet18-digits", machine))


if __name__ == "__main__":
    main()
