"""Bring back what a finished run ships, from its folder alone."""

from pathlib import Path

import torch
from torch import nn

from kdzoo import models, registry
from kdzoo.distiller import DataSpec
from kdzoo.errors import UserError, out_of_memory_told
from kdzoo.files import path_of
from kdzoo.models import Student
from kdzoo.settings import Settings
from kdzoo.store.folder import RunFolder

FACTS = "written by an earlier version of kdzoo, it does not say what its network is like; train it again"


@out_of_memory_told(lambda: "loading a student")
def load(run: str | Path, *, trust_code: bool = False) -> Student:
    """Load the student of a finished run, ready to use: images go in, logits come out.

    Neither the data nor the teacher is needed, so the folder may come from another machine.

    Args:
        run: the run's folder.
        trust_code: import the file or module that the student's network is made by, whoever wrote it.

    Returns:
        A module on the CPU in evaluation mode. It takes images (B, 3, H, W) of any size, uint8 or float in [0, 1], and
        gives logits (B, K), which ``classes`` names, or the embedding (B, D) where the student has no classifier. See
        ``kdzoo.models.Student``.

    Raises:
        UserError: the run is not finished, damaged, of another version, or names code that is not trusted.

    Example:
        >>> run = kdzoo.run("none", "resnet8", overrides=quick, quiet=True)
        >>> student = kdzoo.load(run.folder)
        >>> photos = torch.randint(256, (4, 3, 120, 160), dtype=torch.uint8)
        >>> student(photos).shape, student.classes[:3]
        (torch.Size([4, 10]), ('0', '1', '2'))
    """
    folder = RunFolder(path_of(run).resolve())
    result, working = folder.finished(), Path.cwd()
    folder.check_student(result)
    facts = models.written_facts(folder.student)
    classes = folder.read_classes() if facts.get("classifier", True) else ()
    with folder.home(), torch.random.fork_rng(devices=[]):
        settings = folder.run(trust_code, working, parts_used(folder)).settings
        spec = DataSpec(
            settings.data.name,
            len(classes),
            classes,
            result.image_size or facts.get("image_size") or 0,
            torch.arange(len(classes)),  # as of one training image of each
        )
        if not spec.image_size:
            raise UserError(f"{folder.student}: {FACTS}")
        network = shipped(settings, spec, folder)
    return Student(network, classes=classes, image_size=spec.image_size, test_crop=settings.protocol.test_crop)


def parts_used(folder: RunFolder) -> tuple[str, ...]:
    """List the parts of a run whose code makes what it ships: the student, and the method where that adds to it."""
    adds = models.written_facts(folder.student).get("teacher") is not None
    return ("student", "distiller") if adds else ("student",)


def shipped(settings: Settings, spec: DataSpec, folder: RunFolder) -> nn.Module:
    """Make the module that a run ships, and load its weights: images (B, 3, H, W) in [0, 1] -> an ``Output``.

    Where a method ships more than the student, its modules are built from the shapes of the teacher's outputs.
    """
    facts, student = models.written_facts(folder.student), settings.student
    if not facts:
        raise UserError(f"{folder.student}: {FACTS}")
    network = models.load_given(
        student.name, spec, folder.student, role="student", taps=student.taps, **student.options
    )
    if facts["teacher"] is None:
        return network
    try:
        teacher = models.output_of(facts["teacher"])
    except UserError as error:
        raise UserError(f"{folder.student} is damaged ({error}); copy the whole folder again") from error
    distiller = registry.load(settings.distiller.name)(**settings.distiller.keywords)
    deployed = distiller.assemble(network.shapes(), teacher, spec).deploy(network)
    models.load_weights(deployed, folder.student)
    return deployed.eval()
