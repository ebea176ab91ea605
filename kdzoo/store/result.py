"""What a finished run found, as its folder keeps it."""

import json
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any

from kdzoo.errors import UserError
from kdzoo.keywords import between, flat, typed
from kdzoo.naming import Names

MEASURED = {
    "accuracy": "test images whose class is found",
    "agreement": "test images that student and teacher take for the same class: the data have no labels",
    "knn": "test images whose class the nearest neighbours of their embedding tell: there is no classifier",
    "neighbours": "test images whose nearest neighbour is the teacher's too: there are neither labels nor a classifier",
}
MEASURED_BY = {
    "accuracy": "top-1",
    "agreement": "agreement",
    "knn": "k-NN",
    "neighbours": "common neighbours",
}
HIGHEST = {  # what the numbers of a result may be at most; none is below 0
    **dict.fromkeys(("teacher_top1", "top1", "top5", "best_top1", "best_top5", "agreement", "knn", "probe"), 100),
    **dict.fromkeys(("seconds", "images_per_second", "latency_1", "latency_64"), 1e12),
    **dict.fromkeys(("epochs", "best_epoch"), 10**6),
    "kl": 1e39,  # what float32 holds
    "image_size": 4096,
    **dict.fromkeys(("seed", "parameters", "extra_parameters", "peak_memory", "flops", "file_bytes"), 2**63 - 1),
}


@dataclass(frozen=True)
class Result:
    """What a finished run found. Accuracies are in percent, of the whole test set.

    Example:
        >>> result = kdzoo.run("none", "resnet8", overrides=quick, quiet=True)
        >>> result.folder.parent, result.student, result.epochs
        (PosixPath('runs'), 'resnet8', 1)
    """

    folder: Path
    data: str
    protocol: str
    teacher: str | None
    student: str
    distiller: str
    fidelity: str
    seed: int
    teacher_top1: float | None
    top1: float  # of the last epoch
    top5: float
    best_top1: float  # of the best epoch
    best_epoch: int
    epochs: int
    seconds: float  # of training and measuring, without the teacher's training
    images_per_second: float  # the median over epochs
    names: Names  # of its parts, as tables show them
    fingerprint: str = ""  # of the data; empty where their name and options decide them
    parameters: int | None = None  # of the student that ships; None: not counted, as in results of older versions
    extra_parameters: int | None = None  # that the method trains beside the student
    peak_memory: int | None = None  # bytes of the device in training, teacher included; None: not measured
    weights: str = ""  # SHA-256 of the student's file; empty in results of older versions
    best_top5: float | None = None  # of the best epoch by top-1; None in results of older versions, as all that follow
    ship: str = "last"  # which student was kept, as output.ship says: last, best or ema
    image_size: int | None = None  # side in pixels of the images that it is given, before it resizes them itself
    flops: int | None = None  # of one image through the student that ships; a multiplication with its addition is two
    file_bytes: int | None = None  # of the student's file
    latency_1: float | None = None  # milliseconds of one image through the student that ships, in float32: the median
    latency_64: float | None = None  # milliseconds of 64 images in one batch
    measured: str = "accuracy"  # what top-1 and top-5 are shares of, see ``MEASURED``
    agreement: float | None = None  # percent of the test images that student and teacher take for the same class
    kl: float | None = None  # mean divergence of the student's probabilities from the teacher's, in nats
    knn: float | None = None  # top-1 of the embedding by its nearest neighbours, in percent
    probe: float | None = None  # top-1 of a linear classifier of the embedding, in percent
    teachers_top1: tuple[float, ...] = ()  # of each of several teachers alone, in their order

    def plain(self) -> dict[str, Any]:
        """Return the values as JSON holds them; the folder is not among them."""
        values = asdict(self)
        del values["folder"]
        return values

    @classmethod
    def of(cls, plain: Mapping[str, Any], folder: Path) -> "Result":
        """Read what ``plain`` gave; keys that a newer version has added are left out.

        Raises:
            KeyError: a value is missing, as in what another version wrote.
            UserError: a value is of another type, or out of its range.
        """
        values = _known(cls, plain)
        if isinstance(values.get("names"), dict):
            values["names"] = _known(Names, values["names"])
        for key in fields(cls):
            if key.default is MISSING and key.name not in values and key.name != "folder":
                raise KeyError(key.name)
        result: Result = typed(cls, {**values, "folder": folder}, "")
        for name, highest in HIGHEST.items():
            if getattr(result, name) is not None:
                between(0, highest, **{name: getattr(result, name)})
        for top1 in result.teachers_top1:
            between(0, 100, teachers_top1=top1)
        if result.measured not in MEASURED:
            raise UserError(f"measured={result.measured} is none of {', '.join(MEASURED)}")
        read = flat(json.loads(json.dumps(result.plain())))
        if read | flat(values) != read:
            raise UserError("a value is of another type")
        return result

    @property
    def shipped_top1(self) -> float:
        """Top-1 of the student that was kept, in percent."""
        return self.best_top1 if self.ship == "best" else self.top1

    @property
    def shipped_top5(self) -> float | None:
        """Top-5 of the student that was kept, in percent; None where it was not kept apart."""
        return self.best_top5 if self.ship == "best" else self.top5


def _known(schema: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """Keep the values of the keys that a dataclass has."""
    return {key.name: values[key.name] for key in fields(schema) if key.name in values}
