"""Draw learning curves: the accuracy and each term of the loss of every run, epoch by epoch."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pandas as pd

from kdzoo.naming import ALONE
from kdzoo.results.report.gather import Kept
from kdzoo.results.report.style import GRAY, Figure, epochs, escaped, figure, options, short

ACCURACY = "top-1 on the test images (%)"
POINTS = 100  # of a curve, at most


def curves(kept: Sequence[tuple[int, Kept]], looks: Mapping[str, dict[str, Any]]) -> Figure | None:
    """Draw the accuracy and each term of the loss of every run, epoch by epoch; None where no run has a history.

    Args:
        kept: the runs, each with its place among all of the report.
        looks: of ``styles``.
    """
    traces: list[dict[str, Any]] = []
    for pair in dict.fromkeys(one.pair for _, one in kept):
        legend, same = set[tuple[str, str]](), [(i, one) for i, one in kept if one.pair == pair]
        for i, one in same:
            look, method = looks[one.row["method"]], one.row["method"]
            for what, points in _series(one.history).items():
                named = look["named"] and (method, what) not in legend
                legend.add((method, what))
                traces.append(
                    {
                        "type": "scatter",
                        "mode": "lines" if len(points) > 1 else "markers",
                        "name": short(method),
                        "legendgroup": escaped(method),
                        "showlegend": named,
                        "x": [epoch for epoch, _ in points],
                        "y": [float(f"{value:.4g}") for _, value in points],
                        "line": {
                            "color": look["color"],
                            "dash": look["dash"],
                            "width": 2 if look["named"] else 1,
                        },
                        "opacity": 0.9 if look["named"] else 0.45,
                        "hovertemplate": f"<b>{escaped(method)}</b>, seed {one.row['seed']}<br>epoch %{{x}}: "
                        "%{y}<extra></extra>",
                        "meta": {"pair": pair, "what": what, "method": method, "run": i},
                    }
                )
        traces += _teacher_line([one for _, one in same], pair)
    if not traces:
        return None
    titles: dict[str, Any] = {what: {"yaxis": {"title": escaped(what)}} for what in options(traces, "what")}
    late = [y for trace in traces for y in _late(trace) if trace["meta"]["what"] == ACCURACY]
    if late:
        titles[ACCURACY]["yaxis"]["range"] = [min(late) - 0.5, max(late) + 0.5]
    layout = {"xaxis": epochs(max(x for trace in traces for x in trace["x"])), "height": 440}
    return figure(traces, layout, {"pair": "Pair", "what": "Show"}, {"what": titles})


def _late(trace: Mapping[str, Any]) -> Iterator[float]:
    """The points of a curve from a third of its epochs on."""
    return (y for x, y in zip(trace["x"], trace["y"], strict=True) if 3 * x >= trace["x"][-1])


def _series(history: Sequence[Mapping[str, Any]]) -> dict[str, list[tuple[int, float]]]:
    """The measured accuracy and the terms of the loss by epoch, thinned out where there are many epochs."""
    found = {ACCURACY: [(record["epoch"], record["top1"]) for record in history if record["top1"] is not None]}
    for name in dict.fromkeys(name for record in history for name in record["loss"]):
        values = [(record["epoch"], record["loss"][name]) for record in history if name in record["loss"]]
        found[f"loss: {name}"] = values
    return {what: _thinned(points) for what, points in found.items() if points}


def _thinned(points: list[tuple[int, float]]) -> list[tuple[int, float]]:
    if len(points) <= POINTS:
        return points
    return [points[round(i * (len(points) - 1) / (POINTS - 1))] for i in range(POINTS)]


def _teacher_line(kept: Sequence[Kept], pair: str) -> list[dict[str, Any]]:
    reached = [one.row["teacher_top1"] for one in kept if one.row["teacher"] != ALONE]
    reached = [value for value in reached if pd.notna(value)]
    last = max((record["epoch"] for one in kept for record in one.history), default=0)
    if not reached or not last:
        return []
    return [
        {
            "type": "scatter",
            "mode": "lines",
            "name": "teacher",
            "x": [1, last],
            "y": [round(max(reached), 2)] * 2,
            "line": {"color": GRAY, "dash": "dot", "width": 1.5},
            "hovertemplate": "teacher: %{y} %<extra></extra>",
            "meta": {"pair": pair, "what": ACCURACY},
        }
    ]
