"""Files that are no images to train on, and links that lead nowhere, are named in one line; nothing waits for them."""

import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from kdzoo.data import fingerprint, open_dataset
from kdzoo.errors import UserError

from .conftest import MakeTree


def wide(place: Path) -> None:
    Image.new("RGB", (1200, 11)).save(place)


def huge(place: Path) -> None:
    Image.new("1", (12000, 12000)).save(place)


def listening(place: Path) -> None:
    here = Path.cwd()
    os.chdir(place.parent)  # the name of a socket must be short
    try:
        with socket.socket(socket.AF_UNIX) as bound:
            bound.bind(place.name)
    finally:
        os.chdir(here)


STRANGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "a long strip": (wide, "1200 x 11 pixels, one side more than 100 times the other"),
    "a bomb": (huge, "12000 x 12000 pixels, more than"),
    "a pipe": (os.mkfifo, "no regular file"),
    "a socket": (listening, "no regular file"),
    "a link to a device": (lambda place: place.symlink_to("/dev/zero"), "no regular file"),
    "a link to itself": (lambda place: place.symlink_to(place), "OSError"),
    "an empty file": (Path.touch, "UnidentifiedImageError"),
}


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")  # as kdzoo has it, where pytest has not
@pytest.mark.skipif(os.name != "posix", reason="pipes, sockets and links of POSIX")
@pytest.mark.parametrize("kind", STRANGE)
def test_what_is_no_image_to_train_on_is_named_or_left_out(make_tree: MakeTree, kind: str) -> None:
    make, said = STRANGE[kind]
    root = make_tree()
    make(root / "train" / "ant" / "9.png")
    assert fingerprint(f"folder:{root}")
    with pytest.raises(UserError, match=f"ant/9.png' .*{said}.*; replace or remove it, or set data.skip_damaged=true"):
        open_dataset(f"folder:{root}")
    assert open_dataset(f"folder:{root}", skip_damaged=True).spec.labels.tolist().count(0) == 6


def test_long_images_are_read_while_their_sides_differ_by_less(make_tree: MakeTree) -> None:
    assert open_dataset(f"folder:{make_tree(sizes=[(1000, 10)])}", image_size=8).spec.image_size == 8


@pytest.mark.parametrize("target", ["itself", "gone"])
def test_a_class_that_is_a_link_to_nowhere_is_named(make_tree: MakeTree, target: str) -> None:
    root = make_tree()
    place = root / "train" / "dog"
    place.symlink_to(place if target == "itself" else root / "gone")
    with pytest.raises(UserError, match=r"train/dog' is a link that leads nowhere; repair or remove it"):
        open_dataset(f"folder:{root}")


def test_a_folder_that_cannot_be_read_is_named(make_tree: MakeTree, monkeypatch: pytest.MonkeyPatch) -> None:
    root, scan = make_tree(), os.scandir

    def denied(path: str) -> object:
        if str(path).endswith("bee"):
            raise PermissionError(13, "Permission denied")
        return scan(path)

    assert len(open_dataset(f"folder:{root}").spec.labels) == 18
    monkeypatch.setattr(os, "scandir", denied)
    with pytest.raises(UserError, match=r"cannot read the folder '.*/bee' \(Permission denied\)"):
        open_dataset(f"folder:{root}")


@pytest.mark.skipif(os.name != "posix", reason="names of POSIX")
@pytest.mark.parametrize("name", [b"\xff", b"a\x1b[31m", b"two\nlines"])
def test_a_class_whose_name_no_text_shows_is_refused(make_tree: MakeTree, name: bytes) -> None:
    root = make_tree(classes=["ant", "cafe\u0301"])
    assert open_dataset(f"folder:{root}").spec.num_classes == 2
    for split in ("train", "test"):
        (root / split / "ant").rename(root / split / os.fsdecode(name))
    with pytest.raises(UserError, match="holds characters that no text shows; rename it") as caught:
        open_dataset(f"folder:{root}")
    assert str(caught.value).isascii()


def test_tables_that_are_no_text_are_one_line(make_tree: MakeTree, tmp_path: Path) -> None:
    file = tmp_path / "order.txt"
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="is no UTF-8 text"):
        open_dataset(f"folder:{make_tree()}", classes=str(file))
    with pytest.raises(UserError, match="is no UTF-8 text"):
        open_dataset(f"folder:{tmp_path / 'tree'}", options={"labels": str(file)})
