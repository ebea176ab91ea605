"""A run that is asked to end, or whose folder is taken away, loses nothing and leaves nothing half."""

import os
import signal

import pytest
import torch
from safetensors.torch import load_file

from kdzoo.engine import compiling
from kdzoo.engine.progress import Progress
from kdzoo.engine.training import train_one
from kdzoo.errors import StorageError
from kdzoo.store import checkpoint
from kdzoo.store.folder import RunFolder, find_runs

from ..short_runs import settings

METHOD = '''
"""Supervised training, in whose fourth step something happens."""

import os, signal
from pathlib import Path

from kdzoo import Distiller, Fidelity, Needs
from kdzoo.losses import cross_entropy

class Eventful(Distiller):
    paper = "none"
    fidelity = Fidelity.EXACT
    needs = Needs(teacher=False)

    def __init__(self, *, ce: float = 1.0):
        super().__init__(ce=ce)
        self.steps = 0

    def prepare(self, student, teacher, batches):
        exec(os.environ.get("BEFORE", ""))

    def loss(self, student, teacher, batch):
        self.steps += 1
        if self.steps == 4 and os.environ.get("EVENT"):
            exec(os.environ["EVENT"])
        return self.weigh(ce=lambda: cross_entropy(student.logits, batch.targets))
'''


@pytest.fixture(autouse=True)
def handlers():
    """The signals end this process, also where the tests run under ``nohup``."""
    numbers = (signal.SIGTERM, signal.SIGHUP)
    before = [signal.signal(number, signal.SIG_DFL) for number in numbers]
    yield
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


@pytest.fixture
def train(tmp_path, dataset, monkeypatch):
    """Trains in a folder; the code happens in the fourth of ten steps."""
    method = tmp_path / "eventful.py"
    method.write_text(METHOD)

    def trained(out, event="", *more):
        monkeypatch.setenv("EVENT", event)
        run = settings(out, str(method), *more, teacher=None)
        return train_one(run, dataset, None, Progress(quiet=True))

    return trained


def weights(result):
    return load_file(result.folder / "student.safetensors")


def same(one, other):
    return all(torch.equal(tensor, weights(other)[name]) for name, tensor in weights(one).items())


@pytest.mark.slow(reason="trains several runs")
@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_who_asks_a_run_to_end_finds_its_last_step_saved_and_the_same_bits_in_the_end(tmp_path, train, name):
    with pytest.raises(SystemExit) as end:
        train(tmp_path / "asked", f"os.kill(os.getpid(), signal.{name})")
    assert end.value.code == 143
    [folder] = tmp_path.glob("asked/*/checkpoints")
    assert list(checkpoint.whole(folder)[0]) == [4]
    assert signal.getsignal(getattr(signal, name)) is signal.SIG_DFL
    assert same(train(tmp_path / "asked"), train(tmp_path / "whole"))


def test_a_signal_ends_a_phase_before_training_at_once(tmp_path, train, monkeypatch):
    ends = "assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL"
    monkeypatch.setenv("BEFORE", ends)
    train(tmp_path, ends.replace(" is ", " is not "))
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_signal_ends_compilation_at_once_and_the_steps_before_it_are_saved(tmp_path, train, monkeypatch):
    found = []

    def decide(self, batch):
        ends = signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
        found.append((ends, [sorted(checkpoint.whole(lane.folder.checkpoints)[0]) for lane in self.lanes]))
        return False

    monkeypatch.setattr(compiling.Compiling, "decide", decide)
    monkeypatch.setattr(compiling, "WATCHED", 0.0)
    monkeypatch.setattr(compiling, "SHARE", 1e9)
    train(tmp_path / "runs", "")
    assert found == [(True, [[1]])]


def test_who_asked_a_run_to_end_before_waits_for_no_phase(tmp_path, train, monkeypatch):
    monkeypatch.setattr("kdzoo.engine.loop.resume", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    monkeypatch.setenv("BEFORE", "raise AssertionError")
    with pytest.raises(SystemExit) as end:
        train(tmp_path)
    assert end.value.code == 143


def test_a_signal_that_is_ignored_ends_nothing(tmp_path, train):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        train(tmp_path, "os.kill(os.getpid(), signal.SIGHUP)")
    finally:
        signal.signal(signal.SIGHUP, before)
    assert len(find_runs([tmp_path])) == 1


@pytest.mark.slow(reason="trains several runs")
@pytest.mark.parametrize(
    ("event", "more"),
    [("shutil.rmtree({})", ["engine.checkpoint_seconds=0"]), ("Path({}).rename({} + '-moved')", [])],
)
def test_a_folder_that_is_taken_away_stops_the_run_and_does_not_come_back_half(tmp_path, train, event, more):
    out = tmp_path / "out"
    place = f"str(next(Path({str(out)!r}).iterdir()))"
    with pytest.raises(StorageError, match="is not there; if it was removed or renamed, run the same command again"):
        train(out, "import shutil; place = " + place + "; " + event.format("place", "place"), *more)
    assert not find_runs([out])
    assert not [folder for folder in out.iterdir() if "moved" not in folder.name]
    assert same(train(out, "", *more), train(tmp_path / "whole"))


@pytest.mark.slow(reason="trains several runs")
def test_a_disk_that_fails_is_no_failure_of_the_method(tmp_path, train, monkeypatch):
    unlink, left = os.unlink, 2

    def failing(path, **options):
        nonlocal left
        left -= str(path).endswith(".pt")
        if not left:
            raise OSError(5, "Input/output error", str(path))
        unlink(path, **options)

    with monkeypatch.context() as patch:
        patch.setattr(os, "unlink", failing)
        with pytest.raises(StorageError, match=r"cannot be written \(Input/output error\)"):
            train(tmp_path / "failing", "", "engine.checkpoint_seconds=0")
    result = train(tmp_path / "failing", "", "engine.checkpoint_seconds=0")
    assert same(result, train(tmp_path / "whole"))
    assert not RunFolder(result.folder).failure.exists()
