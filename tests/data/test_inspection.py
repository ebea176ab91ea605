"""``kdzoo data``: all damaged files, the number of images of each class and split, and images that are repeated."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from kdzoo.data.inspection import Inspection, near
from kdzoo.errors import UserError
from kdzoo.resolve import resolve_data
from kdzoo.results.data_page import inspected, page

MakeTree = Callable[..., Path]


def inspect(root: Path, *overrides: str) -> Inspection:
    return inspected(resolve_data(f"folder:{root}", overrides))


def photograph(seed: int, side: int = 96) -> Image.Image:
    """A smooth picture that is like no other."""
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC)


def thumbs(*images: Image.Image) -> np.ndarray:
    return np.stack([np.asarray(image.resize((9, 8), Image.Resampling.BILINEAR)) for image in images])


def test_a_process_that_is_lost_while_it_looks_is_told_in_a_line(
    make_tree: MakeTree, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(self: object) -> None:
        raise RuntimeError("DataLoader worker (pid 1) is killed by signal: Killed. ")

    monkeypatch.setattr("kdzoo.data.inspection._CHUNK", 2)
    monkeypatch.setattr("torch.utils.data.DataLoader.__iter__", killed)
    with pytest.raises(UserError, match=r"was lost \(.* is killed by signal: Killed\), mostly"):
        inspect(make_tree(), "data.workers=2")


def test_every_damaged_file_is_listed(make_tree: MakeTree) -> None:
    root = make_tree()
    assert inspect(root).damaged == {}
    cut = root / "train" / "bee" / "3.png"
    cut.write_bytes(cut.read_bytes()[:200])
    (root / "test" / "ant" / "1.png").write_text("not a picture")
    (root / "train" / "cat" / "2.png").write_bytes(b"")
    found = inspect(root).damaged
    assert list(found) == ["train/bee/3.png", "train/cat/2.png", "test/ant/1.png"]
    assert all(
        reason.split(":")[0] in ("OSError", "SyntaxError", "UnidentifiedImageError") for reason in found.values()
    )
    lines = page("mine", inspect(root)).splitlines()
    assert "damaged images: 3" in lines
    assert [line.split()[0] for line in lines if line.endswith(")")] == list(found)


def test_images_are_counted_by_class_and_split(make_tree: MakeTree) -> None:
    root = make_tree(sizes=[(12, 12), (40, 30)])
    (root / "train" / "ant" / "0.png").unlink()
    shutil.rmtree(root / "test" / "bee")
    found = inspect(root)
    assert {split: counts.tolist() for split, counts in found.counts.items()} == {"train": [5, 6, 6], "test": [2, 0, 2]}
    assert (found.smallest, found.largest) == ((12, 12), (40, 30))
    text = page("mine", found)
    assert "3 classes, 17 training and 4 test images" in text
    assert "size (width x height): from 12 x 12 to 40 x 30 pixels" in text
    assert ["bee", "6", "0"] in [line.split() for line in text.splitlines()]
    assert f"fingerprint: {found.fingerprint}" in text


def test_the_settings_of_the_data_hold(make_tree: MakeTree) -> None:
    found = inspect(make_tree(), "data.val=0.5", "data.classes=natural")
    assert found.counts["train"].tolist() == found.counts["test"].tolist() == [3, 3, 3]
    with pytest.raises(UserError, match=r"unknown setting 'data\.vall'"):
        inspect(Path(), "data.vall=0.5")


def test_a_test_image_that_training_repeats_is_found(make_tree: MakeTree) -> None:
    root = make_tree()
    for number in range(8):
        photograph(number).save(root / "train" / "ant" / f"photo {number}.png")
    photograph(20).save(root / "test" / "ant" / "new.png")
    photograph(3).save(root / "test" / "ant" / "copied.png")
    photograph(4, side=40).save(root / "test" / "bee" / "smaller.jpg", quality=60)
    assert inspect(root).doubles == {
        "test/ant/copied.png": "train/ant/photo 3.png",
        "test/bee/smaller.jpg": "train/ant/photo 4.png",
    }


def test_the_nearest_of_several_is_named() -> None:
    bright = Image.eval(photograph(1), lambda shade: min(255, shade + 6))
    assert near(thumbs(photograph(1)), thumbs(photograph(5), bright, photograph(1))) == {0: 2}
    assert near(thumbs(photograph(1)), thumbs(photograph(5), bright)) == {0: 1}
    assert near(thumbs(photograph(1)), thumbs(photograph(5))) == {}


def test_many_blank_images_hide_no_copy() -> None:
    blank = thumbs(*[Image.new("RGB", (9, 8), (shade,) * 3) for shade in range(200)])
    many = np.concatenate([blank[:100].repeat(50, 0), thumbs(photograph(1)), blank[100:].repeat(50, 0)])
    assert near(np.concatenate([blank[150:151], thumbs(photograph(1), photograph(2))]), many)[1] == 5000
    assert (many[near(blank, many)[150]] == 150).all()


def test_flat_images_of_other_shades_are_not_the_same() -> None:
    gray = [Image.new("RGB", (9, 8), (shade,) * 3) for shade in (0, 100, 200)]
    assert near(thumbs(gray[1]), thumbs(gray[0], gray[2])) == {}
    assert near(thumbs(gray[1]), thumbs(gray[0], gray[1], gray[2])) == {0: 1}


def test_a_set_that_is_in_memory_is_counted_too() -> None:
    found = inspected(resolve_data("bands", ["data.options.train=3", "data.options.test=2"]))
    assert found.counts["train"].tolist() == [3] * 8
    assert (found.smallest, found.largest, found.fingerprint) == ((32, 32), (32, 32), "")


@pytest.mark.parametrize("setting", ["protocol.epochs=3", "limit=3", "seed=1"])
def test_a_setting_that_is_none_of_the_data_is_one_line(setting: str) -> None:
    with pytest.raises(UserError, match=f"^{setting.partition('=')[0]} is no setting of the data, which all begin"):
        resolve_data("digits", [setting])


# Since Python 3.12 a fork beside other threads warns; the workers of torch's loader are forks on Linux.
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_workers_change_nothing(make_tree: MakeTree) -> None:
    root = make_tree(classes=["ant"])
    for number in range(1100):
        Image.new("RGB", (4, 4), (number % 250, number // 250, 0)).save(root / "train" / "ant" / f"x{number}.png")
    (root / "train" / "ant" / "x777.png").write_text("not a picture")
    alone, helped = (inspect(root, f"data.workers={workers}") for workers in (0, 2))
    assert list(alone.damaged) == list(helped.damaged) == ["train/ant/x777.png"]
    assert alone.doubles == helped.doubles


def test_a_file_of_any_name_can_be_printed_and_commands_no_terminal() -> None:
    counts = {"train": np.array([1]), "test": np.array([1])}
    damaged = {"ant/pic\udcff.png": "UnidentifiedImageError", "ant/\x1b[2J.png": "UnidentifiedImageError"}
    said = page("mine", Inspection(("ant",), counts, (8, 8), (8, 8), damaged, {}, ""))
    assert [line for line in said.splitlines() if "png" in line] == [
        r"  ant/pic\udcff.png  (UnidentifiedImageError)",
        r"  ant/\x1b[2J.png  (UnidentifiedImageError)",
    ]
    assert all(line.isprintable() for line in said.splitlines())
