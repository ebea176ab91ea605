"""A suite runs in groups, survives being killed, and never runs twice what is finished."""

import os
import re
import shutil
import signal
import subprocess
import sys
from itertools import chain
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import kdzoo
from kdzoo import files
from kdzoo.cli import main
from kdzoo.errors import StorageError, UserError
from kdzoo.experiments import suites, teachers, work
from kdzoo.experiments.bench import bench, survey
from kdzoo.experiments.work import by_checkpoint, grouped
from kdzoo.store.folder import RunFolder
from kdzoo.store.lock import RunLock

from ..small_suites import QUICK, SUITE


def placed(suite, out):
    """The suite's runs, in the folder that a bench gives them."""
    return [run.within(output={"root": str(out)}) for run in suite.runs]


def weights(out):
    return {folder.name: load_file(folder / "student.safetensors") for folder in out.iterdir() if folder.is_dir()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[n][k], other[n][k]) for n in one for k in one[n])


def test_a_group_shares_teacher_data_recipe_and_seed(suite):
    groups = grouped(suite.runs)
    assert [len(group) for group in groups] == [6, 6]
    assert {run.settings.seed for run in groups[0]} == {0}
    assert {run.settings.student.name for run in groups[0]} == {"resnet8", "resnet14"}


@pytest.mark.parametrize(("lanes", "sizes"), [(1, [1] * 6), (4, [3, 3]), (5, [3, 3]), (6, [6]), (9, [6])])
def test_groups_are_no_larger_than_asked_for_and_about_equal(suite, lanes, sizes):
    whole = grouped(suite.runs)
    groups = grouped(run.within(engine={"lanes": lanes}) for run in suite.runs)
    assert [len(group) for group in groups] == 2 * sizes
    assert [run.settings for run in chain(*groups)] == [run.settings for run in chain(*whole)]


def test_groups_of_less_than_nothing_are_refused(suite, tmp_path):
    with pytest.raises(UserError, match=r"engine\.lanes=-1: expected a number from 0"):
        suites.load(str(tmp_path / "mine.yaml"), overrides=["engine.lanes=-1"])


@pytest.mark.slow(reason="starts processes, each of which imports torch and trains")
def test_a_bench_killed_twice_ends_as_one_that_nobody_killed(suite, tmp_path):
    whole = bench(suite, tmp_path / "whole", quiet=True)
    assert len(whole.finished) == 12
    code = (
        "import os, signal, sys; from pathlib import Path\n"
        "from kdzoo.engine import lane; from kdzoo.experiments import bench, suites\n"
        "step, left = lane.Lane.step, int(sys.argv[3])\n"
        "def doomed(self, *given):\n"
        "    global left\n"
        "    left -= 1\n"
        "    if not left: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    step(self, *given)\n"
        "lane.Lane.step = doomed\n"
        f"suite = suites.load(sys.argv[1], overrides={[*QUICK, 'engine.checkpoint_seconds=0']!r})\n"
        "bench.bench(suite, Path(sys.argv[2]), quiet=True)"
    )
    killed = tmp_path / "killed"
    for left in (20, 25):
        command = [sys.executable, "-c", code, str(tmp_path / "mine.yaml"), str(killed), str(left)]
        assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    report = bench(suite, killed, quiet=True)
    assert len(report.finished) == 12
    assert same(weights(tmp_path / "whole"), weights(killed))


@pytest.mark.slow(reason="trains twelve runs, then four others")
def test_what_is_finished_is_not_run_again_and_an_edited_suite_runs_only_what_is_new(suite, tmp_path, monkeypatch):
    bench(suite, tmp_path / "runs", quiet=True)
    trained = []
    train_lanes = work.train_lanes
    monkeypatch.setattr(work, "train_lanes", lambda runs, *rest: trained.extend(runs) or train_lanes(runs, *rest))
    bench(suite, tmp_path / "runs", quiet=True)
    assert not trained
    (tmp_path / "mine.yaml").write_text(SUITE.replace("temperature: 1", "temperature: 2"))
    bench(suites.load(str(tmp_path / "mine.yaml"), overrides=QUICK), tmp_path / "runs", quiet=True)
    assert [run.settings.distiller.keywords["temperature"] for run in trained] == [2.0] * 4


@pytest.mark.slow(reason="trains two groups of runs")
def test_memory_is_given_back_after_each_training_before_the_next_teacher_is_made(suite, tmp_path, monkeypatch):
    done = []

    def noting(call):
        def noted(*given):
            done.append(call.__name__)
            return call(*given)

        return noted

    for owner, name in ((teachers, "obtain"), (work, "train_lanes"), (work, "give_back_memory")):
        monkeypatch.setattr(owner, name, noting(getattr(owner, name)))
    few = [run for run in suite.runs if run.settings.distiller.name == "kd" and run.settings.student.name == "resnet8"]
    bench(suites.Suite("few", tuple(few)), tmp_path)
    assert done == 2 * ["obtain", "train_lanes", "give_back_memory"]


@pytest.mark.slow(reason="trains a suite twice")
def test_a_failed_run_is_kept_apart_and_retried_on_request(tmp_path):
    file = tmp_path / "bad.yaml"
    file.write_text(SUITE.replace("temperature: 1", "kd: 1.0e+39").replace("seeds: [0, 1]", "seeds: [0]"))
    suite = suites.load(str(file), overrides=QUICK)
    report = bench(suite, tmp_path / "runs", quiet=True)
    assert (len(report.finished), len(report.failed)) == (4, 2)
    assert all("'kd' is not finite" in reason for reason in report.failed.values())
    folder = RunFolder(next(iter(report.failed)))
    before = folder.failure.stat().st_mtime_ns
    bench(suite, tmp_path / "runs", quiet=True)
    assert folder.failure.stat().st_mtime_ns == before
    bench(suite, tmp_path / "runs", retry=True, quiet=True)
    assert folder.failure.stat().st_mtime_ns > before


def test_a_failure_that_cannot_be_removed_for_another_try_is_one_line(suite, tmp_path, monkeypatch):
    folders = [RunFolder.of(run) for run in placed(suite, tmp_path / "runs")]
    for folder in folders:
        folder.path.mkdir(parents=True)
        folder.failure.write_text("out of luck")

    def unlink(path, missing_ok=False):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "unlink", unlink)
    with pytest.raises(StorageError, match=f"{re.escape(str(folders[0].path))} cannot be written .*denied"):
        bench(suite, tmp_path / "runs", retry=True, quiet=True)


def test_a_survey_makes_no_folder(suite, tmp_path):
    report = survey(placed(suite, tmp_path / "runs"), ["out of luck"])
    assert set(report.stopped.values()) == {"out of luck"}
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow(reason="trains eleven runs")
def test_what_another_process_works_on_is_left_to_it(suite, tmp_path):
    held = RunFolder.of(placed(suite, tmp_path / "runs")[0]).path
    with RunLock(held):
        report = bench(suite, tmp_path / "runs", quiet=True)
    assert report.elsewhere == [held]
    assert len(report.finished) == 11


def test_one_folder_holds_one_suite(suite, tmp_path):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "suite.json").write_text('{"name": "other"}')
    with pytest.raises(UserError, match="holds the suite 'other', not 'mine'"):
        bench(suite, tmp_path / "runs", quiet=True)


def edited(folder):
    folder.config.write_text(folder.config.read_text().replace("epochs: 1", "epochs: 3"))


def without_a_sound_checkpoint(folder):
    folder.result.unlink()
    folder.checkpoints.mkdir(exist_ok=True)
    (folder.checkpoints / "step-000000005-0123456789abcdef.pt").write_bytes(b"")


@pytest.fixture(scope="module")
def finished_suite(tmp_path_factory):
    """A suite of two runs, and the folder in which both are finished."""
    folder = tmp_path_factory.mktemp("one")
    (folder / "one.yaml").write_text(
        "data: {name: digits, limit: 128}\npairs: [[null, resnet8], [null, resnet14]]\ndistillers: [none]"
    )
    suite = suites.load(str(folder / "one.yaml"), overrides=[*QUICK, "protocol.epochs=1"])
    assert len(bench(suite, folder / "runs", quiet=True).finished) == 2
    return suite, folder / "runs"


@pytest.fixture
def harmed(finished_suite, tmp_path):
    """The suite, and a copy of its runs of which the first is to do again and the second is to be harmed."""
    suite, runs = finished_suite
    first, second = (RunFolder.of(run) for run in placed(suite, shutil.copytree(runs, tmp_path / "runs")))
    first.result.unlink()
    return suite, first, second


@pytest.mark.slow(reason="trains several runs")
@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (edited, "was edited by hand"),
        (lambda folder: folder.student.unlink(), "has lost its student"),
        (lambda folder: folder.config.unlink(), "has lost its config.yaml"),
        (lambda folder: folder.config.write_text("a: [1"), "config.yaml is damaged"),
        (lambda folder: folder.config.write_text(""), "config.yaml is damaged"),
        (lambda folder: folder.result.write_text("{"), "result.json is damaged"),
        (lambda folder: folder.result.write_text('{"top9": 1, "names": {}}'), "another version"),
        (without_a_sound_checkpoint, "every checkpoint in"),
    ],
)
def test_a_harmed_run_is_left_as_it_is_and_stops_no_other(harmed, harm, said):
    suite, first, second = harmed
    harm(second)
    before = {file.name: file.read_bytes() for file in second.path.iterdir() if file.is_file()}
    report = bench(suite, second.path.parent, quiet=True)
    assert report.finished == [first.path]
    assert list(report.stopped) == [second.path]
    assert said in report.stopped[second.path]
    assert "\n" not in report.stopped[second.path]
    after = {file.name: file.read_bytes() for file in second.path.iterdir() if file.is_file()}
    assert after == before
    with pytest.raises(UserError, match="1 run stopped"):
        report.check()


@pytest.mark.parametrize("text", ["{", "[]"])
def test_a_damaged_mark_of_the_suite_is_one_line_before_anything_is_trained(harmed, monkeypatch, text):
    suite, first, _ = harmed
    (first.path.parent / "suite.json").write_text(text)
    monkeypatch.setattr("kdzoo.experiments.work.train_lanes", None)
    with pytest.raises(UserError, match=r"suite\.json is damaged.*remove that file"):
        bench(suite, first.path.parent, quiet=True)


def test_a_table_leaves_out_what_is_damaged_and_says_so(harmed, monkeypatch, capsys):
    _, first, second = harmed
    first.result.write_text("{")
    with pytest.warns(UserWarning, match=r"left out: .*result\.json is damaged"):
        found = kdzoo.table(first.path.parent, baseline="none")
    assert found["student"].tolist() == ["resnet14"]
    monkeypatch.setattr(sys, "argv", ["kdzoo", "table", str(first.path.parent)])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0
    shown, said = capsys.readouterr()
    assert "resnet14" in shown
    assert "left out: " in said
    second.result.write_text("{")
    with pytest.raises(UserError, match=r"result\.json is damaged"):
        kdzoo.table(first.path.parent)


@pytest.mark.parametrize("kind", ["checkpoints", "student.safetensors", "metrics.jsonl", "result.json"])
@pytest.mark.slow(reason="trains again and again, killed at many moments")
def test_a_disk_that_fills_stops_the_bench_and_no_run_has_failed(suite, tmp_path, monkeypatch, kind):
    few = suites.Suite("mine", tuple(run.within(engine={"checkpoint_seconds": 0.0}) for run in suite.runs[:3]))
    whole = bench(few, tmp_path / "whole", quiet=True)
    write, left = files.write_atomically, 2

    def full(path, content):
        nonlocal left
        left -= kind in str(path)
        if left < 0:
            return write(path, lambda temporary: os.write(os.open("/dev/full", os.O_WRONLY), b"x"))
        return write(path, content)

    with monkeypatch.context() as patch:
        for module in ("kdzoo.files", "kdzoo.store.checkpoint", "kdzoo.models.weights"):
            patch.setattr(f"{module}.write_atomically", full)
        with pytest.raises(UserError, match=r"the disk of .* is full; free some space and run the same command again"):
            bench(few, tmp_path / "full", quiet=True)
    assert not list((tmp_path / "full").glob("*/failed.txt"))
    report = bench(few, tmp_path / "full", quiet=True)
    assert len(report.finished) == len(whole.finished) == 3
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "full"))


@pytest.mark.slow(reason="trains several runs")
def test_what_one_group_lacks_does_not_stop_the_others(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text(SUITE.replace("data: {name: digits, limit: 320}", "data: ['folder:/nowhere', digits]"))
    more = [*QUICK, "data.limit=320", "protocol.epochs=1"]
    suite = suites.load(str(file), seeds=1, overrides=more)
    report = bench(suite, tmp_path / "runs", quiet=True)
    assert (len(report.finished), len(report.failed)) == (6, 6)
    assert all("no folder '/nowhere'" in reason for reason in report.failed.values())


def test_a_failure_that_many_runs_share_is_told_once(tmp_path, monkeypatch, capsys):
    file = tmp_path / "mine.yaml"
    file.write_text("data: 'folder:/nowhere'\npairs: [[null, resnet8], [null, resnet14]]\ndistillers: [none]")
    monkeypatch.setattr(sys, "argv", ["kdzoo", "bench", str(file), "--out", str(tmp_path / "runs")])
    with pytest.raises(SystemExit) as end:
        main()
    *lines, said = capsys.readouterr().err.splitlines()
    assert end.value.code == 2
    assert said.startswith("error: 2 runs failed (")
    for student in ("resnet8", "resnet14"):
        assert any(re.match(rf"folder-nowhere-{student}-none-s0-\w+ failed: no folder", line) for line in lines)
    assert said.count("no folder '/nowhere'") == 1


def test_lanes_start_together_only_from_a_step_that_all_have(suite, tmp_path):
    from kdzoo.store import checkpoint

    runs = placed(suite, tmp_path)[:4]
    for run, steps in zip(runs, [(4, 6), (6,), (), (4,)], strict=True):
        RunFolder.of(run).path.mkdir()
        for step in steps:
            checkpoint.save(RunFolder.of(run).checkpoints, step, {})
    assert [len(together) for together in by_checkpoint(runs)] == [2, 1, 1]


def test_an_edit_of_a_method_trains_nothing_under_the_name_of_its_old_self(two, tmp_path):
    (tmp_path / "mine.py").write_text((tmp_path / "mine.py").read_text() + "# edited")
    report = bench(two, tmp_path / "runs", quiet=True)
    assert len(report.finished) == 1
    assert list(report.stopped.values()) == [f"{tmp_path}/mine.py changed since the suite was read"]
    with pytest.raises(UserError, match="1 run stopped"):
        report.check()


@pytest.mark.slow(reason="trains several runs")
def test_a_run_whose_owner_on_another_machine_gives_no_sign_is_taken_over(two, tmp_path, monkeypatch):
    first = RunFolder.of(placed(two, tmp_path / "runs")[0]).path
    first.mkdir(parents=True)
    owner = first / "owner.json"
    owner.write_text('{"host": "elsewhere", "process": 1}')
    monkeypatch.setattr("kdzoo.experiments.work.await_signs", lambda locks: os.utime(owner, (0, 0)))
    report = bench(two, tmp_path / "runs", quiet=True)
    assert len(report.finished) == 2
