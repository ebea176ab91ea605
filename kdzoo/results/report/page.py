"""Write the report as one HTML file that needs no network: its sections, its figures and all that belongs to a run."""

import base64
import gzip
import hashlib
import shlex
from collections.abc import Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import pandas as pd

from kdzoo import __version__, registry
from kdzoo.errors import UserError
from kdzoo.files import make_folder, write_text
from kdzoo.results import layout, published, statistics
from kdzoo.results.render import Cell
from kdzoo.results.report import figures, search
from kdzoo.results.report.answer import answer
from kdzoo.results.report.curves import curves
from kdzoo.results.report.gather import Gathered, best_first, gather, of_section, records
from kdzoo.results.report.one_run import Panes
from kdzoo.results.report.style import Figure, styles
from kdzoo.results.table import PAIR, SECTION, comparisons, groups, observations, pair_name, scores, shipped, summary
from kdzoo.store.result import MEASURED

MORE = {"teacher top-1", "top-1 best", "top-5 last", "compared", "published best", "images/s", "extra parameters"}
MORE |= {"peak MiB", "GFLOPs", "MB"}
HELP = {  # of columns, by how their titles begin; the first that fits
    "n": "Number of seeds, each with its own initial weights and order of images",
    "teacher top-1": "Share of the test images whose class the teacher finds, in percent",
    "top-1 last": "Share of the test images whose class the student finds, after the last epoch: mean ± standard "
    "deviation over seeds",
    "top-1 best": "The same after the best epoch, which is chosen on the test images: too high by that choice",
    "top-5": "Share of the test images whose class is among the student's first five",
    "95 %": "95 % interval: a range that holds the true mean in 95 of 100 such comparisons",
    "compared": "Number of runs of the same pair and seed that both methods have",
    "p (Holm)": "How often chance alone gives such a difference; corrected for the number of methods",
    "verdict": "better or worse: p is below 0.05; not told apart: these runs do not show a difference",
    "published": "The authors' number of the same epoch, in brackets ours minus it; the letter is its source",
    "seconds": "Time of one training, the teacher's own training left out",
    "images/s": "Training images per second",
    "parameters": "Numbers that the student learned",
    "extra": "Numbers that the method trains beside the student and throws away",
    "peak": "Memory in training",
    "ms for": "Latency: time of one pass of the student over one image, and over 64",
    "GFLOPs": "Arithmetic of one image: billions of additions and multiplications",
    "MB": "Size of the student's file",
    "agreement": "Share of the test images that student and teacher take for the same class",
    "KL": "Divergence of the student's probabilities from the teacher's, in nats",
    "k-NN": "Share of the test images whose class the nearest neighbours of their embedding tell",
    "linear probe": "Share of the test images whose class a linear classifier of the embedding finds",
}
SHARES = {  # of columns that hold another share than accuracy
    "teacher top-1": "Of the teacher: share of the",
    "top-1 last": "After the last epoch: share of the",
    "top-5 last": "The same of the first five answers: share of the",
}
FIGURES = {
    "forest": (
        "Differences to {baseline}",
        "Mean difference in top-1 over the same pairs and seeds, with its 95 % interval: a range that holds the true "
        "difference in 95 of 100 such comparisons. Where the interval crosses the dotted line, chance may explain it. "
        "Among many methods, chance alone keeps some off that line: the colours follow the corrected p of the table.",
    ),
    "ranks": (
        "Critical-difference diagram",
        "Average place of each method over the pairs. A bar on the right joins methods that cannot be told apart, "
        "since their ranks lie closer than the critical difference (Nemenyi test, 0.05).",
    ),
    "cost": (
        "Top-1 against cost",
        "What a student reaches, and what it costs to run or to train. The upper left corner is best.",
    ),
    "curves": (
        "Learning curves and loss terms",
        "One line for each run, gray where a method is not among the best six. Top-1 is shown from a third of "
        "the training on; a double click shows all of it, and dragging looks closer. A click on a line opens its run "
        "below, a click on a name hides its lines.",
    ),
}


def write(paths: Sequence[Path], out: Path, baseline: str | None = None) -> list[str]:
    """Write the report of the finished runs and searches in or below ``paths`` completely or not at all.

    Returns:
        what was left out, and why: a line each.

    Raises:
        UserError: there is no finished run and no search, no run of the baseline, a library is missing, no
            permission to write, or the file's ending promises another format.
    """
    if out.suffix.lower() not in (".html", ".htm"):
        raise UserError(f"--out {out}: expected a file that ends with .html; kdzoo plot writes png, pdf and svg")
    gathered = gather(paths, baseline)
    text = _page(gathered, paths)
    make_folder(out.parent)
    write_text(out, text)
    return gathered.notes


def page(paths: Sequence[Path], baseline: str | None = None) -> str:
    """Make the report's HTML.

    Raises:
        UserError: as by ``write``, but for the permission.
    """
    return _page(gather(paths, baseline), paths)


def _page(gathered: Gathered, paths: Sequence[Path]) -> str:
    packed, code = _plotly()
    baseline = gathered.baseline
    drawn: dict[str, Figure] = {}
    searches = _searches(gathered, drawn)
    sections = _sections(gathered, drawn) if gathered.kept else []
    panes = Panes(gathered.kept, baseline).all()
    css, js = (files(__package__).joinpath(name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    allowed = " ".join(f"'sha256-{_digest(script)}'" for script in (js, code))
    words = ["kdzoo", "report", *map(str, paths), "--baseline", baseline]
    return _render(
        title="Distillation report",
        counts=_counts(gathered.runs),
        allowed=allowed,
        css=css,
        js=js,
        plotly=packed,
        searches=searches,
        sections=sections,
        pairs=sorted({one.pair for one in gathered.kept}),
        runs=[pane["title"] for pane in panes["runs"]],
        left_out=gathered.notes,
        version=__version__,
        made_by=shlex.join(words),
        data={"figures": drawn, "baseline": baseline, "first": _first(gathered), **panes},
    )


def _render(css: str, js: str, **context: Any) -> str:
    try:
        from jinja2 import Environment, StrictUndefined
        from markupsafe import Markup
    except ImportError as error:
        raise UserError("kdzoo report needs jinja2: pip install 'kdzoo[report]'") from error
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(files(__package__).joinpath("page.html").read_text(encoding="utf-8"))
    ours = {"css": Markup(css), "js": Markup(js), "allowed": Markup(context.pop("allowed"))}
    return template.render(**context, **ours)


@cache
def _plotly() -> tuple[str, str]:
    """Pack plotly.js, which would fill a report's five megabytes alone: gzip in base64, and its text."""
    try:
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        raise UserError("kdzoo report needs plotly: pip install 'kdzoo[report]'") from error
    code = get_plotlyjs()
    return base64.b64encode(gzip.compress(code.encode(), mtime=0)).decode("ascii"), code


def _digest(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode("ascii")


def _searches(gathered: Gathered, drawn: dict[str, Figure]) -> list[dict[str, Any]]:
    """Make a section for each search; their figures go into ``drawn`` by their names."""
    found = []
    for i, one in enumerate(gathered.searches):
        drawing = search.rungs(one)
        drawn |= {} if drawing is None else {f"search-{i}": drawing}
        title = "How far each candidate came"
        shown = [] if drawing is None else [{"id": f"search-{i}", "title": title, "help": search.HELP}]
        found.append({**search.section(one), "figures": shown})
    return found


def _sections(gathered: Gathered, drawn: dict[str, Figure]) -> list[dict[str, Any]]:
    """Make a section for each group of comparable runs; their figures go into ``drawn`` by their names."""
    runs, baseline, found = gathered.runs, gathered.baseline, []
    pooled, laid = comparisons(runs, baseline), layout.long(runs, baseline)
    for i, ((key, rows), section) in enumerate(zip(groups(summary(runs, baseline), SECTION), laid, strict=True)):
        part, seen = of_section(pooled, key), of_section(observations(runs), key)
        kept = [(place, one) for place, one in enumerate(gathered.kept) if one.section == key]
        looks = styles(best_first(rows), baseline)
        complete = scores(seen)
        drawings = {
            "forest": figures.forest(rows, part, baseline),
            "ranks": figures.ranks(complete),
            "cost": figures.cost(rows, looks),
            "curves": curves(kept, looks),
        }
        made = {name: figure for name, figure in drawings.items() if figure is not None}
        drawn |= {f"{name}-{i}": figure for name, figure in made.items()}
        [grid] = section.grids
        order = sorted(range(len(grid.titles)), key=lambda n: grid.titles[n] != "method")
        found.append(
            {
                "title": section.title,
                "answer": answer(rows, part, baseline),
                "caption": grid.caption,
                "columns": [_column(grid.titles[n], n >= grid.names, key[SECTION.index("measured")]) for n in order],
                "rows": [
                    {
                        "method": row["method"],
                        "pair": pair_name(row["teacher"], row["student"]),
                        "cells": [_cell(cells[n], grid.titles[n], row) for n in order],
                    }
                    for row, cells in zip(records(rows), grid.rows, strict=True)
                ],
                "notes": section.notes,
                "figures": [
                    {
                        "id": f"{name}-{i}",
                        "title": title.format(baseline=baseline),
                        "help": said,
                        "first": name == "forest",
                    }
                    for name, (title, said) in FIGURES.items()
                    if name in made
                ],
                "lacking": _lacking(made, complete),
            }
        )
    return found


def _column(title: str, is_number: bool, measured: str) -> dict[str, Any]:
    said = next((text for start, text in HELP.items() if title == start or title.startswith(start)), "")
    if measured != "accuracy" and title in SHARES:
        said = f"{SHARES[title]} {MEASURED[measured]}, in percent"
    if title.startswith("minus "):
        said = HELP["95 %"] if title.endswith("95 %") else f"Points of top-1 above the baseline{title[5:]}"
    return {
        "title": title,
        "kind": "n" if is_number and title != "verdict" else "",
        "more": title in MORE,
        "help": said or "Sort by this column",
    }


def _first(gathered: Gathered) -> int:
    """The run that is shown first: the best one of the first section; 0 where there is none."""
    if not gathered.kept:
        return 0
    rows = [(place, one) for place, one in enumerate(gathered.kept) if one.section == gathered.kept[0].section]
    measure = shipped(pd.DataFrame([one.row for _, one in rows]))
    return max(rows, key=lambda row: row[1].row[measure])[0]


def _cell(cell: Cell, title: str, row: dict[str, Any]) -> dict[str, str]:
    said = ""
    if title == "method" and row["fidelity"] in layout.MARKS:
        said = f"{row['fidelity']}: {registry.FIDELITIES[row['fidelity']]}"
    if title.startswith("published") and cell.text:
        where = {name: str(row[name]) for name in ("data", "protocol", *PAIR, "method")}
        number = published.find(**where, epoch=title.split()[1])
        said = number.origin if number else ""
    verdict = cell.text.replace(" ", "-") if title == "verdict" and cell.text in ("better", "worse") else ""
    return {"text": cell.text, "mark": cell.mark, "help": said, "verdict": verdict}


def _lacking(made: dict[str, Any], complete: pd.DataFrame) -> list[str]:
    """Say why figures are missing."""
    lines = []
    if "forest" not in made:
        lines.append("No differences are drawn: no method shares a pair and a seed with the baseline.")
    if "ranks" not in made:
        pairs, methods = complete.shape
        lines.append(
            f"No critical-difference diagram: it needs {statistics.ENOUGH_PAIRS} pairs that all of at least "
            f"{statistics.ENOUGH_METHODS} methods have, and these runs have {pairs} of {methods} methods."
        )
    return lines


def _counts(runs: pd.DataFrame) -> str:
    if runs.empty:
        return "no finished run yet"
    counts = {
        "run": len(runs),
        "method": runs["method"].nunique(),
        "pair": len(observations(runs)[PAIR].drop_duplicates()),
        "seed": runs["seed"].nunique(),
    }
    return ", ".join(f"{number} {name}{'' if number == 1 else 's'}" for name, number in counts.items())
