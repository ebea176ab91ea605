"""Show how a search for the best method went: its answer, its finalists, and how far each candidate came."""

import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kdzoo.errors import UserError, visible
from kdzoo.experiments.recommend import outline
from kdzoo.results.recommendation import Recommendation
from kdzoo.results.recommendation_screen import sentences, table
from kdzoo.results.report.style import GRAY, Figure, epochs, escaped, figure, short, styles
from kdzoo.results.table import BASELINE, pair_name
from kdzoo.store.search import Search

LONGEST = 120  # characters of a reason that is shown when a line is pointed at
BACKGROUND = {"color": GRAY, "dash": "solid", "named": False}
HELP = (
    "Top-1 on the part of the training images that is held out. A line ends where its candidate stopped; dotted lines "
    "are the epochs after which the worse half stops: those that take the right classes for less likely (higher NLL), "
    "which tells more of few images than top-1, or have a lower top-1 where students have no classifier. Point at a "
    "line to see its NLL, and at a gray one its name and place."
)


@dataclass(frozen=True)
class Found:
    """A search as its folder holds it, and what it found."""

    folder: Path
    search: Search
    answer: Recommendation | None  # None: there is none, and ``sentences`` say why
    sentences: list[str]


def read(folder: Path) -> Found:
    """Read a search and its answer.

    Raises:
        UserError: its file is damaged.
    """
    search = Search.read(folder)
    if not search.finals:
        return Found(folder, search, None, [_waiting(search)])
    try:
        answer = Recommendation.read(folder)
    except UserError as error:
        return Found(folder, search, None, [visible(str(error))])
    return Found(folder, search, answer, [visible(line) for line in sentences(answer)])


def section(found: Found) -> dict[str, Any]:
    """Describe a search for the page: texts, the table of its finalists, and what did not fit or failed."""
    search = found.search
    failed = [
        (one.student, one.title, f"failed: {course.reason}")
        for one, course in zip(search.candidates, search.courses, strict=False)
        if course.reason
    ]
    drawn = [] if found.answer is None else table(found.answer).columns
    return {
        "title": visible(f"Search: {pair_name(search.asked['teacher'], ', '.join(search.students))}"),
        "folder": visible(str(found.folder)),
        "outline": outline(search),
        "sentences": found.sentences,
        "columns": [{"title": str(one.header), "kind": "n" if one.justify == "right" else ""} for one in drawn],
        "rows": [list(map(str, cells)) for cells in zip(*(one.cells for one in drawn), strict=True)],
        "left_out": [visible(f"{method}, {student}: {why}") for student, method, why in [*search.left_out, *failed]],
    }


def rungs(found: Found) -> Figure | None:
    """Draw the accuracy of each candidate until it stopped; None where none was measured yet.

    Those of the highest rank have colours: finalists, or those that are still in the search.
    """
    search, traces = found.search, list[dict[str, Any]]()
    for student in search.students if search.courses else []:
        best = _best(found, student)
        looks = styles([search.candidates[number].title for number in best], BASELINE)
        background = [number for number in search.of(student) if number not in best]
        for number in [*background, *best]:
            if search.courses[number].curve:
                look = looks[search.candidates[number].title] if number in best else BACKGROUND
                traces.append(_line(search, number, look))
    if not traces:
        return None
    line = {"type": "line", "yref": "paper", "y0": 0, "y1": 1, "line": {"color": GRAY, "dash": "dot"}}
    ends = [{**line, "x0": end, "x1": end} for end in search.rungs]
    last = max(trace["x"][-1] for trace in traces)
    layout = {"xaxis": epochs(last), "yaxis": {"title": "top-1, held out (%)"}, "height": 440, "shapes": ends}
    return figure(traces, layout, {"pair": "Pair"})


def _waiting(search: Search) -> str:
    reached = max((point.epoch for course in search.courses for point in course.curve), default=0)
    if not search.rungs or reached >= search.rungs[-1]:
        return "The search is not finished: its finalists have no results yet."
    return f"The search is not finished: its candidates have reached epoch {reached} of {search.rungs[-1]}."


def _best(found: Found, student: str) -> list[int]:
    """The candidates that have colours, the best first."""
    search = found.search
    if found.answer is not None:
        return [one.number for each in found.answer.answers if each.student == student for one in each.finalists]
    left = [number for number in search.of(student) if search.courses[number].stopped is None]
    return sorted(
        left, key=lambda number: [point.standing for point in search.courses[number].curve[-1:]], reverse=True
    )


def _line(search: Search, number: int, look: dict[str, Any]) -> dict[str, Any]:
    candidate, curve = search.candidates[number], search.courses[number].curve
    title = visible(candidate.title)
    return {
        "type": "scatter",
        "mode": "lines" if len(curve) > 1 else "markers",
        "name": short(title),
        "showlegend": look["named"],
        "x": [point.epoch for point in curve],
        "y": [round(point.top1, 2) for point in curve],
        "line": {"color": look["color"], "dash": look["dash"], "width": 2 if look["named"] else 1},
        "opacity": 0.9 if look["named"] else 0.45,
        "hovertemplate": f"<b>{escaped(title)}</b><br>{escaped(_fate(search, number))}<br>epoch %{{x}}: %{{y}} %"
        "%{customdata}<extra></extra>",
        "customdata": ["" if point.nll is None else f", NLL {point.nll:.3f}" for point in curve],
        "meta": {"pair": visible(pair_name(search.asked["teacher"], candidate.student)), "method": title},
    }


def _fate(search: Search, number: int) -> str:
    """Say what became of a candidate."""
    course = search.courses[number]
    if course.reason:
        return visible(textwrap.shorten(f"failed: {course.reason}", LONGEST, placeholder=" ..."))
    if course.stopped is None:
        return "finalist" if search.finals else "still in the search"
    epoch, some = course.stopped, search.of(search.candidates[number].student)
    begun = [other for one in some if ((other := search.courses[one]).stopped or epoch) >= epoch]
    sound = [other for other in begun if not other.reason or other.stopped != epoch]  # some may have failed later
    place = 1 + sum(other.at(epoch).standing > course.at(epoch).standing for other in sound)
    return f"stopped after epoch {epoch}, place {place} of {len(begun)}"
