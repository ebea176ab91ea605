"""Train runs side by side and write their folders, given the data and, where a method has one, the teacher."""

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from functools import partial

from kdzoo import models, registry
from kdzoo.data import Dataset, Loader
from kdzoo.distillation import Distillation
from kdzoo.distiller import DataSpec
from kdzoo.engine import cost, loop
from kdzoo.engine.device import current
from kdzoo.engine.faults import caught, check_trained
from kdzoo.engine.finish import finish
from kdzoo.engine.lane import Lane, titles
from kdzoo.engine.measure import evaluate
from kdzoo.engine.memory import out_of_memory
from kdzoo.engine.passes import Teacher, TeacherPasses
from kdzoo.engine.progress import Progress
from kdzoo.engine.ranks import ALONE, Ranks
from kdzoo.engine.termination import Termination
from kdzoo.engine.turns import Turns
from kdzoo.errors import UserError
from kdzoo.precision import PRECISIONS
from kdzoo.process_state import unchanged
from kdzoo.quantities import counted
from kdzoo.randomness import seed_of, seed_torch
from kdzoo.recipe import Protocol
from kdzoo.resolve import changed_files
from kdzoo.settings import Run, Settings, StudentSettings
from kdzoo.store.folder import RunFolder
from kdzoo.store.loggers import Loggers
from kdzoo.store.result import Result

OF_THE_BEGINNING = 0.05  # share of the weights before training in an average of them, from which on it is said
Outcome = Result | UserError | None  # of a run: its result, why it failed, or neither where it stopped on the way


def network_of(wanted: StudentSettings, spec: DataSpec, fetch: bool = True) -> models.Network:
    """Make a network with the weights it starts from.

    Without ``fetch`` a pretrained network is only made to fit its weights, as in ``models.create``.
    """
    if not wanted.classifier:
        spec = spec._replace(num_classes=0)
    if wanted.weights:
        return models.load_given(wanted.name, spec, wanted.weights, drop_head=True, role="student", **wanted.making())
    return models.create(wanted.name, spec, pretrained=wanted.pretrained, fetch=fetch, **wanted.making())


def build(run: Run, dataset: Dataset, teacher: TeacherPasses | None, fetch: bool = True) -> Distillation:
    """Make student and distiller of a run on the data's device; the seed alone decides their weights.

    The passes of ``teacher`` then show what the method needs, beside what they showed before. Without ``fetch`` a
    pretrained student is only made to fit its weights, as in ``models.create``.

    Raises:
        UserError: teacher and student differ in their number of classes, or the method does not fit the pair.
    """
    (settings, place), labels = run, dataset.spec.labels.clone()  # which a method may keep, and write to
    spec = dataset.spec._replace(labels=labels)
    if teacher is not None and not teacher.network.has_classifier:
        spec = spec._replace(num_classes=0)  # there is no classifier to learn from
    seed_torch(seed_of(settings.seed, "student"))
    student = network_of(settings.student, spec, fetch)
    if dataset.device.type == "cpu":
        models.unfuse_attention(student)
        models.learn_on_cpu(student)
    seed_torch(seed_of(settings.seed, "distiller"))
    make = partial(registry.load(settings.distiller.name), **settings.distiller.keywords)
    distiller = make()
    if getattr(distiller, "fidelity", None) not in registry.FIDELITIES:  # which a result says of itself
        name = settings.distiller.name
        raise UserError(f"the class of distiller '{name}' has no fidelity; set it, as in fidelity = Fidelity.EXACT")
    if teacher is None and distiller.needs.teacher:
        raise UserError(f"distiller '{settings.distiller.name}' needs a teacher; pass --teacher NAME")
    network = None if teacher is None else teacher.network
    if isinstance(network, models.Ensemble) and network.turns and distiller.is_active and distiller.needs.teacher:
        distiller = Turns(make, network)
    distillation = Distillation(
        student,
        network,
        distiller,
        data=spec,
        labelled=dataset.is_labelled,
        precision=PRECISIONS[settings.engine.precision],
        passes=teacher,
    )
    if teacher is not None and distiller.needs.teacher:
        teacher.show |= distiller.needs.show("teacher")
    if place.engine.checkpoint_activations:
        student.checkpoint_activations()
    return models.channels_last(distillation.to(dataset.device))


def build_all(
    runs: Sequence[Run], dataset: Dataset, teacher: TeacherPasses | None
) -> tuple[dict[int, Distillation], dict[int, UserError]]:
    """Build each run, by its number, and give the reason of those that cannot be built."""
    built: dict[int, Distillation] = {}
    failed: dict[int, UserError] = {}
    for i, run in enumerate(runs):
        with caught(run, lambda: "while it was built", partial(failed.__setitem__, i)):
            if changed := changed_files(run.settings):
                raise UserError(f"{', '.join(changed)} changed since the command began; run the same command again")
            with unchanged(f"distiller '{run.settings.distiller.name}'"):
                distillation = build(run, dataset, teacher).train()
            check_trained(distillation, list(distillation.parameters()), run.settings.distiller.name)
            built[i] = distillation
    return built, failed


def common_loader(settings: Settings, built: Iterable[Distillation], dataset: Dataset, ranks: Ranks = ALONE) -> Loader:
    """Make the batches that serve all lanes, with the views that any of them needs."""
    views = sorted({view for distillation in built for view in distillation.distiller.needs.views})
    return dataset.loader(settings.protocol, seed=settings.seed, views=tuple(views), rank=ranks.rank, world=ranks.world)


def shared_passes(network: models.Network, run: Run, say: Callable[[str], object] = lambda _: None) -> TeacherPasses:
    """Share the passes of a frozen network, made by the copy of it that is fastest."""
    return TeacherPasses(network, fast=models.frozen(network, PRECISIONS[run.settings.engine.precision], say))


def train_lanes(
    runs: Sequence[Run],
    dataset: Dataset,
    teacher: Teacher | None,
    progress: Progress,
    ranks: Ranks = ALONE,
) -> list[Outcome]:
    """Train runs that share data, protocol, seed and teacher side by side, each from where its folder stands.

    Each of ``ranks`` calls it alike and trains on its share of every batch.

    Returns:
        For each run its result, or why it failed, or None where it stopped as ``engine.stop_after`` asks; no lane's
        failure stops another. Where memory lacks for what they share, none fits.
    """
    try:
        return _train_lanes(runs, dataset, teacher, progress, ranks)
    except Exception as error:
        full = out_of_memory(error, runs[0])
        if full is None:
            raise
    return [full for _ in runs]


def _train_lanes(
    runs: Sequence[Run], dataset: Dataset, teacher: Teacher | None, progress: Progress, ranks: Ranks
) -> list[Outcome]:
    shared = None if teacher is None else shared_passes(teacher.network, runs[0], progress.say)
    students = [run.settings.student for run in runs]
    weights = " with pretrained weights" if any(student.pretrained for student in students) else ""
    with progress.doing(f"building {', '.join(sorted({student.name for student in students}))}{weights}"):
        built, failed = build_all(runs, dataset, shared)
    outcomes: dict[int, Outcome] = {**failed}
    if built:
        loader = common_loader(runs[0].settings, built.values(), dataset, ranks)
        device, per_epoch, names = dataset.device, loader.steps_per_epoch, titles(runs)
        lanes: dict[int, Lane] = {}
        for i in built:
            with caught(runs[i], lambda: "while its training was set up", partial(outcomes.__setitem__, i)):
                lanes[i] = Lane(runs[i], built[i], RunFolder.of(runs[i]), device, per_epoch, names[i], ranks)
        with ExitStack() as ended:
            for lane in lanes.values():
                ranks.once(lane.folder.open, lane.run)
                if ranks.first:
                    lane.loggers = ended.enter_context(Loggers(lane.run, lane.folder, progress.say))
            if lanes:
                ranks.once(say_left_out, lanes.values(), dataset, progress)
                ranks.once(say_too_short, runs[0].settings.protocol, loader.total_steps, progress)
                ranks.once(say_origins, lanes.values(), dataset, progress)
                with current(device), Termination() as termination:
                    loop.train(list(lanes.values()), shared, dataset, loader, progress, termination)
            costs: dict[str, cost.Cost] = {}
            for i, lane in lanes.items():
                outcomes[i] = None
                if lane.failure is None and lane.run.is_trained_whole:
                    with progress.doing(f"writing the result of {lane.title}"), lane.failing_alone():
                        outcomes[i] = finish(lane, dataset, teacher, costs)
                if lane.failure is not None:
                    outcomes[i] = lane.failure
                    lane.loggers.fail()
    return [outcomes[i] for i in range(len(runs))]


def say_left_out(lanes: Iterable[Lane], dataset: Dataset, progress: Progress) -> None:
    """Say once which terms of the methods are left out, and why."""
    lacking: dict[str, set[str]] = {}
    for distillation in (lane.distillation for lane in lanes):
        for name in distillation.left_out:
            unlabelled = not dataset.is_labelled and name in distillation.distiller.label_terms
            why = "the data have no labels" if unlabelled else "the teacher has no classifier"
            lacking.setdefault(why, set()).add(name)
    for why, names in lacking.items():
        progress.say(f"{', '.join(sorted(names))} left out of the loss: {why}")
    for lane in lanes:
        student = lane.distillation.student
        left_out = lane.distillation.left_out
        if left_out and getattr(student, "has_classifier", True) and not lane.distillation.distiller.trains_classifier:
            progress.say(
                f"{lane.title}: without {', '.join(left_out)} nothing trains the student's "
                "classifier, so only its embedding is worth something; teacher.classifier=false leaves it out"
            )


def say_too_short(protocol: Protocol, steps: int, progress: Progress) -> None:
    """Say what of a recipe a training is too short for."""
    begun = protocol.ema**steps
    if begun > OF_THE_BEGINNING:
        progress.say(
            f"protocol.ema={protocol.ema:g} is for longer trainings: after {counted(steps, 'step')} {begun:.0%} of the "
            "average, which is the student that is kept, are still the weights before training; protocol.ema=0 keeps "
            "the last weights"
        )
    if protocol.warmup > protocol.epochs:
        progress.say(
            f"protocol.warmup={protocol.warmup:g} is for longer trainings: after {counted(protocol.epochs, 'epoch')} "
            f"the learning rate is at {protocol.epochs / protocol.warmup:.0%} of its height; protocol.warmup=0 begins "
            "there"
        )


def say_origins(lanes: Iterable[Lane], dataset: Dataset, progress: Progress) -> None:
    """Say once for each student that starts from weights which they are, what it reads, and its top-1 so far."""
    starting = {str(lane.run.settings.student): lane for lane in lanes if lane.run.settings.student.is_started}
    for lane in starting.values():
        (settings, _), student = lane.run, lane.distillation.student
        with progress.doing(f"measuring student {settings.student.name} before training"):
            found = evaluate(student, dataset, settings.engine.precision, settings.protocol.test_crop)
        progress.say(
            f"student {settings.student.name}: top-1 {found.top1:.2f} % before training, reads {student.reads}  "
            f"({student.origin})"
        )


def train_one(run: Run, dataset: Dataset, teacher: Teacher | None, progress: Progress, ranks: Ranks = ALONE) -> Result:
    """Train a run from where its folder stands to its end; each of ``ranks`` calls it alike.

    Raises:
        UserError: it failed.
    """
    [outcome] = train_lanes([run], dataset, teacher, progress, ranks)
    if isinstance(outcome, UserError):
        raise outcome
    assert outcome is not None, "a single run is trained to its end"
    return outcome
