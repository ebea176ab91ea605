"""Tables as people read them: every number in its place, every name shown as it is, every mark explained."""

import csv
import io
import json
import re

import matplotlib
import numpy as np
import pandas as pd
import pytest

from kdzoo import cli
from kdzoo.errors import UserError
from kdzoo.results import layout, ranks, table

from ..made_runs import runs, varied, write


@pytest.fixture
def found(tmp_path):
    return varied(tmp_path)


def test_teacher_last_and_best_epoch_have_columns_and_grids_of_their_own():
    found = runs(("resnet32x4", "resnet8x4", "kd", 0, 73.0))
    assert "| teacher top-1 | top-1 last | top-1 best |" in layout.render(found, "markdown")
    pivot = layout.render(found, "markdown", pivot=True)
    teacher, last, best = (pivot.index(text) for text in ("Teacher, top-1", "of the last epoch", "of the best epoch"))
    assert teacher < pivot.index("79.42 (\N{MINUS SIGN}0.42) [a]") < last < pivot.index("| kd | 73.00 |") < best
    assert pivot.index("| kd | 73.50 |") > best


def test_an_interval_below_zero_has_the_minus_sign_of_all_numbers():
    found = runs(("t", "s", "kd", 0, 10.0), ("t", "s", "kd", 1, 14.0))  # 12 ± 12.71 * 2
    assert "| \N{MINUS SIGN}13.41 to 37.41 |" in layout.render(found, "markdown")
    assert "$-$13.41 to 37.41" in layout.render(found, "latex")


@pytest.mark.parametrize("pivot", [False, True])
def test_an_interval_without_zero_beside_a_verdict_of_no_difference_is_explained(pivot):
    methods = {"kd": (70, 71, 72), "at": (72, 73, 74), "sp": (70, 72, 71)}
    scores = [("t", "s", name, seed, float(top1)) for name, found in methods.items() for seed, top1 in enumerate(found)]
    said = layout.render(runs(*scores), "markdown", pivot=pivot)
    assert "| +2.00 | +2.00 to +2.00 | 3 | 0.500 | not told apart |" in said
    assert "with its own 95 % interval, not corrected" in said
    assert "Where all differences are equal, the interval is a point, and p that of the sign test." in said
    others = runs(*(row for row in scores if row[2] != "at"))
    assert "sign test" not in layout.render(others, "markdown", pivot=pivot)


@pytest.mark.parametrize("pivot", [False, True])
def test_published_numbers_stand_beside_ours_with_difference_source_and_status(pivot):
    pair = ("resnet32x4", "resnet8x4")
    said = layout.render(runs((*pair, "kd", 0, 73.0), (*pair, "dkd", 0, 76.0)), "markdown", pivot=pivot)
    assert "73.33 (\N{MINUS SIGN}0.33) [" in said  # last epoch against last
    assert "76.32 (+0.18) [" in said  # best epoch, 76.5, against best
    assert "RepDistiller README (read)" in said
    assert "mdistiller README (read)" in said


@pytest.mark.parametrize("style", ["markdown", "csv", "latex", "html"])
@pytest.mark.parametrize("pivot", [False, True])
def test_numbers_that_nobody_verified_are_shown_nowhere(style, pivot):
    found = runs(("mixer_b16", "resnet18", "kd", 0, 70.0), protocol="ofa-cnn")
    said = layout.render(found, style, pivot=pivot)
    assert "77.79" not in said
    assert "from memory" not in said


@pytest.mark.parametrize("pivot", [False, True])
@pytest.mark.parametrize(("style", "mark"), [("markdown", "†"), ("html", "†"), ("latex", r"$\dagger$")])
def test_reconstructions_are_marked_wherever_they_carry_numbers(style, mark, pivot):
    found = pd.concat([runs(("t", "s", "kd", 0, 70.0)), runs(("t", "s", "uhkd", 0, 70.0), fidelity="reconstructed")])
    said = layout.render(found, style, pivot=pivot)
    assert f"uhkd {mark}" in said
    assert f"{mark} reconstructed: the full text was not available" in said
    assert f"kd {mark}" not in said.replace("uhkd", "")


def test_all_styles_hold_the_same_numbers(found):
    markdown, csv, latex, page = (layout.render(found, style) for style in ("markdown", "csv", "latex", "html"))
    assert "| **82.00 ± 2.65** |" in markdown
    assert r"\textbf{82.00 $\pm$ 2.65}" in latex
    assert r"\underline{70.00}" in latex
    assert r"resnet\_8" in latex
    assert "<b>82.00 ± 2.65</b>" in page
    assert ",82.0," in csv
    assert "| 70.00 |" in markdown  # one seed: no deviation is made up


def test_equal_numbers_are_equally_best():
    found = runs(*[("t", "s", name, 0, top1) for name, top1 in {"kd": 70.001, "at": 70.0, "sp": 69.0}.items()])
    latex = layout.render(found, "latex")
    assert latex.count(r"\textbf{70.00}") == 2
    assert r"\underline{69.00}" in latex


def test_numbers_that_are_shown_alike_are_marked_alike():
    means = {"kd": (70.03, 70.04), "at": (70.03, 70.03)}  # the first is shown as 70.03, and numpy rounds it to 70.04
    found = runs(*[("t", "s", name, seed, top1) for name, both in means.items() for seed, top1 in enumerate(both)])
    assert layout.render(found, "latex").count(r"\textbf{70.03 ") == 2


@pytest.mark.parametrize("pivot", [False, True])
def test_csv_comes_back_as_it_went(found, pivot):
    expected = layout.wide(found) if pivot else table.summary(found)
    back = pd.read_csv(io.StringIO(layout.render(found, "csv", pivot=pivot)))
    assert list(back.columns) == list(expected.columns)
    for name, column in expected.items():
        if column.isna().all() or pd.api.types.is_numeric_dtype(column):
            assert np.array_equal(back[name].astype(float), column.astype(float), equal_nan=True)
        else:
            assert list(back[name].astype(object).fillna("")) == list(column)


EVIL = r"<script>alert(1)</script> a_b & c 50% #1 {x} ~ ^ $ \ | **"


@pytest.mark.parametrize("pivot", [False, True])
def test_latex_has_every_special_character_escaped(pivot):
    said = layout.render(runs(("t", "s", EVIL, 0, 70.0)), "latex", pivot=pivot)
    assert (
        r"\textless{}script\textgreater{}alert(1)\textless{}/script\textgreater{} a\_b \& c 50\% \#1 \{x\} "
        r"\textasciitilde{} \textasciicircum{} \$ \textbackslash{} \textbar{}"
    ) in said
    for columns, body in re.findall(r"\\begin\{tabular\}\{(\w+)\}(.*?)\\end\{tabular\}", said, flags=re.DOTALL):
        lines = [line for line in body.splitlines() if line.endswith(r"\\")]
        assert len(lines) >= 2
        assert {len(re.findall(r"(?<!\\)&", line)) + 1 for line in lines} == {len(columns)}
    assert "% interval" not in said.replace(r"\%", "")


def test_two_hyphens_of_a_name_are_no_dash():
    assert "a-{-}b" in layout.render(runs(("t", "s", "a--b", 0, 70.0)), "latex")


def test_a_difference_that_rounds_to_nothing_has_no_minus():
    said = layout.render(runs(("t", "s", "kd", 0, 70.0), ("t", "s", "dkd", 0, 69.999)), "markdown")
    assert "+0.00" in said
    assert "\N{MINUS SIGN}0.00" not in said


@pytest.mark.parametrize("pivot", [False, True])
def test_html_and_markdown_show_a_name_and_do_not_obey_it(pivot):
    found = runs(("t", "s", EVIL, 0, 70.0))
    page = layout.render(found, "html", pivot=pivot)
    assert "<script" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt; a_b &amp; c" in page
    markdown = layout.render(found, "markdown", pivot=pivot)
    assert r"\<script\>" in markdown
    assert r"\| \*\*" in markdown
    assert " <script" not in markdown


def test_html_needs_no_other_file():
    page = layout.render(runs(("t", "s", "kd", 0, 70.0)), "html")
    assert page.startswith("<!doctype html>")
    assert 'charset="utf-8"' in page
    assert not any(word in page for word in ("http", "src=", "<link", "url("))


def ranked(pairs):
    return runs(
        *[
            ("t", f"s{i}", name, 0, 70.0 + better + i / 10)
            for i in range(pairs)
            for better, name in enumerate(("kd", "a_b $x$", "uhkd"))
        ]
    )


@pytest.mark.parametrize(("ending", "magic"), [("png", b"\x89PNG"), ("pdf", b"%PDF"), ("svg", b"<?xml")])
def test_ranks_are_drawn_where_there_are_enough_pairs(tmp_path, ending, magic):
    file = tmp_path / f"ranks.{ending}"
    ranks.draw(ranked(5), file)
    assert file.read_bytes().startswith(magic)
    assert "Ranks closer than 1.48 (Nemenyi, 0.05)" in layout.render(ranked(5), "markdown", pivot=True)


def test_a_diagram_finds_no_formula_in_a_name(tmp_path):
    found = ranked(5).assign(data="a$b_$")
    ranks.draw(found, tmp_path / "ranks.svg")
    assert (tmp_path / "ranks.svg").is_file()


def test_reconstructions_are_marked_in_the_diagram_too(tmp_path, monkeypatch):
    monkeypatch.setitem(matplotlib.rcParams, "svg.fonttype", "none")
    found = ranked(5)
    found.loc[found.method == "uhkd", "fidelity"] = "reconstructed"
    ranks.draw(found, tmp_path / "ranks.svg")
    said = (tmp_path / "ranks.svg").read_text(encoding="utf-8")
    assert "uhkd †" in said
    assert "† reconstructed" in said


def test_too_few_pairs_or_another_format_are_errors_of_one_line(tmp_path):
    with pytest.raises(UserError, match=r"4 pairs with all of 3 methods; expected at least 5 pairs and 3 methods"):
        ranks.draw(ranked(4), tmp_path / "ranks.png")
    with pytest.raises(UserError, match=r"ranks.xlsx: expected a file that ends with .png"):
        ranks.draw(ranked(5), tmp_path / "ranks.xlsx")
    assert not list(tmp_path.iterdir())


def test_the_command_prints_the_table_and_draws_the_ranks(tmp_path, capsys, monkeypatch):
    for method, top1 in {"kd": 80.0, "none": 70.0}.items():
        write(tmp_path / "runs", top1, 0, distiller=method)

    def table_of(*arguments):
        monkeypatch.setattr("sys.argv", ["kdzoo", "table", str(tmp_path / "runs"), *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return ended.value.code, *capsys.readouterr()

    assert "minus none" in table_of("--baseline", "none")[1]
    assert "Teacher, top-1" in table_of("--pivot")[1]
    assert table_of("--format", "html")[1].startswith("<!doctype html>")
    assert table_of("--baseline", "nonne")[::2] == (
        2,
        "error: unknown baseline 'nonne'; did you mean none? (a method of the table, as the table names it)\n",
    )
    code, out, err = table_of("--ranks", str(tmp_path / "ranks.png"))
    assert (code, out, err.count("\n")) == (2, "", 1)


@pytest.mark.parametrize("pivot", [False, True])
@pytest.mark.parametrize("name", ["=1+2", "+1", "-1", "@SUM(A1)"])
def test_csv_holds_no_formula(name, pivot):
    said = layout.render(runs(("-", name, name, 0, 70.0), ("-", name, "kd", 0, 71.0)), "csv", pivot=pivot)
    cells = [cell for row in csv.reader(io.StringIO(said)) for cell in row]
    assert f"'{name}" in cells
    assert not [cell for cell in cells if cell[:1] in ("=", "+", "@") or (cell[:1] == "-" and not is_number(cell))]


def is_number(cell):
    return cell == "-" or re.fullmatch(r"-?[0-9.]+(e-?[0-9]+)?", cell)


@pytest.mark.parametrize("style", ["markdown", "csv", "latex", "html"])
def test_no_table_commands_the_terminal(tmp_path, style):
    folder = write(tmp_path, 80.0, 0)
    found = json.loads(folder.result.read_text())
    found["names"]["method"] = "kd\x1b[2J\r\x07\u202e"
    folder.result.write_text(json.dumps(found))
    said = layout.render(table.rows([folder]), style, "none")
    assert all(c.isprintable() or c == "\n" for c in said)
    assert "x1b" in said
