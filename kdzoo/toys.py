"""Toy networks and batches for the conformance suite, small enough to check a method in seconds."""

import copy
from collections.abc import Callable, Mapping
from functools import cache, partial
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kdzoo.distillation import Distillation
from kdzoo.distiller import Batch, DataSpec, Distiller
from kdzoo.outputs import EVERYTHING, LOGITS, Output, Show, StageOutput
from kdzoo.randomness import seed_torch

Terms = Mapping[str, Tensor]


class Shape(NamedTuple):
    """The shape of a toy network: widths and grids of its four stages."""

    widths: tuple[int, int, int, int]
    grids: tuple[tuple[int, int], ...] = ((8, 8), (4, 4), (2, 2), (1, 1))
    tokens: bool = False  # features lie in memory as (B, H, W, C), as a transformer leaves them


STUDENT, TEACHER = Shape((6, 8, 8, 12)), Shape((8, 12, 16, 20))
FINE, ODD, DOTS, PLAIN = ((16, 16), (8, 8), (4, 4), (2, 2)), ((7, 5),) * 4, ((1, 1),) * 4, ((4, 4),) * 4
RATE = 0.03  # of learning, at first
COLOURS = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * 3).flip(1)[
    :, :, None, None
]  # black, red, green, yellow ...
PAIRS = {
    "the same shapes": (STUDENT, STUDENT),
    "other widths": (STUDENT, TEACHER),
    "a narrower teacher": (TEACHER, STUDENT),
    "a finer teacher": (STUDENT, TEACHER._replace(grids=FINE)),
    "a coarser teacher": (STUDENT._replace(grids=FINE), TEACHER),
    "7x5 maps": (STUDENT._replace(grids=ODD), TEACHER._replace(grids=ODD)),
    "7x5 maps under tokens": (STUDENT._replace(grids=ODD), Shape((20,) * 4, PLAIN, tokens=True)),
    "1x1 maps": (STUDENT._replace(grids=DOTS), TEACHER._replace(grids=DOTS)),
    "a pyramid under tokens": (STUDENT, Shape((20,) * 4, PLAIN, tokens=True)),
    "tokens under a pyramid": (Shape((12,) * 4, PLAIN, tokens=True), TEACHER),
}


class ToyNetwork(nn.Module):
    """The base class of toy networks: reports output shapes and has a linear classifier."""

    classifier: nn.Linear | None

    def shapes(self) -> Output:
        """Return the outputs for one image on the meta device."""
        with torch.no_grad():
            return to_meta(copy.deepcopy(self).eval()(torch.zeros(1, 3, 8, 8), EVERYTHING))

    def classify(self, means: Tensor) -> Tensor:
        """Compute logits (M, K) of embeddings (M, D); K is 0 without a classifier."""
        return means[:, :0] if self.classifier is None else self.classifier(means)


class Toy(ToyNetwork):
    """A small convolutional network with the interface of those in ``kdzoo.models``."""

    def __init__(self, shape: Shape, classes: int = 4):
        super().__init__()
        self.shape = shape
        self.stages = nn.ModuleList(
            nn.Sequential(nn.Conv2d(fan_in, fan_out, 3, padding=1), nn.BatchNorm2d(fan_out))
            for fan_in, fan_out in pairwise((3, *shape.widths))
        )
        self.classifier = nn.Linear(shape.widths[-1], classes) if classes else None

    def forward(self, images: Tensor, show: Show = LOGITS) -> Output:
        x, features, preactivations = images, [], []
        for stage, grid in zip(self.stages, self.shape.grids, strict=True):
            before = stage(x)
            x = self.in_memory_layout(F.adaptive_avg_pool2d(F.gelu(before), grid))
            features.append(x)
            if show.preactivations:
                preactivations.append(self.in_memory_layout(F.adaptive_avg_pool2d(before, grid)))
        embedding = x.mean((2, 3))
        return Output(self.classify(embedding), embedding, tuple(features), tuple(preactivations), x).only(show)

    def run_stage(self, number: int, maps: Tensor, prefix: Tensor | None = None) -> StageOutput:
        pooled = F.adaptive_avg_pool2d(F.gelu(self.stages[number](maps)), self.shape.grids[number])
        return StageOutput(self.in_memory_layout(pooled).float())

    def run_tail(self, maps: Tensor, prefix: Tensor | None = None) -> Output:
        embedding = maps.mean((2, 3))
        return Output(self.classify(embedding), embedding).float()

    def in_memory_layout(self, maps: Tensor) -> Tensor:
        return maps.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2) if self.shape.tokens else maps


class Replay(ToyNetwork):
    """A network that returns stored outputs for any images, and collects their gradients."""

    def __init__(self, shape: Shape, make: Callable[..., Tensor], scale: float):
        super().__init__()
        features = [make(4, width, *grid) for width, grid in zip(shape.widths, shape.grids, strict=True)]
        self.rows = nn.ParameterList([make(4, 4) * scale, *features])
        self.classifier = nn.Linear(shape.widths[-1], 4)

    def forward(self, images: Tensor, show: Show = LOGITS) -> Output:
        picks = torch.arange(len(images)) % 4
        logits, *maps = (rows[picks] for rows in self.rows)
        return Output(logits, maps[-1].mean((2, 3)), tuple(maps), tuple(maps), maps[-1]).only(show)

    def run_stage(self, number: int, maps: Tensor, prefix: Tensor | None = None) -> StageOutput:
        return StageOutput(self(maps, EVERYTHING).features[number])

    def run_tail(self, maps: Tensor, prefix: Tensor | None = None) -> Output:
        return self(maps)


class Absent(ToyNetwork):
    """The teacher of a method that needs none: calling it is an error."""

    def forward(self, images: Tensor, show: Show = LOGITS) -> Output:
        raise RuntimeError("it asks a teacher; its needs say that there is none")


def distillation(
    distiller: type[Distiller],
    keywords: Mapping[str, Any] = {},
    *,
    student: ToyNetwork | None = None,
    teacher: ToyNetwork | None = None,
    seed: int = 0,
    classes: int = 4,
    prepared: bool = True,
    labelled: bool = True,
) -> Distillation:
    """Make a seeded pair of toy networks and a method, ready to train; with 0 classes neither has a classifier."""
    seed_torch(seed)
    student, teacher = student or Toy(STUDENT, classes), teacher or Toy(TEACHER, classes)
    together = Distillation(student, teacher, distiller(**keywords), data=data(classes), labelled=labelled).train()
    if prepared:
        batches = (batch_of(seed, classes=classes) for seed in (101, 102))
        together.prepare([batch if labelled else without_labels(batch) for batch in batches])
    seed_torch(seed)
    return together


def data(classes: int = 4) -> DataSpec:
    """Describe the toy data set; beside networks without a classifier it has four classes all the same."""
    names = tuple(f"class {k}" for k in range(classes or 4))
    labels = torch.arange(max(64, 2 * classes)) % len(names)
    return DataSpec("toy", classes, names, 8, labels, superclasses=tuple(k // 2 for k in range(len(names))))


def without_labels(batch: Batch) -> Batch:
    """Take a batch's labels and targets away."""
    return batch._replace(labels=None, targets=None)  # type: ignore[arg-type]  # absent


def batch_of(seed: int = 1, size: int = 4, classes: int = 4, progress: float = 0.5, mixed: bool = False) -> Batch:
    """Make a batch whose classes differ in colour, with all views."""
    random = torch.Generator().manual_seed(seed)
    labels, classes = data(classes).labels, classes or 4
    index = torch.randperm(len(labels), generator=random)[:size]
    labels = labels[index]
    images = 0.7 * COLOURS[labels % len(COLOURS)] + 0.3 * torch.rand(size, 3, 8, 8, generator=random)
    targets, partner = F.one_hot(labels, classes).float(), None
    if mixed:
        partner = torch.arange(size).flip(0)
        images = 0.7 * images + 0.3 * images[partner]
        targets = 0.9 * (0.7 * targets + 0.3 * targets[partner]) + 0.1 / classes
    turned = torch.stack([images.rot90(turns, (2, 3)) for turns in range(4)], 1)
    views = {"weak": images.flip(3), "strong": images * 0.8, "rotations": turned}
    return Batch(images, labels, targets, index, torch.tensor(progress), views, partner)


def twice(batch: Batch) -> Batch:
    """Let each image stand twice in a batch that is not mixed."""
    rows = torch.arange(len(batch.images)).repeat(2)
    return batch._replace(
        images=batch.images[rows],
        labels=batch.labels[rows],
        targets=batch.targets[rows],
        index=batch.index[rows],
        views={name: view[rows] for name, view in batch.views.items()},
    )


def to_meta(value: Any) -> Any:
    """Move the tensors of nested tuples and dicts to the meta device."""
    if isinstance(value, dict):
        return {key: to_meta(item) for key, item in value.items()}
    if isinstance(value, tuple):
        items = [to_meta(item) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    return value.to("meta") if isinstance(value, Tensor) else value


def seeded(together: Callable[[Batch], dict[str, Tensor]], seed: int, size: int = 4) -> dict[str, Tensor]:
    """Compute the terms of a batch after seeding both, at the share ``seed / 10`` of training."""
    seed_torch(seed)
    return together(batch_of(seed, size, progress=seed / 10))


def total(terms: Terms) -> Tensor:
    """Sum all terms."""
    return torch.stack(list(terms.values())).sum()


def trained(together: Distillation) -> list[nn.Parameter]:
    """List the parameters that are trained."""
    return [p for p in together.parameters() if p.requires_grad]


def gradients(together: nn.Module) -> list[Tensor]:
    """List the gradients that exist."""
    return [p.grad for p in together.parameters() if p.grad is not None]


def train(together: Distillation, steps: int, size: int = 4, seed: int = 0) -> None:
    """Train with Adam and a learning rate that falls linearly to 0.

    The fall keeps the result from depending on the last steps.
    """
    optimizer = torch.optim.Adam(trained(together), lr=RATE, fused=True)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = RATE * (1 - step / steps)
        optimizer.zero_grad()
        total(together(batch_of(seed=seed + step, size=size, progress=step / steps))).backward()
        optimizer.step()


@cache
def taught() -> Toy:
    """Train a toy teacher once."""
    seed_torch(7)
    teacher = Toy(TEACHER)
    optimizer = torch.optim.Adam(teacher.parameters(), lr=0.01)
    for seed in range(60):
        batch = batch_of(seed, size=16)
        optimizer.zero_grad()
        F.cross_entropy(teacher(batch.images).logits, batch.labels).backward()
        optimizer.step()
    return teacher.eval()


def class_of(distiller: Any) -> type[Distiller]:
    """Return the class behind a ``functools.partial``."""
    return class_of(distiller.func) if isinstance(distiller, partial) else distiller


def toy_settings(distiller: Any) -> dict[str, Any]:
    """Read the settings with which a method says that it learns on toys, but for those that a ``partial`` gives."""
    own, given = getattr(class_of(distiller), "toy_settings", {}), getattr(distiller, "keywords", {})
    return {name: value for name, value in own.items() if name not in given}
