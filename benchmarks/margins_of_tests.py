"""Measures how far every number that a test compares stays from its bound, on other draws and other processors.

    python benchmarks/margins_of_tests.py [--seeds 5] [--instructions all avx2] [-- tests -m "not slow"]

The tests run as they are, but each ``torch.manual_seed`` of theirs gets a number added, so that they see other weights
and images. What is noted: both sides of ``<`` and ``>`` between numbers, and the gap of what is compared with a
tolerance, as a share of the tolerance. The table has a row for each place in the tests: the value nearest to its
bound, the mean and spread (standard deviation) over all draws and instruction sets, and how many spreads the mean
is away from the bound. Bounds inside ``.all()`` and ``.any()`` are not seen; a place whose values never differ has no
spread and is left out, and so are places that were reached once. A test that fails on other draws is listed with
what it said: it compares with numbers of one draw, or its bound hangs on it.
"""

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from numbers import Real
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from _pytest.assertion import rewrite
from first_run import INSTRUCTIONS
from measuring import arguments_of, file_of, publish, this_machine

INTO, ADDED = "KDZOO_MARGINS", "KDZOO_ADDED_TO_SEEDS"
ApproxScalar: Any = type(pytest.approx(1.0))
ORDER = ("<", "<=", ">", ">=")
NEAR = 3.0  # spreads

Noted = tuple[str, float, float]  # what kind of comparison, the value, the bound


class Notes:
    """A plugin of pytest that writes a line of JSON for each comparison that held, and for each test that failed."""

    def __init__(self, file: Path, added: int):
        self.file, self.added = file.open("a"), added
        self.test, self.pending = "", list[Noted]()

    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        self.test, self.pending = item.nodeid.partition("[")[0], []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.write(failed=str(report.longrepr)[-300:])

    def pytest_assertion_pass(self, item: pytest.Item, lineno: int, orig: str, expl: str) -> None:
        for kind, value, bound in self.pending:
            self.write(line=lineno, check=orig, kind=kind, value=value, bound=bound)
        self.pending = []

    def write(self, **facts: object) -> None:
        print(json.dumps({"test": self.test, **facts}), file=self.file, flush=True)

    def watch(self) -> None:
        """Watch what compares numbers."""
        compared, near, seeded = rewrite._call_reprcompare, ApproxScalar.__eq__, torch.manual_seed

        def compare(ops: Sequence[str], results: Any, expls: Any, each_obj: Sequence[object]) -> str:
            numbers = [_number(side) for side in each_obj]
            for one, op, two in zip(numbers, ops, numbers[1:], strict=False):
                if op in ORDER and one is not None and two is not None:
                    self.pending.append(("order", one, two))
            return compared(ops, results, expls, each_obj)

        def equal(approx: Any, actual: Any) -> bool:
            if isinstance(actual, Real) and isinstance(approx.expected, Real) and approx.tolerance:
                gap = abs(float(actual) - float(approx.expected)) / approx.tolerance
                self.pending.append(("tolerance", gap, 1.0))
            return near(approx, actual)

        def share(check: Callable[..., Any], rtol: str, atol: str) -> Callable[..., Any]:
            def checked(one: Any, two: Any, *given: Any, **more: Any) -> Any:
                gap = _share_of_tolerance(one, two, more.get(rtol), more.get(atol))
                if gap is not None:
                    line = sys._getframe(1).f_lineno
                    self.write(line=line, check=check.__name__, kind="tolerance", value=gap, bound=1)
                return check(one, two, *given, **more)

            return checked

        rewrite._call_reprcompare = compare
        ApproxScalar.__eq__ = equal
        torch.manual_seed = lambda seed: seeded(seed + self.added)
        torch.testing.assert_close = share(torch.testing.assert_close, "rtol", "atol")
        np.testing.assert_allclose = share(np.testing.assert_allclose, "rtol", "atol")


def _number(side: object) -> float | None:
    """Make a float of a number that is no count."""
    if isinstance(side, torch.Tensor) and side.numel() == 1 and side.is_floating_point():
        return float(side.detach())
    return float(side) if isinstance(side, Real) and not isinstance(side, bool) else None


def _share_of_tolerance(one: Any, two: Any, rtol: float | None, atol: float | None) -> float | None:
    """Compute the largest gap as a share of what is allowed; None where no tolerance is named."""
    if rtol is None and atol is None:
        return None
    one, two = (np.asarray(torch.as_tensor(side).detach().cpu().numpy()).astype(complex) for side in (one, two))
    allowed = (atol or 0.0) + (rtol or 0.0) * np.abs(two)
    with np.errstate(divide="ignore", invalid="ignore"):
        shares = np.where(one == two, 0.0, np.abs(one - two) / allowed)
    return float(shares.max(initial=0.0)) if np.isfinite(shares).all() else None


def pytest_configure(config: pytest.Config) -> None:
    """Begin to note, where the script below asks for it."""
    if INTO in os.environ:
        notes = Notes(Path(os.environ[INTO]), int(os.environ[ADDED]))
        notes.watch()
        config.pluginmanager.register(notes)


def noted(seed: int, instructions: str, tests: Sequence[str], folder: Path) -> Iterator[dict[str, Any]]:
    """Run the tests once, and give what was noted."""
    file = folder / f"{seed}-{instructions}.jsonl"
    environment = {
        **os.environ,
        **INSTRUCTIONS[instructions],
        INTO: str(file),
        ADDED: str(1000 * seed),
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]),
        "PYTHONPYCACHEPREFIX": str(folder / "bytecode"),  # that of usual runs has no hook
    }
    command = [sys.executable, "-m", "pytest", "-p", "margins_of_tests", "-o", "enable_assertion_pass_hook=true"]
    subprocess.run([*command, *tests], env=environment, stdout=subprocess.DEVNULL, check=False)
    with file.open() as lines:
        yield from map(json.loads, lines)


def rows_of(found: dict[tuple[str, int, str], list[tuple[float, float]]]) -> list[dict[str, object]]:
    """A row for each place; values and bounds are those of every draw."""
    rows: list[dict[str, object]] = []
    for (test, line, check), pairs in found.items():
        gaps = [value - bound for value, bound in pairs]
        spread = statistics.stdev(gaps) if len(gaps) > 1 else 0.0
        if not spread or all(value == int(value) and bound == int(bound) for value, bound in pairs):
            continue
        value, bound = min(pairs, key=lambda pair: abs(pair[0] - pair[1]))
        rows.append(
            {
                "test": test,
                "line": line,
                "check": check,
                "nearest": float(f"{value:.4g}"),
                "bound": float(f"{bound:.4g}"),
                "mean_gap": float(f"{statistics.fmean(gaps):.4g}"),
                "spread": float(f"{spread:.4g}"),
                "spreads_away": round(abs(statistics.fmean(gaps)) / spread, 1),
                "values": len(pairs),
            }
        )
    return rows


def main() -> None:
    """Parses, runs the tests and writes the table after each run."""
    parser = arguments_of(__doc__)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--instructions", nargs="*", default=list(INSTRUCTIONS), choices=list(INSTRUCTIONS))
    parser.add_argument("tests", nargs="*", default=["tests", "-m", "not slow"], help="what pytest is given")
    given = parser.parse_args()
    machine = this_machine()
    found: dict[tuple[str, int, str], list[tuple[float, float]]] = {}
    failed: dict[str, str] = {}
    with TemporaryDirectory() as name:
        for seed in range(given.seeds):
            for instructions in given.instructions:
                for one in noted(seed, instructions, given.tests, Path(name)):
                    if "failed" in one:
                        failed.setdefault(one["test"], f"seed {seed}, {instructions}: {one['failed']}")
                    else:
                        place = one["test"], one["line"], one["check"]
                        found.setdefault(place, []).append((one["value"], one["bound"]))
                table = pd.DataFrame(rows_of(found)).sort_values("spreads_away")
                file = file_of(given.results, f"margins-of-tests-{seed + 1}seeds", machine)
                publish(table[table["spreads_away"] < 2 * NEAR], file)
    for test, said in failed.items():
        print(f"\n{test}\n{said}")


if __name__ == "__main__":
    main()
