"""A second part of the training images is held out to choose methods by: neither trained on nor the test images."""

from pathlib import Path

import numpy as np
import pytest

from kdzoo.data import fingerprint, open_dataset
from kdzoo.data.sources import open_source
from kdzoo.errors import UserError


def rows(split) -> set[bytes]:
    return {image.tobytes() for image in split.array}


def test_three_parts_share_no_image_and_every_class_has_its_share_in_each():
    whole = open_source("digits", Path())
    val = open_source("digits", Path(), val=0.25)
    parted = open_source("digits", Path(), val=0.25, select=0.2)
    assert len(parted.test) == round(0.2 * len(val.train))
    assert len(parted.train) + len(parted.test) == len(val.train)
    assert not rows(parted.test) & rows(val.test)
    assert rows(parted.train) | rows(parted.test) == rows(val.train)
    counts = np.bincount(parted.test.labels, minlength=10) / np.bincount(val.train.labels, minlength=10)
    assert counts == pytest.approx(0.2, abs=0.02)
    assert len(whole.train) == len(val.train) + len(val.test)


def test_without_a_share_nothing_changes():
    one, other = open_source("digits", Path()), open_source("digits", Path(), select=0.0)
    assert rows(one.test) == rows(other.test)


@pytest.fixture
def mine(tmp_path):
    """The path of a data set without test images."""
    file = tmp_path / "mine.py"
    file.write_text(
        "import numpy as np\nfrom kdzoo import ImageSet\n\n\nclass Mine(ImageSet):\n"
        "    def load(self, root):\n"
        "        pixels = np.arange(40 * 64, dtype=np.uint32).astype(np.uint8).reshape(40, 8, 8, 1).repeat(3, 3)\n"
        "        return ('a', 'b'), (pixels, np.arange(40) % 2), None\n"
    )
    return str(file)


def test_data_without_test_images_need_them_all_the_same(mine):
    with pytest.raises(UserError, match=r"neither 'val' nor 'test'; set data\.val"):
        open_dataset(mine, select=0.2)
    assert open_dataset(mine, val=0.25, select=0.2).test_size == 6


def test_a_share_that_leaves_nothing_to_train_on_names_the_setting():
    with pytest.raises(UserError, match=r"data\.select=0\.9999 of 1,437 images leaves none to train on"):
        open_dataset("digits", select=0.9999)


def test_a_class_that_the_part_lacks_is_found(caplog):
    assert open_dataset("digits", select=0.2).untested == ()
    assert len(open_dataset("digits", select=0.003).untested) == 6
    assert "data.select=0.003 holds out images of 4 of 10 classes" in caplog.text


def test_data_that_are_parted_otherwise_have_another_fingerprint(mine):
    found = {fingerprint(mine, val=0.25, select=share) for share in (0.0, 0.1, 0.2)}
    assert len(found) == 3
    assert fingerprint(mine, val=0.25, select=0.2) in found
