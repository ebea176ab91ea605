"""Plot a table of ``kdzoo.experiments.spectrum``: stages side by side, teacher against students."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from kdzoo.errors import UserError
from kdzoo.files import make_folder, write_atomically, write_text
from kdzoo.results.render import no_formula

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito 2008, which colour-blind readers can tell apart; yellow is too pale for lines, and the teacher's
# black, which is too heavy for bars, is a dark gray.
COLOURS = ("#444444", "#D55E00", "#0072B2", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
MARKERS = ("o", "s", "D", "^", "v", "P", "X")
HAAR = ["content", "detail"]
STAGES = ("stage 1", "stage 2", "stage 3", "stage 4")
STYLE: dict[Any, Any] = {
    "font.size": 11,
    "axes.titlesize": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#666666",
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": "#dddddd",
    "xtick.color": "#333333",
    "ytick.color": "#333333",
    "lines.linewidth": 1.8,
    "lines.markersize": 5,
}


def require_matplotlib() -> None:
    """Check that matplotlib is installed."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise UserError("the picture needs matplotlib: pip install 'kdzoo[plots]'") from error


def plain(text: str) -> str:
    """Write a text in which matplotlib finds no formula."""
    return text.replace("$", r"\$")


def draw(table: pd.DataFrame) -> "Figure":
    """Draw the power, the share of energy and the agreement with the teacher for each stage and for the logits.

    Raises:
        UserError: more networks than there are colours, or no matplotlib.
    """
    require_matplotlib()
    import matplotlib as mpl
    from matplotlib.figure import Figure

    names = list(table["network"].unique())
    if len(names) > len(COLOURS):
        raise UserError(f"{len(names) - 1} students do not fit one picture; give at most {len(COLOURS) - 1} runs")
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(14.5, 8.6), layout="constrained")
        axes = figure.subplots(3, 5, width_ratios=(1, 1, 1, 1, 0.72))
        stages = [table[table["stage"] == stage] for stage in STAGES]
        bands = list(pd.concat(stages).query("measure == 'energy'")["band"].unique())
        bands.sort(key=lambda band: (band.startswith(">"), float(band.strip(">").split("-")[0]), "-" in band))
        for column, (stage, part) in enumerate(zip(STAGES, stages, strict=True)):
            _power(axes[0, column], part, names)
            _energy(axes[1, column], part, names, bands)
            _agreement(axes[2, column], part, names, bands)
            axes[0, column].set_title(f"{stage}\n{_grids(part)}", loc="left")
        logits = table[table["stage"] == "logits"]
        if logits.empty:  # of networks without a classifier
            axes[1, 4].set_axis_off()
            axes[2, 4].set_axis_off()
        else:
            _energy(axes[1, 4], logits, names, HAAR)
            _agreement(axes[2, 4], logits, names, HAAR)
            axes[1, 4].set_title(f"logits, {logits['grid'].iloc[0]} classes", loc="left")
            axes[2, 4].set_xlabel("Haar band")
        _legend(axes[0, 4], logits, names, table.attrs.get("top1", "top-1"))
        _share_scales(axes)
        for row, label in enumerate(
            ("power per frequency\n(share of the map's energy)", "share of energy", "agreement with teacher\n(CKA)")
        ):
            axes[row, 0].set_ylabel(label)
        for ax in axes[0, :4]:
            ax.set_xlabel("cycles per image")
        for ax in axes[2, :4]:
            ax.set_xlabel("band (cycles per image)")
        figure.align_ylabels(axes[:, 0])
        figure.suptitle(plain(title(table)), x=0.005, ha="left", fontsize=13, fontweight="bold")
    return figure


def title(table: pd.DataFrame) -> str:
    """Write the title: the data and the number of images."""
    images, tests = table.attrs["images"], table.attrs["tests"]
    shown = f"all {tests} test images" if images == tests else f"the first {images} of {tests} test images"
    return f"Energy and agreement by frequency: {table.attrs['data']}, {shown}"


def save(table: pd.DataFrame, stem: Path) -> tuple[Path, Path]:
    """Save the table as ``stem``.csv and its plot as ``stem``.png, each completely or not at all."""
    csv, png = (stem.with_name(stem.name + suffix) for suffix in (".csv", ".png"))
    figure = draw(table)
    make_folder(stem.parent)
    write_text(csv, table.map(no_formula).to_csv(index=False, lineterminator="\n", float_format="%.6g"))
    write_atomically(png, lambda temporary: figure.savefig(temporary, format="png", dpi=130))
    return csv, png


def _power(ax: "Axes", part: pd.DataFrame, names: list[str]) -> None:
    from matplotlib.ticker import MaxNLocator

    for i, rows in _by_network(part, "power", names):
        rings, every = rows["band"].astype(int), len(rows) // 12 + 1
        ax.plot(rings, rows["value"], color=COLOURS[i], marker=MARKERS[i], markevery=every)
    ax.set_yscale("log")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))


def _energy(ax: "Axes", part: pd.DataFrame, names: list[str], bands: Sequence[str]) -> None:
    width = 0.8 / len(names)
    for i, rows in _by_network(part, "energy", names):
        places = [bands.index(band) + (i - (len(names) - 1) / 2) * width for band in rows["band"]]
        ax.bar(places, rows["value"], width, color=COLOURS[i])
    _band_axis(ax, bands)


def _agreement(ax: "Axes", part: pd.DataFrame, names: list[str], bands: Sequence[str]) -> None:
    ordered = bands != HAAR  # content and detail are no steps of a scale: points side by side, not joined
    for i, rows in _by_network(part, "cka", names):
        if i:  # the teacher agrees with itself
            offset = 0.0 if ordered else 0.14 * (i - len(names) / 2)
            places = [bands.index(band) + offset for band in rows["band"]]
            style = "-" if ordered else "none"
            ax.plot(places, rows["value"], linestyle=style, color=COLOURS[i], marker=MARKERS[i])
    _band_axis(ax, bands)


def _by_network(part: pd.DataFrame, measure: str, names: list[str]) -> list[tuple[int, pd.DataFrame]]:
    values = part[part["measure"] == measure]
    return [(i, values[values["network"] == name]) for i, name in enumerate(names)]


def _band_axis(ax: "Axes", bands: Sequence[str]) -> None:
    ax.set_xticks(range(len(bands)), [band.replace("-", "\N{EN DASH}") for band in bands])
    if len(bands) > 6:
        for label in ax.get_xticklabels():
            label.set(rotation=45, rotation_mode="anchor", ha="right")
    ax.set_xlim(-0.6, len(bands) - 0.4)


def _legend(ax: "Axes", logits: pd.DataFrame, names: list[str], what: str) -> None:
    from matplotlib.lines import Line2D

    top1 = logits[logits["measure"] == "top1"].set_index("network")["value"]
    lines = [Line2D([], [], color=COLOURS[i], marker=MARKERS[i]) for i in range(len(names))]
    labels = [f"{name}\n{top1[name]:.1f} % {what}" if name in top1 else name for name in names]
    ax.legend(
        lines, map(plain, labels), loc="upper left", frameon=False, borderaxespad=0, handlelength=1.4, labelspacing=0.8
    )
    ax.set_axis_off()


def _share_scales(axes: Any) -> None:
    """One scale for each row, named once, and one range of frequencies for all stages."""
    for row in axes:
        shown = [ax for ax in row if ax.axison]
        low, high = min(ax.get_ylim()[0] for ax in shown), max(ax.get_ylim()[1] for ax in shown)
        for ax in shown:
            ax.set_ylim(low, high)
            ax.tick_params(labelleft=ax is shown[0])
    for ax in axes[2]:
        ax.set_ylim(min(0.0, ax.get_ylim()[0]), 1.03)
    highest = max(ax.get_xlim()[1] for ax in axes[0, :4])
    for ax in axes[0, :4]:
        ax.set_xlim(-0.05 * highest, highest)


def _grids(part: pd.DataFrame) -> str:
    grids = list(dict.fromkeys(part["grid"].str.replace("x", "\N{MULTIPLICATION SIGN}")))
    return grids[0] if len(grids) == 1 else f"teacher {grids[0]}, student {' / '.join(grids[1:])}"
