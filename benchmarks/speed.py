"""Measures the engine's step: its speed, what takes the time, and how far it is from two limits.

    python benchmarks/speed.py [--pairs vit_s:resnet18@224 ...] [--methods kd uhkd ...] [--batches 64] [--lanes 1 8]

``images_per_second`` counts a batch once for each lane. ``over_bare`` is the speed as a share of a bare loop's: the
same losses and networks, these not folded, compiled or with fewer products, on one batch that lies on the device, with
a plain optimiser and nothing else; both take turns.
``mfu`` is the share of what the arithmetic allows: matrix products, convolutions and attention, counted, over the rate
at which the device multiplies large matrices in that precision, measured here; a loss's transforms are not counted. The
shares of the step are of eager steps that wait for the device between parts, so they tell what is large, not what
overlaps.

Networks and images are random. A row that the table's file holds already is not measured again, so a killed run goes
on; one that cannot be measured is left out, with a line that says why.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import torch
from measuring import (
    Group,
    Machine,
    arguments_of,
    by_part,
    file_of,
    medians,
    parts_of,
    publish,
    random_set,
    take_turns,
    this_machine,
    timed,
    waiting,
)
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from kdzoo.engine import graphs
from kdzoo.errors import UserError
from kdzoo.models.convolutions import LearningConv2d
from kdzoo.precision import PRECISIONS, matmul_precision

PAIRS = (
    "resnet32x4:resnet8x4",
    "resnet56:resnet20",
    "wrn_40_2:shufflenetv1",
    "vit_s:resnet18",
    "swin_t:mobilenetv2",
)
METHODS = ("kd", "uhkd", "figkd", "lfcc", "ofa", "crd")
ROUNDS = 7


class Row(NamedTuple):
    """What one row of the table is about."""

    pair: str  # teacher:student, with @SIZE where images have not the size that was asked for
    batch: int
    method: str
    lanes: int
    compile: str = "off"  # engine.compile


GOAL = Row("vit_s:resnet18@224", 256, "kd", 1)  # on a GPU: at least 0.85 of the bare loop


def shares(group: Group, steps: int) -> dict[str, float]:
    """What share of the engine's own steps is spent where."""
    seconds = by_part(lambda: group.step(graph=False), parts_of(group), waiting(group.device), steps)
    whole = sum(seconds.values())
    return {name: spent / whole for name, spent in seconds.items()}


def bare_step(group: Group) -> Callable[[], None]:
    """A step on one batch that stays, of plain networks, with nothing around the tensor operations."""
    batch, precision = group.batch(), PRECISIONS[group.runs[0].settings.engine.precision]
    distillations = [lane.distillation for lane in group.lanes]
    optimizers = [
        torch.optim.SGD(trainable(each), lr=0.01, momentum=0.9, weight_decay=5e-4, fused=True) for each in distillations
    ]

    def step() -> None:
        group.teacher.forget()
        for distillation, optimizer in zip(distillations, optimizers, strict=True):
            with plain_passes(group):
                terms = distillation(batch)
            with matmul_precision(group.device.type, precision):
                torch.stack(list(terms.values())).sum().backward()
            optimizer.step()
            optimizer.zero_grad()

    return step


@contextmanager
def plain_passes(group: Group) -> Iterator[None]:
    """Makes the passes by the networks themselves: as they were made, not folded, compiled or with fewer products."""
    students = [lane.distillation for lane in group.lanes]
    layers: list[Any] = [layer for one in students for layer in one.student.modules() if type(layer) is LearningConv2d]
    faster, group.teacher.calls = group.teacher.calls, group.teacher.network
    kept = [student.pass_student_through(student.student) for student in students]
    for layer in layers:
        layer.__class__ = nn.Conv2d
    try:
        yield
    finally:
        group.teacher.calls = faster
        for layer in layers:
            layer.__class__ = LearningConv2d
        for student, passes in zip(students, kept, strict=True):
            student.pass_student_through(passes)


def trainable(module: nn.Module) -> list[nn.Parameter]:
    """The parameters that an optimiser takes."""
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


def operations(step: Callable[[], None]) -> int:
    """Floating-point operations of a step: two for each multiplication and addition of products and convolutions."""
    backward: Any = torch.ops.aten.convolution_backward
    with FlopCounterMode(display=False, custom_mapping={backward: of_convolution_backward}) as counter:
        step()
    return counter.get_total_flops()


def of_convolution_backward(
    gradient: Sequence[int], images: Sequence[int], kernel: Sequence[int], *others: Any, **_: Any
) -> int:
    """Each gradient that is wanted costs what the forward does; torch's own count is too high for grouped ones."""
    transposed, wanted = others[4], others[7]
    return 2 * math.prod(images if transposed else gradient) * math.prod(kernel[1:]) * sum(wanted[:2])


@cache
def matrix_rate(device: torch.device, precision: str) -> float:
    """Floating-point operations per second of large matrix products, at best."""
    side = 8192 if device.type == "cuda" else 2048
    one, other = torch.randn(2, side, side, device=device, dtype=PRECISIONS[precision].dtype or torch.float32)
    wait = waiting(device)
    with matmul_precision(device.type, PRECISIONS[precision]):
        timed(lambda: one @ other, wait, 3)  # warm-up
        return 2 * side**3 / min(timed(lambda: one @ other, wait) for _ in range(20))


def measure(row: Row, machine: Machine, size: int, seconds: float) -> dict[str, object]:
    """A row of the table, in about that many seconds."""
    names, _, own_size = row.pair.partition("@")
    teacher, student = names.split(":")
    device = machine.device
    dataset = images_of(int(own_size or size), device)
    group = Group(teacher, student, [row.method] * row.lanes, dataset, machine, row.batch, row.compile)
    wait = waiting(device)
    works = {"engine": group.step, "bare": bare_step(group)}
    for work in works.values():
        timed(work, wait, graphs.WARM_UP + graphs.CHECKED + 1)  # and the capture
    steps = max(1, round(seconds / (2 * ROUNDS) / timed(group.step, wait)))
    measured = take_turns(works, ROUNDS, wait, dict.fromkeys(works, steps))
    median, images = medians(measured), row.batch * row.lanes
    counted = operations(works["bare"])
    return {
        **row._asdict(),
        "image_size": dataset.spec.image_size,
        "milliseconds": round(1000 * median["engine"], 2),
        "images_per_second": round(images / median["engine"], 1),
        "lowest": round(images / max(measured["engine"]), 1),
        "highest": round(images / min(measured["engine"]), 1),
        "over_bare": round(median["bare"] / median["engine"], 3),
        "gflop": round(counted / 1e9, 2),
        "tflop_per_second": round(counted / median["engine"] / 1e12, 3),
        "matrix_tflop_per_second": round(matrix_rate(device, machine.precision) / 1e12, 3),
        "mfu": round(counted / median["engine"] / matrix_rate(device, machine.precision), 3),
        **{name: round(share, 3) for name, share in shares(group, max(2, min(10, steps))).items()},
    }


@cache
def images_of(size: int, device: torch.device) -> Any:
    """One set for all rows of a size."""
    return random_set(size, device)


def measured_before(file: Path) -> list[dict[str, object]]:
    """The rows that the file holds."""
    rows = pd.read_csv(file).to_dict("records") if file.is_file() else []
    return [{str(key): value for key, value in row.items()} for row in rows]


def main() -> None:
    """Parses, measures row by row, prints and writes the table."""
    parser = arguments_of(__doc__)
    parser.add_argument("--pairs", nargs="*", help="TEACHER:STUDENT, with @SIZE for images of another size")
    parser.add_argument("--methods", nargs="*", default=METHODS)
    parser.add_argument("--batches", nargs="*", type=int, help="default: 64, on a GPU 64 and 512")
    parser.add_argument("--lanes", nargs="*", type=int, help="default: 1, on a GPU 1 and 8")
    parser.add_argument("--compile", nargs="*", choices=("off", "auto", "on"), default=["off"], help="default: off")
    parser.add_argument("--seconds", type=float, help="of each row; default: 20, on a GPU 2")
    parser.add_argument("--image-size", type=int, default=32)
    parser.add_argument("--out", type=Path, help="the table, to go on with one of another day")
    given = parser.parse_args()
    machine = this_machine()
    on_gpu = machine.device.type != "cpu"
    batches, lanes = given.batches or ([64, 512] if on_gpu else [64]), given.lanes or ([1, 8] if on_gpu else [1])
    seconds = given.seconds or (2.0 if on_gpu else 20.0)
    wanted = [
        Row(pair, batch, method, count, compile)
        for method, count, batch, pair, compile in product(
            given.methods, lanes, batches, given.pairs or PAIRS, given.compile
        )
    ]
    if on_gpu and not given.pairs:
        wanted.insert(0, GOAL)
    file = given.out or file_of(given.results, "speed", machine)
    rows = measured_before(file)
    done = {tuple(row.get(key, "off") for key in Row._fields) for row in rows}
    for row in wanted:
        if row in done:
            continue
        try:
            rows.append(measure(row, machine, given.image_size, seconds))
        except (UserError, torch.OutOfMemoryError) as error:
            print(f"left out: {' '.join(map(str, row))}: {str(error).splitlines()[0]}")
            continue
        publish(pd.DataFrame(rows), file)


if __name__ == "__main__":
    main()
