"""Ask the teacher once for each image, where every epoch shows it the same images."""

from collections.abc import Iterable, Sequence
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from kdzoo.data import Loader
from kdzoo.distiller import Batch, Needs
from kdzoo.engine.agreement import OUTPUTS, agree
from kdzoo.engine.graphs import Plain
from kdzoo.engine.host_work import first_line
from kdzoo.engine.lane import Lane
from kdzoo.engine.passes import TeacherPasses, why_unsteady
from kdzoo.engine.progress import Progress
from kdzoo.engine.termination import Termination
from kdzoo.errors import is_shortage
from kdzoo.models import Ensemble, Network
from kdzoo.outputs import Output
from kdzoo.precision import PRECISIONS, autocast
from kdzoo.quantities import counted
from kdzoo.settings import Settings
from kdzoo.tensors import leaves

MOST = 2**29  # bytes of all that a teacher can show of all images, in float32


class Stored(NamedTuple):
    """Rows of a tensor, each in one piece of memory, in the layout of a batch of them."""

    rows: Tensor  # (N, ...), contiguous, the dimensions of a row in the order of their strides
    back: tuple[int, ...]  # the dimensions of a batch among those of ``rows``

    @classmethod
    def like(cls, batch: Tensor, images: int) -> "Stored":
        """Make room for so many rows as those of a batch (B, ...)."""
        order = [0, *sorted(range(1, batch.ndim), key=batch.stride, reverse=True)]
        rows = batch.new_empty(images, *(batch.shape[dim] for dim in order[1:]))
        return cls(rows, tuple(order.index(dim) for dim in range(batch.ndim)))

    def write(self, batch: Tensor, start: int) -> None:
        """Store a batch (B, ...) from row ``start`` on."""
        self.rows[start : start + len(batch)].permute(self.back).copy_(batch)

    def batch(self, index: Tensor) -> Tensor:
        """Copy the rows ``index`` (B,): (B, ...)."""
        return self.rows[index].permute(self.back)


class Remembered(Plain):
    """Plain steps in which the teacher's outputs for the batch's images were computed before the first step.

    They are computed in the order of the training set at each start, so that a run which is continued reads the
    same bits. For other images, such as further views, the teacher is asked in the step.

    Args:
        teacher: makes the passes.
        outputs: of all training images, a batch after the other, as the passes show them.
        images: how many there are.
        views: whether methods show it other images too.
    """

    def __init__(self, teacher: TeacherPasses, outputs: Iterable[Output], images: int, views: bool):
        super().__init__(teacher)
        self.shared, self.asks_teacher = teacher, views
        waiting = iter(outputs)
        self.first = next(waiting)  # what an output is made of
        self.stored = [Stored.like(part, images) for part in leaves(self.first)]
        start = 0
        for output in chain([self.first], waiting):
            for stored, part in zip(self.stored, leaves(output), strict=True):
                stored.write(part, start)
            start += len(output.logits)

    def begin(self, batch: Batch, step: int) -> Batch:
        batch = super().begin(batch, step)
        images = batch.images if batch.teacher_images is None else batch.teacher_images
        self.shared.remember(images, self.output(batch.index))
        return batch

    def output(self, index: Tensor) -> Output:
        """Copy the output for the images ``index`` (B,) of the training set."""
        batches = iter([stored.batch(index) for stored in self.stored])
        return tree_map_only(Tensor, lambda _: next(batches), self.first)


def applies(settings: Settings, device: torch.device, teacher: Network, needs: Iterable[Needs], loader: Loader) -> bool:
    """Tell whether the teacher is asked once for each image.

    What decides is part of each run, and neither free memory nor the methods beside it are, so that its bits are the
    same everywhere. On a GPU the teacher is asked in each step: they are graphs there, and such a teacher costs little.

    Args:
        settings: of all runs.
        device: of the training.
        teacher: that the runs share.
        needs: of their methods.
        loader: of the batches.
    """
    return (
        device.type == "cpu"
        and loader.teacher_sees_the_same
        and settings.protocol.epochs > 1
        and settings.engine.accumulate == 1
        and settings.engine.devices == 1
        and not (isinstance(teacher, Ensemble) and teacher.turns)
        and any(need.teacher and not need.teacher_grad for need in needs)
        and bytes_of(teacher, loader) <= MOST
    )


def share(settings: Settings, device: torch.device, teacher: Network, needs: Iterable[Needs], loader: Loader) -> float:
    """Compute in what share of the steps the teacher is asked; the arguments are those of ``applies``."""
    return 1 / settings.protocol.epochs if applies(settings, device, teacher, needs, loader) else 1.0


def bytes_kept(
    settings: Settings, device: torch.device, teacher: Network, needs: Iterable[Needs], loader: Loader
) -> int:
    """Count the bytes that the teacher's answers take at most; the arguments are those of ``applies``."""
    return bytes_of(teacher, loader) if applies(settings, device, teacher, needs, loader) else 0


def bytes_of(teacher: Network, loader: Loader) -> int:
    """Count the bytes of all that a teacher can show of all training images, in float32."""
    return 4 * loader.images * sum(tensor[0].numel() for tensor in leaves(teacher.shapes()))


def steps(
    lanes: Sequence[Lane],
    teacher: TeacherPasses | None,
    loader: Loader,
    progress: Progress,
    termination: Termination,
) -> Remembered | None:
    """Ask the teacher for all images, and make the steps of a training that reads its answers.

    Returns:
        None where it is asked in each step, or where every lane that reads it has failed.
    """
    settings, device = lanes[0].run.settings, lanes[0].device
    needs = [lane.distillation.distiller.needs for lane in lanes if lane.failure is None]
    if teacher is None or not applies(settings, device, teacher.network, needs, loader):
        return None
    name, precision = teacher.network.name, settings.engine.precision
    if why := why_unsteady(teacher.fast, precision):
        progress.say(f"teacher {name} is asked in each step, as it {why}")
        return None

    def asked(images: Tensor) -> Output:
        with torch.no_grad(), autocast(device.type, PRECISIONS[precision]):
            return teacher.calls(images, teacher.show)

    try:
        with progress.doing(f"showing {counted(loader.images, 'image')} to {name}"), termination.at_once():
            outputs = map(asked, loader.teachers_images())
            remembered = Remembered(teacher, outputs, loader.images, bool(loader.views))
            batch = next(loader.batches(0, 1))
            images = batch.images if batch.teacher_images is None else batch.teacher_images
            compared = (remembered.output(batch.index), asked(images), asked(images))
    except Exception as error:  # a network may take batches of one size alone
        if is_shortage(error):
            raise
        progress.say(f"teacher {name} is asked in each step, as it fails on all images beforehand: {first_line(error)}")
        return None
    for found, plain, again in zip(*map(leaves, compared), strict=True):
        if not agree([found], [plain], [again], OUTPUTS[precision]):
            progress.say(f"teacher {name} is asked in each step, as its answers depend on the other images of a batch")
            return None
    return remembered
