"""Draw finished runs for papers: differences with intervals, learning curves, accuracy against cost, ranks."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pandas as pd

from kdzoo.errors import UserError
from kdzoo.files import make_folder, write_atomically
from kdzoo.results import ranks
from kdzoo.results.layout import MARKS, title
from kdzoo.results.report.curves import ACCURACY
from kdzoo.results.report.figures import ALL_PAIRS, COSTS
from kdzoo.results.report.gather import Kept, best_first, gather, of_section, records
from kdzoo.results.report.style import GRAY, VERDICTS, styles
from kdzoo.results.spectrum_plot import STYLE, plain, require_matplotlib
from kdzoo.results.table import SECTION, comparisons, groups, pair_name, shipped, summary

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FORMATS = ("png", "pdf", "svg")
DASHES = {"solid": "-", "dash": "--"}
SYMBOLS = {
    "circle": "o",
    "diamond": "D",
    "square": "s",
    "triangle-up": "^",
    "cross": "P",
    "star": "*",
    "x": "x",
    "circle-open": "o",
}


def draw(
    paths: Sequence[Path], file: Path, kind: str, cost: str = "latency_1", baseline: str | None = None
) -> list[str]:
    """Draw the finished runs in or below ``paths`` into a file, which is written completely or not at all.

    Args:
        paths: folders of runs, or folders that hold some.
        file: its ending decides the format: png, pdf or svg.
        kind: ``forest``, ``curves``, ``cost`` or ``ranks``.
        cost: a column of ``table.summary``, for ``cost``.
        baseline: the method that the others are compared with; None: kd, or none where there is no kd.

    Returns:
        what was left out, and why: a line each.

    Raises:
        UserError: there is nothing to draw, an unknown format, no matplotlib, or no permission to write.
    """
    require_matplotlib()
    ending = file.suffix.lower().removeprefix(".")
    if ending not in FORMATS:
        raise UserError(f"--out {file}: expected a file that ends with .png, .pdf or .svg")
    gathered = gather(paths, baseline)
    runs, baseline = gathered.runs, gathered.baseline
    if runs.empty:
        raise UserError(f"no finished run in {', '.join(map(str, paths))}: the search there is not finished")
    if kind == "ranks":
        ranks.draw(runs, file)
        return gathered.notes
    panels = {
        "forest": lambda: _forests(runs, baseline),
        "curves": lambda: _curves(gathered.kept, runs, baseline),
        "cost": lambda: _costs(runs, cost, baseline),
    }[kind]()
    if not panels:
        raise UserError(_NOTHING[kind].format(baseline=baseline, cost=cost))
    _save(panels, file, ending)
    return gathered.notes


_NOTHING = {
    "forest": "no differences to draw: no method shares a pair and a seed with the baseline {baseline}",
    "curves": "no learning curves to draw: none of these runs has a history",
    "cost": "no {cost} to draw: none of these runs has measured it; name another --cost",
}
Panel = tuple[str, float, Any]  # its title, its height in inches, and what draws it on axes


def _save(panels: Sequence[Panel], file: Path, ending: str) -> None:
    import matplotlib as mpl
    from matplotlib.figure import Figure

    columns = min(2, len(panels))
    rows = [panels[i : i + columns] for i in range(0, len(panels), columns)]
    heights = [max(height for _, height, _ in row) for row in rows]
    with mpl.rc_context({**STYLE, "font.size": 9, "axes.titlesize": 9, "pdf.fonttype": 42}):
        size = (4.6 * columns if columns > 1 else 6.4, sum(heights))
        figure = Figure(figsize=size, dpi=200, layout="constrained")
        axes = figure.subplots(len(rows), columns, squeeze=False, height_ratios=heights)
        for ax in axes.flat:
            ax.set_axis_off()
        for ax, (name, _, paint) in zip(axes.flat, panels, strict=False):
            ax.set_axis_on()
            ax.set_title(plain(name), loc="left")
            paint(ax)
        make_folder(file.parent)
        write_atomically(file, lambda temporary: figure.savefig(temporary, format=ending))


def _forests(runs: pd.DataFrame, baseline: str) -> list[Panel]:
    pooled, panels = comparisons(runs, baseline), list[Panel]()
    for key, rows in groups(summary(runs, baseline), SECTION):
        views = {pair_name(*pair): group for pair, group in groups(rows, ["teacher", "student"])}
        if len(views) > 1:
            views = {ALL_PAIRS: of_section(pooled, key), **views}
        for name, view in views.items():
            shown = view[view["compared"] > 0].sort_values("difference")
            if len(shown):
                panels.append((f"{title(key)}\n{name}", 1.1 + 0.24 * len(shown), _forest(shown, baseline)))
    return panels


def _forest(shown: pd.DataFrame, baseline: str) -> Any:
    def paint(ax: "Axes") -> None:
        for y, row in enumerate(records(shown)):
            colour, symbol = VERDICTS.get(row["verdict"], VERDICTS["not told apart"])
            if row["compared"] > 1:
                ax.plot([row["difference_low"], row["difference_high"]], [y, y], color=colour, lw=1.6)
            filled = colour if symbol != "circle-open" else "white"
            ax.plot(row["difference"], y, SYMBOLS[symbol], color=colour, markerfacecolor=filled, ms=6)
        ax.axvline(0, color=GRAY, lw=1, ls=":")
        marked = [f"{row['method']} {MARKS.get(row['fidelity'], '')}".strip() for row in records(shown)]
        ax.set_yticks(range(len(shown)), [plain(name) for name in marked])
        ax.set_ylim(-0.6, len(shown) - 0.4)
        ax.grid(axis="y", visible=False)
        ax.grid(axis="x", visible=True)
        ax.set_xlabel(plain(f"points of top-1 minus {baseline}, 95 % interval"))

    return paint


def _curves(kept: Sequence[Kept], runs: pd.DataFrame, baseline: str) -> list[Panel]:
    panels = []
    for key, rows in groups(summary(runs, baseline), SECTION):
        looks = styles(best_first(rows), baseline)
        own = [one for one in kept if one.history and one.section == key]
        for pair in dict.fromkeys(one.pair for one in own):
            found = pd.DataFrame(
                [
                    (one.row["method"], record["epoch"], record["top1"])
                    for one in own
                    if one.pair == pair
                    for record in one.history
                    if record["top1"] is not None
                ],
                columns=["method", "epoch", "top1"],
            )
            panels.append((f"{title(key)}\n{pair}", 3.2, _curve(found, looks)))
    return panels


def _curve(found: pd.DataFrame, looks: Mapping[str, dict[str, Any]]) -> Any:
    def paint(ax: "Axes") -> None:
        for method, look in looks.items():
            by_epoch = found[found["method"] == method].groupby("epoch")["top1"]
            if not len(by_epoch):
                continue
            epochs, label = by_epoch.mean().index.to_numpy(), plain(method) if look["named"] else None
            how: dict[str, Any] = {"lw": 1.6, "zorder": 3} if look["named"] else {"lw": 0.7, "alpha": 0.6}
            ax.plot(epochs, by_epoch.mean(), DASHES[look["dash"]], color=look["color"], label=label, **how)
            ax.fill_between(epochs, by_epoch.min(), by_epoch.max(), color=look["color"], alpha=0.15, lw=0)
        late = found.loc[3 * found["epoch"] >= found["epoch"].max(), "top1"]
        ax.set_ylim(late.min() - 1, late.max() + 1)
        ax.set_xlabel("epoch")
        ax.set_ylabel(f"{ACCURACY.partition(' (')[0]} (%)")
        _legend(ax, "lower right")

    return paint


def _legend(ax: "Axes", place: Literal["best", "lower right"]) -> None:
    """Name the methods of a panel that have a name of their own; none of them may be the panel's."""
    if ax.get_legend_handles_labels()[1]:
        ax.legend(frameon=False, fontsize=8, loc=place)


def _costs(runs: pd.DataFrame, cost: str, baseline: str) -> list[Panel]:
    panels, (name, unit) = [], COSTS[cost]
    for key, rows in groups(summary(runs, baseline), SECTION):
        known = rows[rows[cost].notna()] if cost in rows else rows[:0]
        if len(known):
            panels.append((title(key), 3.4, _cost(known, cost, name, unit, styles(best_first(rows), baseline))))
    return panels


def _cost(known: pd.DataFrame, cost: str, name: str, unit: float, looks: Mapping[str, dict[str, Any]]) -> Any:
    measure = shipped(known)

    def paint(ax: "Axes") -> None:
        for method, part in known.groupby("method", sort=False):
            look = looks[str(method)]
            x, y = part[cost].astype(float) / unit, part[f"{measure}_mean"]
            half = (part[f"{measure}_high"] - y).fillna(0)
            label = plain(str(method)) if look["named"] else None
            mark: dict[str, Any] = {"markerfacecolor": "white"} if look["symbol"] == "circle-open" else {}
            ax.errorbar(x, y, half, fmt=SYMBOLS[look["symbol"]], color=look["color"], label=label, elinewidth=1, **mark)
        ax.set_xlabel(name)
        ax.set_ylabel("top-1 (%), mean and 95 % interval")
        _legend(ax, "best")

    return paint
