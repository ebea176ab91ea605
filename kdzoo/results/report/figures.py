"""Draw what a comparison found: differences with intervals, ranks, and accuracy against cost."""

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from kdzoo.results import statistics
from kdzoo.results.report.gather import records
from kdzoo.results.report.style import GRAY, PALETTE, VERDICTS, Figure, escaped, figure, options, short
from kdzoo.results.table import average_ranks, pair_name, shipped

ALL_PAIRS = "all pairs together"
ROW = 26  # pixels of a method's line
BAR = 0.3  # ranks between two bars of methods that cannot be told apart
COSTS = {  # columns of ``table.summary``: what an axis calls them, and what a number is divided by
    "latency_1": ("latency of one image (ms)", 1),
    "latency_64": ("latency of a batch of 64 (ms)", 1),
    "parameters": ("parameters of the student (millions)", 1e6),
    "flops": ("FLOPs of one image (millions)", 1e6),
    "file_bytes": ("file of the student (MB)", 1e6),
    "seconds": ("seconds of training", 1),
}


def forest(rows: pd.DataFrame, pooled: pd.DataFrame, baseline: str) -> Figure | None:
    """Draw paired differences to the baseline with their intervals; None where nothing was compared."""
    views = {pair: group for pair, group in _pairs(rows).items() if group["compared"].any()}
    if len(views) > 1:
        views = {ALL_PAIRS: pooled, **views}
    traces, layouts = [], {}
    for pair, view in views.items():
        shown = view[view["compared"] > 0].sort_values("difference")
        for verdict, (colour, symbol) in VERDICTS.items():
            part = shown[shown["verdict"].where(shown["verdict"].isin(VERDICTS), "not told apart") == verdict]
            if len(part):
                traces.append(_differences(part, verdict, colour, symbol, pair))
        names = list(shown["method"])
        layouts[pair] = {
            "height": 110 + ROW * len(names),
            "yaxis": {"categoryarray": [escaped(name) for name in names], **_ticks(names)},
        }
    if not traces:
        return None
    zero = {"type": "line", "x0": 0, "x1": 0, "yref": "paper", "y0": 0, "y1": 1, "line": {"color": GRAY, "dash": "dot"}}
    layout = {
        "xaxis": {"title": f"points of top-1 minus {escaped(baseline)}", "zeroline": False},
        "yaxis": {"type": "category", "categoryorder": "array", "automargin": True, "showgrid": False},
        "shapes": [zero],
        "showlegend": True,
    }
    return figure(traces, layout, {"pair": "Pair"}, {"pair": layouts})


def _differences(part: pd.DataFrame, verdict: str, colour: str, symbol: str, pair: str) -> dict[str, Any]:
    up, down = part["difference_high"] - part["difference"], part["difference"] - part["difference_low"]
    said = [
        f"{row['difference']:+z.2f} points"
        + (f"<br>95 % interval {row['difference_low']:+z.2f} to {row['difference_high']:+z.2f}" if several else "")
        + f"<br>{row['compared']} compared, {verdict if several else 'too few for a test'}"
        for row in records(part)
        for several in [row["compared"] > 1]
    ]
    return {
        "type": "scatter",
        "mode": "markers",
        "name": verdict,
        "x": _numbers(part["difference"]),
        "y": [escaped(name) for name in part["method"]],
        "text": said,
        "hovertemplate": "<b>%{y}</b><br>%{text}<extra></extra>",
        "error_x": {
            "type": "data",
            "symmetric": False,
            "array": _numbers(up.fillna(0)),
            "arrayminus": _numbers(down.fillna(0)),
            "color": colour,
            "thickness": 1.8,
            "width": 5,
        },
        "marker": {"color": colour, "symbol": symbol, "size": 10, "line": {"width": 2, "color": colour}},
        "meta": {"pair": pair},
    }


def ranks(complete: pd.DataFrame) -> Figure | None:
    """Draw average ranks over pairs; None where there are too few pairs or methods.

    Bars beside the ranks join methods that lie closer than Nemenyi's critical difference.

    Args:
        complete: of ``table.scores``.
    """
    pairs, methods = complete.shape
    if pairs < statistics.ENOUGH_PAIRS or methods < statistics.ENOUGH_METHODS:
        return None
    found = sorted(average_ranks(complete).items(), key=lambda item: -item[1])
    names, limit = [escaped(name) for name, _ in found], statistics.critical_difference(methods, pairs)
    traces = [
        {
            "type": "scatter",
            "mode": "markers",
            "x": [round(rank, 3) for _, rank in found],
            "y": names,
            "hovertemplate": f"<b>%{{y}}</b><br>average rank %{{x:.2f}} over {pairs} pairs<extra></extra>",
            "marker": {"color": PALETTE[0], "size": 11},
            "showlegend": False,
            "meta": {},
        }
    ]
    spans = statistics.cliques([rank for _, rank in found], limit)
    for i, (low, high) in enumerate(spans):
        joined = [escaped(name) for name, rank in found if low <= rank <= high]
        traces.append(
            {
                "type": "scatter",
                "mode": "lines",
                "x": [methods + 0.4 + BAR * i] * len(joined),
                "y": joined,
                "line": {"color": PALETTE[1], "width": 6},
                "hovertemplate": f"cannot be told apart: {', '.join(reversed(joined))}<extra></extra>",
                "showlegend": False,
                "meta": {},
            }
        )
    layout = {
        "height": 110 + ROW * methods,
        "xaxis": {
            "title": f"average rank over {pairs} pairs (1 is best)",
            "zeroline": False,
            "range": [0.7, methods + 0.7 + BAR * len(spans)],
            "tickvals": list(range(1, methods + 1, 1 + methods // 15)),
        },
        "yaxis": {
            "type": "category",
            "categoryorder": "array",
            "categoryarray": names,
            "automargin": True,
            **_ticks([name for name, _ in found]),
        },
    }
    return {**figure(traces, layout), "note": f" Here it is {limit:.2f} ranks."}


def cost(rows: pd.DataFrame, looks: Mapping[str, dict[str, Any]]) -> Figure | None:
    """Draw top-1 against what a student costs; None where nothing is known of it."""
    traces: list[dict[str, Any]] = []
    measure = shipped(rows)
    for column, (title, unit) in COSTS.items():
        known = rows[rows[column].notna()] if column in rows else rows[:0]
        for method, part in known.groupby("method", sort=False):
            look = looks[str(method)]
            pairs = [pair_name(*pair) for pair in zip(part["teacher"], part["student"], strict=True)]
            half = (part[f"{measure}_high"] - part[f"{measure}_mean"]).fillna(0)
            traces.append(
                {
                    "type": "scatter",
                    "mode": "markers",
                    "name": short(str(method)),
                    "showlegend": look["named"],
                    "x": _numbers(part[column].astype(float) / unit),
                    "y": _numbers(part[f"{measure}_mean"]),
                    "error_y": {"type": "data", "array": _numbers(half), "color": look["color"], "thickness": 1.2},
                    "text": [f"<b>{escaped(str(method))}</b><br>{escaped(pair)}" for pair in pairs],
                    "hovertemplate": "%{text}<br>top-1 %{y:.2f} %<br>%{x:.4~g}<extra></extra>",
                    "marker": {"color": look["color"], "symbol": look["symbol"], "size": 10},
                    "meta": {"what": title, "method": str(method)},
                }
            )
    if not traces:
        return None
    layout = {"yaxis": {"title": "top-1 (%), mean and 95 % interval"}, "height": 440}
    axes = {what: {"xaxis": {"title": what, **_scale(traces, what)}} for what in options(traces, "what")}
    return figure(traces, layout, {"what": "Cost"}, {"what": axes})


def _scale(traces: Sequence[Mapping[str, Any]], what: str) -> dict[str, Any]:
    """Choose an axis of logarithms where costs differ by much, and one that is not too narrow where they do not."""
    costs = [x for trace in traces if trace["meta"]["what"] == what for x in trace["x"]]
    low, high = min(costs), max(costs)
    if low > 0 and high > 10 * low:
        return {"type": "log"}
    pad = max(0.05 * (high - low), 0.2 * high - 0.2 * (high - low))
    return {"type": "linear", "range": [max(0.0, low - pad), high + pad]}


def _pairs(rows: pd.DataFrame) -> dict[str, pd.DataFrame]:
    return {pair_name(*map(str, key)): group for key, group in rows.groupby(["teacher", "student"], sort=False)}


def _ticks(names: Sequence[str]) -> dict[str, Any]:
    """Short names beside an axis for the whole ones."""
    return {"tickvals": [escaped(name) for name in names], "ticktext": [short(name) for name in names]}


def _numbers(values: pd.Series) -> list[float]:
    return [float(f"{value:.6g}") for value in values]
