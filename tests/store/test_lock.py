"""A run has one owner at a time, and a dead owner holds nothing."""

import json
import os
import signal
import subprocess
import sys
from threading import Event, Semaphore
from types import SimpleNamespace

import pytest

from kdzoo.errors import StorageError, UserError
from kdzoo.store import lock
from kdzoo.store.lock import RunLock

HOLD = "import sys; from pathlib import Path; from kdzoo.store.lock import RunLock\n" + (
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


def test_a_lock_whose_owner_cannot_be_written_down_is_given_up(tmp_path, monkeypatch):
    def full(path, text):
        raise StorageError("the disk is full")

    taken = RunLock(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(lock, "write_text", full)
        with pytest.raises(StorageError, match="is full"):
            taken.acquire()
    taken.release()
    assert RunLock(tmp_path).acquire()


def test_what_is_released_can_be_taken_again(tmp_path):
    with RunLock(tmp_path):
        pass
    with RunLock(tmp_path):
        pass


@pytest.fixture
def foreign(tmp_path):
    """The file of an owner on another machine, whose file system carries no locks to this one."""
    owner = RunLock(tmp_path).owner
    owner.write_text('{"host": "elsewhere", "process": 1}')
    return owner


def test_an_owner_on_another_machine_is_respected_while_its_heart_beats(tmp_path, foreign):
    with pytest.raises(UserError, match="process 1 on elsewhere"), RunLock(tmp_path):
        pass


def test_an_owner_on_another_machine_whose_heart_has_stopped_holds_nothing(tmp_path, foreign):
    before = foreign.stat().st_mtime - 61
    os.utime(foreign, (before, before))
    with RunLock(tmp_path) as lock:
        assert str(os.getpid()) in lock.who()


def test_an_owner_on_another_machine_is_waited_for(tmp_path, foreign, monkeypatch):
    monkeypatch.setattr(lock.time, "sleep", lambda _: foreign.unlink())
    assert RunLock(tmp_path).acquire(wait=True)


def test_the_heart_of_an_owner_beats_until_it_gives_the_lock_up(tmp_path, monkeypatch):
    beats = Semaphore(0)
    monkeypatch.setattr(lock, "HEARTBEAT", 0.001)
    monkeypatch.setattr(lock.os, "utime", lambda _: beats.release())
    with RunLock(tmp_path):
        assert beats.acquire(timeout=60)
        assert beats.acquire(timeout=60)
    assert not RunLock(tmp_path).owner.exists()


@pytest.mark.parametrize("by_handle", [True, False])
def test_a_heart_beats_on_after_a_file_system_failed_for_a_moment(tmp_path, monkeypatch, by_handle):
    beats, failures = Semaphore(0), iter([OSError("stale file handle")])

    def utime(_):
        if failure := next(failures, None):
            raise failure
        beats.release()

    monkeypatch.setattr(lock, "HEARTBEAT", 0.001)
    monkeypatch.setattr(os, "utime", utime)
    monkeypatch.setattr(os, "supports_fd", {utime} if by_handle else set())
    with RunLock(tmp_path):
        assert beats.acquire(timeout=60)


@pytest.mark.parametrize("by_handle", [True, False])
def test_an_owner_shows_that_it_lives_by_an_open_file_or_by_its_path(tmp_path, monkeypatch, by_handle):
    beaten, touched = Event(), []

    def utime(file):
        touched.append(file)
        beaten.set()

    monkeypatch.setattr("kdzoo.store.lock.HEARTBEAT", 0.001)
    monkeypatch.setattr(os, "utime", utime)
    monkeypatch.setattr(os, "supports_fd", {utime} if by_handle else set())
    with RunLock(tmp_path):
        assert beaten.wait(60)
    assert isinstance(touched[0], int) == by_handle


def test_an_owner_on_this_machine_is_dead_though_it_had_another_name(tmp_path, foreign):
    foreign.write_text(json.dumps({"host": "elsewhere", "process": 1, "machine": lock.machine()}))
    assert RunLock(tmp_path).acquire()


def test_an_owner_whose_time_lies_in_the_future_is_dead_a_minute_later(tmp_path, foreign):
    later = foreign.stat().st_mtime + 3600
    os.utime(foreign, (later, later))
    assert not RunLock(tmp_path).acquire()
    seen = foreign.stat().st_mtime
    assert seen < later - 3000
    os.utime(foreign, (seen - 61, seen - 61))
    assert RunLock(tmp_path).acquire()


@pytest.mark.parametrize("lives", [False, True])
def test_signs_of_an_owner_on_another_machine_are_waited_for_as_long_as_it_may_live(
    tmp_path, foreign, monkeypatch, lives
):
    clock = [0.0]

    def sleep(seconds):
        clock[0] += seconds
        if lives:
            os.utime(foreign, (clock[0], clock[0]))

    monkeypatch.setattr(lock, "time", SimpleNamespace(sleep=sleep, perf_counter=lambda: clock[0]))
    lock.await_signs([RunLock(tmp_path)])
    assert clock[0] == pytest.approx(lock.HEARTBEAT / 10 if lives else lock.LIFETIME)


def test_nothing_is_waited_for_where_no_other_machine_has_an_owner(tmp_path, monkeypatch):
    monkeypatch.setattr(lock.time, "sleep", None)
    lock.await_signs([RunLock(tmp_path)])


def test_looking_makes_no_folder(tmp_path):
    assert not RunLock(tmp_path / "nothing").is_held()
    assert list(tmp_path.iterdir()) == []


def test_who_looks_sees_an_owner_until_it_is_gone(tmp_path, holder):
    assert RunLock(tmp_path).is_held()
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    assert not RunLock(tmp_path).is_held()


def test_who_looks_sees_an_owner_on_another_machine_while_its_heart_beats(tmp_path, foreign):
    (tmp_path / ".lock").touch()
    assert RunLock(tmp_path).is_held()
    before = foreign.stat().st_mtime - 61
    os.utime(foreign, (before, before))
    assert not RunLock(tmp_path).is_held()
    assert foreign.exists()


def test_a_run_that_starts_while_others_look_is_not_refused(tmp_path, monkeypatch):
    looks = lock.FileLock(tmp_path / ".lock")
    looks.acquire()
    monkeypatch.setattr(lock.time, "sleep", lambda _: looks.release())
    with RunLock(tmp_path):
        assert not looks.is_locked
