"""What a search for the best method did, as its folder keeps it: the plan, and how far each candidate came."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from kdzoo.errors import UserError
from kdzoo.files import read_json, write_text
from kdzoo.store.folder import RunFolder

FORMAT = 3
FILE = "search.json"
MOST_EPOCHS = 10**6
ASKED = {"teacher": str, "teachers": list, "weights": list, "data": dict, "protocol": dict, "overrides": list}


@dataclass(frozen=True)
class Candidate:
    """One student, and one method with its keywords."""

    student: str
    method: str
    keywords: dict[str, Any] = field(default_factory=dict)  # what differs from the preset or the defaults

    @property
    def title(self) -> str:
        """The method with its keywords, as tables name it."""
        changed = ", ".join(f"{key}={value}" for key, value in self.keywords.items())
        return f"{self.method} ({changed})" if changed else self.method

    @property
    def entry(self) -> dict[str, Any]:
        """The candidate's line in a suite's list of methods."""
        return {"name": self.method, **self.keywords}


class Point(NamedTuple):
    """What was measured after an epoch on the part that was held out, see ``kdzoo.engine.measure.Measures``."""

    epoch: int
    top1: float  # percent
    top5: float  # percent
    nll: float | None = None  # nats; None: the student has no classifier

    @property
    def standing(self) -> tuple[float, float, float]:
        """What candidates are compared by: more is better."""
        return -math.inf if self.nll is None else -self.nll, self.top1, self.top5


@dataclass
class Course:
    """How far a candidate came."""

    curve: list[Point] = field(default_factory=list)  # its epochs, all from the first on
    stopped: int | None = None  # the rung's epoch after which it did not continue; None: it did to the end
    reason: str = ""  # why it failed; empty: it did not

    def at(self, epoch: int) -> Point:
        """Return what was measured after an epoch."""
        return next(point for point in self.curve if point.epoch == epoch)


@dataclass(frozen=True)
class Trained:
    """A finalist's run on the test images."""

    candidate: int  # its number
    seed: int
    folder: str  # the name of the run's folder, in ``final``


@dataclass
class Search:
    """The plan of a search, decided before it begins, and what became of it."""

    asked: dict[str, Any]  # what must be the same when it is continued
    epochs: int  # of a training at full length
    rungs: list[int]  # epochs after which the worse half stops
    seeds: list[int]  # of the finalists
    share: float  # of the training images, which candidates are ranked on
    average: float  # decay of the average of weights that they are ranked by; 0: the recipe's own average
    candidates: list[Candidate]
    costs: list[float]  # seconds of a step of each candidate trained alone, as measured before
    left_out: list[tuple[str, str, str]]  # student, method, and why it does not fit
    courses: list[Course] = field(default_factory=list)  # of the candidates, in their order
    finals: list[Trained] = field(default_factory=list)
    seconds: float = 0.0  # that all of it was expected to take, as measured before; 0: not known

    @property
    def students(self) -> list[str]:
        """The students, each once."""
        return list(dict.fromkeys(one.student for one in self.candidates))

    def of(self, student: str) -> list[int]:
        """Return the numbers of a student's candidates."""
        return [number for number, one in enumerate(self.candidates) if one.student == student]

    def run(self, out: Path, trained: Trained) -> RunFolder:
        """Find the folder of a finalist's run, in the folder of the search."""
        return RunFolder(out / "final" / Path(trained.folder).name)

    def write(self, out: Path) -> None:
        """Write it into the folder of the search."""
        write_text(out / FILE, json.dumps({"format": FORMAT, **asdict(self)}, indent=1) + "\n")

    @classmethod
    def read(cls, out: Path) -> "Search":
        """Read what ``write`` wrote.

        Raises:
            UserError: there is no search in ``out``, or its file is damaged or of another version.
        """
        file = out / FILE
        if not file.is_file():
            raise UserError(f"{out} holds no search; expected a folder that kdzoo recommend wrote")
        values = read_json(file)
        if values.pop("format", None) != FORMAT:
            raise UserError(
                f"{file} was written by another version of kdzoo; move the folder away, or choose another --out"
            )
        try:
            found = cls(**values)
            found.candidates = [Candidate(**_texts(one, "student", "method")) for one in values["candidates"]]
            found.courses = [
                Course(
                    [
                        Point(int(epoch), float(top1), float(top5), None if nll is None else float(nll))
                        for epoch, top1, top5, nll in one["curve"]
                    ],
                    one["stopped"],
                    str(one["reason"]),
                )
                for one in values["courses"]
            ]
            found.finals = [
                Trained(int(one["candidate"]), int(one["seed"]), str(one["folder"])) for one in values["finals"]
            ]
            found.left_out = [
                (str(student), str(method), str(reason)) for student, method, reason in values["left_out"]
            ]
            found.costs = [float(cost) for cost in values["costs"]]
            found.seconds = float(found.seconds)
            found.rungs = [int(epoch) for epoch in values["rungs"]]
            _check(found)
        except (TypeError, KeyError, ValueError, AttributeError, OverflowError) as error:
            raise UserError(f"{file} is damaged ({error}); move the folder away, or choose another --out") from error
        return found


def _texts(values: dict[str, Any], *names: str) -> dict[str, Any]:
    if not all(isinstance(values[name], str) for name in names) or not isinstance(values["keywords"], dict):
        raise ValueError("a candidate has no name")
    return values


def _check(found: Search) -> None:
    """Check what ``read`` has not: that numbers can be drawn, and that candidates can be ranked."""
    number, courses = len(found.candidates), found.courses
    if not number or len(found.costs) != number or len(courses) not in (0, number):
        raise ValueError("its lists differ in length")
    for key, kind in ASKED.items():
        value = found.asked.get(key)
        if not isinstance(value, kind) or (kind is list and not all(isinstance(one, str) for one in value)):
            raise ValueError(f"it names no {key}")
    for key in ("data", "protocol"):
        if not isinstance(found.asked[key].get("name"), str):
            raise ValueError(f"it names no {key}")
    if not found.asked["teachers"]:
        raise ValueError("it names no teacher")
    if not isinstance(found.seeds, list) or not all(isinstance(seed, int) for seed in found.seeds):
        raise ValueError("a seed is none")
    if not all(isinstance(epoch, int) and 1 <= epoch <= MOST_EPOCHS for epoch in [found.epochs, *found.rungs]):
        raise ValueError("an epoch is none")
    if not 0 <= found.average < 1:
        raise ValueError("an average has no such decay")
    if not all(0 < cost < math.inf for cost in found.costs):
        raise ValueError("a cost is no time")
    if not 0 <= found.seconds < math.inf:
        raise ValueError("what it was expected to take is no time")
    last = max((course.stopped or 0 for course in courses), default=0)
    for course in courses:
        if course.stopped not in (None, *found.rungs):
            raise ValueError("a candidate stopped after an epoch that is no rung")
        if [epoch for epoch, *_ in course.curve] != list(range(1, len(course.curve) + 1)):
            raise ValueError("a curve lacks an epoch")
        if not all(0 <= share <= 100 for point in course.curve for share in (point.top1, point.top5)):
            raise ValueError("an accuracy is no percentage")
        if not all(0 <= point.nll < math.inf for point in course.curve if point.nll is not None):
            raise ValueError("a likelihood is none")
        if not course.reason and len(course.curve) < (last if course.stopped is None else course.stopped):
            raise ValueError("a curve is too short")
    seeds: dict[int, set[int]] = {}
    for one in found.finals:
        seeds.setdefault(one.candidate, set()).add(one.seed)
    if not all(0 <= candidate < number for candidate in seeds):
        raise ValueError("a finalist is no candidate")
    if len(set(map(frozenset, seeds.values()))) > 1:
        raise ValueError("finalists differ in their seeds")


def ranked(search: Search, chosen: Sequence[int], epoch: int) -> list[int]:
    """Order candidates by their standing after an epoch, the best first; those that failed are left out."""
    sound = [number for number in chosen if not search.courses[number].reason]
    return sorted(sound, key=lambda number: search.courses[number].at(epoch).standing, reverse=True)
