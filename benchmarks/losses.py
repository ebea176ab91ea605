"""Measures what each method's loss costs, forward and backward, as a share of a whole step of plain ``kd``.

    python benchmarks/losses.py [--methods uhkd lfcc ...] [--pairs vit_s:resnet18 ...] [--rounds 5]

Networks are of random weights at CIFAR-100's size; the loss runs on outputs that were computed before. Methods and
the ``kd`` step take turns; the table shows medians in milliseconds, and goes to ``benchmarks/results/``.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor, nn

from kdzoo import Batch, DataSpec, Distillation, Distiller, Needs, Output, models, registry
from kdzoo.config import EngineSettings, protocol
from kdzoo.distillation import ask
from kdzoo.engine.device import autocast, settle
from kdzoo.engine.optim import Optimizer
from kdzoo.errors import UserError

PAIRS = ("vit_s:resnet18", "resnet32x4:resnet8x4")
CLASSES, SIZE = 100, 32


class Shown(nn.Module):
    """A network whose output is known."""

    def __init__(self, network: models.Network, output: Output):
        super().__init__()
        self.classifier, self.classify, self.output = network.classifier, network.classify, output

    def forward(self, images: Tensor) -> Output:
        return self.output


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


def timed(work: Callable[[], None], wait: Callable[[], None], repeats: int) -> float:
    """Milliseconds of one call."""
    wait()
    begun = time.perf_counter()
    for _ in range(repeats):
        work()
    wait()
    return 1000 * (time.perf_counter() - begun) / repeats


def build(name: str, student: models.Network, teacher: models.Network, data: DataSpec) -> Distiller:
    """The method with its defaults, on the data's device."""
    distiller = registry.load(name)(student.shapes(), teacher.shapes(), data)
    return distiller.to(data.labels.device).train()


def measure(pair: str, methods: list[str], size: int, rounds: int, engine: EngineSettings) -> list[dict[str, object]]:
    """Rows of the table for one pair."""
    device = settle(engine)
    wait = torch.cuda.synchronize if device.type == "cuda" else (lambda: None)
    labels = torch.randint(CLASSES, (50_000,), device=device)
    data = DataSpec("random", CLASSES, tuple(map(str, range(CLASSES))), SIZE, labels)
    torch.manual_seed(0)
    teacher, student = (
        models.create(name, data).to(device).to(memory_format=torch.channels_last) for name in pair.split(":")
    )
    batch = batch_of(size, device)

    step_of_kd = Distillation(student, teacher, build("kd", student, teacher, data)).train()
    optimizer = Optimizer(step_of_kd, protocol("crd"))

    def step() -> None:
        with autocast(device, engine.precision):
            terms = step_of_kd(batch)
        torch.stack(list(terms.values())).sum().backward()
        optimizer.step(0.01)

    works: dict[str, Callable[[], None]] = {"kd step": step}
    everything = [Needs(preactivations=("student", "teacher"), final=True)]
    ask(student, "student", everything)
    ask(teacher, "teacher", everything)
    with torch.no_grad(), autocast(device, engine.precision):
        seen, reference = student(batch.images), teacher(batch.images)
    ask(student, "student", [step_of_kd.distiller.needs])
    ask(teacher, "teacher", [step_of_kd.distiller.needs])
    for name in methods:
        shown = Shown(student, leaves(seen)), Shown(teacher, reference)
        try:
            together = Distillation(shown[0], shown[1], build(name, student, teacher, data)).train()
            together.prepare([batch])
        except UserError as error:
            print(f"{name} is left out for {pair}: {error}")
            continue

        def loss(together: Distillation = together) -> None:
            torch.stack(list(together(batch).values())).sum().backward()

        works[name] = loss
    for work in works.values():
        timed(work, wait, 1)  # warm-up
    measured: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(rounds):
        for name, work in works.items():
            measured[name].append(timed(work, wait, 1 if name == "kd step" else 3))
    whole = statistics.median(measured["kd step"])
    return [
        {
            "pair": pair.replace(":", " -> "),
            "method": name,
            "milliseconds": round(statistics.median(times), 2),
            "share_of_kd_step": round(statistics.median(times) / whole, 3),
        }
        for name, times in measured.items()
    ]


def main() -> None:
    """Parses, measures, prints and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="*", default=registry.names())
    parser.add_argument("--pairs", nargs="*", default=PAIRS)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    engine = EngineSettings()
    rows = [
        row
        for pair in arguments.pairs
        for row in measure(pair, arguments.methods, arguments.batch_size, arguments.rounds, engine)
    ]
    table = pd.DataFrame(rows)
    kind = engine.device.replace(":", "")
    conditions = f"{kind}-{torch.get_num_threads()}threads-{engine.precision}-torch{torch.__version__}"
    title = f"losses-b{arguments.batch_size}-{conditions}-{date.today()}".replace("+", "_")
    file = Path(__file__).parent / "results" / f"{title}.csv"
    table.to_csv(file, index=False)
    print(table.to_string(index=False), f"\n{file}")


if __name__ == "__main__":
    main()
