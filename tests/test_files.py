"""The cache is its owner's alone, paths are what users mean, and what was left half written goes."""

import errno
import os
import stat
from functools import partial
from pathlib import Path

import pytest

import kdzoo
from kdzoo.errors import StorageError, UserError, unknown
from kdzoo.files import DAY, appearing, cache_folder, make_folder, path_of, read_text, write_atomically, write_text


def test_the_cache_is_made_for_its_owner_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("KDZOO_CACHE", str(tmp_path / "new" / "cache"))
    before = os.umask(0)
    try:
        folder = cache_folder()
    finally:
        os.umask(before)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert cache_folder() == folder


@pytest.mark.parametrize("mode", [0o770, 0o707, 0o777])
def test_a_cache_that_others_can_write_to_is_refused_with_the_remedy(tmp_path, monkeypatch, mode):
    monkeypatch.setenv("KDZOO_CACHE", str(tmp_path))
    tmp_path.chmod(mode)
    with pytest.raises(UserError, match=rf"other users .* run 'chmod go-w {tmp_path}'"):
        cache_folder()
    tmp_path.chmod(0o755)  # that they read it is no harm
    assert cache_folder() == tmp_path


def test_the_working_folder_is_called_so_where_it_cannot_be_written():
    def refuse(path):
        raise PermissionError(13, "Permission denied")

    with pytest.raises(StorageError, match=r"^the working folder cannot be written \(Permission denied\)"):
        write_atomically(Path("report.html"), refuse)


@pytest.mark.parametrize("name", ["file", "file/cache"])
def test_a_cache_that_cannot_be_made_is_one_line_that_says_what_names_it(name, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("KDZOO_CACHE", str(tmp_path / name))
    with pytest.raises(StorageError, match=rf"{tmp_path / 'file'} cannot be written .*KDZOO_CACHE"):
        cache_folder()


def test_the_home_folder_is_meant_by_a_tilde(monkeypatch):
    monkeypatch.setenv("HOME", "/somewhere")
    assert path_of("~/weights.pt") == Path("/somewhere/weights.pt")
    assert path_of("a/~b") == Path("a/~b")


@pytest.mark.parametrize("given", ["~no-such-user-here/x", "x" * 256, "é" * 128, "a/" * 2500 + "b", "a\0b"])
def test_what_can_be_no_path_is_one_line(given):
    with pytest.raises(UserError) as caught:
        path_of(given)
    assert len(str(caught.value)) < 250
    assert path_of("x" * 255).name == "x" * 255


@pytest.mark.parametrize("given", ["https://example.org/best.pth", "s3://bucket/runs"])
def test_an_address_is_said_to_be_none_of_this_machine_s_paths(given):
    with pytest.raises(UserError, match=f"^{given} is an address; expected a path on this machine"):
        path_of(given)
    assert path_of("odd:/name").parts == ("odd:", "name")


@pytest.mark.parametrize("given", [3, None, [], b"runs"])
@pytest.mark.parametrize("function", [kdzoo.load, kdzoo.table, partial(kdzoo.export, format="timm")])
def test_what_is_no_path_at_all_is_one_line(function, given):
    with pytest.raises(
        UserError, match=r"is of type \w+; expected a path$|^no folder is named; expected one or several"
    ):
        function(given)


@pytest.mark.parametrize(
    "function",
    [
        partial(kdzoo.bench, "digits-short"),
        partial(kdzoo.run, "none", "resnet8"),
        partial(kdzoo.recommend, "resnet14", "resnet8"),
    ],
)
def test_an_empty_path_is_not_taken_for_the_working_folder(function, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"^out is empty; the working folder is"):
        function(out="")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("given", [3, [], b"runs"])
@pytest.mark.parametrize("function", [partial(kdzoo.bench, "digits-short"), partial(kdzoo.run, "none", "resnet8")])
def test_what_is_no_folder_to_write_to_is_one_line(function, given):
    with pytest.raises(UserError, match=r"is of type \w+; expected a path$"):
        function(out=given)


def test_a_path_that_is_no_text_can_be_written_about(tmp_path):
    write_text(tmp_path / "failed.txt", "pic\udcff.png cannot be decoded")
    assert read_text(tmp_path / "failed.txt") == r"pic\udcff.png cannot be decoded"


def test_a_text_that_is_too_large_is_one_line(tmp_path):
    write_text(tmp_path / "a", "12345")
    assert read_text(tmp_path / "a", 5) == "12345"
    with pytest.raises(UserError, match=r"a is larger than 4 bytes"):
        read_text(tmp_path / "a", 4)


def test_half_written_files_go_a_day_later(tmp_path):
    old, new, foreign = (tmp_path / name for name in (".a.1-0123abcd.part", ".b.1-0123abcd.part", ".c.part"))
    for file in (old, new, foreign):
        file.touch()
    for file in (old, foreign):
        os.utime(file, (0, new.stat().st_mtime - DAY - 1))
    write_text(tmp_path / "a", "whole")
    assert sorted(file.name for file in tmp_path.iterdir()) == [new.name, foreign.name, "a"]


def test_half_written_folders_go_a_day_later_and_links_keep_what_they_point_to(tmp_path):
    kept = tmp_path / "kept"
    old, new, link = (tmp_path / name for name in (".a.1-0123abcd.part", ".b.1-0123abcd.part", ".l.1-0123abcd.part"))
    for folder in (kept, old, new):
        folder.mkdir()
        (folder / "file").touch()
    link.symlink_to(kept)
    for path in (old, link):
        os.utime(path, (0, new.stat().st_mtime - DAY - 1), follow_symlinks=False)
    with appearing(tmp_path / "a") as folder:
        (folder / "whole").touch()
    assert sorted(file.name for file in tmp_path.iterdir()) == [new.name, "a", "kept"]
    assert (kept / "file").exists()


@pytest.mark.parametrize("name", ["x" * 255, "é" * 127, "\U0001f600" * 63])
def test_names_may_be_as_long_as_the_file_system_takes(tmp_path, name):
    write_text(tmp_path / name, "whole")
    with appearing(tmp_path / f"{name[:-1]}y") as folder:
        (folder / "whole").touch()
    assert (tmp_path / name).read_text() == "whole"
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.skipif(os.name != "posix", reason="devices of POSIX")
@pytest.mark.parametrize("name", [os.devnull, "/dev/stdout", "/dev/new"])
def test_a_device_is_not_replaced_by_a_file(tmp_path, monkeypatch, name):
    monkeypatch.setattr(Path, "replace", lambda path, other: pytest.fail(f"{other} is replaced"))
    with pytest.raises(StorageError, match=f"{name} is a device; name a file to write"):
        write_text(Path(name), "lost")
    monkeypatch.setattr("kdzoo.files.DEVICES", tmp_path)
    with pytest.raises(StorageError, match="is a device; name a file to write"):
        write_text(Path(os.devnull), "lost")


def test_a_folder_whose_writing_is_stopped_leaves_nothing_and_keeps_what_was_there(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "before").touch()

    def stopped():
        with appearing(tmp_path / "out") as folder:
            (folder / "half").touch()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped()
    assert [file.name for file in tmp_path.rglob("*")] == ["out", "before"]
    with appearing(tmp_path / "out") as folder:
        (folder / "whole").touch()
    assert [file.name for file in tmp_path.rglob("*")] == ["out", "whole"]


@pytest.mark.parametrize(
    ("error", "raised"),
    [(OSError(errno.EIO, "Input/output error"), StorageError), (KeyboardInterrupt(), KeyboardInterrupt)],
)
def test_a_folder_that_cannot_take_its_name_leaves_what_was_there(tmp_path, monkeypatch, error, raised):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "before").touch()
    rename = Path.rename

    def failing(path, target):
        if (path / "whole").exists():
            raise error
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(raised), appearing(tmp_path / "out") as folder:
        (folder / "whole").touch()
    assert [file.name for file in tmp_path.rglob("*")] == ["out", "before"]


def test_a_file_where_a_folder_belongs_is_named(tmp_path):
    (tmp_path / "mine").write_text("")
    with pytest.raises(StorageError, match=rf"{tmp_path / 'mine'} cannot be written"):
        make_folder(tmp_path / "mine")
    with pytest.raises(StorageError, match=rf"{tmp_path / 'mine'} cannot be written \(it is no folder"):
        make_folder(tmp_path / "mine" / "below" / "it")
    make_folder(tmp_path)


def test_a_link_to_a_disk_that_is_gone_is_named(tmp_path):
    (tmp_path / "runs").symlink_to(tmp_path / "gone" / "disk")
    for folder in ("runs", "runs/suite"):
        with pytest.raises(StorageError, match=rf"{tmp_path / 'runs'} cannot be written .* link that leads nowhere"):
            make_folder(tmp_path / folder)


def test_an_error_lists_each_known_name_once():
    assert str(unknown("key", "xyz", ["data", "data", "seed"])) == "unknown key 'xyz'; known: data, seed"
    assert str(unknown("key", "xyz", map(str, range(32)))).endswith(", 6, 7 and 2 more")
