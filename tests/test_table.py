"""Tables: seeds are averaged, variants told apart, nothing compared that differs in protocol."""

import statistics

import pytest

from kdzoo import config
from kdzoo.results import table
from kdzoo.results.folder import Result, RunFolder, find_runs


def write(root, top1, seed, *overrides, distiller="kd"):
    settings = config.resolve(
        {"distiller": {"name": distiller}, "student": {"name": "resnet_8"}, "output": {"root": str(root)}},
        [f"seed={seed}", "engine.device=cpu", "engine.precision=float32", *overrides],
    )
    folder = RunFolder.of(settings)
    folder.open(settings)
    folder.write_result(
        Result(
            folder=folder.path,
            data="digits",
            protocol="quick",
            teacher="vit_s",
            student="resnet_8",
            distiller=distiller,
            fidelity="exact",
            seed=seed,
            teacher_top1=96.0,
            top1=top1,
            top5=99.0,
            best_top1=top1 + 1,
            best_epoch=1,
            epochs=2,
            seconds=1.0,
            images_per_second=100.0,
        )
    )


@pytest.fixture
def summary(tmp_path):
    for seed, top1 in enumerate((80.0, 81.0, 85.0)):
        write(tmp_path, top1, seed)
    write(tmp_path, 70.0, 0, "distiller.temperature=1")
    write(tmp_path, 60.0, 0, "protocol.epochs=1")
    write(tmp_path, 50.0, 0, distiller="none")
    return table.summary(table.rows(find_runs([tmp_path])))


def test_seeds_are_averaged_with_the_deviation_of_a_sample(summary):
    row = summary[(summary.method == "kd") & (summary.protocol == "quick")].iloc[0]
    assert row.seeds == 3
    assert row.top1_mean == pytest.approx(82)
    assert row.top1_std == pytest.approx(statistics.stdev([80, 81, 85]))
    assert row.best_top1_mean == pytest.approx(83)


def test_what_differs_is_another_row_and_says_how(summary):
    assert set(summary.method) == {"kd", "kd (temperature=1.0)", "none"}
    assert any("epochs=1" in protocol for protocol in summary.protocol)
    assert len(summary) == 4


def test_markdown_csv_and_latex_hold_the_same_numbers(summary):
    markdown, csv, latex = (table.render(summary, style) for style in ("markdown", "csv", "latex"))
    assert "| 82.00 ± 2.65 |" in markdown
    assert r"82.00 $\pm$ 2.65" in latex
    assert r"resnet\_8" in latex
    assert "82.0," in csv
    assert "| 70.00 |" in markdown  # one seed: no deviation is made up
