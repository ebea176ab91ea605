"""Measures what a group of lanes costs against the same runs one by one.

    python benchmarks/lanes.py [--pairs resnet32x4:resnet8x4 vit_s:resnet18@16] [--rounds 3] [--steps 5]

The group shares one teacher pass and one batch; single runs pay for both each time. Both take turns in one process.
The bound is what sharing could save at best: one teacher pass and one batch for all, and each lane's own work.
Networks have random weights; images are random, of the size after ``@`` (else 32 pixels), of 100 classes.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from kdzoo import DataSpec, config, models
from kdzoo.data import Dataset
from kdzoo.data.sources import Pixels
from kdzoo.distillation import ask
from kdzoo.engine.device import autocast, settle
from kdzoo.engine.lane import Lane, SharedTeacher
from kdzoo.engine.training import build
from kdzoo.results.folder import RunFolder

METHODS = ("kd", "logitmse", "figkd", "dkd", "dist", "lskd", "nkd", "rsd")
PAIRS = ("resnet32x4:resnet8x4", "vit_s:resnet18@16")


def random_set(size: int, device: torch.device) -> Dataset:
    """Noise with labels."""
    draw = np.random.default_rng(0)
    pixels = Pixels(draw.integers(256, size=(5000, size, size, 3), dtype=np.uint8), np.arange(5000) % 100)
    spec = DataSpec("noise", 100, tuple(map(str, range(100))), size, torch.from_numpy(pixels.labels).to(device))
    return Dataset(spec, pixels, pixels, fits=True)


def timed(work: Callable[[], None], wait: Callable[[], None]) -> float:
    """Seconds of one call."""
    wait()
    begun = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - begun


def measure(pair: str, methods: list[str], steps: int, rounds: int) -> dict[str, object]:
    """One row of the table."""
    names, _, size = pair.partition("@")
    teacher_name, student_name = names.split(":")
    engine = config.EngineSettings()
    device = settle(engine)
    wait = torch.cuda.synchronize if device.type == "cuda" else (lambda: None)
    dataset = random_set(int(size or 32), device)
    network = models.create(teacher_name, dataset.spec).to(device).to(memory_format=torch.channels_last)
    network.eval().requires_grad_(False)
    shared = SharedTeacher(network)
    with tempfile.TemporaryDirectory() as folder:
        lanes = []
        for method in methods:
            settings = config.resolve(
                {
                    "distiller": {"name": method},
                    "student": {"name": student_name},
                    "teacher": {"name": teacher_name},
                    "protocol": {"name": "crd"},
                }
            )
            settings.engine = engine
            distillation = build(settings, dataset, shared).train()
            lanes.append(Lane(settings, distillation, RunFolder(Path(folder)), device, 78))
        ask(network, "teacher", [lane.distillation.distiller.needs for lane in lanes])
        loader = dataset.loader(lanes[0].settings.protocol, seed=0)
        batches = loader.batches()

        def group() -> None:
            for step in range(steps):
                shared.forget()
                batch = next(batches)
                for lane in lanes:
                    lane.step(batch, step)

        def one_by_one() -> None:
            for lane in lanes:
                for step in range(steps):
                    shared.forget()
                    lane.step(next(batches), step)

        def teacher_alone() -> None:
            for _ in range(steps):
                batch = next(batches)
                with torch.no_grad(), autocast(device, engine.precision):
                    network(batch.images)

        works = {"group": group, "one_by_one": one_by_one, "teacher_and_batch": teacher_alone}
        for work in works.values():
            work()  # warm-up
        measured: dict[str, list[float]] = {name: [] for name in works}
        for _ in range(rounds):
            for name, work in works.items():
                measured[name].append(timed(work, wait) / steps)
    median = {name: statistics.median(times) for name, times in measured.items()}
    common = median["teacher_and_batch"]
    bound = common + median["one_by_one"] - len(methods) * common
    return {
        "pair": pair.replace(":", " -> "),
        "lanes": len(methods),
        "group_ms": round(1000 * median["group"], 1),
        "one_by_one_ms": round(1000 * median["one_by_one"], 1),
        "teacher_and_batch_ms": round(1000 * common, 1),
        "share": round(median["group"] / median["one_by_one"], 3),
        "bound": round(bound / median["one_by_one"], 3),
        "over_bound": round(median["group"] / bound, 3),
    }


def main() -> None:
    """Parses, measures, prints and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", nargs="*", default=PAIRS)
    parser.add_argument("--methods", nargs="*", default=METHODS)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    rows = [measure(pair, list(arguments.methods), arguments.steps, arguments.rounds) for pair in arguments.pairs]
    table = pd.DataFrame(rows)
    engine = config.EngineSettings()
    kind = settle(engine).type
    conditions = f"{kind}-{torch.get_num_threads()}threads-{engine.precision}-torch{torch.__version__}"
    title = f"lanes-b64-{conditions}-{date.today()}".replace("+", "_")
    file = Path(__file__).parent / "results" / f"{title}.csv"
    table.to_csv(file, index=False)
    print(table.to_string(index=False), f"\n{file}")


if __name__ == "__main__":
    main()
