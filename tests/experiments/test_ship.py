"""Which student a run keeps: of the last epoch, or of the best, through interruptions; and the average."""

import pytest
import torch
from safetensors.torch import load_file

import kdzoo
from kdzoo.engine.measure import Measures
from kdzoo.errors import UserError
from kdzoo.experiments.run import evaluate_run
from kdzoo.results import layout, table
from kdzoo.store.folder import RunFolder, find_runs

from ..made_runs import write

SHORT = ["engine.device=cpu", "engine.precision=float32", "engine.checkpoint_seconds=0", "data.limit=128"]
SHORT += ["protocol.schedule=constant", "protocol.warmup=0", "protocol.batch_size=32"]


def run(out, *more, epochs=3, distiller="none", teacher=None):
    overrides = [*SHORT, f"protocol.epochs={epochs}", "teacher.epochs=1", "teacher.allow_weak=true", *more]
    return kdzoo.run(distiller, "resnet8", teacher, out=out, overrides=overrides, quiet=True)


def weights(result):
    return load_file(result.folder / "student.safetensors")


def same(one, other):
    return all(torch.equal(value, weights(other)[name]) for name, value in weights(one).items())


@pytest.fixture
def falling(monkeypatch):
    """Every measurement of training is worse than the one before; ``interrupted`` stops at the third."""
    numbers = []

    def measure(*_, **__):
        numbers.append(90.0 - 10 * len(numbers))
        if numbers[-1] in measure.interrupted:
            raise KeyboardInterrupt
        return Measures(numbers[-1], 95.0, None)

    measure.interrupted = ()
    monkeypatch.setattr("kdzoo.engine.loop.evaluate", measure)
    return measure


@pytest.mark.slow(reason="trains several runs")
def test_the_student_of_the_best_epoch_is_kept_averaged_where_the_protocol_averages(tmp_path, falling):
    best = run(tmp_path / "best", "output.ship=best", "protocol.ema=0.5")
    first = run(tmp_path / "first", "protocol.ema=0.5", epochs=1)
    assert same(best, first)
    assert not same(run(tmp_path / "last", "protocol.ema=0.5"), first)
    assert (best.ship, best.best_epoch, best.best_top1, best.top1) == ("best", 1, 90.0, 70.0)
    assert (best.shipped_top1, best.shipped_top5) == (90.0, 95.0)


@pytest.mark.slow(reason="trains several runs")
def test_a_run_that_is_interrupted_keeps_the_best_student_with_the_same_bits(tmp_path, falling):
    whole = run(tmp_path / "whole", "output.ship=best")
    falling.interrupted = (40.0,)  # the third measurement from here
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "broken", "output.ship=best")
    assert list((tmp_path / "broken").glob("*/checkpoints/step-*.pt"))
    assert same(run(tmp_path / "broken", "output.ship=best"), whole)


@pytest.mark.slow(reason="trains several runs")
def test_what_a_method_adds_to_the_student_is_kept_with_it(tmp_path, falling):
    both = {"distiller": "simkd", "teacher": "resnet14"}
    best = run(tmp_path / "best", "output.ship=best", **both, epochs=2)
    assert same(best, run(tmp_path / "first", **both, epochs=1))
    assert not same(best, run(tmp_path / "last", **both, epochs=2))


def test_what_is_kept_is_what_is_measured_again(tmp_path):
    kept = run(tmp_path, "output.ship=best", "protocol.lr=0.3")
    assert evaluate_run(kept.folder) == (kept.best_top1, kept.best_top5)


@pytest.mark.slow(reason="trains several runs")
def test_the_average_is_kept_where_the_protocol_averages_and_refused_elsewhere(tmp_path):
    average = run(tmp_path / "ema", "output.ship=ema", "protocol.ema=0.5", epochs=1)
    assert same(average, run(tmp_path / "last", "protocol.ema=0.5", epochs=1))
    assert not same(average, run(tmp_path / "plain", "protocol.ema=0", epochs=1))
    with pytest.raises(UserError, match=r"output\.ship=ema: this protocol averages no weights; set protocol\.ema"):
        run(tmp_path, "output.ship=ema", "protocol.ema=0")
    with pytest.raises(UserError, match=r"output\.ship=best: .*output\.measure_every=2"):
        run(tmp_path, "output.ship=best", "output.measure_every=2")
    with pytest.raises(UserError, match=r"output\.ship"):
        run(tmp_path, "output.ship=worst")


def test_tables_never_mix_what_is_kept_and_compare_what_is_kept(tmp_path):
    for seed in range(3):
        write(tmp_path, 80.0 + seed, seed)
        write(tmp_path, 81.0 + seed, seed, distiller="at")
        write(tmp_path, 70.0, seed, "output.ship=best", ship="best", best_top1=90.0 + seed)
        write(tmp_path, 60.0, seed, "output.ship=best", distiller="at", ship="best", best_top1=93.0 + 2 * seed)
    rows = table.rows(find_runs([tmp_path]))
    found = table.summary(rows).set_index(["ship", "method"])
    assert len(found) == 4
    assert found.loc[("last", "at"), "difference"] == pytest.approx(1)
    assert found.loc[("best", "at"), "difference"] == pytest.approx(4)
    for text in (layout.render(rows, "markdown"), layout.render(rows, "markdown", pivot=True)):
        assert text.count("### digits, protocol quick") == 2
        assert "### digits, protocol quick, students of the best epoch" in text
    said = layout.render(rows, "markdown")
    assert "differences in top-1 of the best epoch" in said
    assert "differences in top-1 of the last epoch" in said


def test_a_run_that_keeps_another_student_is_another_run(tmp_path):
    last, best = run(tmp_path, epochs=1), run(tmp_path, "output.ship=best", epochs=1)
    assert last.folder != best.folder
    assert RunFolder(last.folder).run().settings.output.ship == "last"
