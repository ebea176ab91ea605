"""Read the spectra that ``kdzoo spectrum`` wrote into a run's folder, and draw them for a report."""

from io import StringIO
from pathlib import Path

import pandas as pd

from kdzoo.errors import UserError
from kdzoo.files import read_text
from kdzoo.results.report.style import PALETTE, Figure, escaped, figure

COLUMNS = ["network", "stage", "grid", "measure", "band", "value"]
LARGEST = 2**20  # bytes
MEASURES = {"energy": "share of energy", "cka": "agreement with the teacher (CKA)"}


def read_spectrum(file: Path) -> pd.DataFrame | None:
    """Read a table of spectra; None where there is none.

    Raises:
        UserError: it is no such table.
    """
    if not file.is_file():
        return None
    text = read_text(file, LARGEST)
    try:
        table = pd.read_csv(StringIO(text), dtype=dict.fromkeys(COLUMNS[:-1], str), keep_default_na=False)
        if list(table.columns) != COLUMNS:
            raise ValueError(f"expected the columns {', '.join(COLUMNS)}")
        table["value"] = pd.to_numeric(table["value"].replace("", "nan"))
    except (ValueError, pd.errors.ParserError) as error:
        said = " ".join(str(error).split())
        raise UserError(f"{file} is no table of kdzoo spectrum ({said}); remove it") from error
    return table[table["measure"].isin(MEASURES)].dropna()


def spectra(table: pd.DataFrame) -> Figure:
    """Draw energy and agreement by frequency band: a view for each stage and measure."""
    networks, traces = list(table["network"].unique()), []
    for (stage, measure, network), rows in table.groupby(["stage", "measure", "network"], sort=False):
        if measure == "cka" and network == networks[0]:
            continue  # the teacher agrees with itself
        traces.append(
            {
                "type": "bar",
                "name": escaped(str(network)),
                "x": [escaped(str(band)) for band in rows["band"]],
                "y": [round(float(value), 4) for value in rows["value"]],
                "marker": {"color": PALETTE[networks.index(network) % len(PALETTE)]},
                "hovertemplate": "%{x}: %{y:.3f}",
                "meta": {"stage": str(stage), "what": MEASURES[str(measure)]},
            }
        )
    layout = {"xaxis": {"title": "band (cycles per image)", "type": "category"}, "barmode": "group"}
    return figure(traces, layout, {"stage": "Stage", "what": "Show"})
