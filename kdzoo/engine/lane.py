"""A lane: one student trained by one method, beside others that share its teacher and its batches."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from timm.utils.model_ema import ModelEmaV3
from torch import Tensor, nn

from kdzoo.data import Loader
from kdzoo.distillation import Distillation
from kdzoo.distiller import LOGITS, Batch, Distiller, Output, Show
from kdzoo.engine.memory import out_of_memory
from kdzoo.engine.meter import Meter
from kdzoo.engine.micro_batches import micro_batches
from kdzoo.engine.optim import Optimizer, learning_rate
from kdzoo.engine.ranks import ALONE, Ranks
from kdzoo.errors import StorageError, UserError
from kdzoo.models import Network
from kdzoo.precision import PRECISIONS, matmul_precision
from kdzoo.randomness import seed_of
from kdzoo.settings import Run
from kdzoo.store.curves import Curves
from kdzoo.store.folder import RunFolder


class TeacherPasses:
    """The passes of one teacher that all lanes share: the same images go through it once a step.

    They run without gradients, not in inference mode: losses multiply outputs with the student's, and autograd refuses
    to keep an inference tensor for the backward pass.

    Args:
        network: the teacher.
        show: what a pass shows. Each lane adds what it needs before the first pass, and is given that alone.
        fast: a network of the same outputs that makes the passes; None for the teacher itself.
    """

    def __init__(self, network: Network, show: Show = LOGITS, fast: Network | None = None):
        self.network, self.show, self.fast = network, show, fast or network
        # Images and output, by the memory of the images, which are kept so that it is not used again.
        self.made: dict[tuple[Any, ...], tuple[Tensor, Output]] = {}

    def __call__(self, images: Tensor, show: Show) -> Output:
        """Return ``network(images, show)``, remembered until ``forget``; a pass that keeps a graph is not shared."""
        if torch.is_grad_enabled():
            return self.fast(images, show)
        key = images.data_ptr(), images.shape, images.stride(), images.dtype  # the same slice, whoever cut it
        if key not in self.made:
            self.made[key] = images, self.fast(images, self.show)
        return self.made[key][1].only(show)

    def forget(self) -> None:
        """Forget all passes; call this between steps."""
        self.made.clear()


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

    def __post_init__(self) -> None:
        settings, place = self.run
        protocol = settings.protocol
        self.base_rate = protocol.lr_of.get(settings.student.name, protocol.lr)
        self.trained = Trained(self.distillation.student, self.distillation.distiller)
        self.forward = self.ranks.wrap(self.distillation)
        self.optimizer = Optimizer(self.distillation, protocol)
        self.meter = Meter(self.device)
        self.history: list[dict[str, Any]] = []
        self.seconds = 0.0  # spent on this run so far, over all its starts
        self.failure: UserError | None = None
        curves = place.output.tensorboard and self.ranks.first
        self.curves = Curves(self.folder.path) if curves else None
        self.average = ModelEmaV3(self.trained, decay=protocol.ema) if protocol.ema else None
        # What the host writes at the begin of a step and the device reads in it.
        self.number = torch.zeros((), device=self.device, dtype=torch.int64)
        self.share = torch.full((), 1 / settings.engine.accumulate, device=self.device)

    def rate(self, step: int) -> float:
        """Compute the learning rate of a step."""
        return learning_rate(self.run.settings.protocol, self.base_rate, step, self.steps_per_epoch)

    def prepare(self, loader: Loader, teacher: TeacherPasses | None) -> None:
        """Run the method's phase before training."""
        torch.manual_seed(seed_of(self.run.settings.seed, "prepare"))
        self.distillation.prepare(Epochs(loader, teacher))
        self.ranks.align(self.trained)

    def step(self, batch: Batch, step: int) -> None:
        """Take one optimiser step on one batch. Randomness inside depends on seed and step alone."""
        self.begin(step)
        self.advance(batch)

    def begin(self, step: int) -> None:
        """Do the host's part of a step: its seed, its learning rate, its number."""
        torch.manual_seed(seed_of(self.run.settings.seed, "step", step, *self.ranks.names))
        self.optimizer.set_rate(self.rate(step))
        self.number.fill_(step)

    def advance(self, batch: Batch) -> None:
        """Do the device's part of a step, which reads no number from the device, so that it can be a CUDA graph."""
        settings = self.run.settings
        for rows in micro_batches(batch, settings.engine.accumulate):
            terms = self.forward(rows)
            if not terms:
                raise UserError(f"distiller '{settings.distiller.name}' has no loss term: all weights are 0")
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

    @contextmanager
    def failing_alone(self) -> Iterator[None]:
        """Take an error inside as this lane's failure and continue after it; a full disk stops all lanes."""
        try:
            yield
        except StorageError:
            raise
        except UserError as error:
            self.failure = error
        except RuntimeError as error:
            self.failure = out_of_memory(error, self.run)
            if self.failure is None:
                raise

    def record(self, found: dict[str, Any]) -> None:
        """Write an epoch down."""
        self.history.append(found)
        self.ranks.once(self.folder.write_history, self.history)
        if self.curves is not None:
            self.curves.write(self.history)
        self.meter.reset()

    def deployed(self) -> nn.Module:
        """Make the module that would ship now."""
        trained = self.trained if self.average is None else cast(Trained, self.average.module)
        return trained.distiller.deploy(trained.student)

    def state_dict(self) -> dict[str, Any]:
        """Return everything that a resumed run needs to continue with the same bits."""
        return {
            "trained": self.trained.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "average": None if self.average is None else self.average.state_dict(),
            "meter": self.meter.state_dict(),
            "history": self.history,
            "seconds": self.seconds,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what ``state_dict`` gave."""
        self.trained.load_state_dict(state["trained"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        self.meter.load_state_dict(state["meter"])
        self.history = state["history"]
        self.seconds = state["seconds"]
