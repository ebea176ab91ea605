"""Finish a lane: its student, what that costs and takes the test images for, and its result go to the run's folder."""

import sys
from statistics import median
from typing import Any

import numpy as np
import psutil
import torch
from torch import nn

from kdzoo import models
from kdzoo.data import Dataset
from kdzoo.distillation import Distillation
from kdzoo.engine import cost
from kdzoo.engine.faults import check_finite
from kdzoo.engine.lane import Lane
from kdzoo.engine.measure import Answers, Likeness, compare, evaluate, joined, measured
from kdzoo.engine.passes import Teacher
from kdzoo.files import digest, write_text
from kdzoo.naming import names_of
from kdzoo.store import checkpoint
from kdzoo.store.predictions import SIDE, Predictions, mistakes
from kdzoo.store.result import Result


def finish(lane: Lane, dataset: Dataset, teacher: Teacher | None, costs: dict[str, cost.Cost]) -> Result:
    """Write the student that ships and what it takes the test images for, then the result.

    Args:
        lane: after its last epoch.
        dataset: that it was trained on.
        teacher: of the lane, if its method has one.
        costs: measured for lanes beside it, by architecture; what is measured for this one is added.
    """
    settings, history, shipped = lane.run.settings, lane.history, lane.shipped()
    check_finite(shipped, "the student to ship")
    lane.ranks.once(models.save_weights, shipped, lane.folder.student, facts_of(shipped, lane.distillation))
    best = max((record for record in history if record["top1"] is not None), key=lambda record: record["top1"])
    result = Result(
        folder=lane.folder.path,
        data=settings.data.name,
        protocol=settings.protocol.name,
        teacher=settings.teacher.title,
        student=settings.student.name,
        distiller=settings.distiller.name,
        fidelity=str(lane.distillation.distiller.fidelity),
        seed=settings.seed,
        teacher_top1=None if teacher is None else teacher.top1,
        teachers_top1=() if teacher is None else teacher.each,
        top1=history[-1]["top1"],
        top5=history[-1]["top5"],
        best_top1=best["top1"],
        best_epoch=best["epoch"],
        epochs=settings.protocol.epochs,
        seconds=round(lane.seconds, 1),
        images_per_second=median(record["images_per_second"] for record in history),
        names=names_of(settings),
        fingerprint=settings.data.fingerprint,
        parameters=count(shipped),
        extra_parameters=count(lane.trained) - count(shipped),
        peak_memory=peak_memory(lane.device),
        weights=digest(lane.folder.student) if lane.ranks.first else "",
        best_top5=best["top5"],
        ship=settings.output.ship,
        image_size=dataset.spec.image_size,
        file_bytes=lane.folder.student.stat().st_size if lane.ranks.first else None,
        measured=measured(dataset, shipped),
        **likeness(shipped, lane, dataset, teacher)._asdict(),
        **cost_of(shipped, lane, dataset, costs)._asdict(),
    )
    lane.ranks.once(write_text, lane.folder.classes, "".join(f"{name}\n" for name in dataset.spec.class_names))
    lane.ranks.once(write_predictions, lane, shipped, dataset, teacher)
    lane.loggers.finish(history, result)  # before the run counts as finished: a kill in between is made up for
    lane.ranks.once(lane.folder.write_result, result)
    lane.ranks.once(checkpoint.remove, lane.folder.checkpoints)
    return result


def likeness(shipped: nn.Module, lane: Lane, dataset: Dataset, teacher: Teacher | None) -> Likeness:
    """Measure what accuracy does not say of a student that learned without labels, or without a classifier."""
    if dataset.is_labelled and measured(dataset, shipped) == "accuracy":
        return Likeness()
    settings = lane.run.settings
    network = None if teacher is None else teacher.network
    return compare(shipped, network, dataset, settings.engine.precision, settings.protocol.test_crop)


def facts_of(shipped: nn.Module, distillation: Distillation) -> dict[str, Any]:
    """Describe what a student's file must be read with; where more ships, with the shapes that it was built from."""
    student, teacher = distillation.student, distillation.teacher
    if isinstance(shipped, models.Network):
        return shipped.facts()
    assert isinstance(student, models.Network), "the engine trains networks of kdzoo.models"
    known = teacher if distillation.distiller.needs.teacher and isinstance(teacher, models.Network) else student
    return {**student.facts(), "teacher": models.shapes_of(known.shapes())}


def cost_of(shipped: nn.Module, lane: Lane, dataset: Dataset, known: dict[str, cost.Cost]) -> cost.Cost:
    """Measure what a lane's student costs, once for all students of one architecture, which ``known`` holds."""
    if not lane.ranks.first:
        return cost.Cost()
    architecture = f"{lane.run.settings.student} {shipped}"
    if architecture not in known:
        known[architecture] = cost.measure(shipped, dataset.spec.image_size, lane.device)
    return known[architecture]


def write_predictions(lane: Lane, shipped: nn.Module, dataset: Dataset, teacher: Teacher | None) -> None:
    """Write what the student that ships takes the test images for, and its teacher, by one more pass of the student.

    The pass makes the file a function of weights and data alone, also where training was resumed after its last epoch.
    """
    settings, answers = lane.run.settings, list[Answers]()
    evaluate(shipped, dataset, settings.engine.precision, settings.protocol.test_crop, answers=answers)
    labels, classes, confidence = (each.numpy() for each in joined(answers))
    worst = mistakes(labels, classes, confidence)
    pictures, titles = dataset.test_pictures(worst, SIDE)
    theirs = np.zeros(0, np.int64) if teacher is None or teacher.classes is None else teacher.classes.numpy()
    Predictions(labels, classes, confidence, theirs, worst, pictures, titles).write(lane.folder.predictions)


def count(module: nn.Module) -> int:
    """Count the parameters of a module."""
    return sum(p.numel() for p in module.parameters())


def peak_memory(device: torch.device) -> int:
    """Measure the most bytes ever in use: of the device, or of this process where it computes on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = getattr(psutil.Process().memory_info(), "peak_wset", None)
    if peak is not None:  # on Windows, which has no module resource
        return peak
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
