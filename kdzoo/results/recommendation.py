"""Answer which method to take, from the finalists that a search left: what is best, and what cannot be told apart."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from kdzoo.errors import UserError, visible
from kdzoo.experiments.question import Question
from kdzoo.experiments.recommend import search
from kdzoo.experiments.workers import Executor
from kdzoo.files import read_text, slug, write_text
from kdzoo.keywords import name, names
from kdzoo.quantities import counted
from kdzoo.resolve import merged, read_protocol, several
from kdzoo.results import statistics
from kdzoo.store.result import Result
from kdzoo.store.search import Candidate, Search

SHARES = {  # what a percentage of top-1 is, by ``Result.measured``
    "accuracy": "on the test images",
    "agreement": "of the test images taken for the same class as by its teacher",
    "knn": "on the test images by nearest neighbours",
    "neighbours": "of the test images with the same nearest neighbour as its teacher's",
}
NOTABLE = 0.03  # of the cost of a step: what steps that are timed by turns tell apart


@dataclass(frozen=True)
class Finalist:
    """A candidate that was trained anew, and how it compares with the best one of its student.

    Its top-1 is in percent of the test images, a value for each seed; ``Result.measured`` says what it is a share of.
    """

    number: int  # of its candidate
    candidate: Candidate
    top1: tuple[float, ...]
    results: tuple[Result, ...]
    cost: float  # seconds of a training step, trained alone
    behind: statistics.Difference  # the best one's top-1 minus its own, over seeds
    p: float  # of that difference, corrected for the number of finalists
    reason: str = ""  # why it failed

    @property
    def mean(self) -> float:
        """The mean of its top-1; NaN where it failed."""
        return statistics.mean(self.top1).mean

    @property
    def is_apart(self) -> bool:
        """Whether the best one is better than it beyond chance."""
        return self.p < statistics.ALPHA


@dataclass(frozen=True)
class Answer:
    """What a search found for one student."""

    student: str
    finalists: list[Finalist]  # the best first; those that failed last
    teacher_top1: float  # in percent; NaN: not measured

    @property
    def best(self) -> Finalist:
        """The finalist with the highest mean."""
        return self.finalists[0]

    @property
    def ties(self) -> list[Finalist]:
        """Those that cannot be told apart from the best one."""
        return [one for one in self.finalists[1:] if not one.reason and not one.is_apart]

    def reference(self, method: str) -> Finalist | None:
        """The finalist that is this method as it comes, if it did not fail."""
        found = (one for one in self.finalists if one.candidate.title == method and not one.reason)
        return next(found, None)

    def sentences(self) -> list[str]:
        """Say what to take and how sure that is, in two sentences; more follow where a method failed, for example."""
        best, seeds = self.best, len(self.best.top1)
        gains = []
        for method, whom in (("kd", "kd"), ("none", "the student trained without a teacher")):
            other = self.reference(method)
            if other is not None and other is not best:
                gain, low, high = (
                    f"{value:+z.2f}" for value in (other.behind.mean, other.behind.low, other.behind.high)
                )
                gains.append(f"{gain} points against {whom} (95 % interval {low} to {high}, corrected p {other.p:.2g})")
        said = "" if best.candidate.method == "none" else " with"
        title = "without a teacher" if best.candidate.method == "none" else best.candidate.title
        shares = SHARES[best.results[0].measured]
        first = f"Train {self.student}{said} {title}: {best.mean:.2f} % {shares}, mean of {seeds} seeds"
        first += f"; {', '.join(gains)}." if gains else "."
        return [first, self._ties(), *self._larger(), *self._failed(), *self._weak_teacher()]

    def _failed(self) -> list[str]:
        return [f"{one.candidate.title} failed: {one.reason.rstrip('.')}." for one in self.finalists if one.reason]

    def _ties(self) -> str:
        best, ties = self.best, self.ties
        if not ties:
            others = len([one for one in self.finalists if not one.reason]) - 1
            if not others:
                return "No other finalist has a result to compare it with."
            whom = "the other finalist" if others == 1 else f"each of the other {others} finalists"
            return f"It is better than {whom} beyond chance (p < {statistics.ALPHA})."
        names = [one.candidate.title for one in ties]
        named = " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))
        cheapest = min(ties, key=lambda one: one.cost)
        less = 1 - cheapest.cost / best.cost
        also = (
            f"; {cheapest.candidate.title} costs {100 * less:.0f} % less to train than {best.candidate.title}"
            if less >= NOTABLE
            else ""
        )
        return f"{named} cannot be told apart from {best.candidate.title}{also}."

    def _larger(self) -> list[str]:
        """Name the methods to choose from that ship more than the student, as some keep layers of their own."""
        alone = self.reference("none") or self.reference("kd")  # which ship the student as it is
        least = None if alone is None else alone.results[0].parameters
        if least is None:
            return []
        sizes = {one.candidate.title: one.results[0].parameters or 0 for one in (self.best, *self.ties)}
        return [
            f"What {title} ships has {counted(size, 'parameter')}; {self.student} alone has {least:,}."
            for title, size in sizes.items()
            if size > least
        ]

    def _weak_teacher(self) -> list[str]:
        alone = self.reference("none")
        if alone is None or not self.teacher_top1 < alone.mean - statistics.EQUAL:
            return []
        return [
            f"The teacher reaches {self.teacher_top1:.2f} % and the student without it {alone.mean:.2f} %: look for a "
            "better teacher first."
        ]


@dataclass(frozen=True)
class Recommendation:
    """The answer of a search.

    Example:
        >>> small = ["data.limit=128", "teacher.epochs=1", "teacher.allow_weak=true"]
        >>> found = kdzoo.recommend(
        ...     "resnet14", "resnet8", methods=["dkd"], settings=1, epochs=2, overrides=small, quiet=True
        ... )
        >>> found.answers[0].best.candidate.method in ("none", "kd", "logitmse", "dkd")
        True
    """

    folder: Path
    search: Search
    answers: list[Answer]  # one for each student

    @classmethod
    def read(cls, folder: Path) -> "Recommendation":
        """Read what a search left in its folder.

        Raises:
            UserError: there is no search, it is not finished, or every finalist of a student failed.
        """
        found = Search.read(folder)
        if not found.finals:
            raise UserError(f"the search in {folder} is not finished; run its command again, and it continues")
        return cls(folder, found, [_answer(folder, found, student) for student in found.students])

    def sentences(self) -> list[str]:
        """Answer in a few sentences."""
        return [sentence for answer in self.answers for sentence in answer.sentences()]

    def rows(self) -> list[dict[str, Any]]:
        """List the finalists with their numbers, unrounded: those of each student the best first."""
        return [
            {
                "student": answer.student,
                "method": one.candidate.title,
                "top1": one.mean,
                "std": statistics.mean(one.top1).std,
                "behind": one.behind.mean,
                "low": one.behind.low,
                "high": one.behind.high,
                "p": one.p,
                "verdict": _verdict(answer, one),
                "cost": one.cost / answer.best.cost,
                "parameters": one.results[0].parameters if one.results else None,
                "latency_1": one.results[0].latency_1 if one.results else None,
            }
            for answer in self.answers
            for one in answer.finalists
        ]

    def write(self) -> list[Path]:
        """Write the settings of each student's best method as a file that ``kdzoo run --config`` takes."""
        files: list[Path] = []
        for answer in self.answers:
            own = f"-{len(files) + 1}-{slug(answer.student)}" if len(self.answers) > 1 else ""
            name = f"recommended{own}.yaml"
            content = yaml.safe_dump(_settings(self.search, answer.best.candidate), sort_keys=False)
            write_text(self.folder / name, f"# {visible(answer.sentences()[0])}\n{content}")
            files.append(self.folder / name)
        return files


def recommend(
    teacher: str | Sequence[str],
    students: str | Sequence[str],
    *,
    methods: str | Sequence[str] = (),
    settings: int = 3,
    budget: str = "",
    epochs: int | None = None,
    data: str = "digits",
    protocol: str = "quick",
    weights: str | Path | Sequence[str | Path] = (),
    seed: int = 0,
    seeds: int = 3,
    out: str | Path | None = None,
    executor: Executor | None = None,
    overrides: Sequence[str] = (),
    quiet: bool = False,
    retry: bool = False,
) -> Recommendation:
    """Find the best method for a teacher and a student, by a search and by finalists that are trained anew.

    Args:
        teacher: its name, or the names of several that answer together.
        students: a name, or several: the question is answered for each.
        methods: names or files of methods; empty for all that are installed. ``none``, ``kd`` and ``logitmse`` are
            always in.
        settings: how many settings of its main weight are tried of each method.
        budget: a time, such as ``4h``, or a number of epochs of all trainings together, such as ``600epochs``; empty:
            the recipe's own epochs for each finalist.
        epochs: of a training at full length; None: the recipe's, or as many as halving all candidates takes.
        data: a data set of ``kdzoo list data``, or the path of a Python file that holds one.
        protocol: a recipe's name, or the path of a YAML file.
        weights: the teacher's, a file or folder, or one for each of several; empty: they are trained.
        seed: of the search; those after it are the finalists'.
        seeds: how many trainings of each finalist count, at least 3.
        out: the folder of the search (default: runs/recommend-TEACHER-STUDENTS-DATA).
        executor: where to train, as ``kdzoo.experiments.workers.find("ray")`` gives it; None for this machine.
        overrides: further settings of every run as ``key=value``.
        quiet: whether to show nothing.
        retry: whether to try again what failed before.

    Raises:
        UserError: a name or a setting that the user can fix; a budget that is too small; no method that fits.

    Example:
        >>> small = ["data.limit=128", "teacher.epochs=1", "teacher.allow_weak=true"]
        >>> found = kdzoo.recommend(
        ...     "resnet14", "resnet8", methods=["dkd"], settings=1, epochs=2, overrides=small, quiet=True
        ... )
        >>> [answer.student for answer in found.answers]
        ['resnet8']
    """
    teachers, pupils, files = names(teacher=teacher), names(students=students), names(weights=weights)
    pictures = {"name": name(data=data)}
    recipe = {"name": name(protocol=protocol)} | ({} if epochs is None else {"epochs": epochs})
    question = Question(
        teachers, pupils, names(methods=methods), settings, budget, pictures, recipe, files, seed, overrides, seeds
    )
    found = Recommendation.read(search(question, out, executor, quiet, retry))
    found.write()
    return found


def _answer(folder: Path, found: Search, student: str) -> Answer:
    """Compare a student's finalists with the best one, over the seeds that both have."""
    seeds: dict[int, dict[int, Result]] = {}
    reasons: dict[int, str] = {}
    for trained in found.finals:
        if found.candidates[trained.candidate].student == student:
            run = found.run(folder, trained)
            result = run.read_result()
            results = seeds.setdefault(trained.candidate, {})
            if result is not None:
                results[trained.seed] = result
            else:
                reasons[trained.candidate] = read_text(run.failure).strip() if run.failure.is_file() else "not finished"
    whole = {number: results for number, results in seeds.items() if number not in reasons}
    if not whole:
        raise UserError(f"every finalist of {student} failed: {'; '.join(dict.fromkeys(reasons.values()))}")
    top1 = {number: [results[seed].top1 for seed in sorted(results)] for number, results in whole.items()}

    def merit(number: int) -> tuple[float, float]:
        """More is better; of finalists whose means differ by no more than rounding, the cheaper one."""
        return round(statistics.mean(top1[number]).mean, statistics.DIGITS), -found.costs[number]

    order = sorted(whole, key=merit, reverse=True)
    behind = {number: statistics.paired(top1[order[0]], top1[number]) for number in order[1:]}
    corrected = dict(zip(behind, statistics.holm([each.p for each in behind.values()]), strict=True))
    blank = statistics.Difference(0, *[math.nan] * 4)
    finalists = [
        Finalist(
            number,
            found.candidates[number],
            tuple(top1.get(number, ())),
            tuple(result for _, result in sorted(seeds[number].items())) if number in whole else (),
            found.costs[number],
            behind.get(number, blank),
            corrected.get(number, math.nan),
            reasons.get(number, ""),
        )
        for number in [*order, *reasons]
    ]
    teachers = [each.teacher_top1 for one in finalists for each in one.results if each.teacher_top1 is not None]
    return Answer(student, finalists, max(teachers, default=math.nan))


def _verdict(answer: Answer, one: Finalist) -> str:
    if one.reason:
        return f"failed: {one.reason}"
    if one is answer.best:
        return "best"
    return "worse" if one.is_apart else "cannot be told apart"


def _settings(found: Search, best: Candidate) -> dict[str, Any]:
    """Write the settings of a run at full length; where the best is ``none``, a teacher would be trained in vain."""
    asked, recipe = found.asked, found.asked["protocol"]
    if found.epochs > read_protocol(str(recipe["name"]), recipe.get("epochs")).epochs:
        recipe = {**recipe, "epochs": found.epochs}  # of a recipe that is shorter than its search
    settings = {
        "distiller": best.entry,
        "teacher": several(asked["teachers"], asked["weights"]),
        "student": {"name": best.student},
        "data": asked["data"],
        "protocol": recipe,
    }
    settings = merged(settings, asked["overrides"])
    return {name: value for name, value in settings.items() if name != "teacher" or best.method != "none"}
