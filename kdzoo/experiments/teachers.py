"""Where teachers come from: a file, the teachers trained before, timm's weights, or training now."""

from collections.abc import Sequence
from dataclasses import asdict, replace
from itertools import cycle
from math import sqrt
from pathlib import Path

import torch
from torch import Tensor

from kdzoo import models
from kdzoo.data import Dataset
from kdzoo.data.classes import ORDERS, listed
from kdzoo.distiller import DataSpec
from kdzoo.engine.measure import Answers, evaluate, joined, show, test_rows
from kdzoo.engine.passes import Teacher
from kdzoo.engine.progress import Progress
from kdzoo.engine.training import network_of, train_one
from kdzoo.errors import UserError
from kdzoo.experiments.class_order import check_order, check_same
from kdzoo.files import cache_folder, path_of, read_text
from kdzoo.models.weight_files import find_file
from kdzoo.quantities import counted
from kdzoo.randomness import seed_of, seed_torch
from kdzoo.resolve import resolve
from kdzoo.settings import TURNS, OutputPlace, Run, Settings, TeacherSettings
from kdzoo.store.folder import RunFolder
from kdzoo.store.lock import RunLock

LEARNED_ON = 2048  # training images by which several teachers are weighed, spread over the classes


def obtain(run: Run, dataset: Dataset, progress: Progress, made: Settings | None = None) -> Teacher:
    """Get the teacher of a run, on its device and measured; several are measured alone first, and then together.

    Args:
        run: the run that is trained, or looked at again.
        dataset: its data.
        progress: where the user is told about it.
        made: what a finished run was made with, maybe under another name of the data or in another precision: its
            teacher is taken where it is kept here and the data are the same.

    Raises:
        UserError: its weights are missing or do not fit, or it is hardly better than chance.
    """
    if not dataset.is_labelled and (trainings := lacking(run, dataset)):
        raise UserError(
            f"data {dataset.spec.name} have no labels to train teacher {trainings[0].settings.student.name} on; give "
            "--teacher-weights FILE, or teacher.pretrained=true"
        )
    if len(run.settings.teacher.parts) > 1 and any(map(is_headless, run.settings.teacher.parts)):
        raise _without_classifier()
    kept = [None] if made is None else [replace(made, teacher=part) for part in made.teacher.parts]
    each = [_obtained(part, dataset, progress, then) for part, then in zip(alone(run), cycle(kept), strict=False)]
    if len(each) > 1 and not all(teacher.network.has_classifier for teacher in each):
        raise _without_classifier()
    found = each[0] if len(each) == 1 else _together(run, each, dataset, progress)
    if not dataset.is_judged and found.classes is not None:
        dataset.answered_by(found.classes.numpy())
    return found


def _without_classifier() -> UserError:
    return UserError("several teachers answer together only where each has a classifier; give one teacher")


def output_names(run: Run) -> tuple[str, ...]:
    """Find out what the outputs of a run's networks stand for, where its data have no labels: by its teacher.

    Returns:
        A name for each output; none where the teacher has no classifier.

    Raises:
        UserError: there is no teacher, or nothing tells how many outputs it has.
    """
    data, wanted = run.settings.data, run.settings.teacher
    if wanted.name is None:
        raise UserError(f"data {data.name} have no labels, and no teacher is named to learn from; pass --teacher NAME")
    for part in wanted.parts:
        models.check_name(str(part.name))
    if is_headless(wanted):
        return ()
    if data.classes in ORDERS:
        raise UserError(
            f"data.classes={data.classes} orders the classes of labels, and data {data.name} have none; give a file "
            "that names the teacher's outputs, one name a line"
        )
    known = [(str(part.name), names) for part in wanted.parts if (names := _written_names(part))]
    for name, names in known[1:]:
        check_same(known[0], (name, names))
    if not known:
        known = [(wanted.name, _numbered(run, wanted.name))]
    return known[0][1] if data.classes is None else _renamed(data.classes, known)


def _numbered(run: Run, name: str) -> tuple[str, ...]:
    """Number the outputs of the teacher of this name, which has no names for them; none where none are known.

    Raises:
        UserError: nothing tells how many they are.
    """
    data, wanted = run.settings.data, run.settings.teacher
    if wanted.weights:
        file = find_file(path_of(wanted.weights))
        size = run.settings.protocol.image_size or wanted.image_size or models.written_facts(file).get("image_size")
        spec = DataSpec(data.name, 2, (), size or 224, torch.zeros(0, dtype=torch.int64))
        count = models.classes_in(name, spec, file, **wanted.making())
    elif wanted.pretrained:
        count = models.pretrained_classes(name) or 0
    else:
        raise UserError(
            f"data {data.name} have no labels to train teacher {name} on; give --teacher-weights FILE, or "
            "teacher.pretrained=true"
        )
    return tuple(f"class {number}" for number in range(count))


def _renamed(file: str, known: Sequence[tuple[str, tuple[str, ...]]]) -> tuple[str, ...]:
    """Read the names that a file gives to the outputs of teachers, each with the names that are ``known`` without it.

    Raises:
        UserError: the file names more or fewer outputs than a teacher has, or gives its own names in another order.
    """
    names = listed(file)
    for teacher, own in known:
        if own and len(names) != len(own):
            raise UserError(
                f"data.classes={file} names {counted(len(names), 'output')}, and teacher {teacher} has {len(own)}; "
                "name each of them, or leave data.classes out"
            )
        if names != own and set(names) == set(own):
            raise UserError(
                f"data.classes={file} has the classes of teacher {teacher} in another order than the file beside its "
                "weights; leave data.classes out"
            )
    return names


def _written_names(wanted: TeacherSettings) -> tuple[str, ...]:
    """Read what a teacher's outputs stand for beside its weights; nothing where kdzoo did not write them."""
    if not wanted.weights:
        return ()
    file = find_file(path_of(wanted.weights))
    kept = file.with_name("classes.txt")
    return tuple(read_text(kept).splitlines()) if kept.is_file() and models.written_facts(file) else ()


def alone(run: Run) -> list[Run]:
    """Make a run with each of its teachers as the only one."""
    return [run._replace(settings=replace(run.settings, teacher=part)) for part in run.settings.teacher.parts]


def ensemble(
    wanted: TeacherSettings, networks: Sequence[models.Network], shares: Tensor | None = None
) -> models.Ensemble:
    """Make one network of several teachers', as their settings ask."""
    names = [part.name for part in wanted.parts]
    shown = names.index(wanted.features) if wanted.features in names else 0
    return models.Ensemble(networks, wanted.combine, shown, shares, wanted.features == TURNS)


def _together(run: Run, each: Sequence[Teacher], dataset: Dataset, progress: Progress) -> Teacher:
    """Make one teacher of several, and measure it."""
    wanted, networks, shares = run.settings.teacher, [teacher.network for teacher in each], None
    if wanted.combine == "learned":
        with progress.doing(f"learning how much each of {wanted.title} counts"):
            shares = _learned(run, networks, dataset)
        counts = ", ".join(f"{one.name} {share:.2f}" for one, share in zip(networks, shares.tolist(), strict=True))
        progress.say(f"learned weights of the teachers: {counts}")
    network = ensemble(wanted, networks, shares).to(dataset.device)
    top1, answers = _measured(run, network, dataset, progress)
    if top1 is not None:
        progress.say(f"{len(each)} teachers together: top-1 {top1:.2f} % on {run.settings.data.measured_on}")
    return Teacher(network, top1, answers.classes, tuple(one.top1 for one in each if one.top1 is not None))


def _learned(run: Run, networks: Sequence[models.Network], dataset: Dataset) -> Tensor:
    """Learn on labelled training images how much each network counts: (networks,)."""
    (settings, _), spec = run, dataset.spec
    if not dataset.is_labelled:
        raise UserError(
            f"teacher.combine=learned learns from labels, and data {spec.name} have none; set teacher.combine to "
            "probabilities or logits"
        )
    seen, right = [], []
    with torch.inference_mode():
        for images, labels in dataset.sample("train", LEARNED_ON, test_rows(spec), settings.protocol.test_crop):
            outputs = [show(one, images, settings.engine.precision, spec.num_classes) for one in networks]
            seen.append(torch.stack([output.logits for output in outputs]).cpu())  # mps knows no float64
            right.append(labels.cpu())
    return models.learned_shares(torch.cat(seen, dim=1), torch.cat(right))


def _measured(run: Run, network: models.Network, dataset: Dataset, progress: Progress) -> tuple[float | None, Answers]:
    """Measure a teacher's top-1 in percent, None without labels, and find its answers for test images, on the CPU."""
    with progress.doing(f"measuring teacher {network.name} on {dataset.spec.name}"):
        answers: list[Answers] = []
        precision, test_crop = run.settings.engine.precision, run.settings.protocol.test_crop
        top1 = evaluate(network, dataset, precision, test_crop, answers=answers).top1
        return top1 if dataset.is_judged else None, joined(answers)


def _obtained(run: Run, dataset: Dataset, progress: Progress, made: Settings | None) -> Teacher:
    wanted, spec = run.settings.teacher, dataset.spec
    assert wanted.name is not None
    if is_published(run, dataset):
        with progress.doing(f"loading the pretrained weights of {wanted.name}"):
            network = untrained(run, dataset, fetch=True)
    elif wanted.weights and _is_given(wanted):
        with progress.doing(f"loading teacher {wanted.name}"):
            network = given(run, dataset, wanted.weights)
    else:
        folder = (made and _kept(run, made, dataset)) or trained(run, dataset, progress)
        with progress.doing(f"loading teacher {wanted.name}"):
            network = given(run, dataset, folder.student)
        network.origin = str(folder.path)
    device = dataset.device
    models.channels_last(network.to(device)).eval().requires_grad_(False)
    top1, (labels, classes, confidence) = _measured(run, network, dataset, progress)
    if wrong := int((~confidence.isfinite()).sum()):
        raise UserError(
            f"teacher {wanted.name} gives outputs that are not finite for {wrong} of {len(labels)} test images "
            f"({network.origin}); take other weights, or engine.precision=float32"
        )
    how = "top-1" if network.has_classifier else "top-1 by nearest neighbours"
    reached = f"answers for {len(labels)} images" if top1 is None else f"{how} {top1:.2f} %"
    where = run.settings.data.measured_on
    progress.say(f"teacher {wanted.name}: {reached} on {where}, reads {network.reads}  ({network.origin})")
    if top1 is None or not spec.num_classes:
        return Teacher(network, top1, classes)
    confusion = torch.zeros(spec.num_classes, spec.num_classes, dtype=torch.int64)
    confusion.index_put_((labels, classes), torch.ones_like(labels), accumulate=True)
    check_order(wanted.name, spec.class_names, confusion.numpy())
    if top1 < near_chance(spec.num_classes, dataset.test_size) and not run.place.teacher.allow_weak:
        raise UserError(
            f"teacher {wanted.name} reaches {top1:.2f} % on {where}, near the chance of "
            f"{100 / spec.num_classes:.2f} %; "
            + (
                f"it reads {network.reads}: set teacher.image_size, teacher.mean and teacher.std to what it was "
                "trained with, data.classes to its order of classes, or teacher.finetune=true to train it on"
                if _is_given(wanted)
                else "train it longer (teacher.epochs=N), or give --teacher-weights"
            )
            + "; teacher.allow_weak=true, or --allow-weak-teacher of kdzoo run, distils all the same"
        )
    return Teacher(network, top1, classes)


def _kept(run: Run, made: Settings, dataset: Dataset) -> RunFolder | None:
    """Find the teacher that was trained for a run as it was made; None where it is not here, or the data differ."""
    now, then = run.settings.data, made.data
    same = now.fingerprint == then.fingerprint if now.fingerprint else now == then
    as_made = run._replace(settings=made)
    return RunFolder.of(recipe(as_made, dataset)) if same and not lacking(as_made, dataset) else None


def near_chance(num_classes: int, tests: int) -> float:
    """Compute the top-1 in percent below which a teacher is hardly better than guessing among ``num_classes``."""
    chance = 1 / num_classes
    error = sqrt(chance * (1 - chance) / tests)
    return 100 * (chance + max(3 * error, min(chance, 0.05)))


def recipe(run: Run, dataset: Dataset) -> Run:
    """Make the run that trains the teacher: one like any other, without a teacher.

    It takes the run's protocol as it stands in its file, so that what one changes for the student never
    changes the teacher. Where it starts from weights it is fine-tuned.
    """
    settings, wanted = run.settings, run.settings.teacher
    starts = wanted.pretrained or wanted.weights
    protocol: dict[str, object] = {"name": wanted.protocol or ("finetune" if starts else settings.protocol.name)}
    protocol["image_size"] = dataset.spec.image_size  # it sees what its students see
    if wanted.epochs is not None:
        protocol["epochs"] = wanted.epochs
    if wanted.lr is not None:
        protocol["lr"] = wanted.lr
    own = resolve(
        {
            "distiller": {"name": "none"},
            "student": asdict(replace(wanted.untrained(), classifier=True)),  # by which it learns, wanted or not
            "data": settings.data.opening(),
            "protocol": protocol,
            "seed": wanted.seed,
        },
        fingerprint=settings.data.fingerprint,
    )
    # A teacher is the same however many devices its students have.
    engine = replace(settings.engine, devices=1)
    output = OutputPlace(root=str(cache_folder() / "teachers"), measure_every=own.settings.protocol.epochs)
    place = replace(run.place, output=output).within(engine={"stop_after": 0})  # it is trained to its end
    return Run(replace(own.settings, engine=engine), place)


def trained(run: Run, dataset: Dataset, progress: Progress) -> RunFolder:
    """Find the run that trained this teacher, or train it now where there is none."""
    own = recipe(run, dataset)
    name = own.settings.student.name
    folder = RunFolder.of(own)
    if (result := folder.read_result()) is not None:
        folder.check_student(result)
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


def lacking(run: Run, dataset: Dataset) -> list[Run]:
    """List the trainings that a run's teachers still need: of those whose weights are not there, nor timm's."""
    trained = (one for one in alone(run) if not _is_given(one.settings.teacher) and not is_published(one, dataset))
    own = {made.settings.identity(): made for made in (recipe(one, dataset) for one in trained)}
    return [made for made in own.values() if RunFolder.of(made).read_result() is None]


def are_given(run: Run) -> bool:
    """Tell whether the weights of all teachers of a run are those of files as they are."""
    return all(map(_is_given, run.settings.teacher.parts))


def _is_given(wanted: TeacherSettings) -> bool:
    """Tell whether a teacher's weights are those of a file as they are."""
    return bool(wanted.weights) and not wanted.finetune


def is_headless(wanted: TeacherSettings) -> bool:
    """Tell whether a teacher has no classifier: it is to have none, or its published weights have none."""
    return not wanted.classifier or (_as_published(wanted) and models.pretrained_classes(str(wanted.name)) == 0)


def is_published(run: Run, dataset: Dataset) -> bool:
    """Tell whether published weights are the teacher as they are, not only where it starts for other classes."""
    wanted = run.settings.teacher
    classes = models.pretrained_classes(str(wanted.name)) if _as_published(wanted) else None
    return classes is not None and (is_headless(wanted) or classes == dataset.spec.num_classes)


def _as_published(wanted: TeacherSettings) -> bool:
    """Tell whether a teacher's published weights are not to be trained on, unless the classes differ."""
    return wanted.pretrained and not wanted.finetune


def untrained(run: Run, dataset: Dataset, fetch: bool = False) -> models.Network:
    """Make the teacher's network, or all of them, as before any training, pretrained weights only to ``fetch``."""
    networks = []
    for wanted in run.settings.teacher.parts:
        seed_torch(seed_of(wanted.seed, "student"))
        student = replace(wanted.untrained(), classifier=not is_headless(wanted))
        networks.append(network_of(student, dataset.spec, fetch))
    return networks[0] if len(networks) == 1 else ensemble(run.settings.teacher, networks)


def given(run: Run, dataset: Dataset, file: str | Path) -> models.Network:
    """Make the teacher's network with the weights of a file."""
    wanted = run.settings.teacher
    assert wanted.name is not None
    spec = dataset.spec._replace(num_classes=0) if is_headless(wanted) else dataset.spec
    return models.load_given(wanted.name, spec, file, role="teacher", **wanted.making())
