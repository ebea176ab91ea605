"""The interface between a distillation method and everything else: batches, data, needs, the base class."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any, ClassVar, NamedTuple, Self, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kdzoo.errors import UserError
from kdzoo.keywords import not_negative, share
from kdzoo.outputs import NetworkView, Output, Show
from kdzoo.quantities import counted


class Fidelity(StrEnum):
    """How closely an implementation follows its paper.

    Example:
        >>> Fidelity.EXACT == "exact"
        True
    """

    EXACT = "exact"  # formulas read in the authors' code or paper
    ADAPTED = "adapted"  # carried over from another task or architecture
    RECONSTRUCTED = "reconstructed"  # the full text was not available


VIEWS = {  # of a batch, by name, with their shapes
    "weak": "(B, 3, H, W), another draw of crop and flip",
    "strong": "(B, 3, H, W), a third draw with RandAugment",
    "rotations": "(B, 4, 3, H, W), turned by 0, 90, 180 and 270 degrees",
}


class Batch(NamedTuple):
    """The data of one training step, the same for every method of a comparison.

    Example:
        >>> batch = Batch.of(torch.rand(2, 3, 32, 32), torch.tensor([3, 1]), num_classes=5)
        >>> batch.targets.argmax(dim=1).tolist()
        [3, 1]
    """

    images: Tensor  # (B, 3, H, W), float in [0, 1], augmented; every network normalises for itself
    labels: Tensor  # (B,) int64, hard labels, kept under mixup and cutmix; None where the data have no labels
    targets: Tensor  # (B, K) float: what cross-entropy is taken against (smoothed, mixed); None as well
    index: Tensor  # type: ignore[assignment]  # (B,) int64, row of the training set, or None; tuple.index is not missed
    progress: Tensor  # () float in [0, 1): the share of training that is done
    views: dict[str, Tensor] = {}  # noqa: RUF012 (a NamedTuple default, never written to)  those of VIEWS
    partner: Tensor | None = None  # (B,) int64: the row whose image was mixed into this one; None without mixing
    teacher_images: Tensor | None = None  # (B, 3, H, W), what the teacher sees in place of images; None: the same

    @classmethod
    def of(
        cls,
        images: Tensor,
        labels: Tensor | None = None,
        num_classes: int = 0,
        progress: float = 0.0,
        index: Tensor | None = None,
    ) -> "Batch":
        """Make a batch from the images and labels of any loader.

        Args:
            images: (B, 3, H, W) in [0, 1].
            labels: (B,) int64; None where there are none.
            num_classes: K.
            progress: the share of training that is done, for methods that warm up.
            index: (B,) int64, the images' rows in the training set, for methods that remember them; None where no
                method reads them.

        Raises:
            UserError: images, labels or index are of another shape or type, labels come without ``num_classes``, or
                ``progress`` is no share, such as the number of an epoch.
        """
        fit = isinstance(images, Tensor) and images.ndim == 4 and images.shape[1] in (1, 3)
        if not (fit and images.is_floating_point()):
            raise UserError(f"images are {described(images)}; expected floats in [0, 1] of shape (B, 3, H, W)")
        if labels is not None and not _are_rows(labels, images):
            raise UserError(f"labels of {len(images)} images are {described(labels)}; expected int64 of shape (B,)")
        if index is not None and not _are_rows(index, images):
            raise UserError(f"the index of {len(images)} images is {described(index)}; expected int64 of shape (B,)")
        if labels is not None and num_classes < 1:
            raise UserError(f"num_classes={num_classes}: pass the number of classes beside the labels")
        return cls(
            images,
            labels,  # type: ignore[arg-type]  # absent where there are none
            None if labels is None else F.one_hot(labels, num_classes).to(torch.float32),  # type: ignore[arg-type]
            index,  # type: ignore[arg-type]  # absent where it is not given
            torch.tensor(share(progress=float(progress)), device=images.device),
        )

    @property
    def view_targets(self) -> Tensor:
        """The targets of the views, which are never mixed: (B, K)."""
        if self.targets is None or self.partner is None:
            return self.targets
        return F.one_hot(self.labels, self.targets.shape[1])


def _are_rows(values: object, images: Tensor) -> bool:
    return isinstance(values, Tensor) and values.shape == images.shape[:1] and values.dtype == torch.int64


def described(tensor: object) -> str:
    """Say of which type and shape a value is that may be a tensor.

    Example:
        >>> described(torch.zeros(2, 3))
        'float32 of shape (2, 3)'
    """
    if not isinstance(tensor, Tensor):
        return f"of type {type(tensor).__name__}"
    return f"{str(tensor.dtype).removeprefix('torch.')} of shape {tuple(tensor.shape)}"


class DataSpec(NamedTuple):
    """The facts of a data set that are known before the first batch.

    Example:
        >>> data = DataSpec("pets", 2, ("cat", "dog"), image_size=32, labels=torch.tensor([0, 1, 1, 0]))
        >>> data.class_names[data.labels[1]]
        'dog'
    """

    name: str
    num_classes: int  # K, of the networks' logits; 0: networks without a classifier
    class_names: tuple[str, ...]
    image_size: int  # side in pixels
    labels: Tensor  # (N,) int64, of the training set, on the device; empty where it has none
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)  # per channel of images in [0, 1]
    std: tuple[float, ...] = (0.25, 0.25, 0.25)
    superclasses: tuple[int, ...] = ()  # (K,) coarse class of each class; empty where none are defined


@dataclass(frozen=True)
class Needs:
    """The data and the network outputs that a method needs.

    Example:
        >>> Needs(preactivations=("teacher",)).show("teacher")
        Show(features=True, preactivations=True, final=False)
    """

    teacher: bool = True  # False: trains without a teacher
    features: bool = True  # False: reads logits and embedding only, so networks run their plain forward
    embedding: bool = True  # False: reads no embedding of the teacher, so that with no other need its logits suffice
    logits: bool = True  # False: its own terms read no logits, so that networks without a classifier suffice
    labels: bool = False  # reads the labels of the training set, and from batch.index which rows of it a batch holds
    views: tuple[str, ...] = ()  # further views in batch.views, of those in VIEWS
    teacher_grad: bool = False  # the graph is kept through the frozen teacher
    preactivations: tuple[str, ...] = ()  # whose features are shown before the last ReLU too: "student", "teacher"
    final: bool = False  # both networks' final maps, and that they classify means of parts of them
    stages: tuple[str, ...] = ()  # whose stages are called one by one: "student", "teacher"

    def show(self, role: str) -> Show:
        """Return the outputs needed from the network in this role, "student" or "teacher"."""
        return Show(self.features, role in self.preactivations, self.final)

    @property
    def logits_suffice(self) -> bool:
        """Whether the method reads nothing of the teacher but its logits for the batch's images."""
        more = (
            self.features,
            self.embedding,
            self.views,
            self.teacher_grad,
            self.preactivations,
            self.final,
            self.stages,
        )
        return not any(more)


class _NoTeacher:
    """Stands for the teacher's output where a method's needs say that there is none: reading it is an error."""

    def __init__(self, title: str):
        self.title = title

    def __getattr__(self, name: str) -> Any:
        raise UserError(
            f"{self.title} reads the teacher's {name}, and its needs say teacher=False; leave that out of needs"
        )


class _NotShown(tuple[Tensor, ...]):
    """Stands for maps that a method's needs leave out: there are none, and reading one is an error that says why."""

    why: str

    def __getitem__(self, place: Any) -> Any:
        raise UserError(self.why)


def _note_prepared(distiller: "Distiller", _state: Any, _prefix: str, metadata: dict[str, Any]) -> None:
    """Save beside a method's state whether its phase before training has run."""
    metadata["is_prepared"] = distiller.is_prepared


def _read_prepared(distiller: "Distiller", state: Any, prefix: str, metadata: dict[str, Any], *_: Any) -> None:
    """Read whether that phase had run when a state was saved; one that does not say so was saved after it.

    A state in which the method's own is missing, such as that of another method, says nothing of that.
    """
    if all(f"{prefix}{name}" in state for name in distiller.state_dict()):
        distiller.is_prepared = metadata.get("is_prepared", True)


class Distiller(nn.Module):
    """The base class of all methods: loss terms, and the modules that they train.

    The constructor's keywords are the method's configuration: it checks and stores them, and passes the weight of each
    term to ``super().__init__``. ``build`` makes modules, ``loss`` says what the terms are, and the base class does
    the rest: ``weigh`` multiplies each term with the keyword of its name and skips the work of a weight of 0; all
    outputs arrive in float32; and the teacher's carry no graph.

    A term named ``ce`` or ``kd`` reads logits alone. Where no other term has a weight, networks show logits and
    embedding only, and ``build`` is not called; a method whose ``kd`` needs modules sets ``logit_terms``. The term
    ``ce`` reads the batch's labels or targets; a method of which other terms read them too sets ``label_terms``. On
    data without labels these terms are left out, and beside networks without a classifier those of ``logit_terms``.

    On a GPU the engine captures a step and replays it, so what ``forward`` and ``loss`` do in Python is done once:
    state lies in buffers and is changed in place, and nothing is decided by the value of a tensor. A method that does
    otherwise is run operation by operation, which is slower.

    Args:
        weights: the weight of each loss term, by its name; 0 or above.

    Raises:
        UserError: a weight is negative or not finite.

    Example:
        >>> class LogitError(Distiller):
        ...     paper, fidelity = "none", Fidelity.EXACT
        ...
        ...     def __init__(self, *, kd: float = 1.0):
        ...         super().__init__(kd=kd)
        ...
        ...     def loss(self, student, teacher, batch):
        ...         return self.weigh(kd=lambda: F.l1_loss(student.logits, teacher.logits))
        >>> ones, zeros = (Output(fill(2, 10), fill(2, 8)) for fill in (torch.ones, torch.zeros))
        >>> batch = Batch.of(torch.rand(2, 3, 32, 32), torch.tensor([3, 1]), num_classes=10)
        >>> LogitError(kd=2.0).loss(ones, zeros, batch)
        {'kd': tensor(2.)}
    """

    paper: ClassVar[str]
    fidelity: ClassVar[Fidelity]
    needs: Needs = Needs()
    logit_terms: ClassVar[tuple[str, ...]] = ("ce", "kd")  # terms that read logits alone and need no modules
    label_terms: tuple[str, ...] = ("ce",)  # terms that read labels or targets of the batch
    # The keyword that kdzoo recommend varies, and its range; empty: the main weight, from a third to three times.
    search: ClassVar[dict[str, tuple[float, float]]] = {}
    fewest_classes: int = 2  # with fewer, what the method compares is the same for every network

    def __init__(self, **weights: float):
        super().__init__()
        self.weights = {name: not_negative(**{name: weight}) for name, weight in weights.items()}
        self.is_assembled = False
        self.is_prepared = False  # whether its phase before training has run, here or before its state was saved
        self.register_state_dict_post_hook(_note_prepared)
        self.register_load_state_dict_pre_hook(_read_prepared)
        self._settle()

    def _settle(self) -> None:
        """Find out by the weights whether a term needs modules or more than logits."""
        self.is_active = any(weight for name, weight in self.weights.items() if name not in self.logit_terms)
        if not self.is_active:
            fewer = replace(self.needs, features=False, preactivations=(), final=False, stages=())
            self.needs = replace(fewer, embedding=False, labels=False)

    @property
    def title(self) -> str:
        """The name by which errors call the method: that of its class."""
        return type(self).__name__

    @property
    def trains_classifier(self) -> bool:
        """Whether a term with a weight reads the student's logits, so that its classifier learns."""
        own = {name for name, weight in self.weights.items() if weight}
        return self.needs.logits or bool(own & set(self.logit_terms))

    def leave_out(self, *, labels: bool = False, logits: bool = False) -> list[str]:
        """Leave out the terms that read what there is not, before the method is assembled.

        Args:
            labels: whether the data have none.
            logits: whether the networks have none, as those without a classifier.

        Returns:
            The names of the terms that had a weight and are left out.

        Raises:
            UserError: without them nothing is left to learn, or the method does not say that it can do without.
        """
        name, other = self.title, "fitnet or pkt" if logits else "kd"
        lacks = [
            (labels, self.label_terms, self.needs.labels, "labels, and the data have none"),
            (logits, self.logit_terms, self.needs.logits, "logits, and the teacher has no classifier that gives any"),
        ]
        dropped: list[str] = []
        for is_lacking, terms, needed, said in lacks:
            if not is_lacking:
                continue
            active = [term for term, weight in self.weights.items() if weight and term not in dropped]
            if needed or not set(active) - set(terms):
                raise UserError(f"{name} learns from {said}; choose another method, such as {other}")
            dropped += [term for term in active if term in terms]
        if dropped:
            self.weights |= dict.fromkeys(dropped, 0.0)
            self._settle()
        return dropped

    def assemble(self, student: Output, teacher: Output, data: DataSpec) -> Self:
        """Build the method's modules for a pair of networks, if a term needs them, and return the method.

        Args:
            student: the student's output on the meta device: only shapes are read, and the batch size means nothing.
            teacher: the teacher's output (the student's where there is no teacher).
            data: what is known of the data set.

        Raises:
            UserError: the method does not fit these networks or these data.
        """
        if 0 < data.num_classes < self.fewest_classes:
            raise UserError(
                f"{self.title} teaches nothing with {counted(data.num_classes, 'class')}: what it compares is then the "
                f"same for every network; expected at least {self.fewest_classes}, so choose another method, such as kd"
            )
        terms = list(self.weights)
        if terms and type(self).build is not Distiller.build and set(terms) <= set(self.logit_terms):
            raise UserError(
                f"build() of {self.title} would never be called, as its terms ({', '.join(terms)}) count as terms that "
                "need no modules; write in the class logit_terms = (...) with the names of those that need none"
            )
        if self.is_active and not self.is_assembled:
            self.build(student, teacher, data)
        self.is_assembled = True
        return self

    def build(self, student: Output, teacher: Output, data: DataSpec) -> None:
        """Make the modules and buffers of the terms. ``assemble`` calls this with its own arguments."""

    def weigh(self, **terms: Callable[[], Tensor]) -> dict[str, Tensor]:
        """Compute each term and multiply it by its weight; skip terms whose weight is 0.

        Args:
            terms: functions without arguments, by the name of the term, each of which returns a scalar.

        Raises:
            UserError: the constructor gave no weight for a term, a term is no function, or it returned no tensor.
        """
        if missing := [name for name in terms if name not in self.weights]:
            raise UserError(
                f"{self.title} has no weight for its term '{missing[0]}'; pass one to "
                f"super().__init__({missing[0]}=...), from a keyword of that name"
            )
        for name, term in terms.items():
            if not callable(term):
                raise UserError(
                    f"the term '{name}' of {self.title} is of type {type(term).__name__}; expected a function, so that "
                    f"its work can be skipped: {name}=lambda: ..."
                )
        found = {name: term() for name, term in terms.items() if self.weights[name]}
        for name, value in found.items():
            if not isinstance(value, Tensor):
                raise UserError(f"the term '{name}' of {self.title} is of type {type(value).__name__}; return a tensor")
        return {name: self.weights[name] * value for name, value in found.items()}

    def loss(self, student: Output, teacher: Output, batch: Batch) -> dict[str, Tensor]:
        """Compute the weighted loss terms of one batch, each a float32 scalar. Training minimises their sum.

        A method whose needs say ``teacher=False`` has no use for ``teacher``, and reading it is an error.
        """
        raise UserError(
            f"{self.title} defines no loss(self, student, teacher, batch); write one that returns its terms"
        )

    def forward(self, student: NetworkView, teacher: NetworkView, batch: Batch) -> dict[str, Tensor]:
        """Run each network once and compute the loss. Methods that run networks in another way override this."""
        if not self.needs.teacher:
            return self.loss(self._shown(student(batch.images)), cast(Output, _NoTeacher(self.title)), batch)
        reference = self._shown(teacher(batch.images))
        return self.loss(self._shown(student(batch.images)), reference, batch)

    def _shown(self, output: Output) -> Output:
        """Let the maps that an output lacks say why where they are read."""
        return output._replace(
            features=output.features or self._not_shown("features"),
            preactivations=output.preactivations or self._not_shown("preactivations"),
        )

    def _not_shown(self, name: str) -> _NotShown:
        maps = _NotShown()
        maps.why = f"{self.title} reads {name}, and {self._why_without(name)}"
        return maps

    def _why_without(self, name: str) -> str:
        active = ", ".join(term for term, weight in self.weights.items() if weight)
        if not active:
            return "no term of it has a weight; give super().__init__ the weight of each term by its name"
        if not self.is_active:
            return (
                f"its terms with a weight ({active}) count as terms that read logits alone; write in the class "
                "logit_terms = (...) with the names of those that do"
            )
        if name == "features":
            return "its needs say features=False; leave that out of needs"
        return "its needs do not name this network; write preactivations=('student', 'teacher') in needs"

    def prepare(self, student: NetworkView, teacher: NetworkView, batches: Iterable[Batch]) -> None:
        """Run a phase before training. ``batches`` can be iterated many times, one epoch each time."""

    @property
    def has_phase(self) -> bool:
        """Whether ``prepare`` finds something that the loss reads."""
        return type(self).prepare is not Distiller.prepare

    def deploy(self, student: nn.Module) -> nn.Module:
        """Return the network to ship, called as networks are. By default this is the student itself."""
        return student
