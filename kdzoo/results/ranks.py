"""The critical-difference diagram: average ranks over pairs, and the methods that cannot be told apart."""

from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from kdzoo.errors import UserError
from kdzoo.files import make_folder, write_atomically
from kdzoo.quantities import counted
from kdzoo.results import statistics
from kdzoo.results.layout import MARKS, title
from kdzoo.results.spectrum_plot import plain
from kdzoo.results.table import SECTION, average_ranks, groups, observations, scores

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INK, ACCENT, FAINT = "#1a1a1a", "#0072b2", "#767676"  # blue of Okabe and Ito's palette; told apart by lightness too
ROW, HEAD = 0.30, 0.95  # inches: of a method's line, and of the axis with what stands above it


def draw(runs: pd.DataFrame, file: Path) -> None:
    """Draw one diagram for each section that has enough pairs and methods, one below the other, into a file.

    Sections (data set and protocol) are ranked apart. Bars join methods whose ranks lie closer than Nemenyi's
    critical difference.

    Args:
        runs: of ``table.rows``.
        file: its ending decides the format: png, pdf or svg.

    Raises:
        UserError: no section has enough, matplotlib is not installed, or it does not know the format.

    Source: Demsar 2006, Statistical Comparisons of Classifiers over Multiple Data Sets, figure 1.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError("--ranks needs matplotlib: pip install 'kdzoo[plots]'") from error
    kind = file.suffix.lower().removeprefix(".")
    if kind not in ("png", "pdf", "svg"):
        raise UserError(f"--ranks {file}: expected a file that ends with .png, .pdf or .svg")
    found, doubtful = _rankable(runs)
    heights = [HEAD + ROW * ((len(ranks) + 1) // 2 + len(_bars(ranks, pairs))) for _, ranks, pairs in found]
    figure = Figure(figsize=(8, sum(heights) + 0.4), dpi=200, layout="constrained")
    axes = figure.subplots(len(found), 1, squeeze=False, height_ratios=heights)[:, 0]
    for ax, (name, ranks, pairs) in zip(axes, found, strict=True):
        _diagram(ax, name, ranks, pairs)
    said = ["1 is best; bars join methods that cannot be told apart", *doubtful]
    figure.supxlabel("   ".join(said), fontsize=9, color=INK, x=0.01, ha="left")
    make_folder(file.parent)
    write_atomically(file, lambda temporary: figure.savefig(temporary, format=kind))


def _rankable(runs: pd.DataFrame) -> tuple[list[tuple[str, dict[str, float], int]], list[str]]:
    """Title, ranks by label and number of pairs of each section that has enough, and what the labels' marks mean."""
    found, most, marks = [], (0, 0), set()
    for key, section in groups(observations(runs), SECTION):
        complete = scores(section)
        pairs, methods = complete.shape
        most = max(most, (pairs, methods))
        if pairs >= statistics.ENOUGH_PAIRS and methods >= statistics.ENOUGH_METHODS:
            fidelity = dict(zip(section["method"], section["fidelity"], strict=True))
            marks |= {fidelity[method] for method in complete.columns}
            ranks = {
                f"{method} {MARKS.get(fidelity[method], '')}".strip(): rank
                for method, rank in average_ranks(complete).items()
            }
            found.append((title(key), ranks, pairs))
    if not found:
        raise UserError(
            f"too little to rank: {counted(most[0], 'pair')} with all of {counted(most[1], 'method')}; expected at "
            f"least {statistics.ENOUGH_PAIRS} pairs and {statistics.ENOUGH_METHODS} methods of one data set and "
            "protocol"
        )
    return found, [f"{mark} {fidelity}" for fidelity, mark in MARKS.items() if fidelity in marks]


def _bars(ranks: dict[str, float], pairs: int) -> list[tuple[float, float]]:
    return statistics.cliques(list(ranks.values()), statistics.critical_difference(len(ranks), pairs))


def _diagram(ax: "Axes", name: str, ranks: dict[str, float], pairs: int) -> None:
    """The axis of ranks, each method's line down to its name, and bars over methods that cannot be told apart."""
    count, limit = len(ranks), statistics.critical_difference(len(ranks), pairs)
    bars = _bars(ranks, pairs)
    order = sorted(ranks.items(), key=lambda item: item[1])
    half = (count + 1) // 2
    pad = (count - 1) * 0.08
    depth = len(bars) * 0.55 + 0.5  # where the first name stands, in lines below the axis
    ax.set_xlim(1 - pad * 5, count + pad * 5)
    ax.set_ylim(depth + half - 0.4, -2.3)
    ax.axis("off")
    ax.set_title(plain(f"{name}: average rank over {pairs} pairs"), fontsize=10, color=INK, loc="left")
    ax.plot([1, count], [0, 0], color=INK, lw=1)
    for tick in range(1, count + 1, 1 + count // 20):
        ax.plot([tick, tick], [0, -0.2], color=INK, lw=1)
        ax.text(tick, -0.35, str(tick), ha="center", va="bottom", fontsize=9, color=INK)
    ax.plot([1, 1 + limit], [-1.55, -1.55], color=INK, lw=1.5, marker="|", ms=7)
    said = f"critical difference {limit:.2f} (Nemenyi, {statistics.ALPHA})"
    ax.text(1 + limit + pad * 0.3, -1.55, said, ha="left", va="center", fontsize=9, color=INK)
    for i, (low, high) in enumerate(bars):
        y = 0.4 + 0.55 * i
        ax.plot([low - pad * 0.15, high + pad * 0.15], [y, y], color=ACCENT, lw=4, solid_capstyle="round", zorder=3)
    for i, (method, rank) in enumerate(order):
        left = i < half
        y = depth + (i if left else count - 1 - i)
        end = 1 - pad * 0.5 if left else count + pad * 0.5
        ax.plot([rank, rank, end], [0, y, y], color=FAINT, lw=0.9, zorder=1)
        label = f"{method}  {rank:.2f}" if left else f"{rank:.2f}  {method}"
        ax.text(end - pad * 0.2 if left else end + pad * 0.2, y, plain(label), fontsize=9, color=INK,
                ha="right" if left else "left", va="center")  # fmt: skip
