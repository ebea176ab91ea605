"""Finished runs that nobody trained: folders as an engine leaves them, and the rows that tables are made of."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from kdzoo.naming import names_of
from kdzoo.resolve import resolve
from kdzoo.results import table
from kdzoo.store.folder import RunFolder, find_runs
from kdzoo.store.predictions import Predictions, mistakes
from kdzoo.store.result import Result
from kdzoo.store.search import Candidate, Course, Point, Search, Trained


def write(root: Path, top1: float, seed: int, *overrides: str, distiller: str = "kd", **found: Any) -> RunFolder:
    """A finished run of the digits, as an engine would leave it."""
    run = resolve(
        {"distiller": {"name": distiller}, "student": {"name": "resnet_8"}, "output": {"root": str(root)}},
        ["teacher.name=vit_s", f"seed={seed}", "engine.device=cpu", "engine.precision=float32", *overrides],
    )
    folder = RunFolder.of(run)
    folder.open(run)
    values: dict[str, Any] = {
        "data": "digits",
        "protocol": "quick",
        "teacher": "vit_s",
        "student": "resnet_8",
        "distiller": distiller,
        "fidelity": "exact",
        "seed": seed,
        "teacher_top1": 96.0,
        "top1": top1,
        "top5": 99.0,
        "best_top1": top1 + 1,
        "best_epoch": 1,
        "epochs": 2,
        "seconds": 1.0,
        "images_per_second": 100.0,
        "names": names_of(run.settings),
        "fingerprint": run.settings.data.fingerprint,
    }
    folder.write_result(Result(folder=folder.path, **{**values, **found}))
    return folder


def fill(
    folder: RunFolder,
    classes: Sequence[str],
    top1: float,
    epochs: int = 3,
    images: int = 300,
    side: int = 8,
    terms: int = 2,
    seed: int = 0,
) -> None:
    """Add to a finished run what reports show beside its result: history, class names and predictions."""
    chance = np.random.default_rng(seed)
    history = [
        {
            "epoch": epoch,
            "step": 10 * epoch,
            "lr": 0.1,
            "loss": dict.fromkeys(("ce", "kd", "one", "other")[:terms], 2.0 / epoch),
            "top1": round(top1 * epoch / epochs, 2),
            "top5": 99.0,
            "images_per_second": 100.0,
        }
        for epoch in range(1, epochs + 1)
    ]
    folder.write_history(history)
    folder.classes.write_text("".join(f"{name}\n" for name in classes), encoding="utf-8")
    labels = chance.integers(len(classes), size=images)
    student, teacher = (
        np.where(chance.random(images) < share, labels, chance.integers(len(classes), size=images))
        for share in (top1 / 100, 0.9)
    )
    confidence = chance.random(images)
    worst = mistakes(labels, student, confidence)
    pictures = chance.integers(256, size=(len(worst), side, side, 3)).astype(np.uint8)
    titles = tuple(f"image {row}" for row in worst)
    Predictions(labels, student, confidence, teacher, worst, pictures, titles).write(folder.predictions)


def many(
    root: Path,
    methods: Sequence[str],
    students: Sequence[str] = ("resnet_8",),
    seeds: int = 3,
    classes: Sequence[str] = ("cat", "dog", "ship"),
    **filled: int,
) -> list[RunFolder]:
    """Runs of every method, student and seed, each method a little better than the one before, with all files."""
    folders = []
    for i, method in enumerate(methods):
        for j, student in enumerate(students):
            for seed in range(seeds):
                top1 = round(60 + 3 * i + j + 0.3 * ((seed * 7 + i * 3 + j) % 5), 2)
                given = [f"student.name={student}"] if student != "resnet_8" else []
                folder = write(root, top1, seed, *given, distiller=method, student=student, parameters=10**5 * (j + 1))
                fill(folder, classes, top1, seed=seed, **filled)
                folders.append(folder)
    return folders


def runs(*scores: tuple[Any, ...], **common: Any) -> pd.DataFrame:
    """Runs from (teacher, student, method, seed, top1), as ``table.rows`` gives them."""
    fixed: dict[str, Any] = {
        "data": "cifar100",
        "protocol": "crd",
        "fidelity": "exact",
        "teacher_top1": 79.0,
        "top5": 90.0,
        "seconds": 10.0,
        "images_per_second": 100.0,
        "parameters": None,
        "extra_parameters": None,
        "peak_memory": None,
        "ship": "last",
        "flops": None,
        "file_bytes": None,
        "latency_1": None,
        "latency_64": None,
        "device": "cpu",
        "precision": "float32",
        "preset": False,
        "measured": "accuracy",
        **dict.fromkeys(table.LIKENESS),
    }
    names = ("teacher", "student", "method", "seed", "top1")
    records = [fixed | dict(zip(names, row, strict=True)) | {"best_top1": row[-1] + 0.5} | common for row in scores]
    return pd.DataFrame(records)


def varied(root: Path) -> pd.DataFrame:
    """Three seeds of kd, and three runs that each differ from it in one thing."""
    for seed, top1 in enumerate((80.0, 81.0, 85.0)):
        write(root, top1, seed)
    write(root, 70.0, 0, "distiller.temperature=1")
    write(root, 60.0, 0, "protocol.epochs=1")
    write(root, 50.0, 0, distiller="none")
    return table.rows(find_runs([root]))


def search(
    out: Path,
    finalists: Sequence[tuple[Candidate, Sequence[float] | str, float]],
    stopped: Sequence[tuple[Candidate, str]] = (),
    **found: Any,
) -> Search:
    """A search as it lies on disk, with two rungs, and with the runs of its finalists.

    Args:
        out: its folder.
        finalists: candidates that came to the end, each with its top-1 by seed or why its first run failed, and the
            seconds of its step.
        stopped: candidates that stopped after the first epoch, each with why it failed, if it did.
        found: other fields of the search, or of the runs' results.
    """
    fields: dict[str, Any] = {name: found.pop(name) for name in ("asked", "left_out", "rungs") if name in found}
    finals = []
    for number, (one, scores, _) in enumerate(finalists):
        keywords = [f"distiller.{key}={value}" for key, value in one.keywords.items()]
        for seed, top1 in enumerate([0.0] * 3 if isinstance(scores, str) else scores, start=1):
            given = [f"student.name={one.student}", *keywords]
            folder = write(out / "final", top1, seed, *given, distiller=one.method, **{"student": one.student, **found})
            fill(folder, ("cat", "dog"), top1, seed=seed)
            finals.append(Trained(number, seed, folder.path.name))
            if isinstance(scores, str) and seed == 1:
                folder.result.unlink()
                folder.failure.write_text(f"{scores}\n", encoding="utf-8")
    ends = [Course([Point(1, 10.0, 50.0, 2.5), Point(2, 30.0 - i, 70.0, 1.5 + i)]) for i in range(len(finalists))]
    begun = [Course([] if why else [Point(1, 9.0 - i, 40.0, 2.6 + i)], 1, why) for i, (_, why) in enumerate(stopped)]
    candidates = [*(one for one, *_ in finalists), *(one for one, _ in stopped)]
    values: dict[str, Any] = {
        "asked": {
            "teacher": "vit_s",
            "teachers": ["vit_s"],
            "students": list(dict.fromkeys(one.student for one in candidates)),
            "data": {"name": "digits"},
            "protocol": {"name": "quick", "epochs": 4},
            "weights": [],
            "overrides": [],
        },
        "epochs": 4,
        "rungs": [1, 2],
        "seeds": [1, 2, 3],
        "average": 0.0,
        "share": 0.2,
        "candidates": candidates,
        "costs": [*(cost for *_, cost in finalists), *([0.01] * len(stopped))],
        "left_out": [],
        "courses": [*ends, *begun],
        "finals": finals,
    }
    made = Search(**{**values, **fields})
    out.mkdir(exist_ok=True)
    made.write(out)
    return made


def candidate(method: str, student: str = "resnet_8", **keywords: Any) -> Candidate:
    """A candidate of a search."""
    return Candidate(student, method, keywords)
