"""Measures the engine against the usual loop and against a bare loop of the same tensor operations.

    python benchmarks/engine.py --data folder:data/cifar100 [--steps 30] [--rounds 7] [--compile auto]

The three take turns in one process; the table shows medians and ratios, and goes to ``benchmarks/results/``. After
that the usual loop and then the engine run once more, for the milliseconds of each part of a step; the usual loop
computes its loss in no separate part, and its loader's workers take their time beside all parts. The bare loop's
teacher is the plain network; the parts of compiled passes are in the rest.
"""

from collections.abc import Iterator

import pandas as pd
import torch
from measuring import (
    Group,
    Mark,
    arguments_of,
    by_part,
    compiling,
    file_of,
    medians,
    network,
    parts_of,
    publish,
    take_turns,
    this_machine,
    waiting,
)
from torch.nn import functional as F
from torch.utils.data.dataloader import _BaseDataLoaderIter
from usual_loop import Pictures, train

from kdzoo import models
from kdzoo.data import Dataset, open_dataset
from kdzoo.precision import PRECISIONS, autocast
from kdzoo.settings import Settings


def bare_steps(settings: Settings, dataset: Dataset, teacher: models.Network) -> Iterator[None]:
    """The same tensor operations with nothing around them."""
    student = network(settings.student.name, dataset.spec).train()
    assert dataset.train_pixels is not None
    pixels = dataset.train_pixels
    labels, device = dataset.spec.labels, dataset.device
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
            with autocast(device.type, PRECISIONS[settings.engine.precision]):
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


def main() -> None:
    """Parses, measures in turns, prints and writes the table."""
    parser = arguments_of(__doc__)
    parser.add_argument("--data", default="cifar100")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--teacher", default="resnet32x4")
    parser.add_argument("--student", default="resnet8x4")
    parser.add_argument("--compile", choices=("off", "auto", "on"), default="off", help="the engine's; default: off")
    given = parser.parse_args()
    machine = this_machine()
    device = machine.device
    dataset = open_dataset(given.data, device=device)
    group = Group(given.teacher, given.student, ["kd"], dataset, machine, compile=given.compile)
    assert dataset.train_pixels is not None
    pictures = Pictures(
        dataset.train_pixels.cpu().numpy(),
        dataset.spec.labels.cpu().numpy(),
        dataset.spec.mean,
        dataset.spec.std,
    )
    plain = [models.create(name, dataset.spec).body for name in (given.teacher, given.student)]
    usual = train(plain[0], plain[1], pictures, group.batch_size)
    bare = bare_steps(group.runs[0].settings, dataset, group.teacher.network)
    loops = {"usual": lambda: next(usual), "bare": lambda: next(bare), "engine": group.step}
    wait = waiting(device)
    take_turns(loops, 5, wait)  # warm-up
    measured = take_turns(loops, given.rounds, wait, dict.fromkeys(loops, given.steps))
    median = medians(measured)
    marks: dict[str, list[Mark]] = {
        "usual": [
            ("data", _BaseDataLoaderIter, "__next__"),
            ("teacher", plain[0], "forward"),
            ("student", plain[1], "forward"),
            ("backward", torch.Tensor, "backward"),
            ("optimiser", torch.optim.SGD, "step"),
        ],
        "engine": parts_of(group),
    }
    parts = {name: by_part(loops[name], where, wait, given.steps) for name, where in marks.items()}
    table = pd.DataFrame(
        [
            {
                "loop": name,
                "images_per_second": round(group.batch_size / median[name], 1),
                "lowest": round(group.batch_size / max(seconds), 1),
                "highest": round(group.batch_size / min(seconds), 1),
                "over_usual": round(median["usual"] / median[name], 3),
                "over_bare": round(median["bare"] / median[name], 3),
                **{f"{part}_ms": round(1000 * spent, 1) for part, spent in parts.get(name, {}).items()},
            }
            for name, seconds in measured.items()
        ]
    )
    title = compiling(f"engine-kd-{given.teacher}-{given.student}-b{group.batch_size}", given.compile)
    publish(table, file_of(given.results, title, machine))


if __name__ == "__main__":
    main()
