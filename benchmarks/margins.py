"""Measures how far a right method stays from every threshold of the conformance suite, on any machine.

    python benchmarks/margins.py [--methods kd ...] [--seeds 20] [--compiled 2] [--threads 1 2]

Each method runs ``check_learns`` with so many seeds, and with each the checks that compare numbers to a tolerance
(``check_compiles``, which is slow, with fewer), with one and two threads and with the instruction set cut to AVX2.
The table has a row for each method and threshold: the value nearest to the threshold, mean and spread (standard
deviation over all of these), and the distance between mean and threshold in spreads, which must not be below 3;
``measured_with`` names threads and instructions, as the file's name has those of this process alone.
"""

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from itertools import product
from typing import Any
from unittest.mock import patch

import pandas as pd
from first_run import INSTRUCTIONS
from measuring import arguments_of, file_of, publish, this_machine

from kdzoo import checks, registry, toys
from kdzoo.checks import promises

Found = dict[str, list[float]]  # values by threshold

EQUAL = (promises.check_weights, promises.check_float32)


@contextmanager
def others(seed: int, found: Found) -> Iterator[None]:
    """The checks see other students and images, and what they compare is noted as a share of what is allowed."""
    make, draw = toys.distillation, toys.batch_of

    def distillation(*given: Any, **more: Any) -> Any:
        return make(*given, **{**more, "seed": more.get("seed", 0) + 100 * seed})

    def batch_of(seed_of_batch: int = 1, *given: Any, **more: Any) -> Any:
        return draw(more.pop("seed", seed_of_batch) + 1000 * seed, *given, **more)

    def note(one: Mapping[str, Any], two: Mapping[str, Any], when: str, remedy: str, tolerance: float = 0.0) -> None:
        if tolerance:
            found.setdefault(f"the same terms {when} (1 is {tolerance:g})", []).append(
                checks.relative_gap(one, two) / tolerance
            )

    with (
        patch.object(toys, "distillation", distillation),
        patch.object(toys, "batch_of", batch_of),
        patch.object(promises, "expect_equal", note),
    ):
        yield


def measured(method: str, seeds: int, compiled: int) -> Found:
    """All values of one method, in this process."""
    kind, found = registry.load(method), Found()
    expected = getattr(kind, "expected_failures", {})
    for seed in range(seeds):
        if "check_learns" not in expected:
            learned = checks.learning(kind, seed)
            found.setdefault("agreement", []).append(learned.agreement)
            found.setdefault("fall of the loss", []).append(learned.fall)
        with others(seed, found):
            for check in (*EQUAL, *[promises.check_compiles] * (seed < compiled)):
                if check.__name__ not in expected:
                    check(kind)
    return found


def rows_of(method: str, values: Found) -> list[dict[str, object]]:
    """A row for each threshold."""
    rows: list[dict[str, object]] = []
    for name, found in values.items():
        threshold = {"agreement": checks.LEAST_AGREEMENT, "fall of the loss": checks.LEAST_FALL}.get(name, 1.0)
        mean, spread = statistics.fmean(found), statistics.stdev(found) if len(found) > 1 else float("nan")
        gaps = {abs(value - threshold): value for value in found}
        rows.append(
            {
                "method": method,
                "threshold": name,
                "value": threshold,
                "nearest": round(gaps[min(gaps)], 4),
                "mean": round(mean, 4),
                "spread": round(spread, 4),
                "spreads_away": round(abs(mean - threshold) / spread, 1) if spread else float("inf"),
                "runs": len(found),
            }
        )
    return rows


def elsewhere(names: Sequence[str], seeds: int, compiled: int, threads: int, instructions: str) -> dict[str, Found]:
    """The values of many methods, from a process with so many threads and these instructions."""
    command = [sys.executable, __file__, "--child", "--seeds", str(seeds), "--compiled", str(compiled)]
    environment = {**os.environ, **INSTRUCTIONS[instructions], "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run([*command, "--methods", *names], env=environment, stdout=subprocess.PIPE, check=True)
    return dict(json.loads(done.stdout))


def main() -> None:
    """Parses, measures, prints and writes the table."""
    parser = arguments_of(__doc__)
    parser.add_argument("--methods", nargs="*", default=registry.names())
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--compiled", type=int, default=2, help="of the seeds, how many are compiled too")
    parser.add_argument("--threads", nargs="*", type=int, default=[1, 2])
    parser.add_argument("--instructions", nargs="*", default=list(INSTRUCTIONS), choices=list(INSTRUCTIONS))
    parser.add_argument("--child", action="store_true", help="print the values instead, as JSON")
    given = parser.parse_args()
    values = partial(measured, seeds=given.seeds, compiled=given.compiled)
    if given.child:
        print(json.dumps({name: values(name) for name in given.methods}))
        return
    together: dict[str, Found] = {name: {} for name in given.methods}
    run = partial(elsewhere, given.methods, given.seeds, given.compiled)
    machine, done = this_machine(), []
    parts = list(product(given.threads, given.instructions))
    at_once = max(1, (os.cpu_count() or 1) // max(given.threads))
    title = f"margins-{len(given.methods)}methods-{given.seeds}seeds"
    with ThreadPoolExecutor(at_once) as pool:
        for part, found in zip(parts, pool.map(run, *zip(*parts, strict=True)), strict=True):
            done.append("{} threads {}".format(*part))
            for name, by_threshold in found.items():
                for threshold, numbers in by_threshold.items():
                    together[name].setdefault(threshold, []).extend(numbers)
            # Written after each part, so that a measurement which is stopped leaves what it has, and says what that is.
            table = pd.DataFrame([row for name, values in together.items() for row in rows_of(name, values)])
            table["measured_with"] = ", ".join(done)
            publish(table.sort_values("spreads_away"), file_of(given.results, title, machine))


if __name__ == "__main__":
    main()
