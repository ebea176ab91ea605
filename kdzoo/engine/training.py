"""Trains one run's student and writes its folder, given the data and, where the method has one, the teacher."""

from dataclasses import dataclass
from statistics import median

import torch
from torch import nn

from kdzoo import config, models, registry
from kdzoo.data import Dataset
from kdzoo.distillation import Distillation
from kdzoo.engine import checkpoint, loop
from kdzoo.engine.device import seed_of
from kdzoo.engine.lane import Lane, SharedTeacher
from kdzoo.engine.progress import Progress
from kdzoo.errors import UserError
from kdzoo.results.folder import Result, RunFolder


@dataclass(frozen=True)
class Teacher:
    """A frozen network on its device, and what it reaches."""

    network: models.Network
    top1: float  # in percent, on the test set


def build(settings: config.Settings, dataset: Dataset, teacher: nn.Module | None) -> Distillation:
    """Student and distiller of these settings on the data's device; the seed alone decides their weights.

    Raises:
        UserError: teacher and student differ in their number of classes, or the method does not fit the pair.
    """
    spec = dataset.spec
    torch.manual_seed(seed_of(settings.seed, "student"))
    student = models.create(settings.student.name, spec, pretrained=settings.student.pretrained)
    shapes = student.shapes()
    network = teacher.network if isinstance(teacher, SharedTeacher) else teacher
    teacher_shapes = shapes if network is None else network.shapes()
    if teacher_shapes.logits.shape[1] != shapes.logits.shape[1]:
        raise UserError(
            f"the teacher tells {teacher_shapes.logits.shape[1]} classes apart and the student "
            f"{shapes.logits.shape[1]}; both must have the {spec.num_classes} of {spec.name}"
        )
    keywords = {key: value for key, value in settings.distiller.items() if key != "name"}
    torch.manual_seed(seed_of(settings.seed, "distiller"))
    distiller = registry.load(settings.distiller["name"])(shapes, teacher_shapes, spec, **keywords)
    if teacher is None and distiller.needs.teacher:
        raise UserError(f"distiller '{settings.distiller['name']}' needs a teacher; pass --teacher NAME")
    distillation = Distillation(student, teacher, distiller)
    return distillation.to(spec.labels.device).to(memory_format=torch.channels_last)


def train_one(settings: config.Settings, dataset: Dataset, teacher: Teacher | None, progress: Progress) -> Result:
    """Trains a run from where its folder stands to its end."""
    folder = RunFolder.of(settings)
    shared = None if teacher is None else SharedTeacher(teacher.network)
    distillation = build(settings, dataset, shared)
    loader = dataset.loader(
        settings.protocol,
        seed=settings.seed,
        views=distillation.distiller.needs.views,
        workers=settings.data.workers,
    )
    if teacher is not None:
        teacher.network.wants_features = distillation.distiller.needs.features
    folder.open(settings)
    lane = Lane(settings, distillation.train(), folder, dataset.spec.labels.device, loader.steps_per_epoch)
    loop.train([lane], shared, dataset, loader, progress)
    if lane.failure is not None:
        raise lane.failure
    return finish(lane, dataset, teacher)


def finish(lane: Lane, dataset: Dataset, teacher: Teacher | None) -> Result:
    """Writes the student that ships, then the result."""
    settings, history = lane.settings, lane.history
    best = max(history, key=lambda record: record["top1"])
    result = Result(
        folder=lane.folder.path,
        data=settings.data.name,
        protocol=settings.protocol.name,
        teacher=settings.teacher.name,
        student=settings.student.name,
        distiller=settings.distiller["name"],
        fidelity=str(lane.distillation.distiller.fidelity),
        seed=settings.seed,
        teacher_top1=None if teacher is None else teacher.top1,
        top1=history[-1]["top1"],
        top5=history[-1]["top5"],
        best_top1=best["top1"],
        best_epoch=best["epoch"],
        epochs=settings.protocol.epochs,
        seconds=round(lane.seconds, 1),
        images_per_second=median(record["images_per_second"] for record in history),
    )
    models.save_weights(lane.deployed(), lane.folder.student)
    lane.folder.write_result(result)
    checkpoint.remove(lane.folder.checkpoints)
    return result
