"""Runs of a suite stop at an epoch where that is asked for, and continue with the same bits."""

import pytest
import torch
from safetensors.torch import load_file

import kdzoo
from kdzoo.cli import main
from kdzoo.errors import UserError
from kdzoo.experiments import suites, work
from kdzoo.experiments.bench import bench
from kdzoo.settings import Run
from kdzoo.store.folder import RunFolder

pytestmark = pytest.mark.slow(reason="trains each run in parts and in one")

SUITE = (
    "{data: {name: digits, limit: 192}, protocol: {name: quick, epochs: 3, batch_size: 64}, "
    "pairs: [[resnet14, resnet8]], distillers: [none, kd, dkd], teacher: {epochs: 1, allow_weak: true}}"
)
PLAIN = ["engine.device=cpu", "engine.precision=float32"]


@pytest.fixture
def load(tmp_path):
    """Loads the suite with further overrides."""
    file = tmp_path / "mine.yaml"
    file.write_text(SUITE)
    return lambda *more: suites.load(str(file), overrides=[*PLAIN, *more])


def weights(out):
    return {file.parent.name: load_file(file) for file in out.glob("*/student.safetensors")}


def test_runs_that_stopped_continue_to_the_bits_of_those_that_never_did(load, tmp_path):
    whole = bench(load(), tmp_path / "whole", quiet=True)
    assert not whole.on_the_way
    for epoch in (1, 2):
        report = bench(load(f"engine.stop_after={epoch}"), tmp_path / "parts", quiet=True)
        assert (len(report.on_the_way), report.finished, report.failed, report.stopped) == (3, [], {}, {})
        for path in report.on_the_way:
            history = RunFolder(path).read_history()
            assert [record["epoch"] for record in history] == list(range(1, epoch + 1))
            assert history[-1]["top1"] is not None
    report = bench(load(), tmp_path / "parts", quiet=True)
    assert (len(report.finished), report.on_the_way) == (3, [])
    one, other = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert one.keys() == other.keys()
    assert all(torch.equal(one[run][name], other[run][name]) for run in one for name in one[run])


def test_nothing_is_trained_again_where_runs_stand_already(load, tmp_path, monkeypatch):
    stopped = load("engine.stop_after=1")
    bench(stopped, tmp_path / "out", quiet=True)
    monkeypatch.setattr(work, "train_lanes", lambda *given: pytest.fail("it trained"))
    assert len(bench(stopped, tmp_path / "out", quiet=True).on_the_way) == 3


def test_a_run_whose_checkpoint_is_gone_is_trained_to_its_stop_again(load, tmp_path):
    stopped = load("engine.stop_after=1")
    for path in bench(stopped, tmp_path / "out", quiet=True).on_the_way:
        for file in (path / "checkpoints").iterdir():
            file.unlink()
    report = bench(stopped, tmp_path / "out", quiet=True)
    assert len(report.on_the_way) == 3
    assert all(any((path / "checkpoints").iterdir()) for path in report.on_the_way)


@pytest.mark.parametrize("text", ["", "no line of JSON\n", '{"epoch": 1}\n', "3\n"])
def test_a_run_whose_history_is_damaged_has_it_written_again(load, tmp_path, text):
    stopped = load("engine.stop_after=1")
    paths = bench(stopped, tmp_path / "out", quiet=True).on_the_way
    whole = {path: (path / "metrics.jsonl").read_text() for path in paths}
    (paths[1] / "metrics.jsonl").write_text(text)
    assert len(bench(stopped, tmp_path / "out", quiet=True).on_the_way) == 3
    assert {path: (path / "metrics.jsonl").read_text() for path in paths} == whole


def test_a_stop_behind_the_end_is_the_end(load, tmp_path):
    assert len(bench(load("engine.stop_after=9"), tmp_path / "out", quiet=True).finished) == 3


def test_the_epoch_of_a_stop_is_measured_whichever_others_are(load, tmp_path):
    report = bench(load("engine.stop_after=1", "output.measure_every=3"), tmp_path / "out", quiet=True)
    assert all(RunFolder(path).read_history()[0]["top1"] is not None for path in report.on_the_way)


def test_where_runs_stop_is_no_part_of_what_they_are(load):
    def names(runs: tuple[Run, ...]) -> list[str]:
        return [run.settings.identity() for run in runs]

    assert names(load("engine.stop_after=1").runs) == names(load().runs)


def test_the_teacher_is_trained_to_its_end(load, tmp_path, cache):
    bench(load("engine.stop_after=1", "teacher.epochs=2", "teacher.seed=77"), tmp_path / "out", quiet=True)
    assert [file.parent.name for file in (cache / "teachers").glob("*-s77-*/result.json")]


def test_a_single_run_refuses_to_stop():
    with pytest.raises(UserError, match=r"engine\.stop_after belongs to kdzoo bench"):
        kdzoo.run("none", "resnet8", overrides=["engine.stop_after=1"], quiet=True)


def test_the_command_line_says_that_runs_stopped(load, tmp_path, capsys, monkeypatch):
    load()
    monkeypatch.setattr("sys.argv", ["kdzoo", "bench", str(tmp_path / "mine.yaml"), "--out", str(tmp_path / "out"),
                                     *PLAIN, "engine.stop_after=1"])  # fmt: skip
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0
    assert "stopped as engine.stop_after asks: 3 runs" in capsys.readouterr().err
