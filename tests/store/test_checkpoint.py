"""A checkpoint is whole or it is not there, and a damaged one is never used."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kdzoo.errors import UserError
from kdzoo.files import write_atomically, write_text
from kdzoo.store import checkpoint
from kdzoo.store.history import check_history


def test_the_newest_comes_back_and_two_are_kept(tmp_path):
    for step in (10, 20, 30):
        checkpoint.save(tmp_path, step, {"weight": torch.full((3,), float(step)), "history": [{"top1": 1.5}]})
    whole, damaged = checkpoint.whole(tmp_path)
    assert (sorted(whole), damaged) == ([20, 30], [])
    state = checkpoint.load(whole[30])
    assert torch.equal(state["weight"], torch.full((3,), 30.0))
    assert state["history"] == [{"top1": 1.5}]
    assert len(list(tmp_path.iterdir())) == 2


def test_no_checkpoint_is_none_to_load(tmp_path):
    assert checkpoint.whole(tmp_path / "nothing") == ({}, [])


@pytest.mark.parametrize("harm", ["truncate", "flip"])
def test_a_damaged_newest_is_reported_and_the_one_before_it_used(tmp_path, harm):
    checkpoint.save(tmp_path, 1, {"step": 1})
    checkpoint.save(tmp_path, 2, {"step": 2})
    newest = max(tmp_path.iterdir())
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 255
    newest.write_bytes(content[: len(content) // 2] if harm == "truncate" else content)
    whole, damaged = checkpoint.whole(tmp_path)
    assert {step: checkpoint.load(file) for step, file in whole.items()} == {1: {"step": 1}}
    assert len(damaged) == 1
    assert newest.name in damaged[0]


@pytest.mark.parametrize("step", [25, 30])
def test_where_training_went_back_behind_a_damaged_one_two_whole_ones_are_kept(tmp_path, step):
    for earlier in (20, 30):
        checkpoint.save(tmp_path, earlier, {"step": earlier})
    newest = max(tmp_path.iterdir())
    newest.replace(tmp_path / "step-000000030-ffffffffffffffff.pt")
    checkpoint.save(tmp_path, step, {"step": step})
    whole, damaged = checkpoint.whole(tmp_path)
    assert (sorted(whole), damaged) == ([20, step], [])


def test_all_damaged_is_an_error(tmp_path):
    checkpoint.save(tmp_path, 1, {"step": 1})
    for file in tmp_path.iterdir():
        file.write_bytes(b"")
    with pytest.raises(UserError, match="move it away and run the same command again"):
        checkpoint.whole(tmp_path)


def test_what_a_kill_left_half_written_is_ignored_and_cleaned(tmp_path):
    (tmp_path / ".step-000000009-0123456789abcdef.pt.99.part").write_bytes(b"half")
    assert checkpoint.whole(tmp_path) == ({}, [])
    checkpoint.save(tmp_path, 1, {})
    assert len(list(tmp_path.iterdir())) == 1


def test_code_in_a_checkpoint_is_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return (print, ("never",))

    checkpoint.save(tmp_path, 1, {"evil": Evil()})
    whole, _ = checkpoint.whole(tmp_path)
    with pytest.raises(UserError, match="is no checkpoint of kdzoo"):
        checkpoint.load(whole[1])


def test_a_full_disk_is_one_line_and_what_stood_there_stays(tmp_path):
    file = tmp_path / "result.json"
    write_text(file, "before")

    def full(path):
        path.write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(UserError, match="is full"):
        write_atomically(file, full)
    assert file.read_text() == "before"
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.slow(reason="starts a process, which imports torch")
@pytest.mark.skipif(os.name != "posix", reason="limits the size of files")
def test_a_process_lives_on_after_a_checkpoint_that_did_not_fit(tmp_path):
    code = """
import gc, pathlib, resource, sys, torch
from kdzoo.errors import StorageError
from kdzoo.store import checkpoint
gc.disable()  # until all are there that it is about
resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, 2**16))
try:
    checkpoint.save(pathlib.Path(sys.argv[1]), 1, {"weight": torch.zeros(2**18)})
except StorageError as error:
    error.itself = error  # for the garbage collector, as all that the frames of a training hold
gc.collect()
print("alive", *pathlib.Path(sys.argv[1]).iterdir())
"""
    ended = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "alive\n", "")


def test_an_unwritable_folder_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        write_text(tmp_path / "file" / "below" / "result.json", "{}")


def test_a_checkpoint_that_was_renamed_to_another_step_is_refused(tmp_path):
    checkpoint.save(tmp_path, 1, {})
    [file] = tmp_path.iterdir()
    moved = file.rename(file.with_name(file.name.replace("000000001", "000000009")))
    whole, _ = checkpoint.whole(tmp_path)
    assert whole == {9: moved}
    with pytest.raises(UserError, match="the state of another step than its name says"):
        checkpoint.load(moved)


def test_folders_and_dangling_links_with_a_checkpoints_name_are_none(tmp_path):
    (tmp_path / "step-000000001-0123456789abcdef.pt").mkdir()
    (tmp_path / "step-000000002-0123456789abcdef.pt").symlink_to("nowhere")
    assert checkpoint.whole(tmp_path) == ({}, [])
    checkpoint.save(tmp_path, 3, {})
    assert list(checkpoint.whole(tmp_path)[0]) == [3]


def test_two_writers_of_one_process_number_do_not_meet(tmp_path, monkeypatch):
    monkeypatch.setattr("os.getpid", lambda: 7)
    names = set()
    for _ in range(2):
        write_atomically(tmp_path / "file", lambda temporary: (names.add(temporary.name), temporary.write_text("x")))
    assert len(names) == 2


def test_a_checkpoint_that_its_run_replaces_while_it_is_looked_at_is_no_harm(tmp_path, monkeypatch):
    checkpoint.save(tmp_path, 1, {"step": 1})
    checkpoint.save(tmp_path, 2, {"step": 2})
    read, [first, _] = Path.read_bytes, sorted(tmp_path.iterdir())

    def read_late(path):
        first.unlink(missing_ok=True)
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", read_late)
    whole, damaged = checkpoint.whole(tmp_path)
    assert (sorted(whole), damaged) == ([2], [])


@pytest.mark.parametrize(
    "content", [None, 3, {}, [1], {"step": 1}, {"step": 1, "state": None}, {"step": 1, "state": 3}]
)
def test_a_file_of_something_else_is_no_checkpoint(tmp_path, content):
    torch.save(content, tmp_path / "step-000000001-0123456789abcdef.pt")
    with pytest.raises(UserError, match=r"is no checkpoint of kdzoo; move .* away"):
        checkpoint.load(tmp_path / "step-000000001-0123456789abcdef.pt")


@pytest.mark.parametrize("version", [{}, {"format": 99}])
def test_a_checkpoint_of_another_version_says_so(tmp_path, version):
    torch.save({"step": 1, "state": {}} | version, tmp_path / "step-000000001-0123456789abcdef.pt")
    with pytest.raises(UserError, match="was written by another version of kdzoo; continue with that version"):
        checkpoint.load(tmp_path / "step-000000001-0123456789abcdef.pt")


def record(epoch, **changed):
    numbers = {"lr": 0.1, "loss": {"ce": 1.0}, "top1": 50.0, "top5": None, "images_per_second": 9.0}
    return {"epoch": epoch, "step": 4 * epoch, **numbers} | changed


HISTORIES = {
    "none": None,
    "text": "abc",
    "numbers": [1, 2],
    "an epoch too few": [record(1)],
    "an epoch too many": [record(1), record(2), record(3)],
    "an epoch twice": [record(1), record(1)],
    "text for a number": [record(1), record(2, top1="50")],
    "NaN": [record(1), record(2, top1=float("nan"))],
    "no percentage": [record(1), record(2, top5=200.0)],
    "a tensor": [record(1), record(2, lr=torch.ones(()))],
    "no loss": [record(1), record(2, loss=None)],
    "a key too many": [record(1), record(2, more=1)],
    "a likelihood that is NaN": [record(1), record(2, nll=float("nan"))],
}


@pytest.mark.parametrize("harm", HISTORIES)
def test_a_history_that_is_not_that_of_its_steps_is_refused(harm):
    with pytest.raises(ValueError, match=r"history|record"):
        check_history(HISTORIES[harm], 9, 4)
    check_history([record(1), record(2, top1=None)], 9, 4)
    check_history([record(1, nll=None), record(2, nll=1.5)], 9, 4)
