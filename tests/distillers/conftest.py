"""Closed-form outputs of a student and a teacher for the tests of single methods."""

from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from kdzoo import Batch, DataSpec, Distiller, Output

Grids = Sequence[tuple[int, int, int]]  # channels, height, width of each stage
STUDENT: Grids = ((4, 8, 8), (6, 6, 6), (8, 4, 4), (10, 2, 2))
TEACHER: Grids = ((5, 7, 7), (5, 7, 7), (5, 7, 7), (5, 7, 7))


@pytest.fixture
def waves() -> Callable[..., Tensor]:
    """Numbers of size 1 in any shape, by a closed form without a pattern along any axis."""

    def build(*shape: int, phase: float = 0.0, dtype: torch.dtype = torch.float32) -> Tensor:
        t = torch.arange(int(np.prod(shape)), dtype=torch.float64)
        return (torch.sin(1.7 * t + phase) + torch.cos(0.61 * t * t.sqrt() - phase)).reshape(shape).to(dtype)

    return build


@pytest.fixture
def output(waves: Callable[..., Tensor]) -> Callable[..., Output]:
    """An output of 6 images: logits of ``classes``, an embedding, maps of ``grids`` and others before their last ReLU.

    All may be a constant.
    """

    def build(grids: Grids = STUDENT, classes: int = 10, phase: float = 0.0, constant: float | None = None) -> Output:
        shapes = [(6, classes), (6, grids[-1][0]), *((6, *grid) for grid in grids), *((6, *grid) for grid in grids)]
        if constant is None:
            phases = [phase] * (2 + len(grids)) + [phase + 0.5] * len(grids)
            tensors = [waves(*shape, phase=p) for shape, p in zip(shapes, phases, strict=True)]
        else:
            tensors = [torch.full(shape, constant) for shape in shapes]
        leaves = [tensor.requires_grad_() for tensor in tensors]
        features, preactivations = leaves[2 : 2 + len(grids)], leaves[2 + len(grids) :]
        return Output(leaves[0], leaves[1], tuple(features), tuple(preactivations))

    return build


@pytest.fixture
def student(output: Callable[..., Output]) -> Output:
    return output(STUDENT)


@pytest.fixture
def teacher(output: Callable[..., Output]) -> Output:
    return output(TEACHER, phase=1.0)


@pytest.fixture
def data() -> Callable[..., DataSpec]:
    """A data set of so many classes; even and odd classes make two superclasses where they are asked for."""

    def build(classes: int = 10, superclasses: bool = False) -> DataSpec:
        names = tuple(f"class {k}" for k in range(classes))
        coarse = tuple(k % 2 for k in range(classes)) if superclasses else ()
        return DataSpec("sines", classes, names, 32, torch.arange(classes), superclasses=coarse)

    return build


@pytest.fixture
def batch() -> Callable[..., Batch]:
    """A batch of 6 images, the last two of one class."""

    def build(classes: int = 10) -> Batch:
        labels = torch.tensor([0, 1, 2, 3, 4, 4]) % classes
        return Batch.of(torch.zeros(6, 3, 2, 2), labels, classes)

    return build


@pytest.fixture
def logits(waves: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Logits of 6 images in float64, by a closed form."""

    def build(phase: float = 0.0, classes: int = 10) -> Tensor:
        return 2 * waves(6, classes, phase=phase, dtype=torch.float64)

    return build


@pytest.fixture
def terms_of(data: Callable[..., DataSpec], batch: Callable[..., Batch]) -> Callable[..., dict[str, Tensor]]:
    """The loss terms of a method that reads logits alone, halfway through training or where ``progress`` says."""

    def compute(method: Distiller, student: Tensor, teacher: Tensor, **changed: Tensor) -> dict[str, Tensor]:
        outputs = [Output(rows, torch.zeros(len(rows), 3)) for rows in (student, teacher)]
        classes = student.shape[1]
        given = batch(classes)._replace(**{"progress": torch.tensor(0.5), **changed})
        return method.assemble(*outputs, data(classes)).loss(*outputs, given)

    return compute
