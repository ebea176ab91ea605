"""Trees as they lie on disks: names of splits, what is skipped, links, Unicode, raw layouts, and tables of labels."""

import logging
import os
import unicodedata
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

from kdzoo.data import open_dataset
from kdzoo.data.pictures import warn_once
from kdzoo.errors import UserError
from kdzoo.resolve import resolve

MakeTree = Callable[..., Path]


@pytest.fixture(autouse=True)
def forget_warnings() -> None:
    warn_once.cache_clear()


def classes_of(root: Path, **settings: object) -> tuple[list[str], list[str]]:
    """The class of each training image, and of each test image."""
    data = open_dataset(f"folder:{root}", **settings)  # type: ignore[arg-type]
    names, tested = data.spec.class_names, next(data.test_batches(100))[1]
    return [names[label] for label in data.spec.labels], [names[label] for label in tested]


def draw(*paths: Path) -> None:
    for number, path in enumerate(paths):
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (number % 256, 80, 40)).save(path)


@pytest.mark.parametrize("split", ["val", "valid", "validation", "eval", "test", "Test", "VAL"])
def test_a_test_split_may_have_any_usual_name(make_tree: MakeTree, split: str) -> None:
    assert classes_of(make_tree(test=split))[1] == ["ant", "ant", "bee", "bee", "cat", "cat"]


def test_validation_comes_before_test_and_an_empty_folder_does_not_count(make_tree: MakeTree) -> None:
    root = make_tree(test="test")
    (root / "val").mkdir()
    assert len(classes_of(root)[1]) == 6
    draw(root / "val" / "bee" / "1.png")
    assert classes_of(root)[1] == ["bee"]


def test_an_empty_test_class_equals_a_missing_one(make_tree: MakeTree) -> None:
    root = make_tree()
    for path in (root / "test" / "ant").iterdir():
        path.unlink()
    (root / "test" / "dog").mkdir()
    empty = classes_of(root)
    (root / "test" / "ant").rmdir()
    (root / "test" / "dog").rmdir()
    assert classes_of(root) == empty
    assert empty[1] == ["bee", "bee", "cat", "cat"]


@pytest.mark.parametrize("folder", [".thumbnails", "__MACOSX", "@eaDir"])
def test_leftovers_are_skipped_everywhere(make_tree: MakeTree, folder: str) -> None:
    root = make_tree()
    before = classes_of(root)
    for place in (root, root / "train", root / "test", root / "train" / "ant", root / "train" / "ant" / "deep"):
        draw(place / folder / "x.png", place / folder / "ant" / "x.png")
    draw(root / "train" / "ant" / "._0.png")
    assert classes_of(root) == before


def test_other_files_are_counted_by_their_suffix(make_tree: MakeTree, caplog: pytest.LogCaptureFixture) -> None:
    root = make_tree()
    for name in ("a.xyz", "b.XYZ", "notes.txt", "Makefile"):
        (root / "train" / "ant" / name).touch()
    with caplog.at_level(logging.WARNING):
        classes_of(root)
        classes_of(root)
    assert caplog.text.count(f"'{root}': left out: 2 .xyz, 1 without a suffix, 1 .txt") == 1


def test_linked_folders_are_followed_and_a_loop_is_not(make_tree: MakeTree, tmp_path: Path) -> None:
    root = make_tree()
    draw(tmp_path / "elsewhere" / "dog" / "1.png", tmp_path / "elsewhere" / "dog" / "more" / "2.png")
    (root / "train" / "dog").symlink_to(tmp_path / "elsewhere" / "dog")
    (tmp_path / "elsewhere" / "dog" / "more" / "up").symlink_to(tmp_path / "elsewhere" / "dog")
    (root / "train" / "ant" / "root").symlink_to(root)
    trained, _ = classes_of(root)
    assert trained.count("dog") == 2
    assert trained.count("ant") == 6


def test_a_link_to_nothing_is_an_image_that_cannot_be_read(make_tree: MakeTree) -> None:
    root = make_tree()
    (root / "train" / "ant" / "9.png").symlink_to(root / "gone.png")
    with pytest.raises(UserError, match=r"cannot read image '.*ant/9\.png'"):
        classes_of(root)
    assert classes_of(root, skip_damaged=True)[0].count("ant") == 6


def test_class_names_are_compared_in_one_unicode_form(make_tree: MakeTree) -> None:
    composed, apart = (unicodedata.normalize(form, "caf\u00e9") for form in ("NFC", "NFD"))
    root = make_tree(classes=[composed, "tea"])
    (root / "test" / composed).rename(root / "test" / apart)
    assert classes_of(root)[1] == [composed] * 2 + ["tea"] * 2


def test_a_table_finds_an_image_in_any_unicode_form(tmp_path: Path) -> None:
    composed, apart = (unicodedata.normalize(form, "caf\u00e9") for form in ("NFC", "NFD"))
    draw(tmp_path / "images" / f"{apart}.png", tmp_path / "images" / "tea.png")
    (tmp_path / "labels.csv").write_text(f"path,label,split\nimages/{composed}.png,{composed},train\ntea,{apart},val\n")
    assert classes_of(tmp_path, options={"labels": "labels.csv"}) == ([composed], [composed])


def test_a_share_of_every_class_is_held_out_where_there_is_no_test(make_tree: MakeTree, tmp_path: Path) -> None:
    flat = tmp_path / "flat"
    draw(*(flat / name / f"{i}.png" for name in ("ant", "bee") for i in range(20)))
    with pytest.raises(UserError, match=r"neither 'val' nor 'test'; set data\.val=0\.1"):
        classes_of(flat)
    trained, tested = classes_of(flat, val=0.25)
    assert (trained.count("ant"), trained.count("bee")) == (15, 15)
    assert (tested.count("ant"), tested.count("bee")) == (5, 5)
    below = tmp_path / "below"
    below.mkdir()
    flat.rename(below / "train")
    assert classes_of(below, val=0.25) == (trained, tested)


def test_no_image_is_both_held_out_and_trained(tmp_path: Path) -> None:
    draw(*(tmp_path / "flat" / name / f"{i}.png" for name in ("ant", "bee") for i in range(20)))
    data = open_dataset(f"folder:{tmp_path / 'flat'}", val=0.1)
    assert data.train_pixels is not None
    assert data.test_pixels is not None
    colours = [pixels[:, 0, 0, 0].tolist() for pixels in (data.train_pixels, data.test_pixels)]
    assert sorted(colours[0] + colours[1]) == list(range(40))
    again = open_dataset(f"folder:{tmp_path / 'flat'}", val=0.1).test_pixels
    assert again is not None
    assert torch.equal(again, data.test_pixels)


def test_a_share_too_small_for_every_class_says_which_lack_images(tmp_path: Path, caplog) -> None:
    draw(*(tmp_path / "flat" / name / f"{i}.png" for name in ("ant", "bee", "cat") for i in range(4)))
    name = f"folder:{tmp_path / 'flat'}"
    open_dataset(name, val=0.25)
    assert not caplog.messages
    open_dataset(name, val=0.1)
    assert caplog.messages == [
        f"data '{name}': data.val=0.1 holds out images of 1 of 3 classes, none of bee, cat; more images, or a larger "
        "share, have some of each"
    ]


@pytest.mark.parametrize("share", [-0.1, 1.0])
def test_a_share_out_of_range_is_refused(share: float) -> None:
    base = {"distiller": {"name": "none"}, "student": {"name": "resnet8"}}
    with pytest.raises(UserError, match=r"data\.val=.*expected a number from 0 to below 1"):
        resolve(base, [f"data.val={share}"])


def test_tiny_imagenet_is_read_as_it_is_unpacked(tmp_path: Path) -> None:
    wnids = ("n01443537", "n01629819")
    draw(*(tmp_path / "train" / wnid / "images" / f"{wnid}_{i}.JPEG" for wnid in wnids for i in range(3)))
    draw(*(tmp_path / "val" / "images" / f"val_{i}.JPEG" for i in range(4)))
    draw(*(tmp_path / "test" / "images" / f"test_{i}.JPEG" for i in range(4)))
    lines = [f"val_{i}.JPEG\t{wnids[i % 2]}\t0\t32\t44\t62\n" for i in range(4)]
    (tmp_path / "val" / "val_annotations.txt").write_text("".join(lines))
    for wnid in wnids:
        (tmp_path / "train" / wnid / f"{wnid}_boxes.txt").write_text("n_0.JPEG\t0\t0\t62\t60\n")
    assert classes_of(tmp_path) == ([wnids[0]] * 3 + [wnids[1]] * 3, [wnids[0]] * 2 + [wnids[1]] * 2)


def test_imagenet_as_it_is_unpacked_says_what_to_run_and_then_is_read(tmp_path: Path) -> None:
    root = tmp_path / "CLS-LOC"
    draw(*(root / "train" / wnid / f"{wnid}_{i}.JPEG" for wnid in ("n01440764", "n01443537") for i in range(3)))
    draw(*(root / "val" / f"ILSVRC2012_val_0000000{i}.JPEG" for i in (1, 2)))
    with pytest.raises(UserError, match=r"/val' holds images in no class folder, 2 in all") as caught:
        classes_of(root)
    command = str(caught.value).partition("for ImageNet: ")[2]
    (tmp_path / "LOC_val_solution.csv").write_text(
        "ImageId,PredictionString\nILSVRC2012_val_00000002,n01440764 1 2 3 4 \n"
        "ILSVRC2012_val_00000001,n01443537 1 2 3 4 n01443537 5 6 7 8\n"
    )
    assert os.system(f"cd {tmp_path} && {command.replace('FILE', 'labels.csv')}") == 0
    trained, tested = classes_of(root, options={"labels": str(tmp_path / "labels.csv")})
    assert trained == ["n01440764"] * 3 + ["n01443537"] * 3
    assert tested == ["n01440764", "n01443537"]


def test_archives_that_are_not_unpacked_are_named(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "n01440764.tar").touch()
    with pytest.raises(UserError, match=r"no class folders with images .* it holds 1 \.tar: unpack them first"):
        classes_of(tmp_path)


def flat(root: Path, table: str, name: str = "labels.csv") -> Path:
    """Six pictures in one folder, and a table of their classes."""
    draw(*(root / "images" / f"{i}.png" for i in range(6)))
    (root / name).write_text(table)
    return root


@pytest.mark.parametrize(
    "table",
    [
        "path,label,split\nimages/0.png,ant,train\nimages/1.png,bee,train\nimages/2.png,ant,test\n",
        "label;path;split\nant;images/0.png;train\nbee;images/1.png;\nant;images/2.png;Val\n",
        "\ufeffPath, Label, Split\n0.png, ant, train\n1, bee, train\n./images/2.png, ant, validation\n",
    ],
)
def test_a_table_gives_classes_and_splits_to_a_flat_folder(
    tmp_path: Path, table: str, caplog: pytest.LogCaptureFixture
) -> None:
    root = flat(tmp_path, table)
    with caplog.at_level(logging.WARNING):
        assert classes_of(root, options={"labels": "labels.csv"}) == (["ant", "bee"], ["ant"])
    assert "left out: 3 images of no class" in caplog.text


def test_a_table_without_splits_is_shared_out(tmp_path: Path) -> None:
    root = flat(tmp_path, "path,label\n" + "".join(f"{i},{'ant' if i < 3 else 'bee'}\n" for i in range(6)))
    trained, tested = classes_of(root, options={"labels": "labels.csv"}, val=0.34)
    assert (trained, tested) == (["ant", "ant", "bee", "bee"], ["ant", "bee"])


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ("image,class\n0,ant\n", "has the columns image, class; expected path,label"),
        ("path,label\n0,\n", "lacks a path or a label"),
        ("path,label\n7,ant\n8,ant\n", "names 2 images not there, such as '7'"),
        ("path,label\n0,ant\n0.png,bee\n", "has two rows for 'images/0.png'"),
        ("path,label\n", "data.labels=labels.csv lists no image"),
        ('path,label\n"0,ant\n1,bee\n', "is no CSV (unexpected end of data); look for a quote that is opened and not"),
        ('"path,label\n0,ant\n', "is no CSV (unexpected end of data)"),
        pytest.param('path,label\n"0,' + "ant\n" * 40_000, "(field larger than field limit (131072)); look", id="long"),
        ('path,label\n0,"an\nant"\n1,bee\n', "class 'an\\nant' holds characters that no text shows"),
        ("path,label,split\n0,ant,tests\n", "unknown split 'tests'; did you mean test? (in data.labels=labels.csv)"),
        ("path,label,split\n0,ant,train\n1,bee,test\n", "unknown test class 'bee'"),
    ],
)
def test_a_table_that_does_not_fit_is_one_line(tmp_path: Path, table: str, said: str) -> None:
    with pytest.raises(UserError) as caught:
        classes_of(flat(tmp_path, table), options={"labels": "labels.csv"})
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_name_that_lies_in_two_folders_must_be_given_whole(tmp_path: Path) -> None:
    root = flat(tmp_path, "path,label\n0,ant\n")
    draw(root / "more" / "0.png")
    with pytest.raises(UserError, match="give the whole path"):
        classes_of(root, options={"labels": "labels.csv"}, val=0.5)


def test_an_option_of_a_set_may_stand_beside_its_name(tmp_path: Path) -> None:
    base = {"distiller": {"name": "none"}, "student": {"name": "resnet8"}, "data": {"name": f"folder:{tmp_path}"}}
    short, long = (resolve(base, [f"data.{key}=mine.csv"]) for key in ("labels", "options.labels"))
    assert short == long
    assert short.settings.data.options == {"labels": "mine.csv"}
    with pytest.raises(UserError, match=r"unknown setting 'data\.labels'"):
        resolve({**base, "data": {"name": "digits"}}, ["data.labels=mine.csv"])
