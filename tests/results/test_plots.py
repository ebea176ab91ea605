"""Plots for papers: a file of the format that its name asks for, whole or not at all, or a line that says why not."""

import sys

import pytest
from PIL import Image

from kdzoo.errors import StorageError, UserError
from kdzoo.results import plots

from ..made_runs import many, write

pytest.importorskip("matplotlib")
BEGINS = {"png": b"\x89PNG", "pdf": b"%PDF", "svg": b"<?xml"}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    many(root, ["none", "kd", "dkd"], students=[f"resnet{n}" for n in (8, 14, 20, 32, 44)], seeds=2)
    return root


@pytest.mark.slow(reason="loads what draws, and draws")
@pytest.mark.parametrize("kind", ["forest", "curves", "cost", "ranks"])
def test_every_kind_is_drawn(made, tmp_path, kind):
    plots.draw([made], tmp_path / "plot.png", kind, cost="parameters")
    with Image.open(tmp_path / "plot.png") as drawn:
        assert len(drawn.convert("L").getcolors()) > 50
        assert min(drawn.size) > 300


@pytest.mark.slow(reason="loads what draws, and draws")
@pytest.mark.parametrize("ending", BEGINS)
def test_the_ending_decides_the_format(made, tmp_path, ending):
    file = tmp_path / f"new/plot.{ending}"
    plots.draw([made], file, "forest")
    assert file.read_bytes().startswith(BEGINS[ending])


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("forest", "no differences to draw: no method shares a pair and a seed with the baseline none"),
        ("curves", "no learning curves to draw"),
        ("cost", "no latency_1 to draw: none of these runs has measured it"),
        ("ranks", "too little to rank"),
    ],
)
def test_where_there_is_nothing_to_draw_a_line_says_so_and_no_file_is_left(tmp_path, kind, said):
    write(tmp_path / "runs", 80.0, 0, distiller="none")
    with pytest.raises(UserError, match=said):
        plots.draw([tmp_path / "runs"], tmp_path / "plot.png", kind)
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]


def test_another_ending_or_a_missing_library_is_a_line(made, tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"plot\.gif: expected a file that ends with \.png, \.pdf or \.svg"):
        plots.draw([made], tmp_path / "plot.gif", "forest")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UserError, match=r"pip install 'kdzoo\[plots\]'"):
        plots.draw([made], tmp_path / "plot.png", "forest")
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_is_a_line(made, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="cannot be written"):
        plots.draw([made], tmp_path / "file" / "plot.png", "forest")


def test_a_pair_of_background_methods_alone_is_drawn_without_a_legend(tmp_path):
    many(tmp_path, ["vid"], ["resnet14"], seeds=1)
    many(tmp_path, ["kd", "dkd", "dist", "at", "crd", "rkd", "pkt", "cc", "sp", "ft"], seeds=1)
    plots.draw([tmp_path], tmp_path / "plot.png", "curves")
    assert (tmp_path / "plot.png").is_file()


def test_names_are_no_formulas(tmp_path):
    for seed in range(2):
        for distiller in ("none", "kd"):
            name = write(tmp_path / "runs", 80.0 + seed, seed, distiller=distiller)
            result = name.read_result()
            text = name.result.read_text().replace(f'"method": "{distiller}"', f'"method": "{distiller} $x_{{"')
            name.result.write_text(text)
            assert name.read_result().names.method == f"{distiller} $x_{{" != result.names.method
    plots.draw([tmp_path / "runs"], tmp_path / "plot.svg", "forest", baseline="none $x_{")
    assert (tmp_path / "plot.svg").is_file()
