"""Measures a step whose teacher's logits lie on disk against the same step with the teacher.

    python benchmarks/kept_logits.py [--pairs resnet32x4:resnet8x4 vit_s:resnet18@16] [--methods kd] [--steps 10]

Three kinds of epochs of ``--steps`` steps take turns in one process: plain ones, ones that write the logits, and ones
that read them, each with its file's checksum. ``writing`` and ``reading`` are their times as shares of the plain ones'.
``bytes_an_epoch`` is what lies on disk for an epoch of all images: as many as CIFAR-100 has, or 4096 above 64 pixels.
On a GPU the plain steps are CUDA graphs, and the others are not. Networks have random weights; images are random, of
the size after ``@`` (else 32 pixels), of 100 classes.
"""

from collections.abc import Callable
from itertools import count, cycle
from pathlib import Path
from tempfile import TemporaryDirectory

import pandas as pd
from measuring import (
    CLASSES,
    Group,
    Machine,
    arguments_of,
    compiling,
    file_of,
    medians,
    publish,
    random_set,
    take_turns,
    this_machine,
    waiting,
)

from kdzoo.engine.graphs import Plain
from kdzoo.engine.kept_logits import KeptLogits

PAIRS = ("resnet32x4:resnet8x4",)
METHODS = ("kd",)


def measure(
    pair: str, methods: list[str], steps: int, rounds: int, compile: str, folder: Path, machine: Machine
) -> dict[str, object]:
    """One row of the table."""
    names, _, size = pair.partition("@")
    teacher, student = names.split(":")
    dataset = random_set(int(size or 32), machine.device)
    group = Group(teacher, student, methods, dataset, machine, compile=compile)
    batch_size, images = group.batch_size, len(dataset.spec.labels)

    def kept(name: str, per_epoch: int) -> KeptLogits:
        return KeptLogits(group.teacher, folder / name, range(2), (per_epoch, batch_size, CLASSES), print)

    def epoch(kind: Plain, number: int) -> None:
        for step in range(number * steps, (number + 1) * steps):
            batch = kind.begin(group.batch(), step)
            for lane in group.lanes:
                kind.step(lane, batch, step)
            kind.end()

    writing, reading, written, read = kept("written", steps), kept("read", steps), count(), cycle(range(2))
    works: dict[str, Callable[[], object]] = {
        "plain": lambda: epoch(group.steps, 0),
        "writing": lambda: epoch(writing, next(written)),
        "reading": lambda: epoch(reading, next(read)),
    }
    for work in [*works.values(), works["reading"]]:  # warm-up, in which both epochs that are read are written
        work()
    if kept("read", steps).missing:
        raise SystemExit(f"no logits could be written below {folder}")
    median = {
        name: seconds / steps for name, seconds in medians(take_turns(works, rounds, waiting(machine.device))).items()
    }
    return {
        "pair": pair.replace(":", " -> "),
        "methods": " ".join(methods),
        "plain_ms": round(1000 * median["plain"], 1),
        "writing_ms": round(1000 * median["writing"], 1),
        "reading_ms": round(1000 * median["reading"], 1),
        "writing": round(median["writing"] / median["plain"], 3),
        "reading": round(median["reading"] / median["plain"], 3),
        "bytes_an_epoch": kept("nowhere", images // batch_size).bytes,
    }


def main() -> None:
    """Parses, measures, prints and writes the table."""
    parser = arguments_of(__doc__)
    parser.add_argument("--pairs", nargs="*", default=PAIRS)
    parser.add_argument("--methods", nargs="*", default=METHODS, help="of lanes side by side, that read logits alone")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--compile", choices=("off", "auto"), default="off", help="as engine.compile")
    given = parser.parse_args()
    machine = this_machine()
    rows = []
    for pair in given.pairs:
        with TemporaryDirectory() as folder:
            row = measure(pair, list(given.methods), given.steps, given.rounds, given.compile, Path(folder), machine)
        rows.append(row)
    publish(pd.DataFrame(rows), file_of(given.results, compiling("kept-logits-b64", given.compile), machine))


if __name__ == "__main__":
    main()
