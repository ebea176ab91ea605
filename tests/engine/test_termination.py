"""A training that the system asks to end saves its step first, and continues from there to the same bits."""

import os
import signal

import pytest
import torch
from safetensors.torch import load_file

from kdzoo.engine.progress import Progress
from kdzoo.engine.termination import Terminated, asked_to_end
from kdzoo.engine.training import train_one
from kdzoo.store import checkpoint
from kdzoo.store.folder import RunFolder

from ..short_runs import settings


class Ended(Progress):
    """Sends this process SIGTERM in the third step."""

    def step(self, done):
        super().step(done)
        if done == 3:
            os.kill(os.getpid(), signal.SIGTERM)


def test_a_step_is_saved_before_the_process_ends_and_the_run_continues_to_the_same_bits(tmp_path, dataset):
    one, other = (settings(tmp_path / name, "none", "engine.checkpoint_seconds=1e9") for name in ("one", "other"))
    train_one(one, dataset, None, Progress(quiet=True))
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Terminated):
        train_one(other, dataset, None, Ended(quiet=True))
    assert signal.getsignal(signal.SIGTERM) == before
    folder = RunFolder.of(other)
    assert list(checkpoint.whole(folder.checkpoints)[0]) == [3]
    train_one(other, dataset, None, Progress(quiet=True))
    whole, resumed = load_file(RunFolder.of(one).student), load_file(folder.student)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_a_second_signal_ends_the_process_at_once(monkeypatch):
    ended = []
    monkeypatch.setattr(signal, "SIGTERM", signal.SIGUSR1)  # of which the test may die no more than of the other
    signal.signal(signal.SIGUSR1, lambda *_: ended.append(True))
    try:
        with asked_to_end() as end:
            assert not end()
            os.kill(os.getpid(), signal.SIGUSR1)
            assert (end(), ended) == (True, [])
            os.kill(os.getpid(), signal.SIGUSR1)
            assert ended == [True]
    finally:
        signal.signal(signal.SIGUSR1, signal.SIG_DFL)
