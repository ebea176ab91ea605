"""Write grids of text as markdown, LaTeX or HTML, with special characters escaped."""

import html
from collections.abc import Iterable, Sequence
from typing import NamedTuple


class Cell(NamedTuple):
    """A text of a table, marked as ``best`` or ``second`` best of its comparison."""

    text: str
    mark: str = ""


class Grid(NamedTuple):
    """A caption, column titles and rows of cells. The first ``names`` columns hold names, the others numbers."""

    caption: str
    titles: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    names: int


class Section(NamedTuple):
    """Grids of comparable numbers, with their notes."""

    title: str
    grids: Sequence[Grid]
    notes: Sequence[str]


def no_formula(value: object) -> object:
    """Put a quote before a text that a spreadsheet would compute."""
    return f"'{value}" if isinstance(value, str) and len(value) > 1 and value[0] in "=+-@" else value


def markdown(sections: Iterable[Section]) -> str:
    """Write GitHub markdown; the best is bold."""

    def text(cell: Cell) -> str:
        plain = "".join(f"\\{c}" if c in MARKDOWN else c for c in " ".join(cell.text.split())).replace("](", r"]\(")
        return f"**{plain}**" if cell.mark == "best" else plain

    def line(cells: Iterable[str]) -> str:
        return f"| {' | '.join(cells)} |"

    lines = []
    for section in sections:
        lines += [f"### {text(Cell(section.title))}", ""]
        for grid in section.grids:
            lines += [text(Cell(grid.caption)), "", line(text(Cell(title)) for title in grid.titles)]
            lines += [line("---" if i < grid.names else "---:" for i in range(len(grid.titles)))]
            lines += [*(line(map(text, row)) for row in grid.rows), ""]
        lines += [*(f"- {text(Cell(note))}" for note in section.notes), ""]
    return "\n".join(lines)


def latex(sections: Iterable[Section]) -> str:
    """Write LaTeX tables with booktabs' rules; the best is bold, the second underlined."""

    def text(cell: Cell) -> str:
        plain = "".join(LATEX.get(c, c) for c in " ".join(cell.text.split())).replace("--", "-{-}")
        command = {"best": r"\textbf", "second": r"\underline"}.get(cell.mark)
        return f"{command}{{{plain}}}" if command else plain

    def line(cells: Iterable[Cell]) -> str:
        # A row that begins with a bracket would be read as an option of the line end before it.
        return " & ".join(map(text, cells)).replace("[", "{[}") + r" \\"

    lines = [r"% Needs \usepackage{booktabs}.", ""]
    for section in sections:
        for grid in section.grids:
            columns = "l" * grid.names + "r" * (len(grid.titles) - grid.names)
            lines += [r"\begin{table}", r"\centering", rf"\caption{{{text(Cell(f'{section.title}: {grid.caption}'))}}}"]
            lines += [rf"\begin{{tabular}}{{{columns}}}", r"\toprule", line(map(Cell, grid.titles)), r"\midrule"]
            lines += [*map(line, grid.rows), r"\bottomrule", r"\end{tabular}"]
            lines += [rf"\par\footnotesize {text(Cell(note))}" for note in section.notes]
            lines += [r"\end{table}", ""]
    return "\n".join(lines)


def page(sections: Iterable[Section]) -> str:
    """Write one self-contained HTML file; the best is bold, the second underlined."""

    def text(cell: Cell) -> str:
        plain = html.escape(cell.text)
        tag = {"best": "b", "second": "u"}.get(cell.mark)
        return f"<{tag}>{plain}</{tag}>" if tag else plain

    def line(tag: str, cells: Iterable[Cell], names: int) -> str:
        parts = (f"<{tag}{'' if i < names else ' class=n'}>{text(c)}</{tag}>" for i, c in enumerate(cells))
        return f"<tr>{''.join(parts)}</tr>"

    body = []
    for section in sections:
        body.append(f"<h2>{text(Cell(section.title))}</h2>")
        for grid in section.grids:
            body += ["<table>", f"<caption>{text(Cell(grid.caption))}</caption>", "<thead>"]
            body += [line("th", map(Cell, grid.titles), grid.names), "</thead>", "<tbody>"]
            body += [*(line("td", row, grid.names) for row in grid.rows), "</tbody>", "</table>"]
        body += ["<ul>", *(f"<li>{text(Cell(note))}</li>" for note in section.notes), "</ul>"]
    return "\n".join([HEAD, *body, "</body>", "</html>", ""])


MARKDOWN = set("\\`*|<>")
LATEX = {
    "\\": r"\textbackslash{}",
    "&": r"\&",
    "%": r"\%",
    "#": r"\#",
    "_": r"\_",
    "{": r"\{",
    "}": r"\}",
    "$": r"\$",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    "±": r"$\pm$",
    "→": r"$\rightarrow$",
    "†": r"$\dagger$",
    "‡": r"$\ddagger$",
    "\N{MINUS SIGN}": "$-$",
}
HEAD = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>kdzoo: results</title>
<style>
body { font: 15px/1.45 system-ui, sans-serif; color: #1a1a1a; background: #fff; margin: 2rem; }
table { border-collapse: collapse; margin: 1rem 0; }
caption { text-align: left; font-weight: 600; padding: .3rem 0; }
th, td { padding: .25rem .7rem; text-align: left; white-space: nowrap; vertical-align: top; }
th.n, td.n { text-align: right; font-variant-numeric: tabular-nums; }
thead th { border-top: 2px solid; border-bottom: 1px solid; }
tbody tr:last-child td { border-bottom: 2px solid; }
tbody tr:hover { background: #eef3f8; }
li { max-width: 60rem; color: #444; }
</style>
</head>
<body>
<h1>Results</h1>"""
