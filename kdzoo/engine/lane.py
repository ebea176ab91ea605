"""A lane: one student trained by one method, beside others that share its teacher and its batches."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from kdzoo.config import Settings
from kdzoo.data import Loader
from kdzoo.distillation import Distillation
from kdzoo.distiller import Batch, Distiller, Output
from kdzoo.engine.device import autocast
from kdzoo.engine.optim import Optimizer, learning_rate
from kdzoo.engine.parallel import ALONE, Ranks
from kdzoo.errors import UserError
from kdzoo.models import Network
from kdzoo.randomness import seed_of
from kdzoo.results.curves import Curves
from kdzoo.results.folder import RunFolder

_NEVER = 2**62


class SharedTeacher(nn.Module):
    """The teacher of all lanes: whatever several of them show it in one step runs through it once."""

    def __init__(self, network: Network):
        super().__init__()
        self.network = network
        self._passes: dict[int, tuple[Tensor, Output]] = {}

    @property
    def classifier(self) -> nn.Linear | None:
        """The network's own."""
        return self.network.classifier

    def forward(self, images: Tensor) -> Output:
        """``network(images)``, remembered until ``forget``; passes that keep a graph are each lane's own."""
        if torch.is_grad_enabled():
            return self.network(images)
        if id(images) not in self._passes:
            self._passes[id(images)] = images, self.network(images)
        return self._passes[id(images)][1]

    def forget(self) -> None:
        """To be called between steps."""
        self._passes.clear()


class Epochs:
    """The batches of training, for phases before it: each iteration is the next epoch, then the first again."""

    def __init__(self, loader: Loader):
        self.loader, self.start = loader, 0

    def __iter__(self) -> Iterator[Batch]:
        start = self.start % self.loader.total_steps
        self.start = start + self.loader.steps_per_epoch
        return self.loader.batches(start, start + self.loader.steps_per_epoch)


class Meter:
    """Means of the loss terms over an epoch, summed on the device and read only when asked."""

    def __init__(self, device: torch.device):
        self.device = device
        self.reset()

    def reset(self) -> None:
        self.steps = 0
        self.sums: dict[str, Tensor] = {}
        self.first_bad: dict[str, Tensor] = {}

    def add(self, terms: dict[str, Tensor], step: int) -> None:
        """Takes one step's terms without waiting for the device."""
        self.steps += 1
        for name, term in terms.items():
            if name not in self.sums:
                self.sums[name] = torch.zeros((), device=self.device)
                self.first_bad[name] = torch.full((), _NEVER, device=self.device, dtype=torch.int64)
            term = term.detach()
            bad = self.first_bad[name]
            self.sums[name] += term
            self.first_bad[name] = torch.where(term.isfinite(), bad, bad.clamp(max=step))

    def read(self) -> dict[str, float]:
        """The means so far.

        Raises:
            UserError: a term was not finite; says which and when.
        """
        bad = {name: int(step) for name, step in self.first_bad.items() if int(step) != _NEVER}
        if bad:
            name = min(bad, key=lambda key: bad[key])
            raise UserError(
                f"the loss term '{name}' is not finite at step {bad[name]}; the last good checkpoint is kept: "
                "lower protocol.lr or the term's weight, or set protocol.clip"
            )
        return {name: float(total) / self.steps for name, total in self.sums.items()}

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps, "sums": self.sums, "first_bad": self.first_bad}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps = state["steps"]
        self.sums = {name: value.to(self.device) for name, value in state["sums"].items()}
        self.first_bad = {name: value.to(self.device) for name, value in state["first_bad"].items()}


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
    ranks: Ranks = ALONE

    def __post_init__(self) -> None:
        protocol = self.settings.protocol
        self.base_rate = protocol.lr_of.get(self.settings.student.name, protocol.lr)
        self.trained = Trained(self.distillation.student, self.distillation.distiller)
        self.whole = self.ranks.copy(self.trained)
        self.forward = self.ranks.wrap(self.distillation)
        self.optimizer = Optimizer(self.distillation, protocol)
        self.meter = Meter(self.device)
        self.history: list[dict[str, Any]] = []
        self.seconds = 0.0  # spent on this run so far, over all its starts
        self.failure: UserError | None = None
        curves = self.settings.output.tensorboard and self.ranks.first
        self.curves = Curves(self.folder.path) if curves else None
        self.average = (
            AveragedModel(self.trained, multi_avg_fn=get_ema_multi_avg_fn(protocol.ema), use_buffers=True)
            if protocol.ema
            else None
        )

    @property
    def title(self) -> str:
        """The method with its settings, to tell lanes apart."""
        name, *keywords = self.settings.distiller.items()
        return " ".join([str(name[1]), *(f"{key}={value}" for key, value in keywords)])

    def rate(self, step: int) -> float:
        """The learning rate of a step."""
        return learning_rate(self.settings.protocol, self.base_rate, step, self.steps_per_epoch)

    def prepare(self, loader: Loader) -> None:
        """The method's phase before training."""
        torch.manual_seed(seed_of(self.settings.seed, "prepare"))
        with autocast(self.device, self.settings.engine.precision):
            self.distillation.prepare(Epochs(loader))
        self.ranks.align(self.trained)

    def step(self, batch: Batch, step: int) -> None:
        """One optimiser step on one batch. Randomness inside depends on seed and step alone."""
        torch.manual_seed(seed_of(self.settings.seed, "step", step, *self.ranks.names))
        with autocast(self.device, self.settings.engine.precision):
            terms = self.forward(batch)
        if not terms:
            raise UserError(f"distiller '{self.settings.distiller['name']}' has no loss term: all weights are 0")
        torch.stack(list(terms.values())).sum().backward()
        self.optimizer.step(self.rate(step))
        if self.average is not None:
            self.average.update_parameters(self.trained)
        self.meter.add(self.ranks.mean(terms), step)

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
