"""Measures the engine against the usual loop and against a bare loop of the same tensor operations.

    python benchmarks/engine.py --data folder:data/cifar100 [--steps 30] [--rounds 7]

The three take turns in one process; the table shows medians and ratios, and goes to ``benchmarks/results/``.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path

import pandas as pd
import torch
from torch.nn import functional as F
from usual_loop import Pictures, train

from kdzoo import config, models
from kdzoo.data import Dataset
from kdzoo.distillation import ask
from kdzoo.engine.device import autocast, settle
from kdzoo.engine.lane import Lane, SharedTeacher
from kdzoo.engine.run import open_data
from kdzoo.engine.training import build
from kdzoo.results.folder import RunFolder


def engine_steps(settings: config.Settings, dataset: Dataset, teacher: models.Network) -> Iterator[None]:
    """The loop's own step on the loader's own batches."""
    shared = SharedTeacher(teacher)
    distillation = build(settings, dataset, shared).train()
    ask(teacher, "teacher", [distillation.distiller.needs])
    loader = dataset.loader(settings.protocol, seed=0)
    with tempfile.TemporaryDirectory() as folder:
        lane = Lane(
            settings,
            distillation,
            RunFolder(Path(folder)),
            dataset.spec.labels.device,
            loader.steps_per_epoch,
        )
        for step, batch in enumerate(loader.batches()):
            shared.forget()
            lane.step(batch, step)
            yield


def bare_steps(settings: config.Settings, dataset: Dataset, teacher: models.Network) -> Iterator[None]:
    """The same tensor operations with nothing around them."""
    student = build(settings, dataset, SharedTeacher(teacher)).student.train()
    assert dataset.train_pixels is not None
    pixels = dataset.train_pixels
    labels, device = dataset.spec.labels, dataset.spec.labels.device
    size, rows = settings.protocol.batch_size, torch.arange(32, device=device)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4, fused=True)
    while True:
        order = torch.randperm(len(labels), device=device)
        for start in range(0, len(labels) - size + 1, size):
            index = order[start : start + size]
            padded = F.pad(pixels[index], (0, 0, 4, 4, 4, 4))
            top, left = torch.randint(9, (2, size, 1), device=device)
            columns = torch.where(torch.rand(size, 1, device=device) < 0.5, rows, 31 - rows) + left
            here = torch.arange(size, device=device)[:, None, None]
            images = padded[here, (rows + top)[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2) / 255
            with autocast(device, settings.engine.precision):
                with torch.no_grad():
                    reference = teacher(images).logits
                logits = student(images).logits
            hard = F.cross_entropy(logits, labels[index])
            soft = F.kl_div(
                F.log_softmax(logits / 4, 1),
                F.log_softmax(reference / 4, 1),
                log_target=True,
                reduction="batchmean",
            )
            (0.1 * hard + 0.9 * 16 * soft).backward()
            optimizer.step()
            optimizer.zero_grad()
            yield


def speed(steps: Iterator[object], count: int, batch_size: int, wait: Callable[[], None]) -> float:
    """Images per second of the next ``count`` steps."""
    wait()
    begun = time.perf_counter()
    for _ in range(count):
        next(steps)
    wait()
    return count * batch_size / (time.perf_counter() - begun)


def main() -> None:
    """Parses, measures in turns, prints and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="cifar100")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--teacher", default="resnet32x4")
    parser.add_argument("--student", default="resnet8x4")
    arguments = parser.parse_args()
    settings = config.resolve(
        {
            "distiller": {"name": "kd"},
            "student": {"name": arguments.student},
            "teacher": {"name": arguments.teacher},
            "data": {"name": arguments.data},
            "protocol": {"name": "crd"},
        }
    )
    device = settle(settings.engine)
    dataset = open_data(settings, device)
    size = settings.protocol.batch_size

    def network(name: str) -> models.Network:
        return models.create(name, dataset.spec).to(device).to(memory_format=torch.channels_last)

    teacher = network(arguments.teacher).eval().requires_grad_(False)
    assert dataset.train_pixels is not None
    pictures = Pictures(
        dataset.train_pixels.cpu().numpy(),
        dataset.spec.labels.cpu().numpy(),
        dataset.spec.mean,
        dataset.spec.std,
    )
    plain = [models.create(name, dataset.spec).body for name in (arguments.teacher, arguments.student)]
    runners: dict[str, Iterator[object]] = {
        "usual": train(plain[0], plain[1], pictures, size),
        "bare": bare_steps(settings, dataset, teacher),
        "engine": engine_steps(settings, dataset, teacher),
    }
    wait = torch.cuda.synchronize if device.type == "cuda" else (lambda: None)
    for steps in runners.values():
        speed(steps, 5, size, wait)  # warm-up
    measured: dict[str, list[float]] = {name: [] for name in runners}
    for _ in range(arguments.rounds):
        for name, steps in runners.items():
            measured[name].append(speed(steps, arguments.steps, size, wait))
    medians = {name: statistics.median(values) for name, values in measured.items()}
    table = pd.DataFrame(
        [
            {
                "loop": name,
                "images_per_second": round(medians[name], 1),
                "lowest": round(min(values), 1),
                "highest": round(max(values), 1),
                "over_usual": round(medians[name] / medians["usual"], 3),
                "over_bare": round(medians[name] / medians["bare"], 3),
            }
            for name, values in measured.items()
        ]
    )
    conditions = f"{device.type}-{torch.get_num_threads()}threads-{settings.engine.precision}-torch{torch.__version__}"
    title = f"engine-kd-{arguments.teacher}-{arguments.student}-b{size}-{conditions}-{date.today()}".replace("+", "_")
    file = Path(__file__).parent / "results" / f"{title}.csv"
    table.to_csv(file, index=False)
    print(table.to_string(index=False), f"\n{file}")


if __name__ == "__main__":
    main()
