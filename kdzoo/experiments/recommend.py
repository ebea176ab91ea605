"""Search for the best method of a pair by successive halving, then train finalists anew.

Every rung is a bench whose runs stop at the rung's epoch; the better half continues from there in the next. What is
left is trained anew on all training images with other seeds, and measured on the test images once. Which candidates
continue is a function of what lies on disk: a search that was stopped continues, and processes that share one agree.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from kdzoo import own_code, registry
from kdzoo.data import Dataset
from kdzoo.engine.device import use
from kdzoo.engine.progress import Progress
from kdzoo.errors import UserError
from kdzoo.experiments import halving, suites, teachers
from kdzoo.experiments.bench import bench, own, placed
from kdzoo.experiments.candidates import candidates
from kdzoo.experiments.estimate import by_turns, measure
from kdzoo.experiments.halving import SHARE, Prices
from kdzoo.experiments.question import Question
from kdzoo.experiments.run import open_data
from kdzoo.experiments.suites import Suite
from kdzoo.experiments.workers import Executor, Local, given_or_local
from kdzoo.files import digest, make_folder, output_path, read_text, write_text
from kdzoo.quantities import counted, duration
from kdzoo.settings import Run
from kdzoo.store.folder import RunFolder
from kdzoo.store.lock import RunLock
from kdzoo.store.search import FILE, Candidate, Course, Point, Search, Trained, ranked

REFERENCES = ("none", "kd")  # are always trained anew, so that the answer says what a method gains
AVERAGE = 0.97  # decay of the average of weights that candidates are ranked by, where the recipe keeps none
PLACED = {"data", "overrides"}  # also say where trainings happen; what they decide of the runs is in "runs"
MARK = "recommend"  # stands for a suite's name in the folder of a search


def search(
    question: Question,
    out: str | Path | None = None,
    executor: Executor | None = None,
    quiet: bool = False,
    retry: bool = False,
) -> Path:
    """Search, and train the finalists anew; what is on disk already is not done again.

    Args:
        question: what is sought.
        out: the folder of the search (default: runs/recommend-TEACHER-STUDENTS-DATA).
        executor: where to train; None for this machine.
        quiet: whether to show nothing.
        retry: whether to try again what failed before.

    Returns:
        The folder, which holds a ``Search`` and the finalists' runs.

    Raises:
        UserError: a name or a setting that the user can fix; a budget that is too small; no method that fits; a folder
            that holds the answer to another question.
    """
    out = question.folder if out is None else output_path(out)
    trainer = Trainer(question, out, given_or_local(executor), quiet, retry)
    with Progress(quiet) as progress:
        made = planned(trainer, progress)
        progress.say(outline(made))
        for student, method, reason in made.left_out:
            progress.say(f"{method} is left out for {student}: {reason}")
    made.courses = [Course() for _ in made.candidates]
    chosen = {student: made.of(student) for student in made.students}
    average = [f"protocol.ema={made.average}"] if made.average else []
    for rung, epoch in enumerate(made.rungs):
        for number, run in trainer.train(made, f"rung-{rung + 1}", chosen, [f"engine.stop_after={epoch}", *average]):
            follow(made.courses[number], run, epoch)
        for student, some in chosen.items():
            best = ranked(made, some, epoch)[: halving.left(len(made.of(student)), rung + 1)]
            if not best:
                reasons = dict.fromkeys(made.courses[number].reason for number in some)
                raise UserError(f"no method is left for {student}: {'; '.join(reasons)}; --retry tries again")
            for number in set(some) - set(best):
                made.courses[number].stopped = epoch
            chosen[student] = best
        if not Search.read(out).finals:  # else all of this stands there already
            made.write(out)
    for student, some in chosen.items():
        chosen[student] = [*some, *(number for number in references(made, student) if number not in some)]
    trained = list(trainer.train(made, "final", chosen, [f"output.measure_every={made.epochs}"]))
    made.finals = [Trained(number, run.settings.seed, RunFolder.of(run).path.name) for number, run in trained]
    lock = RunLock(out)
    lock.acquire(wait=True)
    try:
        if retry or Search.read(out).finals != made.finals:  # else another process has compared their costs
            for student in made.students:
                theirs = {number: run for number, run in trained if made.candidates[number].student == student}
                compare_costs(made, theirs, quiet)
            made.write(out)
    finally:
        lock.release()
    return out


def compare_costs(made: Search, runs: Mapping[int, Run], quiet: bool) -> None:
    """Time the steps of a student's finalists by turns, in place of what was measured before the search.

    Where this machine has not what they were trained on, such as their device, that stands.
    """
    if not runs:
        return
    doing = f"comparing the cost of {counted(len(runs), 'finalist')}"
    with suppress(UserError), Progress(quiet) as progress, progress.doing(doing):
        for i, seconds in by_turns(list(runs.values()), progress).items():
            made.costs[list(runs)[i]] = seconds


def references(made: Search, student: str) -> list[int]:
    """Find the methods that every answer is compared with, among a student's candidates."""
    usual = [number for number in made.of(student) if not made.candidates[number].keywords]
    return [
        number for number in usual if made.candidates[number].method in REFERENCES and not made.courses[number].reason
    ]


def beside(some: Iterable[Candidate]) -> list[str]:
    """Name the methods that every answer is compared with, as far as they are among the candidates."""
    methods = {one.method for one in some}
    return [name for name in REFERENCES if name in methods]


def follow(course: Course, run: Run, epoch: int) -> None:
    """Read how far a candidate came, up to an epoch."""
    folder = RunFolder.of(run)
    history = folder.read_history()[:epoch]
    course.curve = [Point(*(record[name] for name in Point._fields)) for record in history]
    if folder.failure.is_file() and not folder.has_reached(epoch):  # else it failed later, and was ranked here
        course.reason = read_text(folder.failure).strip()


@dataclass(frozen=True)
class Trainer:
    """Trains candidates as benches of suites, whose files lie in the folder of the search."""

    question: Question
    out: Path
    executor: Executor
    quiet: bool
    retry: bool = False

    def suite(
        self,
        stage: str,
        chosen: Mapping[str, Sequence[Candidate]],
        epochs: int,
        seeds: Sequence[int],
        overrides: Sequence[str],
        progress: Progress,
    ) -> Suite:
        """Write the suite of a stage, and place its runs: by student, seed and candidate."""
        make_folder(self.out / "suites")
        file, name = self.out / "suites" / f"{stage}.yaml", "final" if stage == "final" else "search"
        write_text(file, self.question.suite(name, chosen, epochs, seeds))
        with progress.doing("reading settings and data") as rename:
            suite = suites.load(str(file), 0, [*self.question.overrides, *overrides], rename)
            return replace(suite, runs=tuple(placed(suite, self.out / name, self.executor, progress)))

    def train(
        self, made: Search, stage: str, chosen: Mapping[str, Sequence[int]], overrides: Sequence[str]
    ) -> Iterator[tuple[int, Run]]:
        """Train the chosen candidates, by student; yield the number and the run of each, which finished or failed."""
        seeds = made.seeds if stage == "final" else [self.question.seed]
        some = {student: [made.candidates[number] for number in numbers] for student, numbers in chosen.items()}
        with Progress(self.quiet) as progress:
            suite = self.suite(stage, some, made.epochs, seeds, overrides, progress)
        report = bench(suite, self.out / suite.name, self.retry, self.quiet, self.executor, wait=True)
        if report.stopped:
            report.check()
        if report.elsewhere:
            raise UserError(
                f"other processes are still at work on {counted(len(report.elsewhere), 'run')}; the same command "
                "continues"
            )
        numbers = [number for group in chosen.values() for _ in seeds for number in group]
        yield from zip(numbers, suite.runs, strict=True)


def tried(
    question: Question, out: str | Path | None = None, executor: Executor | None = None, quiet: bool = False
) -> Search:
    """Plan a search without training anything or leaving anything behind; one that has begun keeps its plan.

    Raises:
        UserError: as by ``search``.
    """
    begun = question.folder if out is None else output_path(out)
    with TemporaryDirectory() as folder, Progress(quiet) as progress:
        if (begun / FILE).is_file():
            return planned(Trainer(question, begun, given_or_local(executor), quiet), progress)
        return planned(Trainer(question, Path(folder), Local(), quiet), progress)


def planned(trainer: Trainer, progress: Progress) -> Search:
    """Read the plan of the search, or make it where there is none yet.

    Raises:
        UserError: as by ``search``.
    """
    lock, question = RunLock(trainer.out), trainer.question
    names = str(question.data["name"]), str(question.protocol["name"])
    found = candidates(question.teacher, question.students, question.methods, question.settings, *names)
    lock.acquire(wait=True)
    try:
        own(trainer.out, MARK)
        asked = json.loads(
            json.dumps(
                {
                    **asdict(question),
                    "teacher": question.teacher,
                    "runs": content(trainer, progress),
                    "files": files(question),
                }
            )
        )
        if not (trainer.out / FILE).is_file():
            made = made_plan(trainer, asked, found, progress)
            made.write(trainer.out)
            return made
        made = Search.read(trainer.out)
        changed = [key for key, value in asked.items() if made.asked.get(key) != value]
        if not PLACED.issuperset(changed):
            what = ", ".join(changed) if changed != ["runs"] else "the images, or a file that the runs use,"
            raise UserError(
                f"{trainer.out} holds the answer to another question ({what} changed); choose another --out"
            )
        if changed:
            made.asked = asked  # so that the recommended file names the place of today
            made.write(trainer.out)
        return made
    finally:
        lock.release()


def content(trainer: Trainer, progress: Progress) -> str:
    """Hash what decides the runs, beside their methods: networks, recipe, data, files."""
    question = trainer.question
    alone = {student: [Candidate(student, "none"), Candidate(student, "kd")] for student in question.students}
    runs = trainer.suite("alone", alone, question.epochs, [question.seed], [], progress).runs
    return hashlib.sha256(" ".join(run.settings.identity() for run in runs).encode()).hexdigest()


def files(question: Question) -> dict[str, str]:
    """Compute the SHA-256 of each file that the user's own methods consist of, since the plan follows from it."""
    parts = (part for name in question.methods for part in own_code.named(name, (), ()).values())
    return {name: digest(file) for part in parts for name, file in part.items()}


def made_plan(trainer: Trainer, asked: dict[str, Any], found: Sequence[Candidate], progress: Progress) -> Search:
    """Find the candidates that fit, by a few steps of each method, and how many epochs the budget pays."""
    question = trainer.question
    usual = [one for one in found if not one.keywords]
    by_student = {student: [one for one in usual if one.student == student] for student in question.students}
    here = replace(trainer, executor=Local())  # methods are measured on this machine, as by a dry run
    runs = here.suite("alone", by_student, question.epochs, [question.seed], [], progress).runs
    check_inputs(runs[0], progress)
    with progress.doing(f"measuring a few steps of {counted(len(runs), 'method')}") as rename:
        cost, teaching = measure(runs, progress, rename)
    left_out = [(one.student, one.method, str(cost.failed[i])) for i, one in enumerate(usual) if i in cost.failed]
    unasked = {one.method for one in usual if not registry.load(one.method).needs.teacher}
    steps = {
        (one.student, one.method): cost.shared - cost.teacher * (one.method in unasked) + cost.lanes[i].step
        for i, one in enumerate(usual)
        if i in cost.lanes
    }
    for i, one in enumerate(usual):
        if i in cost.lanes and cost.lanes[i].phase > question.epochs:
            phase = cost.lanes[i].phase
            reason = f"its phase before training takes {counted(phase, 'epoch')}, and a training {question.epochs}"
            left_out.append((one.student, one.method, f"{reason}; it is tried with --epochs {phase} or more"))
            del steps[one.student, one.method]
    fitting = [one for one in found if (one.student, one.method) in steps]
    counts = [sum(one.student == student for one in fitting) for student in question.students]
    if not all(counts):
        student = question.students[counts.index(0)]
        reason = next(reason for where, _, reason in left_out if where == student)
        raise UserError(f"no method fits {question.teacher} -> {student}: {reason}")
    places = {(one.student, one.method): i for i, one in enumerate(usual)}
    lanes = [cost.lanes[places[one.student, one.method]] for one in fitting]
    most = question.epochs
    if "epochs" not in question.protocol:  # a recipe may be shorter than its search
        most = max(most, halving.fewest_epochs(max(counts)))
    prices, references = Prices.of(cost, lanes, sum(teaching.values())), len(beside(fitting))
    epochs = halving.longest(question.budget, counts, references, most, prices, question.seeds, question.settings)
    return Search(
        asked=asked,
        epochs=epochs,
        rungs=halving.rungs(max(counts), epochs),
        seeds=list(range(question.seed + 1, question.seed + 1 + question.seeds)),
        share=SHARE,
        average=0.0 if runs[0].settings.protocol.ema else AVERAGE,
        candidates=fitting,
        costs=[steps[one.student, one.method] for one in fitting],
        left_out=left_out,
        seconds=prices.seconds(*halving.epochs_of(counts, references, epochs, question.seeds)),
    )


def check_inputs(run: Run, progress: Progress) -> None:
    """Check the data, and a teacher whose weights are given, before anything is measured or trained.

    Raises:
        UserError: there is one class, some class has no image in the part that is held out, or the weights do not fit
            the teacher, or leave it hardly better than chance.
    """
    dataset = open_data(run, use(run.place), progress)
    check_held_out(dataset)
    if teachers.are_given(run):
        teachers.obtain(run, dataset, progress)


def check_held_out(dataset: Dataset) -> None:
    """Check that methods can be ranked on the part of the training images that is held out.

    Raises:
        UserError: as by ``check_inputs``.
    """
    spec = dataset.spec
    if not dataset.is_labelled:
        return  # ranked by the teacher's answers
    if spec.num_classes < 2:
        raise UserError(f"data {spec.name} have one class ({spec.class_names[0]}): there is nothing to tell apart")
    if missing := dataset.untested:
        some = ", ".join(missing[:3]) + ", ..." * (len(missing) > 3)
        raise UserError(
            f"data {spec.name}: {100 * SHARE:.0f} % of the training images are held out to rank methods on, and have "
            f"none of {some}; add images of {'this class' if len(missing) == 1 else 'these classes'}"
        )


def outline(made: Search) -> str:
    """Say in a line what the search does."""
    counts = [len(made.of(student)) for student in made.students]
    seeds = len(made.seeds)
    search, final = halving.epochs_of(counts, len(beside(made.candidates)), made.epochs, seeds)
    whole = seeds * made.epochs * sum(counts)
    unfit = len(made.left_out)
    others = f" ({unfit} more {'does' if unfit == 1 else 'do'} not fit)" if unfit else ""
    after = f"epoch{'s' * (len(made.rungs) > 1)} {', '.join(map(str, made.rungs))}"
    halved = f"; the worse half stops after {after}" if made.rungs else ""
    most = "at most " if made.rungs and beside(made.candidates) else ""  # a reference may be among the best three
    expected = f"; expected to take about {duration(made.seconds)}" if made.seconds else ""
    return (
        f"{counted(sum(counts), 'candidate')}{others}{halved}; finalists are trained anew for "
        f"{counted(made.epochs, 'epoch')} with {seeds} seeds: "
        f"{most}{search + final:,} epochs in all ({whole:,} to train all candidates with {seeds} seeds){expected}"
    )
