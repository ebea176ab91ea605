"""A lane: one student trained by one method, beside others that share its teacher and its batches."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from timm.utils.model_ema import ModelEmaV3
from torch import Tensor, nn

from kdzoo.data import Loader
from kdzoo.distillation import Distillation
from kdzoo.distiller import Batch, Distiller
from kdzoo.engine.faults import caught, check_gradients, check_terms, check_trained
from kdzoo.engine.memory import check_reserve
from kdzoo.engine.meter import Meter
from kdzoo.engine.micro_batches import micro_batches
from kdzoo.engine.optim import Optimizer, learning_rate
from kdzoo.engine.passes import TeacherPasses
from kdzoo.engine.ranks import ALONE, Ranks
from kdzoo.errors import UserError
from kdzoo.models import Network, fault_of_copies
from kdzoo.precision import PRECISIONS, matmul_precision
from kdzoo.randomness import seed_of, seed_torch
from kdzoo.settings import Run
from kdzoo.store.folder import RunFolder
from kdzoo.store.history import check_history, is_number
from kdzoo.store.loggers import Loggers


class Epochs:
    """The batches of training, for phases before it: each iteration is the next epoch, then the first again.

    With each batch, what the ``teacher`` was shown before is forgotten.
    """

    def __init__(self, loader: Loader, teacher: TeacherPasses | None):
        self.loader, self.teacher, self.start = loader, teacher, 0

    def __iter__(self) -> Iterator[Batch]:
        start = self.start % self.loader.total_steps
        self.start = start + self.loader.steps_per_epoch
        for batch in self.loader.batches(start, self.start):
            if self.teacher is not None:
                self.teacher.forget()
            yield batch


def titles(runs: Sequence[Run]) -> list[str]:
    """Name lanes so that they differ: by method, by student where there are several, and by keywords that differ."""
    everything = [run.settings for run in runs]
    several = len({settings.student.name for settings in everything}) > 1
    names = []
    for settings in everything:
        method = settings.distiller
        alike = [other.distiller.keywords for other in everything if other.distiller.name == method.name]
        own = [f"{key}={value}" for key, value in method.keywords.items() if any(a[key] != value for a in alike)]
        names.append(" ".join([*([settings.student.name] if several else []), method.name, *own]))
    return names


class Trained(nn.Module):
    """The modules that a lane trains and keeps: student and distiller, never the teacher."""

    def __init__(self, student: nn.Module, distiller: Distiller):
        super().__init__()
        self.student, self.distiller = student, distiller


class Average(ModelEmaV3):
    """A moving average of all weights and statistics, in which one that has several names counts once."""

    def apply_update_(self, model: nn.Module, decay: float) -> None:
        both = zip(*(module.state_dict(keep_vars=True).values() for module in (self.module, model)), strict=True)
        pairs = {id(mine): (mine, its) for mine, its in both}.values()
        floating = [pair for pair in pairs if pair[0].is_floating_point()]
        if floating:
            averages, values = map(list, zip(*floating, strict=True))
            torch._foreach_lerp_(averages, values, weight=1 - decay)
        for mine, its in pairs:
            if not mine.is_floating_point():
                mine.copy_(its)


@dataclass
class Lane:
    """All the state of one run in training. Every step is a function of that state, the seed and the step."""

    run: Run
    distillation: Distillation
    folder: RunFolder
    device: torch.device
    steps_per_epoch: int
    title: str = ""  # among the lanes beside it
    ranks: Ranks = ALONE
    loggers: Loggers = field(default_factory=Loggers)  # none

    def __post_init__(self) -> None:
        settings, _ = self.run
        protocol = settings.protocol
        self.base_rate = protocol.lr_of.get(settings.student.name, protocol.lr)
        self.trained = Trained(self.distillation.student, self.distillation.distiller)
        self.forward = self.ranks.wrap(self.distillation)
        self.optimizer = Optimizer(self.distillation, protocol)
        self.meter = Meter(self.device)
        self.history: list[dict[str, Any]] = []
        self.seconds = 0.0  # spent on this run so far, over all its starts
        self.at: int | None = None  # the step that it is in or was in last; None before the first
        self.failure: UserError | None = None
        self.best: dict[str, Tensor] | None = None  # on the CPU: the student of the best epoch, where that ships
        self.average = self._average() if protocol.ema else None
        # What the host writes at the begin of a step and the device reads in it.
        self.number = torch.zeros((), device=self.device, dtype=torch.int64)
        self.share = torch.full((), 1 / settings.engine.accumulate, device=self.device)

    def _average(self) -> Average:
        student = self.distillation.student
        if isinstance(student, Network) and (why := fault_of_copies(student)):
            raise UserError(
                f"the moving average of {student.name}'s weights needs a copy of it, and {why}; correct that, or set "
                "protocol.ema=0"
            )
        return Average(self.trained, decay=self.run.settings.protocol.ema)

    def rate(self, step: int) -> float:
        """Compute the learning rate of a step."""
        return learning_rate(self.run.settings.protocol, self.base_rate, step, self.steps_per_epoch)

    def prepare(self, loader: Loader, teacher: TeacherPasses | None) -> None:
        """Run the method's phase before training."""
        seed_torch(seed_of(self.run.settings.seed, "prepare"))
        before = list(self.trained.parameters())
        self.distillation.prepare(Epochs(loader, teacher))
        check_trained(self.trained, before, self.run.settings.distiller.name)
        self.ranks.align(self.trained)
        if self.average is not None:
            self.average.set(self.trained)  # what the phase found belongs to the average as it is

    def step(self, batch: Batch, step: int) -> None:
        """Take one optimiser step on one batch. Randomness inside depends on seed and step alone."""
        self.begin(step)
        self.advance(batch)

    def begin(self, step: int) -> None:
        """Do the host's part of a step: its seed, its learning rate, its number."""
        check_reserve()
        seed_torch(seed_of(self.run.settings.seed, "step", step, *self.ranks.names))
        self.optimizer.set_rate(self.rate(step))
        self.number.fill_(step)
        self.at = step

    def advance(self, batch: Batch) -> None:
        """Do the device's part of a step, which reads no number from the device, so that it can be a CUDA graph."""
        settings = self.run.settings
        for rows in micro_batches(batch, settings.engine.accumulate):
            terms = self.forward(rows)
            check_terms(terms, settings.distiller.name, self.when, self.device, self.meter.sums)
            if not self.meter.sums:
                check_gradients(terms, self.trained, self.optimizer.parameters, settings.distiller.name, self.when)
            with matmul_precision(self.device.type, PRECISIONS[settings.engine.precision]):
                torch.stack(list(terms.values())).sum().backward(self.share)
            self.meter.add(self.ranks.mean(terms), self.number)
        self.optimizer.step()
        if self.average is not None:
            self.average.update(self.trained)

    @property
    def host_bound(self) -> str | None:
        """Say why ``advance`` cannot be a CUDA graph, where that is known beforehand."""
        if self.run.place.engine.checkpoint_activations:
            return "activation checkpointing keeps the generator's state on the host"
        return self.optimizer.host_bound

    @property
    def when(self) -> str:
        """Say where in its training the lane is."""
        return "before training" if self.at is None else f"at step {self.at}"

    @contextmanager
    def failing_alone(self) -> Iterator[None]:
        """Take any error inside as this lane's failure and continue after it; a full disk stops all lanes."""

        def note(failure: UserError) -> None:
            self.failure = failure

        with caught(self.run, lambda: self.when, note):
            yield

    def record(self, found: dict[str, Any]) -> None:
        """Write an epoch down, and keep its student where it is the best so far and the best ships."""
        earlier = [record["top1"] for record in self.history]
        if self.run.settings.output.ship == "best" and found["top1"] > max(earlier, default=-1.0):
            state = self.deployed().state_dict()
            self.best = {name: value.detach().to("cpu", copy=True) for name, value in state.items()}
        self.history.append(found)
        self.ranks.once(self.folder.write_history, self.history)
        self.loggers.write(self.history)
        self.meter.reset()

    def deployed(self) -> nn.Module:
        """Make the module of this moment that images go through when it is measured."""
        trained = self.trained if self.average is None else cast(Trained, self.average.module)
        module = trained.distiller.deploy(trained.student)
        if not isinstance(module, nn.Module):
            name = self.run.settings.distiller.name
            raise UserError(f"distiller '{name}' deploys a {type(module).__name__}; expected a torch.nn.Module")
        return module

    def shipped(self) -> nn.Module:
        """Make the module that ships, after the last step."""
        module = self.deployed()
        if self.best is not None:
            module.load_state_dict(self.best)
        return module

    def state_dict(self) -> dict[str, Any]:
        """Return everything that a resumed run needs to continue with the same bits."""
        return {
            "run": self.run.settings.identity(),
            "trained": self.trained.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "average": None if self.average is None else self.average.state_dict(),
            "meter": self.meter.state_dict(),
            "best": self.best,
            "history": self.history,
            "seconds": self.seconds,
        }

    def load_state_dict(self, state: dict[str, Any], step: int) -> None:
        """Restore what ``state_dict`` gave, at the end of ``step`` steps.

        Raises:
            ValueError: it is another run's, or its history is not that of these steps.
        """
        if (
            state["run"] != self.run.settings.identity()
            or step > self.run.settings.protocol.epochs * self.steps_per_epoch
        ):
            raise ValueError("it is another run's")
        check_history(state["history"], step, self.steps_per_epoch)
        if not is_number(state["seconds"]) or state["seconds"] < 0:
            raise ValueError("its time is no number")
        self.trained.load_state_dict(state["trained"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        self.meter.load_state_dict(state["meter"])
        self.best = state["best"]
        self.history = state["history"]
        self.seconds = state["seconds"]
