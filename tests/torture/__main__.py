"""Torture runs and benches: ``python -m tests.torture --minutes 10``; a seed that failed is repeated by ``--seed``."""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # processes are forked, so no thread may exist before

import argparse
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from .cases import SUBJECTS, Fault, Torture
from .harm import KINDS


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.torture", description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0, help="how long new cases are drawn (default: 10)")
    parser.add_argument("--seed", type=int, help="run the case of this seed alone")
    parser.add_argument("--first", type=int, default=0, help="the first seed (default: 0)")
    parser.add_argument("--cases", type=int, help="run so many cases instead of so many minutes")
    parser.add_argument("--kind", action="append", choices=KINDS, help="draw these kinds alone (default: all)")
    parser.add_argument("--subject", action="append", choices=list(SUBJECTS), help="draw these alone (default: both)")
    given = parser.parse_args()
    kinds, subjects = tuple(given.kind or KINDS), tuple(given.subject or SUBJECTS)
    more = "".join(f" --kind {kind}" for kind in given.kind or ()) + "".join(
        f" --subject {s}" for s in given.subject or ()
    )
    begun, seed, counts = time.monotonic(), given.first if given.seed is None else given.seed, Counter[str]()
    with tempfile.TemporaryDirectory(prefix="torture-", ignore_cleanup_errors=True) as folder:
        torture = Torture(Path(folder))
        while True:
            case = torture.drawn(seed, kinds, subjects)
            try:
                end = torture.run(case)
                print(f"{case}: {end}", flush=True)
                counts["ended well"] += 1
                counts["killed by a native library"] += "native" in end
            except Fault as fault:
                print(f"{case}: FAULT: {fault}\n    python -m tests.torture --seed {seed}{more}", flush=True)
                counts["faults"] += 1
            counts.update(f"harmed by {harm.kind}" for harm in case.harms)
            seed += 1
            done = seed - given.first
            if given.seed is not None or done == given.cases:
                break
            if given.cases is None and time.monotonic() - begun > 60 * given.minutes:
                break
    minutes = (time.monotonic() - begun) / 60
    print(f"{sum(counts[end] for end in ('ended well', 'faults'))} cases in {minutes:.1f} minutes: {dict(counts)}")
    return int(counts["faults"] > 0)


if __name__ == "__main__":
    sys.exit(main())
