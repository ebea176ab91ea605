"""The fingerprint of a data set: the same wherever it lies, another once an image, a name or a label changes."""

import os
import shutil
import time
import unicodedata
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from kdzoo.data import fingerprint

MakeTree = Callable[..., Path]


def of(root: Path, **settings: object) -> str:
    return fingerprint(f"folder:{root}", **settings)  # type: ignore[arg-type]


@pytest.fixture
def hour_later(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files that a test wrote are an hour old."""
    now = time.time_ns
    monkeypatch.setattr("time.time_ns", lambda: now() + 3600 * 10**9)


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files whose content was opened."""
    opened, names = os.open, list[str]()

    def watched(path: str | bytes, *arguments: int) -> int:
        names.append(os.path.basename(os.fsdecode(path)))
        return opened(path, *arguments)

    monkeypatch.setattr("os.open", watched)
    return names


def pictures(names: list[str]) -> list[str]:
    return [name for name in names if name.endswith(".png")]


def test_a_copy_with_other_times_has_the_same(make_tree: MakeTree, tmp_path: Path) -> None:
    root = make_tree()
    copy = shutil.copytree(root, tmp_path / "copy", copy_function=shutil.copyfile)
    for path in copy.rglob("*.png"):
        os.utime(path, ns=(1, 1))
    assert of(copy) == of(root) != ""


def recolour(root: Path) -> None:
    Image.new("RGB", (12, 12)).save(root / "train" / "ant" / "0.png")


def change_one_bit_and_hide_it(root: Path) -> None:
    path = root / "train" / "ant" / "0.png"
    state, content = path.stat(), path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))


CHANGES = {
    "recoloured": recolour,
    "hidden": change_one_bit_and_hide_it,
    "added": lambda root: shutil.copy(root / "train" / "ant" / "0.png", root / "train" / "ant" / "9.png"),
    "removed": lambda root: (root / "test" / "ant" / "1.png").unlink(),
    "renamed": lambda root: (root / "train" / "ant" / "5.png").rename(root / "train" / "ant" / "6.png"),
    "relabelled": lambda root: (root / "train" / "ant" / "5.png").rename(root / "train" / "bee" / "6.png"),
    "moved": lambda root: (root / "train" / "ant" / "5.png").rename(root / "test" / "ant" / "5.png"),
    "class": lambda root: [(root / split / "ant").rename(root / split / "aunt") for split in ("train", "test")],
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.usefixtures("hour_later")
def test_any_change_gives_another(make_tree: MakeTree, change: str) -> None:
    root = make_tree()
    before = of(root)
    assert of(root) == before
    CHANGES[change](root)
    assert of(root) != before


@pytest.mark.usefixtures("hour_later")
def test_a_file_is_read_again_only_if_it_changed(make_tree: MakeTree, read: list[str]) -> None:
    root = make_tree()
    before = of(root)
    assert len(pictures(read)) == 24
    read.clear()
    assert of(root) == before
    assert pictures(read) == []
    recolour(root)
    of(root)
    assert pictures(read) == ["0.png"]


def test_a_file_that_changed_only_just_is_read_again(make_tree: MakeTree, read: list[str]) -> None:
    """Its next change may have the same time."""
    root = make_tree()
    of(root)
    read.clear()
    of(root)
    assert len(pictures(read)) == 24


@pytest.mark.usefixtures("hour_later")
def test_damaged_notes_of_before_change_nothing(make_tree: MakeTree, cache: Path) -> None:
    root = make_tree()
    before = of(root)
    [notes] = cache.rglob("*.npz")
    for content in (b"", notes.read_bytes()[:-9], notes.read_bytes().replace(b"digests", b"digestz")):
        notes.write_bytes(content)
        assert of(root) == before


def test_a_cache_that_cannot_be_written_only_costs_time(make_tree: MakeTree, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    root = make_tree()
    assert of(root, cache=tmp_path / "file" / "below") == of(root)


def test_names_count_in_one_unicode_form(make_tree: MakeTree, tmp_path: Path) -> None:
    root = make_tree(classes=["caf\u00e9", "th\u00e9"])
    other = tmp_path / "mac"
    for path in root.rglob("*.png"):
        to = other / unicodedata.normalize("NFD", str(path.relative_to(root)))
        to.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, to)
    assert of(other) == of(root)


def test_sets_that_follow_from_their_name_have_none() -> None:
    assert [fingerprint(name) for name in ("digits", "bands", "cifar10", "cifar100")] == [""] * 4


def test_a_set_of_ones_own_is_read_unless_it_says_what_it_is(tmp_path: Path) -> None:
    file, images = tmp_path / "mine.py", np.zeros((4, 4, 4, 3), np.uint8)
    text = (
        "import numpy as np\nfrom kdzoo import ImageSet\nclass Mine(ImageSet):\n    def load(self, root):\n"
        "        images = np.load(root / 'images.npy'), [0, 1, 0, 1]\n        return ['a', 'b'], images, images\n"
    )
    file.write_text(text)
    np.save(tmp_path / "images.npy", images)
    before = fingerprint(str(file), tmp_path)
    assert fingerprint(str(file), tmp_path) == before
    images[3, 3, 3, 2] = 1
    np.save(tmp_path / "images.npy", images)
    assert fingerprint(str(file), tmp_path) != before
    file.write_text(text + "    def fingerprint(self, root):\n        return 'version 3'\n")
    assert fingerprint(str(file), tmp_path) == "version 3"
