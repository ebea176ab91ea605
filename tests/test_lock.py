"""A run has one owner at a time, and a dead owner holds nothing."""

import os
import signal
import subprocess
import sys

import pytest

from kdzoo.errors import UserError
from kdzoo.results.lock import RunLock

HOLD = "import sys; from pathlib import Path; from kdzoo.results.lock import RunLock\n" + (
    "lock = RunLock(Path(sys.argv[1])).__enter__(); print('held', flush=True); sys.stdin.read()"
)


@pytest.fixture
def holder(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def test_a_run_that_another_process_works_on_is_refused_with_its_name(tmp_path, holder):
    with pytest.raises(UserError, match=f"process {holder.pid} on "), RunLock(tmp_path):
        pass
    assert not RunLock(tmp_path).acquire()


def test_an_owner_that_was_killed_holds_nothing(tmp_path, holder):
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    with RunLock(tmp_path) as lock:
        assert str(os.getpid()) in lock.who()


def test_what_is_released_can_be_taken_again(tmp_path):
    with RunLock(tmp_path):
        pass
    with RunLock(tmp_path):
        pass
