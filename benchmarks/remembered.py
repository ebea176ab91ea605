"""Measures what a teacher that is asked once for each image saves, beside a bare loop that asks it in each step.

    python benchmarks/remembered.py [--teacher vit_s] [--student resnet18] [--images 320] [--epochs 5] [--rounds 7]

Short trainings of ``kd`` on digits take turns in one process: a bare loop of the same tensor operations, the engine's
steps as they are where images are drawn anew, and its steps as they are where every epoch shows the same images, the
teacher's passes before the first of them included. No loop draws anything of the images here.
"""

from collections.abc import Callable

import pandas as pd
import torch
from measuring import (
    Group,
    Machine,
    arguments_of,
    file_of,
    medians,
    network,
    publish,
    take_turns,
    this_machine,
    waiting,
)
from torch.nn import functional as F

from kdzoo import models
from kdzoo.data import Dataset, open_dataset
from kdzoo.engine import remembered
from kdzoo.engine.graphs import Plain
from kdzoo.engine.progress import Progress
from kdzoo.engine.termination import Termination
from kdzoo.precision import PRECISIONS, autocast
from kdzoo.resolve import resolve
from kdzoo.settings import Run, Settings


class Still(Group):
    """A group whose images are never cropped or mirrored."""

    @staticmethod
    def _run(teacher: str, student: str, method: str, machine: Machine, batch_size: int | None, compile: str) -> Run:
        names = {"distiller": method, "student": student, "teacher": teacher}
        engine = {"device": str(machine.device), "precision": machine.precision, "compile": compile}
        given = {**{key: {"name": name} for key, name in names.items()}, "protocol": {"name": "crd"}, "engine": engine}
        return resolve(given, ["protocol.augmentation.crop=0", "protocol.augmentation.flip=false"])


def bare_training(settings: Settings, dataset: Dataset, teacher: models.Network, steps: int) -> Callable[[], None]:
    """The same tensor operations with nothing around them, for so many steps a call."""
    student = network(settings.student.name, dataset.spec).train()
    assert dataset.train_pixels is not None
    pixels, labels, device = dataset.train_pixels, dataset.spec.labels, dataset.device
    size = settings.protocol.batch_size
    optimizer = torch.optim.SGD(student.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4, fused=True)

    def train() -> None:
        for _ in range(steps):
            index = torch.randint(len(labels), (size,), device=device)
            images = pixels[index].permute(0, 3, 1, 2) / 255
            with autocast(device.type, PRECISIONS[settings.engine.precision]):
                with torch.no_grad():
                    reference = teacher(images).logits
                logits = student(images).logits
            hard = F.cross_entropy(logits, labels[index])
            hot = F.log_softmax(logits / 4, 1), F.log_softmax(reference / 4, 1)
            (0.1 * hard + 0.9 * 16 * F.kl_div(*hot, log_target=True, reduction="batchmean")).backward()
            optimizer.step()
            optimizer.zero_grad()

    return train


def main() -> None:
    """Parses, measures in turns, prints and writes the table."""
    parser = arguments_of(__doc__)
    parser.add_argument("--teacher", default="vit_s")
    parser.add_argument("--student", default="resnet18")
    parser.add_argument("--images", type=int, default=320)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=7)
    given = parser.parse_args()
    machine = this_machine()
    dataset = open_dataset("digits", limit=given.images, device=machine.device)
    group = Still(given.teacher, given.student, ["kd"], dataset, machine)
    steps = given.epochs * group.loader.steps_per_epoch

    def train(make: Callable[[], Plain | None]) -> None:
        kind = make()
        assert kind is not None, "the teacher is asked in each step"
        for step in range(steps):
            batch = kind.begin(group.batch(), step)
            for lane in group.lanes:
                kind.step(lane, batch, step)
            kind.end()

    with Progress(quiet=True) as progress, Termination() as termination:
        works: dict[str, Callable[[], object]] = {
            "bare": bare_training(group.runs[0].settings, dataset, group.teacher.network, steps),
            "asked in each step": lambda: train(lambda: group.plain),
            "asked once": lambda: train(
                lambda: remembered.steps(group.lanes, group.teacher, group.loader, progress, termination)
            ),
        }
        wait = waiting(machine.device)
        take_turns(works, 1, wait)  # warm-up
        measured = take_turns(works, given.rounds, wait)
    median, images = medians(measured), steps * group.batch_size
    table = pd.DataFrame(
        [
            {
                "loop": name,
                "images_per_second": round(images / median[name], 1),
                "lowest": round(images / max(seconds), 1),
                "highest": round(images / min(seconds), 1),
                "over_bare": round(median["bare"] / median[name], 3),
            }
            for name, seconds in measured.items()
        ]
    )
    what = f"remembered-kd-{given.teacher}-{given.student}-b{group.batch_size}-{given.epochs}epochs"
    publish(table, file_of(given.results, what, machine))


if __name__ == "__main__":
    main()
