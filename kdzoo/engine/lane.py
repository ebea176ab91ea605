"""A lane: one student trained by one method, beside others that share its teacher and its batches."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from kdzoo.config import Settings
from kdzoo.data import Loader
from kdzoo.distillation import Distillation
from kdzoo.distiller import Batch, Distiller, Output
from kdzoo.engine.average import Average
from kdzoo.engine.device import DTYPES, arithmetic, autocast
from kdzoo.engine.meter import Meter
from kdzoo.engine.optim import Optimizer, learning_rate
from kdzoo.engine.parallel import ALONE, Ranks
from kdzoo.engine.parts import micro_batches
from kdzoo.errors import UserError
from kdzoo.models import Network
from kdzoo.randomness import seed_of
from kdzoo.results.curves import Curves
from kdzoo.results.folder import RunFolder


class SharedTeacher(nn.Module):
    """The teacher of all lanes: whatever several of them show it in one step runs through it once.

    It runs without gradients, not in inference mode: losses multiply its outputs with the student's, and autograd
    refuses to keep an inference tensor for the backward pass.

    ``passes`` are what is remembered: images with their output, by the memory they lie in.
    """

    def __init__(self, network: Network):
        super().__init__()
        self.network = network
        self.passes: dict[tuple[Any, ...], tuple[Tensor, Output]] = {}

    @property
    def classifier(self) -> nn.Linear | None:
        """The network's own."""
        return self.network.classifier

    def classify(self, means: Tensor) -> Tensor:
        """The network's own."""
        return self.network.classify(means)

    def forward(self, images: Tensor) -> Output:
        """``network(images)``, remembered until ``forget``; passes that keep a graph are each lane's own."""
        if torch.is_grad_enabled():
            return self.network(images)
        key = images.data_ptr(), images.shape, images.stride(), images.dtype  # the same slice, whoever cut it
        if key not in self.passes:
            self.passes[key] = images, self.network(images)  # the images too, lest their memory be used again
        return self.passes[key][1]

    def forget(self) -> None:
        """To be called between steps."""
        self.passes.clear()


class Epochs:
    """The batches of training, for phases before it: each iteration is the next epoch, then the first again.

    With each batch the ``teacher`` forgets what it was shown before.
    """

    def __init__(self, loader: Loader, teacher: nn.Module | None):
        self.loader, self.teacher, self.start = loader, teacher, 0

    def __iter__(self) -> Iterator[Batch]:
        start = self.start % self.loader.total_steps
        self.start = start + self.loader.steps_per_epoch
        for batch in self.loader.batches(start, self.start):
            if isinstance(self.teacher, SharedTeacher):
                self.teacher.forget()
            yield batch


def titles(runs: Sequence[Settings]) -> list[str]:
    """Names that tell lanes apart: the method, the student where there are several, and keywords that differ."""
    several = len({run.student.name for run in runs}) > 1
    names = []
    for run in runs:
        alike = [other.distiller for other in runs if other.distiller["name"] == run.distiller["name"]]
        own = [f"{key}={value}" for key, value in run.distiller.items() if any(a[key] != value for a in alike)]
        names.append(" ".join([*([run.student.name] if several else []), run.distiller["name"], *own]))
    return names


class Trained(nn.Module):
    """What a lane trains and keeps: never the teacher."""

    def __init__(self, student: nn.Module, distiller: Distiller):
        super().__init__()
        self.student, self.distiller = student, distiller


@dataclass
class Lane:
    """All the state of one run in training. Every step is a function of that state, the seed and the step."""

    settings: Settings
    distillation: Distillation
    folder: RunFolder
    device: torch.device
    steps_per_epoch: int
    title: str = ""  # among the lanes beside it
    ranks: Ranks = ALONE

    def __post_init__(self) -> None:
        protocol = self.settings.protocol
        self.base_rate = protocol.lr_of.get(self.settings.student.name, protocol.lr)
        self.trained = Trained(self.distillation.student, self.distillation.distiller)
        self.whole = self.ranks.copy(self.trained)
        self.forward = self.ranks.wrap(self.distillation)
        dtype = DTYPES[self.settings.engine.precision]
        self.optimizer = Optimizer(self.distillation, protocol, dtype or torch.float32)
        self.meter = Meter(self.device)
        self.history: list[dict[str, Any]] = []
        self.seconds = 0.0  # spent on this run so far, over all its starts
        self.failure: UserError | None = None
        curves = self.settings.output.tensorboard and self.ranks.first
        self.curves = Curves(self.folder.path) if curves else None
        self.average = Average(self.trained, protocol.ema) if protocol.ema else None
        # What the host writes at the begin of a step and the device reads in it.
        self.number = torch.zeros((), device=self.device, dtype=torch.int64)
        self.share = torch.full((), 1 / self.settings.engine.accumulate, device=self.device)

    def rate(self, step: int) -> float:
        """The learning rate of a step."""
        return learning_rate(self.settings.protocol, self.base_rate, step, self.steps_per_epoch)

    def prepare(self, loader: Loader) -> None:
        """The method's phase before training."""
        torch.manual_seed(seed_of(self.settings.seed, "prepare"))
        with autocast(self.device, self.settings.engine.precision):
            self.distillation.prepare(Epochs(loader, self.distillation.teacher))
        self.ranks.align(self.trained)

    def step(self, batch: Batch, step: int) -> None:
        """One optimiser step on one batch. Randomness inside depends on seed and step alone."""
        self.begin(step)
        self.advance(batch)

    def begin(self, step: int) -> None:
        """The host's part of a step: its seed, its learning rate, its number."""
        torch.manual_seed(seed_of(self.settings.seed, "step", step, *self.ranks.names))
        self.optimizer.set_rate(self.rate(step))
        self.number.fill_(step)

    def advance(self, batch: Batch) -> None:
        """The device's part: a function of tensors that asks for no number, so that it can be a CUDA graph."""
        engine = self.settings.engine
        for part in micro_batches(batch, engine.accumulate):
            with autocast(self.device, engine.precision):
                terms = self.forward(part)
            if not terms:
                raise UserError(f"distiller '{self.settings.distiller['name']}' has no loss term: all weights are 0")
            with arithmetic(self.device, engine.precision):
                torch.stack(list(terms.values())).sum().backward(self.share)
            self.meter.add(self.ranks.mean(terms), self.number)
        self.optimizer.step()
        if self.average is not None:
            self.average.update(self.trained)

    @property
    def host_bound(self) -> str | None:
        """Why ``advance`` cannot be a CUDA graph, where that is known beforehand."""
        if self.settings.engine.checkpoint_activations:
            return "activation checkpointing keeps the generator's state on the host"
        return self.optimizer.host_bound

    def record(self, found: dict[str, Any]) -> None:
        """Writes an epoch down."""
        self.history.append(found)
        self.ranks.once(self.folder.write_history, self.history)
        if self.curves is not None:
            self.curves.write(self.history)
        self.meter.reset()

    def deployed(self) -> nn.Module:
        """What would ship now."""
        self.ranks.update(self.whole, self.trained)
        trained = self.whole if self.average is None else cast(Trained, self.average.module)
        return trained.distiller.deploy(trained.student)

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed run needs to go on with the same bits."""
        return {
            "trained": self.ranks.gathered(self.trained.state_dict()),
            "optimizer": self.ranks.gathered(self.optimizer.state_dict()),
            "average": None if self.average is None else self.average.state_dict(),
            "meter": self.meter.state_dict(),
            "history": self.history,
            "seconds": self.seconds,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what ``state_dict`` gave."""
        self.ranks.load(self.trained, state["trained"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.ranks.divide(self.optimizer.parts)
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        self.meter.load_state_dict(state["meter"])
        self.history = state["history"]
        self.seconds = state["seconds"]
