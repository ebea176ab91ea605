"""A dry run says what a suite will take, trains nothing, and lists what it cannot measure too."""

import math
import sys
from dataclasses import replace
from itertools import count
from types import SimpleNamespace

import pytest

from kdzoo.cli import main
from kdzoo.engine.memory import Cost
from kdzoo.engine.progress import Progress
from kdzoo.errors import UserError
from kdzoo.experiments import suites
from kdzoo.experiments.bench import bench, placed
from kdzoo.experiments.estimate import GroupCost, LaneCost, by_turns, estimate, measure
from kdzoo.experiments.work import grouped
from kdzoo.experiments.workers import Local
from kdzoo.store.folder import RunFolder

SUITE = """
data: {name: digits, limit: 320}
protocol: {name: quick, epochs: 1}
pairs: [[resnet14, resnet8]]
distillers: [none, kd]
seeds: [0, 1]
teacher: {epochs: 3, allow_weak: true}
"""
QUICK = ["engine.precision=float32", "engine.device=cpu"]
LANES = {
    0: LaneCost(1.0, 10.0, Cost(30, 20)),
    1: LaneCost(2.0, 20.0, Cost(30, 50)),
    3: LaneCost(3.0, 30.0, Cost(30, 1)),
}


def suite(folder, text=SUITE):
    file = folder / "mine.yaml"
    file.write_text(text)
    return suites.load(str(file), overrides=QUICK)


def expected(found, out, retry=False):
    progress = Progress(quiet=True)
    return estimate(grouped(placed(found, out, Local(), progress)), retry, progress)


def group(**changed):
    facts = {
        "shared": 4.0,
        "once": 7.0,
        "steps": 100,
        "epochs": 3,
        "measured": 3,
        "base": 1000,
        "room": math.inf,
    }
    return GroupCost(lanes=LANES, failed={2: UserError("no such stage")}, **{**facts, **changed})


def test_time_is_epochs_of_steps_and_tests_with_batch_and_teacher_paid_once_for_all_lanes():
    assert group().seconds(range(4)) == 3 * (100 * (4 + 1 + 2 + 3) + 10 + 20 + 30) + 7
    assert group().seconds([1]) == 3 * (100 * (4 + 2) + 20) + 7
    assert group().seconds([]) == 0
    assert group().seconds([2]) == 0  # cannot be trained
    assert group(measured=1).seconds([1]) == 3 * 100 * (4 + 2) + 20 + 7


def test_phases_before_training_and_what_is_done_once_for_each_run_are_counted():
    lane = LaneCost(1.0, 10.0, Cost(30, 20), phase=5, made=3.0)
    found = replace(group(), lanes={0: lane})
    assert found.seconds([0]) == group().seconds([0]) + 5 * 100 * (1 + 4) + 3


def test_a_group_that_memory_divides_pays_for_batch_and_teacher_in_each_part():
    divided = group(room=115)
    assert [len(pack) for pack in divided.packs(range(4))] == [2, 1]
    assert divided.seconds(range(4)) - group().seconds(range(4)) == 3 * 100 * 4


def test_memory_is_that_of_the_largest_part_beside_data_and_teacher():
    assert group().bytes(range(4)) == 1000 + 90 + 50
    assert group(room=0).bytes(range(4)) == 1000 + 30 + 50


def test_groups_that_differ_by_seed_are_measured_once_and_a_teacher_is_trained_once(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("KDZOO_CACHE", str(tmp_path / "cache"))  # in which no teacher is trained yet
    groups = grouped(placed(suite(tmp_path), tmp_path / "runs", Local(), Progress()))
    found = estimate(groups, False, Progress())
    assert capsys.readouterr().err.count("measuring resnet14 on digits") == 1
    first, second = found
    assert first.seconds == second.seconds > 0
    assert first.teaching > 0 == second.teaching
    assert first.memory > 2**20
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(("drawn", "share"), [("{}", 1 / 5), ("{flip: true}", 1.0)])
def test_a_teacher_that_is_asked_once_is_counted_once(tmp_path, monkeypatch, drawn, share):
    monkeypatch.setattr("kdzoo.experiments.estimate.seconds", lambda work, device: 1.0)  # for all that is timed
    monkeypatch.setattr("kdzoo.experiments.estimate.once", lambda work, device: 1.0)
    text = SUITE.replace("epochs: 1", f"epochs: 5, augmentation: {drawn}")
    [runs, *_] = grouped(placed(suite(tmp_path, text), tmp_path / "runs", Local(), Progress(quiet=True)))
    cost, _ = measure(runs, Progress(quiet=True))
    assert (cost.teacher, cost.shared) == (share, 1 + share)
    turns = by_turns(runs, Progress(quiet=True))
    assert turns == {0: 2.0, 1: 2 + share}  # a step and a batch, and for kd the teacher


@pytest.mark.parametrize(("more", "times"), [([], 2), (["engine.lanes=2"], 1)])
def test_each_run_is_built_once_to_measure_memory_and_once_to_train(tmp_path, monkeypatch, more, times):
    monkeypatch.setattr("kdzoo.experiments.estimate.seconds", lambda work, device: 10.0)  # for all that is timed
    monkeypatch.setattr("kdzoo.experiments.estimate.time", SimpleNamespace(perf_counter=count().__next__))
    file = tmp_path / "mine.yaml"
    file.write_text(SUITE)
    found = suites.load(str(file), overrides=[*QUICK, *more])
    [runs, *_] = grouped(placed(found, tmp_path / "runs", Local(), Progress(quiet=True)))
    cost, _ = measure(runs, Progress(quiet=True))
    assert {i: lane.made - lane.test for i, lane in cost.lanes.items()} == {0: times, 1: times}


def test_nothing_is_trained(tmp_path, cache, monkeypatch):
    monkeypatch.setattr("kdzoo.engine.loop.train", None)
    before = set(cache.glob("teachers/*"))
    expected(suite(tmp_path, SUITE.replace("epochs: 3", "epochs: 9")), tmp_path / "runs")
    assert set(cache.glob("teachers/*")) == before


@pytest.mark.slow(reason="trains a suite between two estimates")
def test_what_is_finished_is_no_longer_left(tmp_path):
    found = suite(tmp_path)
    before = expected(found, tmp_path / "runs")
    bench(found, tmp_path / "runs", quiet=True)
    after = expected(found, tmp_path / "runs")
    assert [group.finished for group in (*before, *after)] == [0, 0, 2, 2]
    assert all(group.left == group.seconds > 0 for group in before)
    assert all(group.left == group.teaching == 0 < group.seconds for group in after)


@pytest.mark.slow(reason="trains several runs")
def test_a_failed_run_is_left_only_where_it_is_to_be_tried_again(tmp_path):
    found = suite(tmp_path)
    folder = RunFolder.of(placed(found, tmp_path / "runs", Local(), Progress(quiet=True))[0])
    folder.path.mkdir(parents=True)
    folder.failure.write_text("out of memory")
    once, again = (expected(found, tmp_path / "runs", retry)[0] for retry in (False, True))
    assert (once.finished, again.finished) == (1, 0)
    assert 0 < once.left < once.seconds
    assert again.left == again.seconds


@pytest.fixture
def dry_run(capsys, monkeypatch, tmp_path):
    def call(text, *more):
        file = tmp_path / "mine.yaml"
        file.write_text(text)
        command = ["kdzoo", "bench", str(file), "--dry-run", "--out", str(tmp_path / "runs"), *QUICK, *more]
        monkeypatch.setattr(sys, "argv", command)
        with pytest.raises(SystemExit) as end:
            main()
        return end.value.code, capsys.readouterr().out

    return call


def test_the_listing_holds_groups_runs_estimates_and_their_limits(dry_run):
    code, out = dry_run(SUITE)
    assert code == 0
    assert out.startswith("mine: 4 runs in 2 groups")
    assert "resnet14 on digits, quick, 1 epoch, seed 0: about " in out
    assert "resnet8  kd  ce=0.1 kd=0.9 temperature=4.0" in out
    assert "for all runs, of which" in out
    assert "It is no more than an estimate" in out


@pytest.mark.slow(reason="trains several runs")
def test_data_that_is_not_there_is_listed_with_the_reason(dry_run):
    missing = SUITE.replace("data: {name: digits, limit: 320}", "data: [digits, 'folder:/nowhere']")
    code, out = dry_run(missing)
    assert code == 2
    [line] = [
        line for line in out.splitlines() if line.startswith("- resnet14 on folder:/nowhere, quick, 1 epoch, seed 1")
    ]
    assert "no estimate: no folder '/nowhere'" in line
    assert "Estimate of the 2 groups that could be measured" in out
    _, out = dry_run(SUITE.replace("name: digits, limit: 320", "name: 'folder:/nowhere'"))
    assert "Nothing could be measured, so there is no estimate." in out


def test_a_method_that_does_not_fit_the_pair_is_known_before_anything_is_trained(dry_run):
    code, out = dry_run(SUITE.replace("[none, kd]", "[none, {name: lfcc, stages: [7]}]"))
    assert code == 2
    [line] = [line for line in out.splitlines() if "stages" in line][:1]
    assert line.strip().startswith("resnet8  lfcc")
    assert "cannot be trained: stages" in line


HOLDS_A_LOCK = """
from threading import Lock

from kdzoo import Distiller, Fidelity, Needs
from kdzoo.losses import cross_entropy


class Mine(Distiller):
    paper, fidelity = "none", Fidelity.EXACT
    needs = Needs(teacher=False, features=False)

    def __init__(self, *, ce: float = 1.0):
        super().__init__(ce=ce)
        self.lock = Lock()

    def loss(self, student, teacher, batch):
        return self.weigh(ce=lambda: cross_entropy(student.logits, batch.targets))
"""


def test_a_method_that_cannot_be_set_up_fails_alone_and_is_measured_beside_no_other(tmp_path):
    (tmp_path / "mine.py").write_text(HOLDS_A_LOCK)  # which the average of weights cannot copy
    text = SUITE.replace("[none, kd]", f"[none, '{tmp_path / 'mine.py'}']").replace("[[resnet14", "[[null")
    file = tmp_path / "mine.yaml"
    file.write_text(text.replace("[0, 1]", "[0]"))
    found = suites.load(str(file), overrides=[*QUICK, "protocol.ema=0.9"])
    [cost] = expected(found, tmp_path / "dry")
    assert "while its training was set up" in str(cost.failed[1])
    report = bench(found, tmp_path / "out", quiet=True)
    assert len(report.finished) == 1
    assert "cannot pickle" in " ".join(report.failed.values())
