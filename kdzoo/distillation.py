"""Teacher, student and distiller as one module, for kdzoo's engine and for any other training loop."""

import operator
from collections.abc import Callable, Iterable, Iterator, Mapping
from copy import copy
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from kdzoo.distiller import VIEWS, Batch, DataSpec, Distiller, Needs, described
from kdzoo.errors import UserError, is_shortage, told
from kdzoo.outputs import NetworkView, Output, Show
from kdzoo.precision import FLOAT32, Precision, ambient, autocast, casting_anew
from kdzoo.quantities import counted
from kdzoo.tensors import warn_of_bytes


class Distillation(nn.Module):
    """A student, its frozen teacher and a method as one module: a batch goes in, the loss terms come out.

    Under ``torch.autocast`` the networks run in its precision; losses and the distiller's own modules stay in float32,
    on CUDA without TF32. Only the student and the distiller have parameters that require a gradient; the teacher stays
    in evaluation mode, also under ``train()``.

    Args:
        student: a network of ``kdzoo.models``, or any module from images (B, 3, H, W) to logits (B, K), which
            ``kdzoo.models.wrap`` then wraps. It is trained in place.
        teacher: the same; None for a distiller that needs no teacher.
        distiller: the method, such as ``LFCC(contrast=3.0)``. Its modules are made here, from the networks' shapes.
        num_classes: K; needed where a network has to be wrapped.
        labels: (N,) int64, of the training set, for methods that read them; the batches then need their ``index``.
        image_size: side in pixels; needed where a network has to be wrapped.
        data: everything that is known of the data, instead of the three above.
        labelled: whether batches have labels. Without them the terms that read labels are left out.
        precision: what the networks compute in; None for what holds where the module is called.
        passes: makes the teacher's passes instead of the teacher itself, where several modules share one.

    Raises:
        UserError: something is missing, or the networks do not fit the method or each other.

    Example:
        >>> from kdzoo.distillers.kd import KD
        >>> distillation = Distillation(cnn, wider_cnn, KD(temperature=2.0), num_classes=10, image_size=32)
        >>> optimizer = torch.optim.SGD([p for p in distillation.parameters() if p.requires_grad], lr=0.05)
        >>> for images, labels in loader:
        ...     terms = distillation(Batch.of(images, labels, num_classes=10))
        ...     sum(terms.values()).backward()
        ...     optimizer.step()
        ...     optimizer.zero_grad()
        >>> sorted(terms)
        ['ce', 'kd']
        >>> shipped = distillation.deploy()
        >>> shipped(images).logits.shape
        torch.Size([4, 10])
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | None,
        distiller: Distiller,
        *,
        num_classes: int | None = None,
        labels: Tensor | None = None,
        image_size: int | None = None,
        data: DataSpec | None = None,
        labelled: bool = True,
        precision: Precision | None = None,
        passes: Callable[[Tensor, Show], Output] | None = None,
    ):
        super().__init__()
        num_classes, image_size = _whole(num_classes=num_classes), _whole(image_size=image_size)
        _check_distiller(distiller)
        if teacher is None and distiller.needs.teacher:
            raise UserError(f"{distiller.title} needs a teacher and got None; pass one")
        _check_networks(student, teacher)
        if data is not None:
            num_classes, image_size = data.num_classes, data.image_size
        if num_classes is not None or not distiller.is_assembled:  # which was assembled from the outputs of networks
            student = _network("student", student, num_classes, image_size)
            teacher = None if teacher is None else _network("teacher", teacher, num_classes, image_size)
        self.student, self.teacher, self.distiller = student, teacher, distiller
        self.image_size = image_size  # that its networks' outputs were made of; None where it is not known
        self.left_out: list[str] = []  # terms of the method that read what there is not
        if not distiller.is_assembled:
            self._assemble(num_classes, labels, image_size, data, labelled)
        self.precision = precision
        self.is_called = False
        needs = distiller.needs
        stages = "student" in needs.stages
        self._views = [NetworkView(self.student, needs.show("student"), precision=precision, stages=stages)]
        if self.teacher is not None:
            self.teacher.requires_grad_(False).eval()
            show, grad, stages = needs.show("teacher"), needs.teacher_grad, "teacher" in needs.stages
            view = NetworkView(self.teacher, show, grad=grad, precision=precision, passes=passes, stages=stages)
            self._views.append(view)

    def _assemble(
        self,
        num_classes: int | None,
        labels: Tensor | None,
        image_size: int | None,
        data: DataSpec | None,
        labelled: bool,
    ) -> None:
        student = _shapes(self.student)
        teacher = student if self.teacher is None or not self.distiller.needs.teacher else _shapes(self.teacher)
        classes = student.logits.shape[1] if num_classes is None else num_classes
        for role, output in (("student", student), ("teacher", teacher)):
            if (given := output.logits.shape[1]) != classes:
                todo = "give it that many classes"
                if not given:
                    todo = "give it a classifier, or leave out that of the teacher: teacher.classifier=false"
                raise UserError(
                    f"the {role} gives {counted(given, 'logit')}, expected {classes}, one for each class"
                    f"{f' of {data.name}' if data else ''}; {todo}"
                )
        self.left_out = self.distiller.leave_out(labels=not labelled, logits=not classes)
        for role, network in (("student", self.student), ("teacher", self.teacher)):
            why = getattr(network, "stageless", "")
            if why and self.distiller.needs.features:
                raise UserError(
                    f"{self.distiller.title} reads four stages of the {role}, and none were found ({why}); "
                    f"pass {role}.taps=[...], or taps=[...] to kdzoo.models.wrap: four submodules, shallow to deep"
                )
            why = getattr(network, "inseparable", "") if role in self.distiller.needs.stages else ""
            if why:
                raise UserError(
                    f"{self.distiller.title} calls the {role}'s stages one by one, and this {role} cannot be "
                    f"cut into them ({why}); choose another {role}, such as a ResNet, or another method"
                )
        if data is None:
            if labels is not None and not (isinstance(labels, Tensor) and labels.ndim == 1):
                raise UserError(f"labels of the training set are {described(labels)}; expected int64 of shape (N,)")
            if labels is None and self.distiller.needs.labels:
                raise UserError(
                    f"{self.distiller.title} reads the labels of the training set; pass labels=..., one for "
                    "each of its images, and give each batch its index"
                )
            names = tuple(f"class {k}" for k in range(classes))
            size = image_size or int(getattr(self.student, "image_size", 0))
            labels = torch.zeros(0, dtype=torch.int64) if labels is None else labels
            data = DataSpec("your data", classes, names, size, labels)
        self.distiller.assemble(student, teacher, data)
        _check_built(self.distiller, self.student)

    def train(self, mode: bool = True) -> "Distillation":
        super().train(mode)
        if self.teacher is not None:
            self.teacher.eval()
        return self

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Compute the weighted loss terms, float32 scalars by name; minimise their sum.

        Raises:
            UserError: the batch is of another type, or lacks labels, views or an index that the method reads; the
                method's phase before training has not run; or a buffer of the method keeps the batch's graph.
        """
        distiller = self.distiller
        _check_batch(batch, distiller)
        device = batch.images.device.type
        is_meta = batch.images.is_meta  # shapes alone are asked for
        if self.precision is None and distiller.has_phase and not (distiller.is_prepared or is_meta):  # no loop of ours
            raise UserError(
                f"{distiller.title} has a phase before training; call prepare(batches) first, with the batches of "
                "an epoch, such as a list of Batch.of(...), or load the state of a training that went before"
            )
        if batch.index is None and distiller.needs.labels:
            raise UserError(
                f"{distiller.title} reads which images of the training set a batch holds, and this one does not say; "
                "pass their rows as Batch.of(..., index=...)"
            )
        if batch.labels is None and any(distiller.weights.get(term) for term in distiller.label_terms):
            raise UserError("the batch has no labels, and the loss reads them; give it labels, or pass labelled=False")
        is_first = not (torch.compiler.is_compiling() or self.is_called or is_meta)
        if is_first:
            self.is_called = True
            warn_of_bytes(batch.images, "unless your networks do so")
        student, teacher = self._views_on(device)
        try:
            with autocast(device, FLOAT32):
                terms = distiller(student, _shown(teacher, batch), batch)
        except RuntimeError as error:
            why = "" if is_shortage(error) else self._misfit(batch)
            if not why:
                raise
            raise UserError(f"{why} ({told(error)})") from error
        if is_first:
            _check_kept(distiller)
            if self.precision is None:  # the engine checks every step
                _check_terms(terms, distiller)
        return terms

    def _misfit(self, batch: Batch) -> str:
        """Say how a batch, or a method's modules by now, differ from what these modules were made for, if they do."""
        title, (height, width) = self.distiller.title, batch.images.shape[2:]
        for name, weight in self.distiller.named_parameters():
            if weight.is_floating_point() and weight.dtype != torch.float32:
                kind = str(weight.dtype).removeprefix("torch.")
                return (
                    f"{name} of {title} is {kind}, and methods compute in float32; call distillation.distiller.float()"
                )
        if self.image_size is None or (height, width) == (self.image_size,) * 2:
            return ""
        return (
            f"{title} was made for images of {self.image_size} x {self.image_size}, and those of this batch are "
            f"{height} x {width}; bring them to that size"
        )

    def prepare(self, batches: Iterable[Batch]) -> None:
        """Run the method's phase before training, if it has one. Each iteration over ``batches`` is an epoch.

        Raises:
            UserError: ``batches`` can be read only once, or holds none, or what it holds is no batch for the method.
        """
        if isinstance(batches, Iterator):
            raise UserError(
                f"the batches are of type {type(batches).__name__}, which is used up when it was read once, and "
                "prepare may read them several times; pass a list"
            )
        device = next((p.device.type for p in self.student.parameters()), "cpu")
        student, teacher = self._views_on(device)
        teacher = copy(teacher)  # without a teacher it is the student's own view
        with autocast(device, FLOAT32), casting_anew():  # a phase may train the student
            self.distiller.prepare(student, teacher, _Shown(batches, teacher, self.distiller))
        self.distiller.is_prepared = True

    def pass_student_through(self, passes: Callable[[Tensor, Show], Output]) -> Callable[[Tensor, Show], Output]:
        """Let ``passes`` make the student's passes, such as compiled code of it, and return what made them before."""
        before, self._views[0].passes = self._views[0].passes, passes
        return before

    def deploy(self) -> nn.Module:
        """Return the network to ship, which is the student for most methods."""
        return self.distiller.deploy(self.student)

    def _views_on(self, device: str) -> tuple[NetworkView, NetworkView]:
        """Both networks; a method that needs no teacher never calls the second."""
        if self.precision is None:  # the loop is not ours, so autocast may be switched on around this call
            for view in self._views:
                view.precision = ambient(device)
        return self._views[0], self._views[-1]


def distill(
    student: nn.Module,
    teacher: nn.Module | None,
    method: str,
    *,
    num_classes: int,
    image_size: int,
    labels: Tensor | None = None,
    labelled: bool = True,
    **keywords: Any,
) -> Distillation:
    """Make one module of student, teacher and a method, to train the student in any loop.

    Args:
        student: any module from images (B, 3, H, W) in [0, 1] to logits (B, K). It is trained in place. Where it
            expects normalised images, pass ``kdzoo.models.wrap(student, mean=..., std=...)``.
        teacher: the same, trained before; None for a method that needs none.
        method: a method's name (``kdzoo list distillers`` shows all), or the path of a file that holds one.
        num_classes: K; 0 for networks without a classifier, which return embeddings (B, D).
        image_size: side in pixels.
        labels: (N,) int64, of the training set, for methods that read them (crd). Each batch then needs its ``index``.
        labelled: whether batches have labels. Without them (``Batch.of(images)``) the terms that read labels are left
            out.
        keywords: the method's own, such as ``temperature=2.0``; ``kdzoo show METHOD`` explains them.

    Returns:
        The module. A method with a phase before training, such as ofd, asks for its ``prepare(batches)`` first;
        ``deploy()`` returns the network to ship.

    Raises:
        UserError: an unknown method or keyword, with the nearest, or networks that do not fit.

    Example:
        >>> distillation = kdzoo.distill(cnn, wider_cnn, "kd", num_classes=10, image_size=32, temperature=2.0)
        >>> optimizer = torch.optim.SGD([p for p in distillation.parameters() if p.requires_grad], lr=0.05)
        >>> for images, labels in loader:
        ...     terms = distillation(Batch.of(images, labels, num_classes=10))
        ...     sum(terms.values()).backward()
        ...     optimizer.step()
        ...     optimizer.zero_grad()
        >>> all(term.isfinite() for term in terms.values())
        True
    """
    from kdzoo import registry
    from kdzoo.keywords import keyword_settings, name

    kind = registry.load(name(method=method))
    distiller = kind(**keyword_settings(kind, keywords, prefix=""))
    given = {"num_classes": num_classes, "image_size": image_size, "labels": labels, "labelled": labelled}
    return Distillation(student, teacher, distiller, **given)  # type: ignore[arg-type]  # of the types that it takes


def _shown(teacher: NetworkView, batch: Batch) -> NetworkView:
    """The teacher's view of a batch, which may be other images than the student's."""
    return teacher if batch.teacher_images is None else teacher.seeing(batch.teacher_images, batch.images)


class _Shown:
    """Batches of a phase before training, of which the teacher sees what each says."""

    def __init__(self, batches: Iterable[Batch], teacher: NetworkView, distiller: Distiller):
        self.batches, self.teacher, self.distiller = batches, teacher, distiller

    def __iter__(self) -> Iterator[Batch]:
        batch = None
        for batch in self.batches:
            _check_batch(batch, self.distiller)
            self.teacher.other = None if batch.teacher_images is None else (batch.images, batch.teacher_images)
            yield batch
        if batch is None:
            raise UserError("an epoch of the phase before training has no batches; pass prepare at least one")


def _check_batch(batch: object, distiller: Distiller) -> None:
    """Check that a batch is one, and that it has the views that the method reads."""
    if not isinstance(batch, Batch):
        kind = type(batch).__name__
        raise UserError(f"the batch is of type {kind}; expected Batch.of(images, labels, num_classes=...)")
    missing = [view for view in distiller.needs.views if view not in batch.views]
    if missing and distiller.is_active:
        shapes = "; ".join(f"{view} is {VIEWS[view]}" for view in missing if view in VIEWS)
        raise UserError(
            f"{distiller.title} reads {', '.join(missing)} of the batch's views, and it has none; give it those as "
            f"batch._replace(views={{...}}), which kdzoo run makes by itself: {shapes}"
        )


def _check_distiller(distiller: object) -> None:
    """Check that a method's constructor and its needs are those of a distiller."""
    if not isinstance(distiller, Distiller):
        kind = (
            f"the class {distiller.__name__}" if isinstance(distiller, type) else f"of type {type(distiller).__name__}"
        )
        raise UserError(f"the distiller is {kind}; expected a method with its keywords, such as KD(temperature=2.0)")
    if not hasattr(distiller, "weights"):
        raise UserError(
            f"the constructor of {distiller.title} does not call super().__init__; pass that the weight of each term, "
            "such as super().__init__(ce=ce)"
        )
    if not isinstance(distiller.needs, Needs):
        raise UserError(
            f"needs of {distiller.title} is of type {type(distiller.needs).__name__}; expected kdzoo.Needs, such as "
            "needs = Needs(features=False)"
        )
    for name, roles in {"preactivations": distiller.needs.preactivations, "stages": distiller.needs.stages}.items():
        if not isinstance(roles, tuple) or any(role not in ("student", "teacher") for role in roles):
            raise UserError(
                f"{name}={roles!r} in the needs of {distiller.title}; expected a tuple of 'student' or 'teacher', such "
                f"as {name}=('teacher',)"
            )


def _check_built(distiller: Distiller, student: nn.Module) -> None:
    on_meta = any(weight.is_meta for weight in student.parameters())
    for name, tensor in chain(distiller.named_parameters(), distiller.named_buffers()):
        if is_lazy(tensor):
            raise UserError(
                f"{name} of {distiller.title} has no shape when build() is done; make its layer with its number of "
                "inputs in place of a lazy one, such as student.embedding.shape[1]"
            )
        if tensor.is_meta and not on_meta:
            raise UserError(
                f"{name} of {distiller.title} has a shape and no numbers, as all that build() is given; make it with "
                "numbers, such as torch.zeros(...)"
            )


def _check_terms(terms: object, distiller: Distiller) -> None:
    """Check that a loss is a dictionary of tensors."""
    if not isinstance(terms, Mapping):
        raise UserError(
            f"the loss of {distiller.title} is of type {type(terms).__name__}; expected a dictionary of its terms, "
            "such as self.weigh(ce=lambda: ...)"
        )
    for name, term in terms.items():
        if not isinstance(term, Tensor):
            raise UserError(f"the term '{name}' of {distiller.title} is {described(term)}; return a tensor")


def _whole(**keyword: object) -> int | None:
    """Return a keyword's whole number, of whichever type; None as it is."""
    ((name, value),) = keyword.items()
    try:
        return None if value is None else operator.index(value)  # type: ignore[arg-type]  # says so itself
    except TypeError:
        raise UserError(f"{name}={value!r}: expected a whole number") from None


def _check_kept(distiller: Distiller) -> None:
    """Check that no buffer keeps the graph of a batch: the next one's backward pass would enter it again."""
    for name, buffer in distiller.named_buffers():
        if buffer.grad_fn is not None:
            raise UserError(
                f"the buffer {name} of {distiller.title} keeps the graph of the batch that it was made from; compute "
                "it under torch.no_grad(), or from detached tensors, such as student.logits.detach()"
            )


def _check_networks(student: object, teacher: object) -> None:
    """Check that both are modules, and that the teacher, which is frozen, holds no weight that the student learns."""
    for role, network in {"student": student, "teacher": student if teacher is None else teacher}.items():
        if not isinstance(network, nn.Module):
            raise UserError(f"the {role} is of type {type(network).__name__}; expected a torch.nn.Module")
    if isinstance(student, nn.Module) and isinstance(teacher, nn.Module):
        learned = {weight for weight in student.parameters() if weight.requires_grad}
        if not learned.isdisjoint(teacher.parameters()):
            raise UserError(
                "the teacher shares weights with the student, and a teacher's are frozen; pass a copy.deepcopy of it"
            )


def _network(role: str, module: nn.Module, num_classes: int | None, image_size: int | None) -> nn.Module:
    """The module itself where it can tell its shapes, as networks of kdzoo do, and else wrapped."""
    if hasattr(module, "shapes"):
        return module
    if num_classes is None or image_size is None:
        raise UserError(
            f"the {role} is a bare {type(module).__name__}; pass num_classes=... and image_size=..., "
            "or a network made by kdzoo.models.wrap"
        )
    from kdzoo import models

    return models.wrap(module, image_size=image_size, num_classes=num_classes, name=f"the {role}")


def _shapes(network: nn.Module) -> Output:
    return network.shapes()  # type: ignore[operator]  # known to be there
