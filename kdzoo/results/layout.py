"""Lay out tables for people: the columns, the rows and the notes below."""

from collections.abc import Callable, Sequence

import pandas as pd

from kdzoo import registry
from kdzoo.quantities import counted, p_value, short
from kdzoo.results import published, statistics
from kdzoo.results.render import Cell, Grid, Section, latex, markdown, no_formula, page
from kdzoo.results.table import (
    BASELINE,
    PAIR,
    SECTION,
    comparisons,
    groups,
    observations,
    pair_name,
    repeated,
    scores,
    shipped,
    summary,
)
from kdzoo.store.result import MEASURED, MEASURED_BY

EPOCHS = {"top1": "last", "best_top1": "best"}  # of the measures
KEPT = {"best": ", students of the best epoch", "ema": ", averaged students"}  # by output.ship, where it is not last
LIKENESS = {"agreement": "agreement", "kl": "KL", "knn": "k-NN", "probe": "linear probe"}  # by a result's key
MARKS = {"reconstructed": "†", "adapted": "‡"}


class Sources:
    """Letters for the sources of published numbers, in order of appearance."""

    def __init__(self) -> None:
        self.letters: dict[str, str] = {}

    def cell(self, number: published.Published | None, ours: float | None = None) -> str:
        """Write a published number with the letter of its source, and our difference to it."""
        if number is None:
            return ""
        letter = self.letters.setdefault(number.origin, _letter(len(self.letters)))
        spread = f" ± {number.std:.2f}" if number.std is not None else ""
        beside = f" ({_signed(ours - number.top1)})" if ours is not None else ""
        return f"{number.top1:.2f}{spread}{beside} [{letter}]"

    def notes(self) -> list[str]:
        """Explain the letters."""
        if not self.letters:
            return []
        said = "; ".join(f"[{letter}] {origin}" for origin, letter in self.letters.items())
        return [f"Published top-1 of the same epoch, in brackets ours minus it. {said}."]


def render(runs: pd.DataFrame, style: str, baseline: str = BASELINE, pivot: bool = False) -> str:
    """Write the runs of ``table.rows`` as ``markdown``, ``csv``, ``latex`` or ``html``.

    Args:
        baseline: the method that the others are compared with.
        pivot: methods x pairs, compared over all pairs, instead of a row for each pair and method.
    """
    if style == "csv":
        table = wide(runs, baseline) if pivot else summary(runs, baseline)
        return table.map(no_formula).rename(columns=no_formula).to_csv(index=False, lineterminator="\n")
    sections = pivoted(runs, baseline) if pivot else long(runs, baseline)
    return {"markdown": markdown, "latex": latex, "html": page}[style](sections)


def long(runs: pd.DataFrame, baseline: str = BASELINE) -> list[Section]:
    """Make a grid for each data set and protocol, with a row for each pair and method; empty columns are left out."""
    sections = []
    for key, rows in groups(summary(runs, baseline), SECTION):
        sources = Sources()
        best = {name: _marks(rows, name) for name in ("top1_mean", "best_top1_mean")}
        columns: dict[str, list[Cell]] = {name: [Cell(str(value)) for value in rows[name]] for name in PAIR}
        columns["method"] = [Cell(_method(*row)) for row in zip(rows["method"], rows["fidelity"], strict=True)]
        columns["n"] = [Cell(str(n)) for n in rows["seeds"]]
        columns["teacher top-1"] = _cells(rows["teacher_top1"], "{:.2f}".format)
        columns["top-1 last"] = _spread(rows, "top1", best["top1_mean"])
        columns["95 % interval"] = _interval(rows, "top1", "{:.2f}".format)
        columns["top-1 best"] = _spread(rows, "best_top1", best["best_top1_mean"])
        columns["top-5 last"] = _spread(rows, "top5", [""] * len(rows))
        for name, title_of in LIKENESS.items():
            columns[title_of] = _cells(rows[name], "{:.2f}".format)
        columns |= _compared(rows, baseline)
        for epoch, ours in (("last", "top1_mean"), ("best", "best_top1_mean")):
            found = [published.find(**where, epoch=epoch) for where in _where(rows)]
            columns[f"published {epoch}"] = [
                Cell(sources.cell(number, value)) for number, value in zip(found, rows[ours], strict=True)
            ]
        columns["ms for 1, 64"] = _latencies(rows)
        columns["GFLOPs"] = _cells(rows["flops"], lambda flops: short(flops / 1e9))
        columns["MB"] = _cells(rows["file_bytes"], lambda size: short(size / 1e6))
        columns["seconds"] = _cells(rows["seconds"], "{:.0f}".format)
        columns["images/s"] = _cells(rows["images_per_second"], "{:.0f}".format)
        columns["parameters"] = _cells(rows["parameters"], "{:,}".format)
        columns["extra parameters"] = _cells(rows["extra_parameters"], "{:,}".format)
        columns["peak MiB"] = _cells(rows["peak_memory"], lambda bytes: f"{bytes / 2**20:.0f}")
        grid = _grid("Students, mean ± standard deviation over n seeds", columns, names=3)
        notes = _notes(_part(runs, key), rows, baseline, "seeds", "methods of a pair")
        if not rows[list(LIKENESS)].isna().all(axis=None):
            notes.append(
                "agreement: percent of the test images that student and teacher take for the same class; KL: "
                "divergence of the student's probabilities from the teacher's, in nats; k-NN and linear probe: top-1 "
                "of the embedding."
            )
        if any(cell.text for cell in columns["ms for 1, 64"]):
            notes.append(
                "ms for 1, 64: latency of a batch of 1 and of 64 images in float32, where the run was trained."
            )
        sections.append(Section(title(key), [grid], [*notes, *sources.notes()]))
    return sections


def pivoted(runs: pd.DataFrame, baseline: str = BASELINE) -> list[Section]:
    """Make grids of methods x pairs for each data set and protocol: teachers, last epoch, best epoch."""
    table, pooled = summary(runs, baseline), comparisons(runs, baseline)
    sections = []
    for key, rows in groups(table, SECTION):
        sources, part = Sources(), _part(pooled, key)
        teachers = {"": [Cell("teacher"), Cell("published")]}
        for pair, group in groups(rows, PAIR):
            where = dict(zip([*SECTION, *PAIR], [*key, *pair], strict=True))
            number = published.find(**where, method="teacher", epoch="last")
            ours = group["teacher_top1"].mean()
            teachers[pair_name(*pair)] = [
                Cell("-" if pd.isna(ours) else f"{ours:.2f}"),
                Cell(sources.cell(number, None if pd.isna(ours) else ours)),
            ]
        has_number = any(cells[1].text for name, cells in teachers.items() if name)
        teachers = teachers if has_number else {name: cells[:1] for name, cells in teachers.items()}
        grids = [_grid("Teacher, top-1", teachers, names=1)]
        for epoch, measure in (("last", "top1"), ("best", "best_top1")):
            cells = _pivot(rows, part, measure, epoch, sources)
            grids.append(_grid(f"Student, top-1 of the {epoch} epoch", cells, names=1))
        compared = {"method": [Cell(_method(*row)) for row in zip(part["method"], part["fidelity"], strict=True)]}
        compared |= _compared(part, baseline) | {"average rank": _cells(part["rank"], "{:.2f}".format)}
        if len(compared) > 1:
            grids.append(_grid(f"All pairs together, top-1 of the {_epoch(rows)} epoch", compared, names=1))
        notes = _notes(_part(runs, key), part, baseline, "seeds and pairs", "methods") + _ranking(_part(runs, key))
        sections.append(Section(title(key), grids, [*notes, *sources.notes()]))
    return sections


def wide(runs: pd.DataFrame, baseline: str = BASELINE) -> pd.DataFrame:
    """Add a column for each pair to ``comparisons``: its mean top-1, of the students that are kept, unrounded."""
    table = summary(runs, baseline)
    table["pair"] = [pair_name(*pair) for pair in zip(table["teacher"], table["student"], strict=True)]
    table["kept"] = table["top1_mean"].where(table["ship"] != "best", table["best_top1_mean"])
    cells = table.pivot_table(index=[*SECTION, "method"], columns="pair", values="kept", sort=False)
    return comparisons(runs, baseline).merge(cells.reset_index(), on=[*SECTION, "method"])


def _pivot(
    rows: pd.DataFrame, methods: pd.DataFrame, measure: str, epoch: str, sources: Sources
) -> dict[str, list[Cell]]:
    """The columns of one grid of methods x pairs; a method's published numbers have a line of their own."""
    marked = rows.assign(mark=_marks(rows, f"{measure}_mean"))
    numbers = dict(zip(marked.index, (published.find(**where, epoch=epoch) for where in _where(rows)), strict=True))
    first: dict[str, list[Cell]] = {"method": []}
    pairs = {pair_name(*pair): group for pair, group in groups(marked, PAIR)}
    columns = first | {pair: [] for pair in pairs}
    for method, fidelity in zip(methods["method"], methods["fidelity"], strict=True):
        cells = {pair: group[group["method"] == method] for pair, group in pairs.items()}
        columns["method"].append(Cell(_method(method, fidelity)))
        for pair, row in cells.items():
            columns[pair] += _spread(row, measure, list(row["mark"])) or [Cell("-")]
        beside = {
            pair: sources.cell(numbers[row.index[0]], row[f"{measure}_mean"].iloc[0]) if len(row) else ""
            for pair, row in cells.items()
        }
        if any(beside.values()):
            columns["method"].append(Cell(f"{method}, published"))
            for pair, text in beside.items():
                columns[pair].append(Cell(text))
    return columns


def _compared(rows: pd.DataFrame, baseline: str) -> dict[str, list[Cell]]:
    """The columns of a comparison; none where nothing was compared."""
    if not rows["compared"].any():
        return {}
    title = f"minus {baseline}"
    columns = {title: _cells(rows["difference"], _signed)}
    columns[f"{title}, 95 %"] = _interval(rows, "difference", _signed)
    columns["compared"] = [Cell(str(n) if n else "") for n in rows["compared"]]
    columns["p (Holm)"] = _cells(rows["p_holm"], p_value)
    columns["verdict"] = [Cell(said) for said in rows["verdict"]]
    return columns


def _notes(runs: pd.DataFrame, rows: pd.DataFrame, baseline: str, over: str, family: str) -> list[str]:
    """What must be known to read a section."""
    [measured] = set(runs["measured"])
    notes = ["Accuracies in percent of all test images; with data.val, these are training images that were held out."]
    if measured != "accuracy":
        notes = [f"top-1 and top-5: percent of the {MEASURED[measured]}."]
    seen = observations(runs)
    if len(seen[[*PAIR, "seed"]].drop_duplicates()) == 1:
        notes.append("One seed and one pair: nothing can be concluded about which method is better.")
    elif rows["compared"].any():
        notes.append(
            f"minus {baseline}: mean of the paired differences in top-1 of the {_epoch(runs)} epoch over the {over} "
            f"that both have (compared: how many), with its own 95 % interval, not corrected; p of the paired t-test, "
            f"Holm-corrected over the {family}; not told apart: p is at least {statistics.ALPHA}. It speaks of these "
            f"{over}."
        )
        if (rows["difference_low"] == rows["difference_high"]).any():
            notes.append("Where all differences are equal, the interval is a point, and p that of the sign test.")
        if rows["compared"].max() < 2:
            notes.append("No comparison here rests on more than one run of each method: nothing can be concluded.")
    elif baseline in set(runs["method"]) and runs["method"].nunique() > 1:
        notes.append(f"No method shares a pair and seed with {baseline}: nothing is compared.")
    if baseline not in set(runs["method"]):
        notes.append(f"No run of the baseline {baseline}: no differences are tested.")
    for fidelity, mark in MARKS.items():
        if fidelity in set(rows["fidelity"]):
            notes.append(f"{mark} {fidelity}: {registry.FIDELITIES[fidelity]}.")
    if preset := sorted(set(runs.loc[runs["preset"], "method"])):
        notes.append(f"With the keywords that the field uses for each pair (presets): {', '.join(preset)}.")
    if count := repeated(runs):
        notes.append(f"{counted(count, 'run')} beside another of the same row and seed: a seed counts as their mean.")
    for what, harm in (("precision", "part of a difference may be theirs"), ("device", "times are not comparable")):
        if runs[what].nunique() > 1:
            notes.append(f"Runs of more than one {what} ({', '.join(sorted(set(runs[what])))}): {harm}.")
    return notes


def _ranking(runs: pd.DataFrame) -> list[str]:
    complete = scores(observations(runs))
    pairs, methods = complete.shape
    if min(pairs, methods) < 2:
        return []
    said = f"Ranks are averages over {pairs} pairs and {methods} methods; 1 is best."
    if lacking := sorted(set(runs["method"]) - set(complete.columns)):
        said += f" Not ranked, since runs are missing: {', '.join(lacking)}."
    if pairs >= statistics.ENOUGH_PAIRS and methods >= statistics.ENOUGH_METHODS:
        limit = statistics.critical_difference(methods, pairs)
        return [f"{said} Ranks closer than {limit:.2f} (Nemenyi, {statistics.ALPHA}) cannot be told apart."]
    return [said]


def _marks(rows: pd.DataFrame, measure: str) -> list[str]:
    """Which rows are ``best`` and ``second`` of their pair, by the number as it is shown; none beside one row."""
    places = rows[measure].map("{:.2f}".format).astype(float).groupby([rows[name] for name in PAIR], sort=False)
    rank, many = places.rank(method="dense", ascending=False), places.transform("size") > 1
    return [{1: "best", 2: "second"}.get(int(r), "") if m else "" for r, m in zip(rank, many, strict=True)]


def _grid(caption: str, columns: dict[str, list[Cell]], names: int) -> Grid:
    """The columns that hold anything, side by side."""
    filled = {title: cells for title, cells in columns.items() if any(cell.text for cell in cells)}
    return Grid(caption, list(filled), [list(row) for row in zip(*filled.values(), strict=True)], names)


def _where(rows: pd.DataFrame) -> list[dict[str, str]]:
    """The data, protocol, teacher, student and method of each row."""
    names = (*SECTION, *PAIR, "method")
    return [dict(zip(names, map(str, row), strict=True)) for row in rows[list(names)].itertuples(index=False)]


def _part(table: pd.DataFrame, key: Sequence[str]) -> pd.DataFrame:
    """The rows of one section."""
    return table[(table[SECTION] == list(key)).all(axis=1)]


def _epoch(rows: pd.DataFrame) -> str:
    """The epoch of the students that a section keeps."""
    return EPOCHS[shipped(rows)]


def _spread(rows: pd.DataFrame, name: str, marks: Sequence[str]) -> list[Cell]:
    numbers = zip(rows[f"{name}_mean"], rows[f"{name}_std"], marks, strict=True)
    return [Cell(f"{mean:.2f}" + (f" ± {std:.2f}" if pd.notna(std) else ""), mark) for mean, std, mark in numbers]


def _interval(rows: pd.DataFrame, name: str, show: Callable[[float], str]) -> list[Cell]:
    ends = zip(rows[f"{name}_low"], rows[f"{name}_high"], strict=True)
    said = (f"{show(low)} to {show(high)}" if pd.notna(low) else "" for low, high in ends)
    return [Cell(text.replace("-", "\N{MINUS SIGN}")) for text in said]


def _latencies(rows: pd.DataFrame) -> list[Cell]:
    """Milliseconds of a batch of 1 and of 64, side by side."""
    pairs = zip(rows["latency_1"], rows["latency_64"], strict=True)
    known = [", ".join(short(ms) for ms in pair if pd.notna(ms)) for pair in pairs]
    return [Cell(text) for text in known]


def _cells(values: pd.Series, show: Callable[[float], str]) -> list[Cell]:
    return [Cell(show(value) if pd.notna(value) else "") for value in values]


def _method(name: str, fidelity: str) -> str:
    return f"{name} {MARKS[fidelity]}" if fidelity in MARKS else name


def title(key: Sequence[str]) -> str:
    """Write the heading of a section."""
    data, protocol, ship, measured = key
    by = "" if measured == "accuracy" else f", measured by {MEASURED_BY[measured]}"
    return f"{data}, protocol {protocol}{KEPT.get(ship, '')}{by}"


def _signed(value: float) -> str:
    return f"{value:+z.2f}".replace("-", "\N{MINUS SIGN}")


def _letter(number: int) -> str:
    """a, b ... z, aa, ab ..."""
    return (_letter(number // 26 - 1) if number >= 26 else "") + chr(ord("a") + number % 26)
