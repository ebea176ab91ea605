"""How figures look: colours that colour-blind readers tell apart, and names that are text and nothing else."""

import html
from collections.abc import Mapping, Sequence
from typing import Any

# Okabe and Ito 2008, without black, which a dark page hides, and yellow, which a light page hides.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
GRAY = "#808080"  # of the baseline and of what stays in the background; seen on both pages
SYMBOLS = ("circle", "diamond", "square", "triangle-up", "cross", "star")
VERDICTS = {
    "better": (PALETTE[0], "circle"),
    "worse": (PALETTE[1], "diamond"),
    "not told apart": (GRAY, "circle-open"),
}
LONGEST = 30  # characters of a name beside an axis
FEW = 15  # epochs that an axis counts one by one
Figure = dict[str, Any]


def escaped(text: str) -> str:
    """Write a text in which plotly finds neither tags nor variables."""
    return html.escape(text).replace("%{", "%&#123;")


def short(text: str) -> str:
    """Shorten a name to what fits beside an axis, and escape it."""
    return escaped(text if len(text) <= LONGEST else f"{text[: LONGEST - 1]}…")


def styles(methods: Sequence[str], baseline: str) -> dict[str, dict[str, Any]]:
    """Give the first methods, best first, a colour and a symbol each; the baseline and all others are gray.

    More than a few colours cannot be told apart, so the others stay in the background and are named when pointed at.
    """
    found: dict[str, dict[str, Any]] = {}
    others = [method for method in methods if method != baseline]
    for i, method in enumerate(others):
        if i < len(PALETTE):
            found[method] = {"color": PALETTE[i], "symbol": SYMBOLS[i], "dash": "solid", "named": True}
        else:
            found[method] = {"color": GRAY, "symbol": "circle-open", "dash": "solid", "named": False}
    found[baseline] = {"color": GRAY, "symbol": "x", "dash": "dash", "named": True}
    return found


def epochs(last: int) -> dict[str, Any]:
    """Lay out an axis of epochs."""
    return {"title": "epoch", **({"dtick": 1} if last <= FEW else {})}


def figure(
    traces: list[dict[str, Any]],
    layout: dict[str, Any],
    selects: Mapping[str, str] | None = None,
    layouts: Mapping[str, Any] | None = None,
) -> Figure:
    """Make a figure that ``page.js`` draws.

    Args:
        traces: as plotly.js documents them; ``meta`` holds what a trace is about.
        layout: as plotly.js documents it.
        selects: keys of ``meta`` that a reader chooses a value of, with what the page calls them.
        layouts: what a choice changes of the layout, by key and value.
    """
    choices = [
        {"name": name, "label": label, "options": options(traces, name)} for name, label in (selects or {}).items()
    ]
    return {"traces": traces, "layout": layout, "selects": choices, "layouts": layouts or {}}


def options(traces: Sequence[Mapping[str, Any]], name: str) -> list[str]:
    """List the values that the traces have of a key, in order."""
    return list(dict.fromkeys(trace["meta"][name] for trace in traces))
