"""Tables of finished runs: one row for each data set, recipe, pair and method, over its seeds."""

import json
from collections.abc import Callable, Iterable
from dataclasses import asdict
from typing import Any

import pandas as pd

from kdzoo import config
from kdzoo.errors import UserError
from kdzoo.results.folder import RunFolder

SETTING = ["data", "protocol", "teacher", "student", "method", "fidelity"]
MEASURES = {"top1": "top-1 last", "best_top1": "top-1 best", "top5": "top-5 last"}


def rows(folders: Iterable[RunFolder]) -> pd.DataFrame:
    """A row for each finished run: what it was and what it found."""
    found = []
    for folder in folders:
        result = folder.read_result()
        if result is None:
            continue
        settings = folder.read_config()
        values = result.plain()
        values["method"] = _named(settings["distiller"], lambda name: config.distiller_settings({"name": name}))
        values["protocol"] = _named(settings["protocol"], lambda name: asdict(config.protocol(name)))
        if settings["data"]["limit"]:
            values["data"] += f" ({settings['data']['limit']} images)"
        values["teacher"] = result.teacher or "-"
        found.append(values)
    return pd.DataFrame(found)


def summary(runs: pd.DataFrame) -> pd.DataFrame:
    """Mean and standard deviation (n - 1) over seeds; the deviation is missing where there is one seed."""
    groups = runs.groupby(SETTING, sort=False, dropna=False)
    table = groups.agg(
        seeds=("seed", "nunique"),
        teacher_top1=("teacher_top1", "mean"),
        **{f"{name}_{how}": (name, how) for name in MEASURES for how in ("mean", "std")},
    )
    return table.reset_index()


def render(table: pd.DataFrame, style: str) -> str:
    """The summary as ``markdown``, ``csv`` or ``latex``; accuracies in percent."""
    if style == "csv":
        return table.to_csv(index=False, lineterminator="\n")
    shown = pd.DataFrame({name: table[name].astype(str) for name in SETTING})
    shown["seeds"] = table["seeds"].astype(str)
    shown["teacher top-1"] = [_number(value) for value in table["teacher_top1"]]
    plus = " ± " if style == "markdown" else r" $\pm$ "
    for name, title in MEASURES.items():
        pairs = zip(table[f"{name}_mean"], table[f"{name}_std"], strict=True)
        shown[title] = [_number(mean) + (plus + _number(std) if pd.notna(std) else "") for mean, std in pairs]
    if style == "latex":
        return _latex(shown)
    return _markdown(shown)


def _named(settings: dict[str, Any], defaults_of: Callable[[str], dict[str, Any]]) -> str:
    """The name, and whatever differs from its defaults; the name alone where those are not to be had any more."""
    try:
        defaults = json.loads(json.dumps(defaults_of(settings["name"])))
    except UserError:
        defaults = settings
    changed = [f"{key}={value}" for key, value in settings.items() if value != defaults.get(key)]
    return f"{settings['name']} ({', '.join(changed)})" if changed else str(settings["name"])


def _number(value: float) -> str:
    return "-" if pd.isna(value) else f"{value:.2f}"


def _markdown(table: pd.DataFrame) -> str:
    def line(cells: Iterable[str]) -> str:
        return "| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |\n"

    head = line(table.columns) + line("---" for _ in table.columns)
    return head + "".join(line(row) for row in table.itertuples(index=False))


def _latex(table: pd.DataFrame) -> str:
    def line(cells: Iterable[str]) -> str:
        return " & ".join(_escaped(cell) for cell in cells) + r" \\" + "\n"

    body = "".join(line(row) for row in table.itertuples(index=False))
    rules = f"\\begin{{tabular}}{{{'l' * len(SETTING)}{'r' * (table.shape[1] - len(SETTING))}}}\n\\toprule\n"
    return f"{rules}{line(table.columns)}\\midrule\n{body}\\bottomrule\n\\end{{tabular}}\n"


def _escaped(text: str) -> str:
    for special in "&%#_{}":
        text = text.replace(special, "\\" + special)
    return text
