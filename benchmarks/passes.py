"""Measures a teacher's pass and a student's step: as they are, folded, with fewer products, and compiled.

    python benchmarks/passes.py [--teachers resnet32x4 vit_s@16] [--students resnet8x4 resnet18@16] [--batch-size 64]

The variants of a network take turns. ``share`` is the time as a share of the plain network's; ``difference`` the norm
of what differs in all outputs, or in all gradients where that is larger, over the norm of the plain ones. Networks and
images are random.
"""

import time
from collections.abc import Callable
from copy import deepcopy
from functools import partial
from typing import NamedTuple

import pandas as pd
import torch
from measuring import (
    Machine,
    arguments_of,
    file_of,
    medians,
    network,
    publish,
    random_set,
    take_turns,
    this_machine,
    timed,
    waiting,
)
from torch import Tensor

from kdzoo import models
from kdzoo.engine.agreement import distance
from kdzoo.engine.compiling import Compiled, Found, Passes, begin_anew
from kdzoo.outputs import LOGITS
from kdzoo.precision import PRECISIONS, autocast
from kdzoo.tensors import leaves

TEACHERS = ("resnet32x4", "resnet56", "wrn_40_2", "vit_s@16", "swin_t")
STUDENTS = ("resnet8x4", "resnet20", "shufflenetv1", "resnet18@16", "mobilenetv2")


class Case(NamedTuple):
    """A network, the images that it is shown, and whether it learns."""

    name: str
    learns: bool
    network: models.Network
    images: Tensor


def outputs(case: Case, machine: Machine, call: Passes) -> Found:
    """A pass of a teacher, or forward and backward pass of a student: outputs and gradients."""
    with torch.set_grad_enabled(case.learns), autocast(machine.device.type, PRECISIONS[machine.precision]):
        found = leaves(call(case.images, LOGITS))
    if not case.learns:
        return [found]
    weights = list(case.network.parameters())
    slopes = torch.autograd.grad(torch.stack([one.square().mean() for one in found]).sum(), weights, allow_unused=True)
    return [[one.detach() for one in found], [slope for slope in slopes if slope is not None]]


def variants(case: Case, machine: Machine) -> dict[str, Passes]:
    """What makes the network's passes, by the name of the variant."""
    precision = PRECISIONS[machine.precision]
    if case.learns:
        shared = {id(tensor): tensor for tensor in (*case.network.parameters(), *case.network.buffers())}
        fast = deepcopy(case.network, shared)
        if machine.device.type == "cpu":
            models.learn_on_cpu(fast)
        compiled = Compiled(fast, case.images, LOGITS, True)
        return {"plain": case.network, "fewer products": fast, "compiled": compiled}
    folded, fast = models.fold_norms(case.network) or case.network, models.frozen(case.network, precision)
    if precision.dtype is not None:
        folded = fast
    found = {"plain": case.network, "folded": folded, "fewer products": fast}
    return {**found, "compiled": Compiled(fast, case.images, LOGITS, False)}


def measure(case: Case, machine: Machine, rounds: int) -> list[dict[str, object]]:
    """The rows of one network."""
    wait = waiting(machine.device)
    calls = variants(case, machine)
    works: dict[str, Callable[[], object]] = {
        name: partial(outputs, case, machine, call) for name, call in calls.items()
    }
    begun = time.perf_counter()
    outputs(case, machine, calls["compiled"])
    compiled_in = time.perf_counter() - begun
    for work in works.values():
        timed(work, wait)  # warm-up
    plain = outputs(case, machine, case.network)
    median = medians(take_turns(works, rounds, wait))
    return [
        {
            "network": case.name,
            "role": "student" if case.learns else "teacher",
            "variant": name,
            "milliseconds": round(1000 * median[name], 2),
            "share": round(median[name] / median["plain"], 3),
            "difference": f"{difference(outputs(case, machine, call), plain):.1e}",
            "compiled_in_s": round(compiled_in, 1) if name == "compiled" else 0.0,
        }
        for name, call in calls.items()
    ]


def difference(some: Found, others: Found) -> float:
    """The norm of the difference over that of the second, of outputs or of gradients: the larger."""
    return max(
        distance(found, plain) / distance(plain, map(torch.zeros_like, plain))
        for found, plain in zip(some, others, strict=True)
    )


def case_of(name: str, learns: bool, batch_size: int, machine: Machine) -> Case:
    """A network of this name, with @SIZE where images are not of 32 pixels."""
    title, _, size = name.partition("@")
    dataset = random_set(int(size or 32), machine.device)
    made = network(title, dataset.spec)
    if learns and machine.device.type == "cpu":
        models.unfuse_attention(made)
    made = made.train() if learns else made.eval().requires_grad_(False)
    images, _ = next(dataset.test_batches(batch_size))
    return Case(name, learns, made, images)


def main() -> None:
    """Parses, measures network by network, prints and writes the table."""
    parser = arguments_of(__doc__)
    parser.add_argument("--teachers", nargs="*", default=TEACHERS)
    parser.add_argument("--students", nargs="*", default=STUDENTS)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=7)
    given = parser.parse_args()
    machine = this_machine()
    rows: list[dict[str, object]] = []
    file = file_of(given.results, f"passes-b{given.batch_size}", machine)
    for learns, names in ((False, given.teachers), (True, given.students)):
        for name in names:
            begin_anew()
            rows += measure(case_of(name, learns, given.batch_size, machine), machine, given.rounds)
            publish(pd.DataFrame(rows), file)


if __name__ == "__main__":
    main()
