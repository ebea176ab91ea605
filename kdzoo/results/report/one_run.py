"""Show one run: its accuracy by class, what it confuses, its surest mistakes, its spectra, and how to make it again."""

import base64
import shlex
from collections.abc import Sequence
from io import BytesIO
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from kdzoo.results.report.gather import Kept
from kdzoo.results.report.spectra import spectra
from kdzoo.results.table import PAIR, SECTION
from kdzoo.store.predictions import Predictions

CONFUSIONS = 10  # that are listed
PICTURES = 1_200_000  # characters of all pictures of a report together
FACTS = {"revision": "commit of kdzoo", "device": "device", "precision": "precision", "threads": "CPU threads"}
FACTS |= {"python": "Python", "platform": "platform"}
WORDS = {  # what a class of test images is, and the share of its images that the student takes for it
    "accuracy": ("true class", "accuracy"),
    "agreement": ("the teacher's class", "agreement with the teacher"),
    "knn": ("true class", "accuracy by nearest neighbours"),
}


class Panes:
    """What the page shows of each run; names of classes are kept once, and pictures until they fill their share."""

    def __init__(self, kept: Sequence[Kept], baseline: str):
        self.kept, self.baseline = kept, baseline
        self.classes: list[list[str]] = []
        self.pictures = 0

    def all(self) -> dict[str, Any]:
        """Return the panes of all runs, and the names of classes that they refer to."""
        return {"runs": [self._pane(one) for one in self.kept], "classes": self.classes}

    def _pane(self, one: Kept) -> dict[str, Any]:
        row, notes, folder = one.row, list(one.notes), str(one.row["folder"])
        pane: dict[str, Any] = {
            "title": f"{row['method']}, {one.pair}, {row['data']}, {row['protocol']}, seed {row['seed']}",
            "method": row["method"],
            "baseline": self._baseline_of(one),
            "facts": facts(one),
            "config": one.config,
            "command": one.command,
            "made_in": str(one.environment.get("folder") or ""),
            "spectrum_command": shlex.join(["kdzoo", "spectrum", folder, "--out", f"{folder}/spectrum"]),
            "spectrum": None if one.spectrum is None else spectra(one.spectrum),
        }
        if one.classes not in self.classes:
            self.classes.append(one.classes)
        pane["classes"] = self.classes.index(one.classes)
        if one.predictions is not None:
            found, count = one.predictions, len(one.classes)
            pane["accuracy"] = by_class(found.labels, found.student, count)
            pane["words"] = WORDS[row["measured"]]
            if len(found.teacher) and row["measured"] != "agreement":  # where its answers are what is right
                pane["teacher"] = by_class(found.labels, found.teacher, count)
                pane["confusions"] = confusions(found, count)
            if self.pictures < PICTURES:
                pane["mistakes"] = mistakes(found)
                self.pictures += sum(len(mistake["picture"]) for mistake in pane["mistakes"])
            else:
                notes.append("too many pictures for one page: give fewer runs to see this one's mistakes")
        return {**pane, "notes": notes}

    def _baseline_of(self, one: Kept) -> int | None:
        """The place of the baseline's run on the same data, pair and seed."""
        same = (*SECTION, *PAIR, "seed")
        wanted = {**{name: one.row.get(name) for name in same}, "method": self.baseline}
        if one.row["method"] == self.baseline:
            return None
        found = (i for i, other in enumerate(self.kept) if {name: other.row.get(name) for name in wanted} == wanted)
        return next(found, None)


def facts(one: Kept) -> list[tuple[str, str]]:
    """List what is known of a run beside its accuracy: versions, device, data."""
    found = [("folder", str(one.row["folder"])), ("fidelity", str(one.row["fidelity"]))]
    packages = one.environment.get("packages")
    packages = packages if isinstance(packages, dict) else {}
    found += [(str(name), str(version)) for name, version in packages.items() if version]
    found += [(title, str(one.environment[key])) for key, title in FACTS.items() if one.environment.get(key)]
    found.append(("data fingerprint", one.fingerprint or "none: name and options decide the images"))
    return found


def by_class(labels: NDArray[Any], classes: NDArray[Any], count: int) -> list[float | None]:
    """Compute the accuracy in percent on the images of each class; None for a class without images."""
    images = np.bincount(labels, minlength=count)
    right = np.bincount(labels[labels == classes], minlength=count)
    return [round(100 * float(r) / float(n), 1) if n else None for r, n in zip(right, images, strict=True)]


def confusions(found: Predictions, count: int) -> list[tuple[int, int, int, int]]:
    """Find the confusions that the student has and the teacher has not, most frequent first.

    Returns:
        (true class, class it is taken for, images by the student, images by the teacher) of those that the student
        makes more often.
    """

    def counted(classes: NDArray[Any]) -> dict[int, int]:
        wrong = found.labels != classes
        keys = found.labels[wrong].astype(np.int64) * count + classes[wrong]
        return dict(zip(*(each.tolist() for each in np.unique(keys, return_counts=True)), strict=True))

    ours, theirs = counted(found.student), counted(found.teacher)
    more = [(key, number, theirs.get(key, 0)) for key, number in ours.items() if number > theirs.get(key, 0)]
    more.sort(key=lambda each: (each[2] - each[1], each[0]))
    return [(key // count, key % count, number, other) for key, number, other in more[:CONFUSIONS]]


def mistakes(found: Predictions) -> list[dict[str, Any]]:
    """List the surest mistakes with their pictures, as the page's images have them."""
    return [
        {
            "picture": picture(pixels),
            "title": title,
            "label": int(found.labels[row]),
            "student": int(found.student[row]),
            "confidence": round(100 * float(found.confidence[row]), 1),
            "teacher": int(found.teacher[row]) if len(found.teacher) else None,
        }
        for row, pixels, title in zip(found.worst.tolist(), found.pictures, found.titles, strict=True)
    ]


def picture(pixels: NDArray[np.uint8]) -> str:
    """Write pixels (S, S, 3) as the address of an image that needs no file: small ones exactly, others as WebP."""
    file = BytesIO()
    exact = len(pixels) <= 16
    Image.fromarray(pixels).save(file, "PNG" if exact else "WEBP", **({} if exact else {"quality": 60, "method": 0}))
    return f"data:image/{'png' if exact else 'webp'};base64,{base64.b64encode(file.getvalue()).decode('ascii')}"
