"""What lies in a run's folder is checked when it is read: harm of any kind is one line that names the file."""

import json

import pytest

import kdzoo
from kdzoo.errors import StorageError, UserError

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
        pytest.param(changed(best_epoch=1.5), id="no whole number"),
        pytest.param(changed(names="kd"), id="no names"),
        pytest.param(changed(names={"method": "kd"}), id="few names"),
        pytest.param(changed(unheard="of"), id="unknown key"),
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


def test_a_folder_that_was_taken_away_is_not_finished(tmp_path):
    folder = write(tmp_path, 81.0, seed=0)
    result = folder.read_result()
    folder.path.rename(tmp_path / "elsewhere")
    folder.path.mkdir()
    with pytest.raises(StorageError, match="is not there; if it was removed or renamed"):
        folder.write_result(result)
    assert folder.read_result() is None
