"""Where teachers come from: a file, the teachers trained before, timm's weights, or training now."""

from dataclasses import asdict, replace
from math import sqrt

import torch

from kdzoo import models
from kdzoo.data import Dataset
from kdzoo.engine.measure import evaluate
from kdzoo.engine.progress import Progress
from kdzoo.engine.training import Teacher, train_one
from kdzoo.errors import UserError
from kdzoo.files import cache_folder
from kdzoo.randomness import seed_of
from kdzoo.settings import OutputPlace, Run, resolve
from kdzoo.store.folder import RunFolder
from kdzoo.store.lock import RunLock


def obtain(run: Run, dataset: Dataset, progress: Progress) -> Teacher:
    """Get the teacher of a run, on its device and measured.

    Raises:
        UserError: its weights are missing or do not fit, or it is hardly better than chance.
    """
    settings, wanted, spec = run.settings, run.settings.teacher, dataset.spec
    assert wanted.name is not None
    if wanted.weights:
        network = untrained(run, dataset)
        origin = models.load_weights(network, wanted.weights, role="teacher")
    elif is_published(run, dataset):
        origin = "timm's pretrained weights"
        with progress.doing(f"loading the pretrained weights of {wanted.name}"):
            network = untrained(run, dataset, fetch=True)
    else:
        folder = trained(run, dataset, progress)
        network = untrained(run, dataset)
        models.load_weights(network, folder.student)
        origin = str(folder.path)
    device = dataset.device
    network.to(device).to(memory_format=torch.channels_last).eval().requires_grad_(False)
    with progress.doing(f"measuring teacher {wanted.name} on {spec.name}"):
        top1, _ = evaluate(network, dataset, settings.engine.precision, settings.protocol.test_crop)
    progress.say(f"teacher {wanted.name}: top-1 {top1:.2f} % on {spec.name}  ({origin})")
    if top1 < near_chance(spec.num_classes, dataset.test_size) and not run.place.teacher.allow_weak:
        raise UserError(
            f"teacher {wanted.name} reaches {top1:.2f} % on {spec.name}, near the chance of "
            f"{100 / spec.num_classes:.2f} %; train it longer (teacher.epochs=N), give --teacher-weights, "
            "or insist with --allow-weak-teacher"
        )
    return Teacher(network, top1)


def near_chance(num_classes: int, tests: int) -> float:
    """Compute the top-1 in percent below which a teacher is hardly better than guessing among ``num_classes``."""
    chance = 1 / num_classes
    error = sqrt(chance * (1 - chance) / tests)
    return 100 * (chance + max(3 * error, min(chance, 0.05)))


def recipe(run: Run, dataset: Dataset) -> Run:
    """Make the run that trains the teacher: one like any other, without a teacher.

    It takes the run's protocol as it stands in its file, so that what one changes for the student never
    changes the teacher.
    """
    settings, wanted = run.settings, run.settings.teacher
    protocol: dict[str, object] = {"name": wanted.protocol or settings.protocol.name}
    protocol["image_size"] = dataset.spec.image_size  # it sees what its students see
    if wanted.epochs is not None:
        protocol["epochs"] = wanted.epochs
    own = resolve(
        {
            "distiller": {"name": "none"},
            "student": {"name": wanted.name, "pretrained": wanted.pretrained, "options": wanted.options},
            "data": asdict(settings.data),
            "protocol": protocol,
            "seed": wanted.seed,
        }
    )
    # A teacher is the same however many devices its students have.
    engine = replace(settings.engine, devices=1)
    output = OutputPlace(root=str(cache_folder() / "teachers"), measure_every=own.settings.protocol.epochs)
    return Run(replace(own.settings, engine=engine), replace(run.place, output=output))


def trained(run: Run, dataset: Dataset, progress: Progress) -> RunFolder:
    """Find the run that trained this teacher, or train it now where there is none."""
    own = recipe(run, dataset)
    name = own.settings.student.name
    folder = RunFolder.of(own)
    if folder.read_result() is not None:
        return folder
    lock = RunLock(folder.path)
    if not lock.acquire():
        progress.say(f"{lock.who()} is training {name}: waiting for it")
        with progress.doing(f"waiting for teacher {name}"):
            lock.acquire(wait=True)
    try:
        if folder.read_result() is None:
            progress.say(f"teacher {name} is not trained yet: training it once, for all later runs")
            train_one(own, dataset, None, progress)
    finally:
        lock.release()
    return folder


def lacking(run: Run, dataset: Dataset) -> Run | None:
    """Return the training that a run's teacher still needs; None where its weights are there, or timm's."""
    if run.settings.teacher.weights or is_published(run, dataset):
        return None
    own = recipe(run, dataset)
    return None if RunFolder.of(own).read_result() is not None else own


def is_published(run: Run, dataset: Dataset) -> bool:
    """Tell whether timm's weights are the teacher as they are, not only where it starts for other classes."""
    wanted = run.settings.teacher
    assert wanted.name is not None
    return wanted.pretrained and models.pretrained_classes(wanted.name) == dataset.spec.num_classes


def untrained(run: Run, dataset: Dataset, fetch: bool = False) -> models.Network:
    """Make the teacher's network with weights yet to be loaded, or, to ``fetch``, with timm's."""
    wanted = run.settings.teacher
    assert wanted.name is not None
    torch.manual_seed(seed_of(wanted.seed, "student"))
    return models.create(wanted.name, dataset.spec, pretrained=wanted.pretrained, fetch=fetch, **wanted.options)
