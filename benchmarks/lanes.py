"""Measures what a group of lanes costs against the same runs one by one.

    python benchmarks/lanes.py [--pairs resnet32x4:resnet8x4 vit_s:resnet18@16] [--rounds 3] [--steps 5]

The group shares one teacher pass and one batch; single runs pay for both each time. Both take turns in one process.
The bound is what sharing could save at best: one teacher pass and one batch for all, and each lane's own work. It is
left out on a GPU, where the teacher alone is launched kernel by kernel and steps are graphs.
Networks have random weights; images are random, of the size after ``@`` (else 32 pixels), of 100 classes.
"""

import pandas as pd
import torch
from measuring import (
    Group,
    Machine,
    arguments_of,
    file_of,
    medians,
    publish,
    random_set,
    take_turns,
    this_machine,
    waiting,
)

from kdzoo.precision import PRECISIONS, autocast

METHODS = ("kd", "logitmse", "figkd", "dkd", "dist", "lskd", "nkd", "rsd")
PAIRS = ("resnet32x4:resnet8x4", "vit_s:resnet18@16")


def measure(pair: str, methods: list[str], steps: int, rounds: int, machine: Machine) -> dict[str, object]:
    """One row of the table."""
    names, _, size = pair.partition("@")
    teacher, student = names.split(":")
    device = machine.device
    lanes = Group(teacher, student, methods, random_set(int(size or 32), device), machine)

    def group() -> None:
        for _ in range(steps):
            lanes.step()

    def one_by_one() -> None:
        for lane in lanes.lanes:
            for _ in range(steps):
                lanes.step([lane])

    def teacher_alone() -> None:
        for _ in range(steps):
            batch = lanes.batch()
            with torch.no_grad(), autocast(device.type, PRECISIONS[machine.precision]):
                lanes.teacher.fast(batch.images, lanes.teacher.show)

    works = {"group": group, "one_by_one": one_by_one}
    if device.type == "cpu":
        works["teacher_and_batch"] = teacher_alone
    for work in works.values():
        work()  # warm-up
    median = medians(take_turns(works, rounds, waiting(device)))
    median = {name: seconds / steps for name, seconds in median.items()}
    row: dict[str, object] = {
        "pair": pair.replace(":", " -> "),
        "lanes": len(methods),
        "group_ms": round(1000 * median["group"], 1),
        "one_by_one_ms": round(1000 * median["one_by_one"], 1),
        "share": round(median["group"] / median["one_by_one"], 3),
    }
    if common := median.get("teacher_and_batch"):
        bound = common + median["one_by_one"] - len(methods) * common
        row["teacher_and_batch_ms"] = round(1000 * common, 1)
        row["bound"] = round(bound / median["one_by_one"], 3)
        row["over_bound"] = round(median["group"] / bound, 3)
    return row


def main() -> None:
    """Parses, measures, prints and writes the table."""
    parser = arguments_of(__doc__)
    parser.add_argument("--pairs", nargs="*", default=PAIRS)
    parser.add_argument("--methods", nargs="*", default=METHODS)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    machine = this_machine()
    rows = [measure(pair, list(given.methods), given.steps, given.rounds, machine) for pair in given.pairs]
    publish(pd.DataFrame(rows), file_of(given.results, "lanes-b64", machine))


if __name__ == "__main__":
    main()
