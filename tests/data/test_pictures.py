"""Image files as they lie on disks: deep gray values, transparency, EXIF orientation, formats, and damaged ones."""

import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image, ImageOps

from kdzoo.data import open_dataset
from kdzoo.data.pictures import Reading, warn_once
from kdzoo.data.trees import suffixes
from kdzoo.errors import UserError
from kdzoo.recipe import Protocol

MakeTree = Callable[..., Path]

RAMP = np.arange(12 * 12).reshape(12, 12)  # 0 to 143


@pytest.fixture(autouse=True)
def forget_warnings() -> None:
    warn_once.cache_clear()


def first(root: Path, **settings: object) -> torch.Tensor:
    """The first test image of the tree, in shades (3, H, W)."""
    images, _ = next(open_dataset(f"folder:{root}", **settings).test_batches(1))  # type: ignore[arg-type]
    return (images[0] * 255).round()


def shades(values: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.broadcast_to(values, (3, *values.shape)).astype(np.float32))


@pytest.mark.parametrize(
    ("name", "values", "expected"),
    [
        ("0.png", (RAMP * 257).astype(np.uint16), RAMP),
        ("0.png", (RAMP * 3).astype(np.uint16), np.round(RAMP * 3 / 257)),  # a dark picture stays dark
        ("0.tif", (RAMP * 257).astype(np.uint16), RAMP),
        ("0.tif", (RAMP / 255).astype(np.float32), RAMP),
        ("0.tif", RAMP.astype(np.float32), RAMP),
        ("0.tif", (RAMP * 257).astype(np.float32), RAMP),
        ("0.tif", (RAMP - 70.0).astype(np.float32), np.round(RAMP * 255 / 143)),
        ("0.tif", np.where(RAMP == 5, np.nan, RAMP / 255).astype(np.float32), np.where(RAMP == 5, 0, RAMP)),
        ("0.tif", (RAMP * 257).astype(np.int32), RAMP),
        ("0.tif", RAMP.astype(np.int32), RAMP),
        ("0.tif", (RAMP * 1000).astype(np.int32), np.round(RAMP * 255 / 143)),
    ],
)
def test_gray_values_of_any_depth_are_scaled_and_not_clipped(
    make_tree: MakeTree, name: str, values: np.ndarray, expected: np.ndarray
) -> None:
    root = make_tree()
    (root / "test" / "ant" / "0.png").unlink()
    Image.fromarray(values).save(root / "test" / "ant" / name)
    assert torch.equal(first(root), shades(expected))


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("alpha", "expected"), [("white", 255), ("black", 0), ("#808080", 128)])
def test_transparent_pixels_show_a_background(make_tree: MakeTree, stream: bool, alpha: str, expected: int) -> None:
    root = make_tree()
    pixels = np.full((12, 12, 4), 51, np.uint8)
    pixels[..., 3] = 255
    pixels[:6, :, 3] = 0
    Image.fromarray(pixels).save(root / "test" / "ant" / "0.png")
    image = first(root, alpha=alpha, stream=stream)
    assert (image[:, :6] == expected).all()
    assert (image[:, 6:] == 51).all()


def test_transparency_of_every_kind_is_seen(make_tree: MakeTree) -> None:
    root = make_tree()
    gray = np.stack([np.full((12, 12), 51), np.where(RAMP < 72, 0, 255)], -1).astype(np.uint8)
    palette = Image.fromarray((RAMP >= 72).astype(np.uint8), "P")
    palette.putpalette([9, 9, 9, 51, 51, 51])
    keyed = Image.fromarray(np.repeat(np.where(RAMP < 72, 9, 51).astype(np.uint8)[..., None], 3, 2))
    path = root / "test" / "ant" / "0.png"
    for image, options in (
        (Image.fromarray(gray), {}),
        (palette, {"transparency": 0}),
        (keyed, {"transparency": (9, 9, 9)}),
    ):
        image.save(path, **options)
        assert torch.equal(first(root), shades(np.where(RAMP < 72, 255, 51)))


def test_a_colour_that_is_none_is_one_line(make_tree: MakeTree) -> None:
    with pytest.raises(UserError, match=r"data\.alpha=whiite: expected a colour"):
        first(make_tree(), alpha="whiite")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("suffix", [".png", ".webp"])
def test_images_are_turned_as_their_camera_noted(
    make_tree: MakeTree, caplog: pytest.LogCaptureFixture, stream: bool, suffix: str
) -> None:
    root = make_tree()
    stored, exif = Image.fromarray(RAMP.astype(np.uint8)).convert("RGB"), Image.Exif()
    exif[ExifTags.Base.Orientation] = 6  # to be turned clockwise
    (root / "test" / "ant" / "0.png").unlink()
    stored.save(root / "test" / "ant" / f"0{suffix}", exif=exif, lossless=True)
    with caplog.at_level(logging.WARNING):
        assert torch.equal(first(root, stream=stream), shades(np.rot90(RAMP, -1)))
        first(root, stream=True)
    assert caplog.text.count("data.exif=false reads them as they are stored") == 1
    assert torch.equal(first(root, stream=stream, exif=False), shades(RAMP))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_is_what_pillow_makes_of_it(make_tree: MakeTree, orientation: int) -> None:
    root, exif = make_tree(), Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    path = root / "test" / "ant" / "0.png"
    Image.fromarray(RAMP.astype(np.uint8)).save(path, exif=exif)
    with Image.open(path) as image:
        expected = np.asarray(ImageOps.exif_transpose(image))
    assert torch.equal(first(root), shades(expected))


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@pytest.mark.parametrize("note", [b"", b"Exif\0\0", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff", b"Exif\0\0nonsense" * 9])
def test_a_damaged_note_of_the_camera_says_nothing(make_tree: MakeTree, note: bytes) -> None:
    root = make_tree(suffixes=[".jpg"])
    path = root / "test" / "ant" / "0.jpg"
    Image.fromarray(RAMP.astype(np.uint8)).save(path, exif=note, quality=100)
    assert (first(root) - shades(RAMP)).abs().max() <= 2


def test_the_size_of_a_set_is_that_of_its_turned_images(make_tree: MakeTree) -> None:
    """Portraits of a phone are stored lying, with a note; beside them, others are stored as they stand."""
    root = make_tree(sizes=[(9, 12)], suffixes=[".jpg"])
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 8
    Image.new("RGB", (12, 9)).save(root / "train" / "ant" / "0.jpg", exif=exif)
    assert open_dataset(f"folder:{root}").spec.image_size == 9
    assert open_dataset(f"folder:{root}", exif=False).spec.image_size == 224


def test_every_format_that_pillow_decodes_is_read(make_tree: MakeTree) -> None:
    kinds = [".png", ".jpg", ".jpeg", ".JPE", ".webp", ".bmp", ".gif", ".tif", ".TIFF", ".ppm", ".tga", ".ico", ".jp2"]
    kinds += [".avif"] if "AVIF" in Image.SAVE else []
    root = make_tree()
    for number, kind in enumerate(kinds):
        Image.new("RGB", (16, 16), (90, 90, 90)).save(root / "train" / "bee" / f"other {number}{kind}")
    data = open_dataset(f"folder:{root}", image_size=8)
    assert len(data.spec.labels) == 18 + len(kinds)
    assert {kind.lower() for kind in kinds} <= suffixes()
    assert not {".txt", ".pdf", ".mpg", ".h5", ".grib", ".xyz"} & suffixes()


def damage(root: Path) -> None:
    """Cut one image short and replace another by a text."""
    victim = root / "train" / "bee" / "3.png"
    victim.write_bytes(victim.read_bytes()[:200])
    (root / "test" / "ant" / "1.png").write_text("not a picture")


@pytest.mark.parametrize("stream", [False, True])
def test_damaged_images_are_left_out_and_counted_where_one_asks_for_it(
    make_tree: MakeTree, caplog: pytest.LogCaptureFixture, stream: bool
) -> None:
    root = make_tree()
    damage(root)
    with pytest.raises(UserError, match="cannot read image"):
        list(open_dataset(f"folder:{root}", stream=stream, image_size=12).loader(Protocol(), seed=0).batches())
    with caplog.at_level(logging.WARNING):
        data = open_dataset(f"folder:{root}", stream=stream, skip_damaged=True)
        again = open_dataset(f"folder:{root}", stream=stream, skip_damaged=True)
    assert caplog.text.count("left out: 2 damaged images") == 1
    assert data.spec.labels.tolist() == again.spec.labels.tolist() == [0] * 6 + [1] * 5 + [2] * 6
    assert data.test_size == 5
    next(data.loader(Protocol(batch_size=17), seed=0).batches())


@pytest.mark.parametrize(("error", "damaged"), [(MemoryError(), False), (OSError("truncated"), True)])
def test_an_image_for_which_memory_lacks_is_not_left_out(
    make_tree: MakeTree, monkeypatch: pytest.MonkeyPatch, error: Exception, damaged: bool
) -> None:
    def rgb(reading: Reading, image: Image.Image) -> Image.Image:
        raise error

    monkeypatch.setattr(Reading, "rgb", rgb)
    with pytest.raises(UserError if damaged else MemoryError):
        open_dataset(f"folder:{make_tree()}", skip_damaged=True)


def test_an_image_that_was_repaired_is_taken_again(make_tree: MakeTree) -> None:
    root = make_tree()
    damage(root)
    assert len(open_dataset(f"folder:{root}", skip_damaged=True).spec.labels) == 17
    Image.new("RGB", (12, 12)).save(root / "train" / "bee" / "3.png")
    assert len(open_dataset(f"folder:{root}", skip_damaged=True).spec.labels) == 18


def test_a_class_whose_images_are_all_damaged_is_named(make_tree: MakeTree) -> None:
    root = make_tree()
    for path in (root / "train" / "bee").iterdir():
        path.write_text("not a picture")
    with pytest.raises(UserError, match="every training image of class 'bee' is damaged"):
        open_dataset(f"folder:{root}", skip_damaged=True)
