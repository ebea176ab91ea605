"""Folders of pictures without labels: what is trained on, what is measured on, and what the errors say."""

import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from kdzoo.data import fingerprint, open_dataset
from kdzoo.data.sources import open_source, places_of
from kdzoo.errors import UserError
from kdzoo.recipe import Augmentation, Protocol


def paint(*files: Path) -> None:
    random = np.random.default_rng(len(files))
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(file)


@pytest.fixture
def split(tmp_path):
    """Pictures in nested folders, for training and for the test."""
    root = tmp_path / "pictures"
    paint(*(root / "train" / name for name in ("a.png", "deep/er/b.png", "deep/c.png", "d.png")))
    paint(root / "test" / "e.png", root / "test" / "more" / "f.png", root / "notes" / "g.png")
    return root


@pytest.fixture
def flat(tmp_path):
    root = tmp_path / "flat"
    paint(*(root / f"{i % 3}" / f"{i}.png" for i in range(20)))
    return root


def test_pictures_in_any_folders_are_those_of_the_split_above_them(split):
    source = open_source(f"images:{split}", Path())
    assert (len(source.train), len(source.test)) == (4, 2)
    assert not source.labelled
    assert source.class_names == source.test_names == ()


def test_batches_have_neither_labels_nor_targets(split):
    data = open_dataset(f"images:{split}", image_size=8)
    batch = next(data.loader(Protocol(name="x", epochs=1, batch_size=2), seed=0).batches())
    assert batch.labels is None
    assert batch.targets is None
    assert batch.images.shape == (2, 3, 8, 8)
    assert not data.is_labelled
    assert not data.is_judged


@pytest.mark.parametrize("mix", [{"mixup": 0.5}, {"cutmix": 1.0}])
def test_pictures_are_mixed_as_those_with_labels_are(split, mix):
    data, plain = open_dataset(f"images:{split}", image_size=8), Augmentation(crop=0, flip=False)
    one, other = (
        next(data.loader(Protocol(name="x", epochs=1, batch_size=4, augmentation=recipe), seed=0).batches())
        for recipe in (plain, replace(plain, **mix))
    )
    assert other.targets is None
    assert other.partner.tolist() == [3, 2, 1, 0]
    assert not torch.equal(one.images, other.images)
    assert torch.allclose(one.images + one.images.flip(0), other.images + other.images.flip(0), atol=1e-6)


def test_without_test_images_the_message_names_what_holds_some_out(flat):
    with pytest.raises(UserError, match=r"neither 'val' nor 'test'; set data\.val=0\.1"):
        open_dataset(f"images:{flat}")
    data = open_dataset(f"images:{flat}", val=0.25, image_size=8)
    assert (len(data.train_pixels), data.test_size) == (15, 5)


def empty(root: Path) -> None:
    shutil.rmtree(root)
    root.mkdir()


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (empty, "no images to train on below"),
        (shutil.rmtree, "no folder '.*'; expected one that holds images"),
        (lambda root: (root / "0" / "0.png").write_bytes(b"no picture"), r"cannot read image .*0\.png"),
    ],
)
def test_what_is_wrong_with_the_folder_is_one_line(flat, harm, said):
    harm(flat)
    with pytest.raises(UserError, match=said) as caught:
        open_dataset(f"images:{flat}", val=0.25, image_size=8)
    assert "\n" not in str(caught.value)


def test_damaged_files_are_left_out_where_that_is_asked_for(flat, caplog):
    (flat / "0" / "0.png").write_bytes(b"no picture")
    data = open_dataset(f"images:{flat}", val=0.25, image_size=8, skip_damaged=True)
    assert len(data.train_pixels) + data.test_size == 19
    assert "1 damaged" in caplog.text
    for file in flat.rglob("*.png"):
        file.write_bytes(b"no picture")
    with pytest.raises(UserError, match="every training image is damaged"):
        open_dataset(f"images:{flat}", val=0.25, image_size=8, skip_damaged=True)


def test_what_takes_no_part_is_said_once(split, flat, caplog):
    (flat / "notes.csv").write_text("a,b")
    open_source(f"images:{flat}", Path(), val=0.25)
    assert f"'{flat}': left out: 1 .csv" in caplog.text
    caplog.clear()
    paint(split / "car" / "0.png")  # a class beside that of trains
    open_source(f"images:{split}", Path())
    assert f"'{split}': left out: 2 images beside the folder 'train'" in caplog.text
    caplog.clear()
    open_source(f"images:{split / 'train'}", Path(), val=0.25)
    assert "left out" not in caplog.text  # negative control


def labelled(root: Path, names=("ant", "bee"), split="test") -> Path:
    paint(*(root / part / name / f"{i}.png" for part in ("train", split) for name in names for i in range(3)))
    return root


def test_the_fingerprint_follows_every_image_and_those_of_the_other_set(split, tmp_path):
    other = labelled(tmp_path / "other")
    name, test = f"images:{split}", f"folder:{other}"
    alone, tested = fingerprint(name), fingerprint(name, test=test)
    assert alone != tested
    assert (fingerprint(name), fingerprint(name, test=test)) == (alone, tested)
    paint(other / "test" / "ant" / "0.png")
    Image.new("RGB", (8, 8)).save(other / "test" / "ant" / "0.png")
    changed = fingerprint(name, test=test)
    assert changed != tested
    assert fingerprint(name) == alone
    Image.new("RGB", (8, 8)).save(split / "train" / "a.png")
    assert fingerprint(name) != alone
    assert fingerprint(name, test=test) != changed


def test_the_test_images_of_another_set_keep_their_labels(split, tmp_path):
    other = labelled(tmp_path / "other")
    data = open_dataset(f"images:{split}", test=f"folder:{other}", image_size=8)
    assert data.is_judged
    assert not data.is_labelled
    assert data.test_size == 6
    data.name_outputs(["cow", "bee", "ant"])
    labels = next(data.test_batches(9))[1].tolist()
    assert labels == [2, 2, 2, 1, 1, 1]


def test_labelled_data_may_be_measured_on_other_data_with_classes_in_another_order(tmp_path):
    one, other = labelled(tmp_path / "one"), labelled(tmp_path / "other")
    order = tmp_path / "order.txt"
    order.write_text("bee\nant\n")
    data = open_dataset(f"folder:{one}", test=f"folder:{other}", classes=str(order), image_size=8)
    assert data.spec.class_names == ("bee", "ant")
    assert next(data.test_batches(9))[1].tolist() == [1, 1, 1, 0, 0, 0]


def test_classes_are_matched_by_name_else_by_number_and_never_by_guess():
    assert places_of(("b", "a"), ("a", "b", "c")) == [1, 0]
    assert places_of(("b", "a"), ("class 0", "class 1")) == [0, 1]
    for known in (("a", "x"), ("x", "y", "z")):
        with pytest.raises(UserError, match=r"class(es)? not among the 2 of the outputs, such as 'x'.*data\.classes"):
            places_of(known, ("a", "b"))


def test_a_set_that_cannot_be_measured_on_is_refused_in_one_line(split, flat, tmp_path):
    with pytest.raises(UserError, match=r"data\.test=images:.* has no labels, which are what it is there for"):
        open_dataset(f"images:{split}", test=f"images:{flat}", image_size=8)
    with pytest.raises(UserError, match="one of the sets is of image files and the other is not"):
        open_dataset(f"images:{split}", test="digits", image_size=8)
    with pytest.raises(UserError, match="one of the sets is of image files and the other is not"):
        open_dataset("digits", test=f"folder:{labelled(tmp_path / 'other')}")


def test_what_is_measured_on_is_said_once(split, tmp_path):
    with pytest.raises(UserError, match=r"data\.val=0\.1 and data\.test=.* both say what is measured on"):
        open_dataset(f"images:{split}", test=f"folder:{labelled(tmp_path / 'other')}", val=0.1, image_size=8)


def test_a_file_may_be_damaged_in_the_other_set_too(split, tmp_path):
    other = labelled(tmp_path / "other")
    (other / "test" / "ant" / "0.png").write_bytes(b"no picture")
    data = open_dataset(f"images:{split}", test=f"folder:{other}", image_size=8, skip_damaged=True)
    assert data.test_size == 5


MINE = (
    "import numpy as np\nfrom kdzoo import ImageSet\n\n\nclass Mine(ImageSet):\n    def load(self, root):\n"
    "        images = np.zeros((6, 8, 8, 3), np.uint8)\n        return {names}, (images, {train}), (images, {test})\n"
)


def test_a_set_of_ones_own_has_labels_for_all_images_or_for_none(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(MINE.format(names="()", train=None, test=None))
    assert not open_dataset(str(file)).is_labelled
    for names, train, test in (("('a',)", "None", "None"), ("()", "None", "[0] * 6")):
        file.write_text(MINE.format(names=names, train=train, test=test))
        with pytest.raises(UserError, match="labels are None"):
            open_dataset(str(file))


def test_pictures_are_listed_by_no_class(split, tmp_path):
    from kdzoo.data.inspection import inspect
    from kdzoo.results.data_page import page

    text = page("x", inspect(open_source(f"images:{split}", Path()), ""))
    assert "no labels, 4 training and 2 test images" in text
    assert "class " not in text
    other = open_source(f"images:{split}", Path(), test=f"folder:{labelled(tmp_path / 'other')}")
    assert "no labels, 4 training and 6 test images" in page("x", inspect(other, ""))


def test_a_link_that_leads_back_is_not_followed_for_ever(split):
    os.symlink(split, split / "train" / "again")
    assert len(open_source(f"images:{split}", Path()).train) >= 4
