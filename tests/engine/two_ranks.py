"""A program for the tests: trains methods side by side in as many processes as it is told, or in one.

What each process holds in the end lies in OUT as ``held-RANK.pt``, by method.
"""

import sys
from pathlib import Path

import torch
from torch import nn

from kdzoo.engine import ranks as processes
from kdzoo.engine import training
from kdzoo.engine.device import resolve_auto, use
from kdzoo.engine.progress import Progress
from kdzoo.errors import UserError
from kdzoo.experiments.run import open_data
from kdzoo.experiments.teachers import obtain
from kdzoo.resolve import resolve
from kdzoo.settings import Run

SETTINGS = [
    "data.name=bands",
    "data.options={train: 16, test: 4, classes: 8, size: 24}",
    "student.name=two_ranks:small",
    "teacher.name=two_ranks:small",
    "teacher.epochs=1",
    "teacher.allow_weak=true",
    "protocol.name=crd",
    "protocol.epochs=2",
    "protocol.batch_size=32",
    "protocol.augmentation={crop: 4, flip: true, mixup: 0.2}",
    "data.workers=0",
    "engine.device=cpu",
    "engine.precision=float32",
    "engine.threads=1",
]


class Small(nn.Sequential):
    """Four convolutions with layer norms, for no batch norm sees the whole batch where it is shared."""

    def __init__(self, num_classes: int):
        stages = [
            nn.Sequential(nn.Conv2d(fan_in, fan_out, 3, 2, 1), nn.GroupNorm(1, fan_out), nn.GELU())
            for fan_in, fan_out in ((3, 8), (8, 12), (12, 16), (16, 24))
        ]
        super().__init__(*stages, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, num_classes))


def small(num_classes: int) -> nn.Module:
    return Small(num_classes)


def settings(out: Path, method: str, devices: int = 1, *more: str) -> Run:
    """The method may bring its keywords: ``crd:negatives=4,width=8``."""
    name, _, keywords = method.partition(":")
    given = [f"distiller.name={name}", *(f"distiller.{keyword}" for keyword in keywords.split(",") if keyword)]
    return resolve({"output": {"root": str(out)}}, [*SETTINGS, *given, f"engine.devices={devices}", *more])


def train(first: Run, methods: list[str], out: Path, more: list[str]) -> None:
    """Trains all methods as lanes of one group, on this process's share of each batch."""
    with processes.joined(first) as ranks:
        device = ranks.device(use(first.place))
        runs = [settings(out, method, first.settings.engine.devices, *more) for method in methods]
        with ranks.in_turn():
            dataset = open_data(first, device, Progress(quiet=True))
            teacher = obtain(first, dataset, Progress(quiet=True))

        def held() -> dict[str, dict[str, torch.Tensor]]:
            found, finish = {}, training.finish

            def finish_and_tell(lane, *given):
                found[lane.run.settings.distiller.name] = lane.trained.state_dict()
                return finish(lane, *given)

            training.finish = finish_and_tell
            for outcome in training.train_lanes(runs, dataset, teacher, Progress(quiet=True), ranks):
                if isinstance(outcome, UserError):
                    raise outcome
            training.finish = finish
            return found

        torch.save(held(), out / f"held-{ranks.rank}.pt")
    if "lightning_fabric" in sys.modules:
        (out / "with-fabric").touch()


if __name__ == "__main__":
    out, devices, *methods = sys.argv[1:]
    more = [method for method in methods if method.startswith("engine.")]
    methods = [method for method in methods if method not in more]
    first = settings(Path(out), methods[0], int(devices), *more)
    first = processes.check(resolve_auto(first))
    if processes.to_start(first):
        processes.start(train, first, methods, Path(out), more)
    else:
        train(first, methods, Path(out), more)
