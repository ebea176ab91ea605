"""The interface between a distillation method and everything else: batches, outputs, needs, the base class."""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import ClassVar, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kdzoo.keywords import not_negative
from kdzoo.products import Products, computed, switchable


class Fidelity(StrEnum):
    """How sure it is that a method here is the method of its paper."""

    EXACT = "exact"  # formulas read in the authors' code or paper
    ADAPTED = "adapted"  # carried over from another task or architecture
    RECONSTRUCTED = "reconstructed"  # the full text was not available


class Batch(NamedTuple):
    """One step's data, the same for every method of a comparison."""

    images: Tensor  # (B, 3, H, W), float in [0, 1], augmented; every network normalises for itself
    labels: Tensor  # (B,) int64, hard labels, kept under mixup and cutmix
    targets: Tensor  # (B, K) float: what cross-entropy is taken against (smoothed, mixed)
    index: Tensor  # type: ignore[assignment]  # (B,) int64, row of the training set; tuple.index is not missed
    progress: Tensor  # () float in [0, 1): the share of training that is done
    views: dict[str, Tensor] = {}  # noqa: RUF012 (a NamedTuple default, never written to)  further views by name
    partner: Tensor | None = None  # (B,) int64: the row whose image was mixed into this one; None without mixing

    @classmethod
    def of(cls, images: Tensor, labels: Tensor, num_classes: int, progress: float = 0.0) -> "Batch":
        """A batch from one's own loader: ``images`` (B, 3, H, W) in [0, 1], ``labels`` (B,) int64."""
        return cls(
            images,
            labels,
            F.one_hot(labels, num_classes).to(torch.float32),
            torch.arange(len(labels), device=labels.device),
            torch.tensor(progress, device=images.device),
        )


class Output(NamedTuple):
    """What a network shows of one batch. Distillers read it in float32.

    The first three suffice for most methods; the others are there where a method's needs name them and the network
    has them.
    """

    logits: Tensor  # (B, K)
    embedding: Tensor  # (B, D): what the classifier reads
    features: tuple[Tensor, ...]  # four stages, shallow to deep, each (B, C, H, W); empty where nobody asked
    preactivations: tuple[Tensor, ...] = ()  # the features before their last ReLU; where they have none, themselves
    final: Tensor | None = None  # (B, D', H, W): the map of whose mean over positions the logits are made

    def float(self) -> "Output":
        """The same in float32."""
        features, before = (tuple(f.float() for f in maps) for maps in (self.features, self.preactivations))
        final = None if self.final is None else self.final.float()
        return Output(self.logits.float(), self.embedding.float(), features, before, final)


def autocast(device: str, dtype: torch.dtype | None) -> AbstractContextManager:
    """Autocast to ``dtype``, or none at all for None; devices that know no autocast are left alone."""
    if not torch.amp.is_autocast_available(device):
        return nullcontext()
    return torch.autocast(device, dtype, enabled=dtype is not None)


def products(device: str, how: Products) -> AbstractContextManager:
    """Float32 products computed so, on the device that has a choice."""
    return computed(how) if switchable(device) else nullcontext()


class Seen(nn.Module):
    """A network as a distiller sees it: run in the caller's precision, its output in float32.

    Distillers call it with images (B, 3, H, W) and get an ``Output``.
    """

    def __init__(
        self,
        network: nn.Module,
        precision: torch.dtype | None = None,
        grad: bool = True,
        rounding: Products | None = None,
    ):
        super().__init__()
        self.network, self.precision, self.grad, self.rounding = network, precision, grad, rounding

    @property
    def classifier(self) -> nn.Linear | None:
        """The linear layer that makes the logits of the embedding; None where the network names none."""
        layer = getattr(self.network, "classifier", None)
        return layer if isinstance(layer, nn.Linear) else None

    def classify(self, means: Tensor) -> Tensor:
        """Means (M, D') of the final map over any positions -> logits (M, K), as the network makes them of all."""
        with torch.set_grad_enabled(self.grad and torch.is_grad_enabled()):
            return self.network.classify(means)  # type: ignore[operator]  # networks that show a final map have it

    def forward(self, images: Tensor) -> Output:
        grad, device = self.grad and torch.is_grad_enabled(), images.device.type
        rounded = products(device, self.rounding) if self.rounding else nullcontext()
        with torch.set_grad_enabled(grad), autocast(device, self.precision), rounded:
            return self.network(images).float()


class DataSpec(NamedTuple):
    """What is known of a data set before the first batch."""

    name: str
    num_classes: int
    class_names: tuple[str, ...]
    image_size: int  # side in pixels
    labels: Tensor  # (N,) int64, of the training set, on the device
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)  # per channel of images in [0, 1]
    std: tuple[float, ...] = (0.25, 0.25, 0.25)
    superclasses: tuple[int, ...] = ()  # (K,) coarse class of each class; empty where none are defined


@dataclass(frozen=True)
class Needs:
    """What a method needs beyond the plain case of one pass with features through both networks."""

    teacher: bool = True  # False: trains without a teacher
    features: bool = True  # False: reads logits and embedding only, so networks run their plain forward
    views: tuple[str, ...] = ()  # further views in batch.views: "weak", "strong", "rotations"
    teacher_grad: bool = False  # the graph is kept through the frozen teacher
    preactivations: tuple[str, ...] = ()  # whose features are shown before the last ReLU too: "student", "teacher"
    final: bool = False  # both networks' final maps, and that they classify means of parts of them


class Distiller(nn.Module):
    """What a method adds to supervised training: loss terms, and the modules they train.

    The constructor's keywords are the method's configuration: it checks and stores them, and passes the weight of each
    term to ``super().__init__``. ``build`` makes modules, ``loss`` says what the terms are, and the base class does
    the rest: ``weigh`` multiplies each term with the keyword of its name and skips the work of a weight of 0; all
    outputs arrive in float32; and the teacher's carry no graph.

    A term named ``ce`` or ``kd`` reads logits alone. Where no other term has a weight, networks show logits and
    embedding only, and ``build`` is not called; a method whose ``kd`` needs modules sets ``logit_terms``.

    On a GPU the engine captures a step and replays it, so what ``forward`` and ``loss`` do in Python is done once:
    state lies in buffers and is changed in place, and nothing is decided by the value of a tensor. A method that does
    otherwise is run operation by operation, which is slower.

    Args:
        weights: the weight of each loss term, by its name; 0 or above.

    Raises:
        UserError: a weight is negative or not finite.

    Example::

        distiller = KD(temperature=2.0)
        terms = distiller.loss(student_output, teacher_output, Batch.of(images, labels, num_classes=10))
    """

    paper: ClassVar[str]
    fidelity: ClassVar[Fidelity]
    needs: Needs = Needs()
    logit_terms: ClassVar[tuple[str, ...]] = ("ce", "kd")  # terms that read logits alone and need no modules

    def __init__(self, **weights: float):
        super().__init__()
        self.weights = {name: not_negative(**{name: weight}) for name, weight in weights.items()}
        self.is_active = any(weight for name, weight in weights.items() if name not in self.logit_terms)
        self.is_assembled = False
        if not self.is_active:
            self.needs = replace(self.needs, features=False, preactivations=(), final=False)

    def assemble(self, student: Output, teacher: Output, data: DataSpec) -> Self:
        """Build the method's modules for a pair of networks, where a term needs them, and return the method.

        Args:
            student: the student's output on the meta device: only shapes are read, and the batch size means nothing.
            teacher: the teacher's output (the student's where there is no teacher).
            data: what is known of the data set.

        Raises:
            UserError: the method does not fit these networks or these data.
        """
        if self.is_active and not self.is_assembled:
            self.build(student, teacher, data)
        self.is_assembled = True
        return self

    def build(self, student: Output, teacher: Output, data: DataSpec) -> None:
        """Make the modules and buffers that the terms need; arguments as in ``assemble``, which calls this."""

    def weigh(self, **terms: Callable[[], Tensor]) -> dict[str, Tensor]:
        """Compute each term and multiply it with its weight; a term whose weight is 0 is neither computed nor returned.

        Args:
            terms: functions without arguments, by the name of the term, each of which returns a scalar.
        """
        return {name: self.weights[name] * term() for name, term in terms.items() if self.weights[name]}

    def loss(self, student: Output, teacher: Output, batch: Batch) -> dict[str, Tensor]:
        """Compute the weighted loss terms of one batch, each a float32 scalar; their sum is minimised."""
        raise NotImplementedError

    def forward(self, student: Seen, teacher: Seen, batch: Batch) -> dict[str, Tensor]:
        """One pass through each network, then ``loss``; methods that need another course override this."""
        if not self.needs.teacher:
            seen = student(batch.images)
            return self.loss(seen, seen, batch)
        reference = teacher(batch.images)
        return self.loss(student(batch.images), reference, batch)

    def prepare(self, student: Seen, teacher: Seen, batches: Iterable[Batch]) -> None:
        """A phase before training. ``batches`` may be iterated again and again, an epoch each time."""

    def deploy(self, student: nn.Module) -> nn.Module:
        """What ships, from images to ``Output``: the student itself unless a method says otherwise."""
        return student
