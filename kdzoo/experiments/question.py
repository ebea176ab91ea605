"""The question that a search answers: for which networks, data and recipe, among which methods, at what cost."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from kdzoo.errors import UserError
from kdzoo.experiments import halving
from kdzoo.experiments.candidates import ALWAYS
from kdzoo.experiments.halving import SHARE
from kdzoo.files import slug
from kdzoo.keywords import flat
from kdzoo.resolve import merged, read_protocol, several
from kdzoo.store.search import MOST_EPOCHS, Candidate

OWN = ("data.select", "engine.stop_after", "output.measure_every", "seed", "distiller")  # decided by the search
OPTIONS = {  # of settings that the question itself holds
    "data.name": "--data",
    "protocol.name": "--protocol",
    "protocol.epochs": "--epochs",
    "student.name": "--students",
    "teacher.name": "--teacher",
}
MOST_SEED = 2**62 - 1


@dataclass(frozen=True)
class Question:
    """A teacher and one or several students, for which a method is sought.

    Args:
        teachers: the name of the teacher, or of several that answer together.
        students: their names; the question is answered for each.
        methods: names or files of methods; empty for all. ``none``, ``kd`` and ``logitmse`` are always in.
        settings: how many settings of its main weight are tried of each method.
        budget: a time, such as ``4h``, or a number of epochs of all trainings together, such as ``600epochs``; empty:
            the recipe's own epochs for each finalist.
        data: settings of the data, ``name`` among them.
        protocol: the recipe's settings, ``name`` among them.
        weights: the teacher's, a file or folder, or one for each of several; empty: they are trained.
        seed: of the search; those after it are the finalists'.
        overrides: further settings of every run as ``key=value``.
        seeds: how many trainings of each finalist count.

    Raises:
        UserError: a value that makes no sense, or a setting that the search itself decides.
    """

    teachers: tuple[str, ...]
    students: tuple[str, ...]
    methods: tuple[str, ...] = ()
    settings: int = 3
    budget: str = ""
    data: Mapping[str, Any] = field(default_factory=lambda: {"name": "digits"})
    protocol: Mapping[str, Any] = field(default_factory=lambda: {"name": "quick"})
    weights: tuple[str, ...] = ()
    seed: int = 0
    overrides: Sequence[str] = ()
    seeds: int = halving.SEEDS

    def __post_init__(self) -> None:
        if not self.teachers or not all(self.teachers):
            raise UserError("no teacher is named; pass --teacher NAME")
        if not self.students or not all(self.students):
            raise UserError("no student is named; pass --students NAME, or several with commas between them")
        if len(set(self.students)) < len(self.students):
            raise UserError(f"--students {','.join(self.students)}: expected each name once")
        _check_whole("--settings", self.settings, 1, 9)
        _check_whole("--seed", self.seed, 0, MOST_SEED)
        _check_whole("--seeds", self.seeds, halving.SEEDS, halving.MOST_SEEDS)
        if "epochs" in self.protocol:
            _check_whole("--epochs", self.protocol["epochs"], 1, MOST_EPOCHS)
        if self.budget != "":
            halving.parsed(self.budget)
        for key, value in flat(merged({}, self.overrides)).items():
            if key in OPTIONS or f"{key}.name" in OPTIONS:
                raise UserError(f"{key}={value}: give it as {OPTIONS.get(key) or OPTIONS[f'{key}.name']} instead")
            if key.startswith(OWN):
                raise UserError(f"{key} is decided by the search itself; leave it out")
            if key == "output.ship" and value == "best":
                raise UserError("output.ship=best chooses an epoch on the test images, which a search never does")

    @property
    def teacher(self) -> str:
        """The teacher's name, or the names of all."""
        return "+".join(self.teachers)

    @property
    def epochs(self) -> int:
        """The epochs of a training at full length."""
        return (
            self.protocol["epochs"] if "epochs" in self.protocol else read_protocol(str(self.protocol["name"])).epochs
        )

    @property
    def folder(self) -> Path:
        """The folder of the search, where none is given."""
        names = self.teacher, *self.students, str(self.data["name"])
        return Path("runs") / "-".join(["recommend", *map(slug, names)])[:200]

    def suite(self, name: str, chosen: Mapping[str, Sequence[Candidate]], epochs: int, seeds: Sequence[int]) -> str:
        """Write the suite of these candidates, by student, as its file holds it."""
        teacher = several(self.teachers, self.weights)
        content = {
            "name": name,
            "data": {**self.data, "select": 0.0 if name == "final" else SHARE},
            "protocol": {**self.protocol, "epochs": epochs},
            "pairs": [
                {"teacher": teacher["name"], "student": student, "distillers": [one.entry for one in some]}
                for student, some in chosen.items()
            ],
            "distillers": list(ALWAYS),  # of pairs that name none
            "seeds": list(seeds),
            "teacher": {key: value for key, value in teacher.items() if key != "name"},
        }
        return yaml.safe_dump(content, sort_keys=False)


def _check_whole(option: str, value: Any, lowest: int, highest: int) -> None:
    if type(value) is not int or not lowest <= value <= highest:
        raise UserError(f"{option} {value}: expected a whole number from {lowest} to {highest}")
