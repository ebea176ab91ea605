"""Gather what runs left, for a report: files are read and checked, and no code that they name is run."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import pandas as pd

from kdzoo.errors import UserError, visible
from kdzoo.files import read_text
from kdzoo.results import table
from kdzoo.results.report import search
from kdzoo.results.report.command import command
from kdzoo.results.report.spectra import read_spectrum
from kdzoo.results.unfinished import find_searches, none_finished, trials, unfinished
from kdzoo.store import predictions
from kdzoo.store.folder import RunFolder, find_runs
from kdzoo.store.history import check_history
from kdzoo.store.predictions import Predictions

LARGEST = 2**20  # bytes of a text that is shown
Read = TypeVar("Read")


@dataclass(frozen=True)
class Kept:
    """What a finished run left beside its result; what is missing is empty, and ``notes`` say why."""

    row: dict[str, Any]  # of ``table.rows``
    fingerprint: str  # of the data; empty where their name and options decide them
    history: list[dict[str, Any]]
    classes: list[str]
    predictions: Predictions | None
    spectrum: pd.DataFrame | None
    environment: dict[str, Any]
    config: str  # the text of its file
    command: str
    notes: list[str]

    @property
    def pair(self) -> str:
        """Its teacher and student."""
        return table.pair_name(self.row["teacher"], self.row["student"])

    @property
    def section(self) -> tuple[str, ...]:
        """What the runs that it is compared with agree in."""
        return tuple(str(self.row[name]) for name in table.SECTION)


@dataclass(frozen=True)
class Gathered:
    """The finished runs of a report, as rows and one by one, the searches, and what was left out."""

    runs: pd.DataFrame  # without a row where there are searches alone
    kept: list[Kept]
    searches: list[search.Found]
    notes: list[str]
    baseline: str  # the method that the others are compared with


def gather(paths: Sequence[Path], baseline: str | None = None) -> Gathered:
    """Read the finished runs and the searches in or below ``paths``.

    What a search trained on a part of the training images is left out: these runs are of another kind.

    Raises:
        UserError: there is no such folder, no finished run and no search, or no run of the baseline.
    """
    found = {folder.path.resolve(): folder for folder in find_runs(list(paths))}
    folders = find_searches(paths)
    searches, damaged = _searches(folders)
    tried = trials(folders)
    runs = table.rows(folder for path, folder in found.items() if path.parent not in tried)
    waiting = [*damaged, *unfinished(paths, tried)]
    if runs.empty and not searches:
        raise none_finished(paths, waiting)
    methods = set() if runs.empty else set(runs["method"])
    if baseline is None:
        baseline = next((name for name in (table.BASELINE, "none") if name in methods), table.BASELINE)
    elif methods:
        table.check_baseline(runs, baseline)
    kept = [_kept(RunFolder(row["folder"]), row) for row in records(runs)]
    return Gathered(runs, kept, searches, [*runs.attrs.get("left_out", []), *waiting], baseline)


def of_section(rows: pd.DataFrame, key: tuple[str, ...]) -> pd.DataFrame:
    """Select the rows of one section."""
    return rows[(rows[table.SECTION].astype(str) == list(key)).all(axis=1)]


def records(rows: pd.DataFrame) -> list[dict[str, Any]]:
    """Return the rows of a table by the names of their columns."""
    return [{str(name): value for name, value in row.items()} for row in rows.to_dict("records")]


def best_first(rows: pd.DataFrame) -> list[str]:
    """List the methods of ``table.summary``, the one of the highest mean top-1 first."""
    means = rows.groupby("method")[f"{table.shipped(rows)}_mean"].mean()
    return [str(name) for name in means.sort_values(ascending=False).index]


def _searches(folders: Sequence[Path]) -> tuple[list[search.Found], list[str]]:
    """Read searches, and say in a line each which of them are damaged."""
    found, damaged = [], []
    for folder in folders:
        try:
            found.append(search.read(folder))
        except UserError as error:
            damaged.append(f"left out: {visible(str(error))}")
    return found, damaged


def _kept(folder: RunFolder, row: dict[str, Any]) -> Kept:
    notes: list[str] = []

    def tried(read: Callable[[], Read], otherwise: Read) -> Read:
        try:
            return read()
        except UserError as error:
            notes.append(str(error))
            return otherwise

    classes = tried(lambda: _classes(folder), list[str]())
    config = tried(folder.read_config, dict[str, Any]())
    return Kept(
        row=row,
        fingerprint=str(config["data"].get("fingerprint", "")) if config else "",
        history=tried(lambda: _history(folder), []),
        classes=classes,
        predictions=tried(lambda: _predictions(folder, str(row["measured"]), classes), None),
        spectrum=tried(lambda: read_spectrum(folder.path / "spectrum.csv"), None),
        environment=folder.read_environment(),  # which ``table.rows`` has read already
        config=tried(lambda: read_text(folder.config, LARGEST), "") if config else "",
        command=tried(lambda: command(config), "") if config else "",
        notes=notes,
    )


def _classes(folder: RunFolder) -> list[str]:
    if not folder.classes.is_file():
        return []
    return [visible(name) for name in read_text(folder.classes, LARGEST).splitlines()]


def _history(folder: RunFolder) -> list[dict[str, Any]]:
    history = folder.read_history()
    if not history:
        raise UserError(f"{folder.path} has no {folder.history.name}: no learning curves")
    try:
        check_history(history, history[-1]["step"], history[0]["step"])
    except (ValueError, TypeError, LookupError, ZeroDivisionError) as error:
        raise UserError(f"{folder.history} is damaged: no learning curves") from error
    return history


def _predictions(folder: RunFolder, measured: str, classes: Sequence[str]) -> Predictions | None:
    if not classes and measured in ("knn", "neighbours"):
        return None  # which are rows of the test set
    if not folder.predictions.is_file():
        raise UserError(
            f"no {folder.predictions.name}, as in runs of older versions: no accuracy by class and no mistakes; run "
            "the command below with --fresh to have them"
        )
    if not classes:
        raise UserError(f"no {folder.classes.name}: no accuracy by class and no mistakes")
    return predictions.read(folder.predictions, len(classes))
