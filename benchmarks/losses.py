"""Measures what each method's loss costs, forward and backward, as a share of a whole step of plain ``kd``.

    python benchmarks/losses.py [--methods uhkd lfcc ...] [--pairs vit_s:resnet18 ...] [--rounds 5]

Networks are of random weights at CIFAR-100's size; the loss runs on outputs that were computed before. What a method
computes beyond one pass of each network belongs to its loss: passes over more views (sskd, hsakd) and through stages
(fbt, fcfd, scalekd, pat). Methods and the ``kd`` step take turns; the table shows medians in milliseconds, and goes to
``benchmarks/results/``.
"""

import pandas as pd
import torch
from measuring import (
    CLASSES,
    Machine,
    Work,
    arguments_of,
    file_of,
    medians,
    network,
    publish,
    take_turns,
    this_machine,
    waiting,
)
from torch import Tensor, nn

from kdzoo import Batch, DataSpec, Distillation, Output, Show, models, registry
from kdzoo.engine.optim import Optimizer
from kdzoo.errors import UserError
from kdzoo.outputs import EVERYTHING, LOGITS
from kdzoo.precision import PRECISIONS, autocast
from kdzoo.resolve import read_protocol

PAIRS = ("vit_s:resnet18", "resnet32x4:resnet8x4")
SIZE = 32


class Shown(nn.Module):
    """A network whose output for the batch is known; other views, and stages called one by one, are computed."""

    def __init__(self, network: models.Network, output: Output):
        super().__init__()
        self.network = network
        self.classifier, self.classify, self.shapes = network.classifier, network.classify, network.shapes
        self.run_stage, self.run_tail, self.inseparable = network.run_stage, network.run_tail, network.inseparable
        self.output = output

    def forward(self, images: Tensor, show: Show = LOGITS) -> Output:
        known = len(images) == len(self.output.logits)
        return self.output if known else self.network(images, show)


def leaves(output: Output) -> Output:
    """The same numbers as the ends of a graph."""

    def leaf(tensor: Tensor) -> Tensor:
        return tensor.detach().clone().requires_grad_()

    features, before = (tuple(map(leaf, maps)) for maps in (output.features, output.preactivations))
    final = None if output.final is None else leaf(output.final)
    return Output(leaf(output.logits), leaf(output.embedding), features, before, final)


def batch_of(size: int, device: torch.device) -> Batch:
    """Random images with every view that a method may ask for."""
    images = torch.rand(size, 3, SIZE, SIZE, device=device).contiguous(memory_format=torch.channels_last)
    batch = Batch.of(images, torch.randint(CLASSES, (size,), device=device), CLASSES, progress=0.5)
    turned = torch.stack([images.rot90(turns, (2, 3)) for turns in range(4)], dim=1)
    return batch._replace(views={"weak": images, "strong": images, "rotations": turned})


def distillation(name: str, student: nn.Module, teacher: nn.Module, data: DataSpec, machine: Machine) -> Distillation:
    """Both networks under the method with its defaults, on the data's device."""
    precision = PRECISIONS[machine.precision]
    together = Distillation(student, teacher, registry.load(name)(), data=data, precision=precision)
    return together.to(data.labels.device).train()


def measure(pair: str, methods: list[str], size: int, rounds: int, machine: Machine) -> list[dict[str, object]]:
    """Rows of the table for one pair."""
    device = machine.device
    labels = torch.randint(CLASSES, (50_000,), device=device)
    data = DataSpec("random", CLASSES, tuple(map(str, range(CLASSES))), SIZE, labels)
    torch.manual_seed(0)
    teacher, student = (network(name, data) for name in pair.split(":"))
    batch = batch_of(size, device)

    step_of_kd = distillation("kd", student, teacher, data, machine)
    optimizer = Optimizer(step_of_kd, read_protocol("crd"))

    def step() -> None:
        terms = step_of_kd(batch)
        torch.stack(list(terms.values())).sum().backward()
        optimizer.set_rate(0.01)
        optimizer.step()

    works: dict[str, Work] = {"kd step": step}
    with torch.no_grad(), autocast(device.type, PRECISIONS[machine.precision]):
        seen, reference = student(batch.images, EVERYTHING), teacher(batch.images, EVERYTHING)
    for name in methods:
        shown = Shown(student, leaves(seen)), Shown(teacher, reference)
        try:
            together = distillation(name, *shown, data, machine)
            together.prepare([batch])
        except UserError as error:
            print(f"{name} is left out for {pair}: {error}")
            continue

        def loss(together: Distillation = together) -> None:
            torch.stack(list(together(batch).values())).sum().backward()

        works[name] = loss
    for work in works.values():
        work()  # warm-up
    repeats = {name: 1 if name == "kd step" else 3 for name in works}
    median = medians(take_turns(works, rounds, waiting(device), repeats))
    return [
        {
            "pair": pair.replace(":", " -> "),
            "method": name,
            "milliseconds": round(1000 * seconds, 2),
            "share_of_kd_step": round(seconds / median["kd step"], 3),
        }
        for name, seconds in median.items()
    ]


def main() -> None:
    """Parses, measures, prints and writes the table."""
    parser = arguments_of(__doc__)
    parser.add_argument("--methods", nargs="*", default=registry.names())
    parser.add_argument("--pairs", nargs="*", default=PAIRS)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    machine = this_machine()
    rows = [
        row for pair in given.pairs for row in measure(pair, given.methods, given.batch_size, given.rounds, machine)
    ]
    publish(pd.DataFrame(rows), file_of(given.results, f"losses-b{given.batch_size}", machine))


if __name__ == "__main__":
    main()
