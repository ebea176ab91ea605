"""What lies in a run's folder is checked when it is read: harm of any kind is one line that names the file."""

import json
import os
import re
import shutil

import pytest
import yaml

import kdzoo
from kdzoo.errors import StorageError, UserError
from kdzoo.experiments.run import execute
from kdzoo.files import digest
from kdzoo.resolve import resolve
from kdzoo.store.folder import RunFolder, find_runs
from kdzoo.store.lock import RunLock

from ..made_runs import write

BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)


def changed(**values):
    def change(folder):
        folder.result.write_text(json.dumps({**json.loads(folder.result.read_text()), **values}))

    return change


@pytest.mark.parametrize(
    "harm",
    [
        pytest.param(changed(top1="81.0"), id="text"),
        pytest.param(changed(top1=None), id="null"),
        pytest.param(changed(top1=float("nan")), id="NaN"),
        pytest.param(changed(top1=float("inf")), id="infinity"),
        pytest.param(changed(top1=812.0), id="no percentage"),
        pytest.param(changed(top1=-1.0), id="negative"),
        pytest.param(changed(top1=[81.0]), id="list"),
        pytest.param(changed(top1=10**400), id="beyond floats"),
        pytest.param(changed(parameters=10**30), id="beyond whole numbers"),
        pytest.param(changed(seconds=-1.0), id="time that runs back"),
        pytest.param(changed(best_epoch=1.5), id="no whole number"),
        pytest.param(changed(names="kd"), id="no names"),
        pytest.param(changed(names={"method": "kd"}), id="few names"),
        pytest.param(lambda folder: folder.result.write_text("[" * 100_000), id="nested deeply"),
        pytest.param(lambda folder: folder.result.write_text('{"top1": 1' + "0" * 10_000 + "}"), id="huge number"),
        pytest.param(lambda folder: folder.result.write_text("[]"), id="no mapping"),
        pytest.param(lambda folder: folder.result.write_bytes(b"\xff\xfe{\0}\0"), id="UTF-16"),
        pytest.param(lambda folder: folder.result.write_text(""), id="empty"),
    ],
)
def test_a_result_that_was_harmed_is_one_line_and_never_tabulated(tmp_path, harm):
    folder = write(tmp_path, 80.0, 0)
    harm(folder)
    with pytest.raises(UserError, match=r"result\.json is (damaged|no UTF-8)|another version") as caught:
        kdzoo.table(tmp_path)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400 + len(str(tmp_path))


def test_a_sound_result_is_read_as_it_was_written(tmp_path):
    folder = write(tmp_path, 80.0, 0)
    assert folder.read_result().top1 == 80.0
    assert kdzoo.table(tmp_path)["top1_mean"].tolist() == [80.0]


@pytest.mark.parametrize(
    "content", ["", "[]", "{", "\0", BOMB, "a: 1", "!!python/object/apply:os.getcwd []", "- " * 9999]
)
@pytest.mark.parametrize("file", ["config", "environment"])
def test_harmed_settings_are_one_line_at_once(tmp_path, file, content):
    folder = write(tmp_path, 80.0, 0)
    getattr(folder, file).write_text(content)
    with pytest.raises(UserError) as caught:
        folder.read_config() if file == "config" else kdzoo.table(tmp_path)
    assert getattr(folder, file).name in str(caught.value) or "another version" in str(caught.value)


@pytest.mark.parametrize("more", [{"unheard": "of"}, {"names": {"unheard": "of"}}], ids=["key", "name"])
def test_a_result_in_which_a_newer_version_wrote_more_is_read(tmp_path, more):
    folder = write(tmp_path, 80.0, 0)
    found = json.loads(folder.result.read_text())
    names = {**found["names"], **more.pop("names", {})}
    changed(**more, names=names)(folder)
    assert kdzoo.table(tmp_path)["top1_mean"].tolist() == [80.0]


def test_a_result_in_which_another_version_wrote_less_is_said_to_be_of_it(tmp_path):
    folder = write(tmp_path, 80.0, 0)
    found = json.loads(folder.result.read_text())
    del found["top5"]
    folder.result.write_text(json.dumps(found))
    with pytest.raises(UserError, match=r"written by another version of kdzoo.*\(top5 differs\)"):
        folder.read_result()


def settings_changed(change):
    def harm(folder):
        settings = yaml.safe_load(folder.config.read_text())
        change(settings)
        folder.config.write_text(yaml.safe_dump(settings))

    return harm


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda s: s.update(newer=1), r"another version of kdzoo.*\(newer differs\)"),
        (lambda s: s["protocol"].update(newer=1), r"another version of kdzoo.*\(protocol\.newer differs\)"),
        (lambda s: s["data"].update(newer=1), r"another version of kdzoo.*\(data\.newer differs\)"),
        (lambda s: s["protocol"].pop("ema"), r"another version of kdzoo.*\(protocol\.ema differs\)"),
        (lambda s: s.update(format=99), r"another version of kdzoo.*\(format differs\)"),
        (lambda s: s["protocol"].update(lr=3.0), r"was edited by hand \(protocol\.lr\); write back what stood there"),
    ],
)
def test_settings_that_are_not_the_runs_say_why_and_nothing_is_to_be_removed(tmp_path, change, said):
    folder = finished(tmp_path)
    run = folder.run()
    folder.check(run)
    settings_changed(change)(folder)
    with pytest.raises(UserError, match=said) as caught:
        folder.check(run)
    assert not re.search("remove|delete", str(caught.value))


@pytest.mark.parametrize("section", ["engine", "output", "files", "teacher", "data", "protocol"])
@pytest.mark.parametrize("value", [None, 3, "text", [1]])
def test_a_section_that_is_no_mapping_is_one_line(tmp_path, section, value):
    folder = finished(tmp_path)
    run = folder.run()
    settings_changed(lambda settings: settings.update({section: value}))(folder)
    for read in (folder.read_config, folder.run, lambda: folder.check(run)):
        with pytest.raises(UserError, match=rf"config\.yaml is damaged \(.*{section}.*\); move its folder away"):
            read()


def test_a_key_that_is_a_number_is_one_line(tmp_path):
    folder = finished(tmp_path)
    settings_changed(lambda settings: settings["engine"].update({1: 2}))(folder)
    with pytest.raises(UserError, match=r"another version of kdzoo.*\(engine\.1 differs\)"):
        folder.run()


def finished(root):
    """A finished run with a student's file, whose checksum is written down."""
    folder = write(root, 80.0, 0)
    folder.student.write_bytes(b"weights")
    changed(weights=digest(folder.student))(folder)
    return folder


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (lambda folder: folder.student.unlink(), "has lost its student.safetensors; move its folder away"),
        (
            lambda folder: folder.student.write_bytes(b"wEights"),
            r"safetensors is damaged \(its checksum",
        ),
        (lambda folder: folder.config.unlink(), "has lost its config.yaml; move its folder away"),
    ],
)
def test_a_finished_run_that_lost_something_is_not_finished_before(tmp_path, harm, said):
    folder = finished(tmp_path)
    run = folder.run()
    harm(folder)
    with pytest.raises(UserError, match=said):
        execute(run, quiet=True)


def test_a_run_that_was_replaced_counts_no_more_though_a_kill_left_it(tmp_path):
    folder = write(tmp_path, 80.0, 0)
    folder.set_aside()
    assert [found.path for found in find_runs([tmp_path])] == [folder.before]
    shutil.copytree(folder.before, tmp_path / "left")
    write(tmp_path, 90.0, 0)
    (tmp_path / "left").rename(folder.before)
    assert [found.path for found in find_runs([tmp_path])] == [folder.path]
    assert [found.path for found in find_runs([folder.before])] == [folder.before]


def test_what_killed_processes_left_half_written_is_removed_when_the_run_starts_again(tmp_path):
    folder = write(tmp_path, 80.0, 0)
    parts = [folder.path / ".metrics.jsonl.17-0123abcd.part", folder.checkpoints / ".step-1.pt.17-0123abcd.part"]
    own = folder.path / ".notes.part"
    folder.checkpoints.mkdir()
    for file in (*parts, own):
        file.touch()
    folder.open(folder.run())
    assert [file.exists() for file in (*parts, own)] == [False, False, True]


def test_a_run_of_long_names_has_a_folder(tmp_path):
    long = "a" * 60
    run = resolve(
        {"distiller": {"name": "kd"}, "student": {"name": f"{long}:{long}"}, "teacher": {"name": f"{long}:b{long}"}},
        [f"output.root={tmp_path}", f"seed={2**63 - 1}", "engine.device=cpu"],
    )
    folder = RunFolder.of(run)
    folder.open(run)
    assert len(folder.path.name) <= 255
    assert folder.path.name.endswith(run.settings.identity())


@pytest.mark.parametrize("content", ["[]", "null", "", "[" * 100_000, '{"device": [1]}', '{"folder": 3}'])
def test_a_harmed_environment_is_one_line(tmp_path, content):
    folder = write(tmp_path, 80.0, 0)
    assert folder.read_environment()["precision"] == "float32"
    folder.environment.write_text(content)
    for read in (lambda: kdzoo.table(tmp_path), lambda: folder.home().__enter__()):
        with pytest.raises(UserError, match=r"environment\.json is damaged .*; move its folder away"):
            read()
    folder.environment.unlink()
    with folder.home():
        assert len(kdzoo.table(tmp_path)) == 1


@pytest.mark.skipif(os.name != "posix", reason="pipes of POSIX")
def test_a_pipe_among_a_runs_files_is_never_waited_for(tmp_path):
    folder = write(tmp_path, 80.0, 0)
    for file in (folder.environment, folder.path / "owner.json"):
        file.unlink(missing_ok=True)
        os.mkfifo(file)
    assert folder.read_environment() == {}
    lock = RunLock(folder.path)
    assert lock.who() == "another process"
    with lock:
        assert lock.who() != "another process"


def test_a_folder_that_was_taken_away_is_not_finished(tmp_path):
    folder = write(tmp_path, 81.0, seed=0)
    result = folder.read_result()
    folder.path.rename(tmp_path / "elsewhere")
    folder.path.mkdir()
    with pytest.raises(StorageError, match="is not there; if it was removed or renamed"):
        folder.write_result(result)
    assert folder.read_result() is None
