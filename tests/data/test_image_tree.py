"""Image trees: what is read, what is refused, and that one line names the culprit."""

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from kdzoo.data import Dataset, open_dataset
from kdzoo.errors import UserError
from kdzoo.recipe import Augmentation, Protocol

MakeTree = Callable[..., Path]

# Class and coarse label, as the data set's own files number them.
COARSE = {
    name: int(coarse)
    for name, coarse in re.findall(
        r"(\w+):(\d+)",
        """
apple:4 aquarium_fish:1 baby:14 bear:8 beaver:0 bed:6 bee:7 beetle:7 bicycle:18 bottle:3 bowl:3
boy:14 bridge:9 bus:18 butterfly:7 camel:11 can:3 castle:9 caterpillar:7 cattle:11 chair:6
chimpanzee:11 clock:5 cloud:10 cockroach:7 couch:6 crab:13 crocodile:15 cup:3 dinosaur:15 dolphin:0
elephant:11 flatfish:1 forest:10 fox:12 girl:14 hamster:16 house:9 kangaroo:11 keyboard:5 lamp:5
lawn_mower:19 leopard:8 lion:8 lizard:15 lobster:13 man:14 maple_tree:17 motorcycle:18 mountain:10
mouse:16 mushroom:4 oak_tree:17 orange:4 orchid:2 otter:0 palm_tree:17 pear:4 pickup_truck:18
pine_tree:17 plain:10 plate:3 poppy:2 porcupine:12 possum:12 rabbit:16 raccoon:12 ray:1 road:9
rocket:19 rose:2 sea:10 seal:0 shark:1 shrew:16 skunk:12 skyscraper:9 snail:13 snake:15 spider:13
squirrel:16 streetcar:19 sunflower:2 sweet_pepper:4 table:6 tank:19 telephone:5 television:5 tiger:8
tractor:19 train:18 trout:1 tulip:2 turtle:15 wardrobe:6 whale:0 willow_tree:17 wolf:8 woman:14
worm:13
""",
    )
}


def open_tree(root: Path, **settings: object) -> Dataset:
    return open_dataset(f"folder:{root}", **settings)  # type: ignore[arg-type]


def test_equal_images_keep_their_size_and_their_pixels(make_tree: MakeTree) -> None:
    root = make_tree()
    data = open_tree(root)
    assert data.spec.class_names == ("ant", "bee", "cat")
    assert data.spec.labels.tolist() == [0] * 6 + [1] * 6 + [2] * 6
    assert data.spec.image_size == 12
    images, labels = next(data.test_batches(6))
    assert labels.tolist() == [0, 0, 1, 1, 2, 2]
    with Image.open(root / "test" / "bee" / "1.png") as image:
        expected = np.asarray(image).transpose(2, 0, 1) / np.float32(255)
    assert np.array_equal(images[3].numpy(), expected)


def test_mixed_sizes_and_formats_become_224_pixels(make_tree: MakeTree) -> None:
    root = make_tree(
        sizes=[(40, 30), (20, 50), (33, 33), (64, 48), (31, 47)],
        suffixes=[".png", ".jpg", ".jpeg", ".webp", ".bmp"],
        test="val",
    )
    data = open_tree(root)
    assert data.spec.image_size == 224
    batch = next(data.loader(Protocol(batch_size=4), seed=0).batches())
    assert batch.images.shape == (4, 3, 224, 224)
    assert next(data.test_batches(3, test_crop=0.875))[0].shape == (3, 3, 224, 224)


def test_an_image_size_is_honoured(make_tree: MakeTree) -> None:
    root = make_tree(sizes=[(40, 30), (20, 50)])
    data = open_tree(root, image_size=16)
    crops = Protocol(batch_size=4, augmentation=Augmentation(resized_crop=(0.2, 1.0)))
    assert next(data.loader(crops, seed=0).batches()).images.shape == (4, 3, 16, 16)
    with pytest.raises(UserError, match="image size is 0"):
        open_tree(root, image_size=0)


def test_gray_and_transparent_images_have_three_channels(make_tree: MakeTree) -> None:
    root = make_tree()
    Image.new("L", (12, 12), 51).save(root / "test" / "ant" / "0.png")
    Image.new("RGBA", (12, 12), (51, 51, 51, 255)).save(root / "test" / "ant" / "1.png")
    images, _ = next(open_tree(root).test_batches(2))
    assert torch.allclose(images, torch.full_like(images, 0.2))


@pytest.mark.parametrize("stream", [False, True])
def test_a_corrupt_image_is_named(make_tree: MakeTree, stream: bool) -> None:
    root = make_tree(sizes=[(40, 30), (20, 50)])
    victim = root / "train" / "bee" / "3.png"
    victim.write_bytes(victim.read_bytes()[:200])  # its header is still whole
    with pytest.raises(UserError, match=r"cannot read image '.*bee/3\.png'") as error:
        list(open_tree(root, image_size=8, stream=stream).loader(Protocol(), seed=0).batches())
    assert "\n" not in str(error.value)


def test_a_file_that_is_no_image_is_named(make_tree: MakeTree) -> None:
    root = make_tree()
    (root / "train" / "ant" / "9.png").write_text("not a picture")
    with pytest.raises(UserError, match=r"cannot read image '.*ant/9\.png'"):
        open_tree(root)


def test_other_files_and_hidden_ones_are_ignored(make_tree: MakeTree) -> None:
    root = make_tree()
    (root / "train" / "ant" / "notes.txt").write_text("not a picture")
    (root / "train" / "ant" / ".hidden.png").write_text("not a picture")
    assert len(open_tree(root).spec.labels) == 18


def test_a_test_class_that_is_not_trained_is_refused(make_tree: MakeTree) -> None:
    root = make_tree()
    (root / "test" / "bee").rename(root / "test" / "bees")
    with pytest.raises(UserError, match="unknown test class 'bees'; did you mean bee"):
        open_tree(root)


def test_an_empty_class_is_refused(make_tree: MakeTree) -> None:
    root = make_tree()
    (root / "train" / "dog").mkdir()
    with pytest.raises(UserError, match=r"no images in '.*train/dog'"):
        open_tree(root)


@pytest.mark.parametrize(("split", "message"), [("train", "no folder 'train'"), ("test", "neither 'val' nor")])
def test_a_missing_split_is_refused(make_tree: MakeTree, split: str, message: str) -> None:
    root = make_tree()
    (root / split).rename(root / "elsewhere")
    with pytest.raises(UserError, match=message):
        open_tree(root)


def test_a_missing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no folder '.*nowhere'"):
        open_tree(tmp_path / "nowhere")


def test_a_limit_takes_from_every_class(make_tree: MakeTree) -> None:
    root = make_tree()
    data = open_tree(root, limit=6)
    assert data.spec.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert data.test_size == 6
    assert len(open_tree(root).spec.labels) == 18


def test_cifar_s_hundred_names_bring_their_superclasses(make_tree: MakeTree) -> None:
    data = open_tree(make_tree(sizes=[(4, 4)], classes=list(COARSE)))
    assert dict(zip(data.spec.class_names, data.spec.superclasses, strict=True)) == COARSE
    assert open_dataset("digits").spec.superclasses == ()
