"""Say in two sentences what a comparison found: what is better, by how much, and what cannot be told apart."""

import math
from collections.abc import Sequence
from typing import Any

import pandas as pd

from kdzoo.results.report.gather import records
from kdzoo.results.table import pair_name, shipped

WORDS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")
NAMED = 6  # methods that a sentence names
SAID = {
    "better": "also above {baseline}: {names}",
    "not told apart": "cannot be told apart from {baseline}: {names}",
    "worse": "below {baseline}: {names}",
    "untested": "not tested: {names}",
}


def answer(rows: pd.DataFrame, pooled: pd.DataFrame, baseline: str) -> tuple[str, str]:
    """Answer for one data set and protocol.

    Args:
        rows: of ``table.summary``, a row for each pair and method.
        pooled: of ``table.comparisons``, a row for each method over all pairs.
        baseline: the method that the others are compared with.
    """
    pairs = rows[["teacher", "student"]].drop_duplicates().itertuples(index=False)
    names = [pair_name(*pair) for pair in pairs]
    compared = records(rows if len(names) == 1 else pooled)
    where = f"for {names[0]}" if len(names) == 1 else f"over {_count(len(names), 'pair')}"
    tested = [row for row in compared if not math.isnan(row["p_holm"])]
    if not tested:
        return _untested(rows, compared, baseline, where)
    better = sorted((row for row in tested if row["verdict"] == "better"), key=lambda row: -row["difference"])
    lead = max(better or tested, key=lambda row: row["difference"])
    points, low, high = _rounded(lead["difference"], lead["difference_low"], lead["difference_high"])
    runs = _count(lead["compared"], "seed" if len(names) == 1 else "paired run")
    evidence = f"95 % interval {low} to {high}, {runs}"
    if better:
        first = f"{lead['method']} is {points} points above {baseline} {where} ({evidence})."
    else:
        first = (
            f"No method can be told to be better than {baseline} {where}: the highest, {lead['method']}, differs by "
            f"{points} points ({evidence}; {_p(lead['p_holm'], len(tested))})."
        )
    kinds = {
        "better": [row["method"] for row in better[1:]],
        "not told apart": [row["method"] for row in tested if row["verdict"] == "not told apart"],
        "worse": [row["method"] for row in tested if row["verdict"] == "worse"],
        "untested": [row["method"] for row in compared if row not in tested and row["method"] != baseline],
    }
    parts = [SAID[kind].format(baseline=baseline, names=_listed(found)) for kind, found in kinds.items() if found]
    second = "; ".join(parts) or f"No other method was compared with {baseline}"
    return first, f"{second[0].upper()}{second[1:]}."


def _untested(rows: pd.DataFrame, compared: Sequence[dict[str, Any]], baseline: str, where: str) -> tuple[str, str]:
    top1 = f"{shipped(rows)}_mean"
    best = max(records(rows), key=lambda row: row[top1])
    seeds = _count(int(best["seeds"]), "seed")
    pair = pair_name(best["teacher"], best["student"])
    first = f"The highest top-1 is {best[top1]:.2f} % of {best['method']} for {pair} ({seeds})."
    if len(compared) == 1:
        return first, "There is one method: nothing is compared."
    if baseline not in set(rows["method"]):
        return first, f"There is no run of the baseline {baseline}: nothing is compared."
    if not rows["compared"].any():
        return first, f"No method shares a pair and a seed with {baseline}: nothing is compared."
    return first, f"No method shares more than one run with {baseline} {where}: nothing can be concluded."


def _p(corrected: float, tests: int) -> str:
    """Name a p-value, and for how many tests it is corrected: an interval without 0 is no verdict among many."""
    return f"p {corrected:.3f}" + (f", corrected for {_count(tests, 'comparison')}" if tests > 1 else "")


def _count(number: int, thing: str) -> str:
    words = WORDS[number] if number < len(WORDS) else f"{number:,}"
    return f"{words} {thing}{'' if number == 1 else 's'}"


def _rounded(*points: float) -> list[str]:
    """Write points of accuracy with a decimal, or with two where the first is below one point."""
    decimals = 1 if abs(points[0]) >= 1 else 2
    return [f"{value:.{decimals}f}".replace("-", "\N{MINUS SIGN}") for value in points]


def _listed(names: Sequence[str]) -> str:
    shown = list(names[:NAMED])
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(shown) + more
