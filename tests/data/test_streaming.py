"""Sets that stream: the same bits with any number of workers, and the same pictures as in memory."""

import os
import queue
import signal
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from kdzoo.data import open_dataset
from kdzoo.data.stream import lost_workers_told, stream
from kdzoo.errors import UserError
from kdzoo.recipe import Augmentation, Protocol

MakeTree = Callable[..., Path]

PROTOCOL = Protocol(
    epochs=2,
    batch_size=6,
    augmentation=Augmentation(
        resized_crop=(0.2, 1.0),
        flip=True,
        rand_augment="rand-m9-mstd0.5-inc1",
        erasing=0.5,
        mixup=0.8,
        cutmix=1.0,
    ),
)


class Deadly(torch.utils.data.Dataset[Any]):
    """Images of which one is the death of the process that decodes it, as a machine that is short of memory is."""

    def __getitem__(self, key: tuple[int, int]) -> dict[str, torch.Tensor]:
        if key == (0, 7):
            os.kill(os.getpid(), signal.SIGKILL)
        return {"images": torch.zeros(4, 4, 3, dtype=torch.uint8)}


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGKILL")
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_a_process_that_is_killed_while_it_decodes_is_told_in_a_line() -> None:
    keys = [[(0, row)] for row in range(12)]
    with pytest.raises(UserError, match=r"^a process that decodes images was lost \(.*\), mostly .* data\.workers=0"):
        list(stream(Deadly(), keys, 2, torch.device("cpu")))


KILLED = RuntimeError("DataLoader worker (pid 5) is killed by signal: Killed.")
GONE = RuntimeError("DataLoader worker (pid(s) 5) exited unexpectedly")
GONE.__cause__ = queue.Empty()  # which says nothing


@pytest.mark.parametrize("error", [ConnectionResetError(104, "Connection reset"), EOFError(), KILLED, GONE])
def test_so_is_one_that_is_killed_while_it_hands_a_batch_over(error: Exception) -> None:
    with pytest.raises(UserError, match=r"was lost \(\S.*\S\), mostly"), lost_workers_told(2):
        raise error
    with pytest.raises(type(error)), lost_workers_told(0):
        raise error


@pytest.mark.parametrize("error", [RuntimeError, FileNotFoundError, ConnectionError])
def test_an_error_in_its_work_is_not_taken_for_its_loss(error: type[Exception]) -> None:
    text = f"Caught {error.__name__} in DataLoader worker process 0.\nOriginal Traceback (most recent call last): ..."
    with pytest.raises(error, match=r"^Caught "), lost_workers_told(2):
        raise error(text)


# Since Python 3.12 a fork beside other threads warns; the workers of torch's loader are forks on Linux.
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_workers_change_nothing(make_tree: MakeTree) -> None:
    name = f"folder:{make_tree()}"
    data = open_dataset(name, stream=True)
    helped = open_dataset(name, stream=True, workers=2)
    assert not data.fits
    views = ("weak", "strong")
    alone = list(data.loader(PROTOCOL, seed=0, views=views).batches())
    shared = list(helped.loader(PROTOCOL, seed=0, views=views).batches())
    assert len(alone) == 6
    for one, other in zip(alone, shared, strict=True):
        assert torch.equal(one.images, other.images)
        assert torch.equal(one.targets, other.targets)
        assert all(torch.equal(one.views[view], other.views[view]) for view in views)
    resumed = next(data.loader(PROTOCOL, seed=0, views=views).batches(4))
    assert torch.equal(resumed.images, alone[4].images)
    assert not torch.equal(resumed.images, alone[3].images)
    for (images, labels), (same, too) in zip(data.test_batches(4), helped.test_batches(4), strict=True):
        assert torch.equal(images, same)
        assert torch.equal(labels, too)


def test_only_measures_are_cached(make_tree: MakeTree, cache: Path) -> None:
    name = f"folder:{make_tree()}"
    streamed = open_dataset(name, stream=True)
    assert list(cache.rglob("*.npy")) == []
    kept = open_dataset(name, stream=False)
    assert len(list(cache.rglob("*.npy"))) == 2
    assert streamed.spec.mean == kept.spec.mean
    assert streamed.spec.std == kept.spec.std


@pytest.mark.parametrize("crop", [1.0, 0.75])
def test_streamed_images_are_those_in_memory(make_tree: MakeTree, crop: float) -> None:
    name = f"folder:{make_tree(sizes=[(16, 16)])}"
    streamed = open_dataset(name, stream=True)
    kept = open_dataset(name)
    assert kept.fits
    for (images, labels), (expected, same) in zip(
        streamed.test_batches(4, crop), kept.test_batches(4, crop), strict=True
    ):
        assert torch.allclose(images, expected, atol=2 / 255)
        assert torch.equal(labels, same)
        assert images.is_contiguous(memory_format=torch.channels_last)
    plain = Protocol(batch_size=5)
    batch = next(streamed.loader(plain, seed=0).batches())
    assert torch.equal(batch.images, next(kept.loader(plain, seed=0).batches()).images)


@pytest.mark.parametrize("recipe", [Augmentation(crop=2, flip=True, jitter=0.4, erasing=0.5), Augmentation(flip=True)])
def test_what_streams_is_drawn_like_what_is_in_memory(make_tree: MakeTree, recipe: Augmentation) -> None:
    name = f"folder:{make_tree(sizes=[(16, 16)])}"
    protocol = Protocol(epochs=2, batch_size=5, augmentation=recipe)
    streamed, kept = (
        open_dataset(name, stream=stream).loader(protocol, seed=0, views=("weak", "rotations"))
        for stream in (True, False)
    )
    for one, other in zip(streamed.batches(), kept.batches(), strict=True):
        assert torch.allclose(one.images, other.images, atol=1e-6)
        assert torch.equal(one.views["weak"], other.views["weak"])


def test_resized_crops_that_stream_are_mirrored_half_of_the_time(make_tree: MakeTree) -> None:
    data = open_dataset(f"folder:{make_tree(sizes=[(16, 16)])}", stream=True)
    whole = Augmentation(resized_crop=(1.0, 1.0))
    batches = [
        torch.cat(
            [
                batch.images
                for batch in data.loader(Protocol(epochs=6, batch_size=6, augmentation=recipe), seed=0).batches()
            ]
        )
        for recipe in (whole, replace(whole, flip=True))
    ]
    mirrored = (batches[1] == batches[0].flip(3)).all((1, 2, 3))
    assert ((batches[1] == batches[0]).all((1, 2, 3)) ^ mirrored).all()
    assert 0.3 < mirrored.float().mean() < 0.7


def photograph(path: Path, width: int, height: int) -> None:
    """Writes a JPEG of a smooth pattern that differs from place to place."""
    x, y = np.meshgrid(np.linspace(0, 3, width), np.linspace(0, 2, height))
    waves = np.stack([np.sin(x * 5), np.cos(y * 4), np.sin(x + y)], axis=-1)
    Image.fromarray((127 + 120 * waves).astype(np.uint8)).save(path, quality=95)


@pytest.mark.parametrize(
    ("recipe", "decoded"),
    [
        (Augmentation(), (80, 60)),
        (Augmentation(crop=4, flip=True), (80, 60)),
        (Augmentation(resized_crop=(0.08, 1.0)), (320, 240)),
        (Augmentation(resized_crop=(0.9, 1.0)), (160, 120)),
    ],
)
def test_a_large_jpeg_is_decoded_no_larger_than_its_crops_need(
    make_tree: MakeTree, monkeypatch: pytest.MonkeyPatch, recipe: Augmentation, decoded: tuple[int, int]
) -> None:
    root = make_tree(suffixes=[".jpg"])
    for path in root.rglob("*.jpg"):
        photograph(path, 640, 480)
    data = open_dataset(f"folder:{root}", stream=True, image_size=50)
    sizes, convert = set(), Image.Image.convert

    def watched(image: Image.Image, *arguments: Any, **keywords: Any) -> Image.Image:
        sizes.add(image.size)
        return convert(image, *arguments, **keywords)

    monkeypatch.setattr(Image.Image, "convert", watched)
    next(data.loader(Protocol(batch_size=4, augmentation=recipe), seed=0).batches())
    assert sizes == {decoded}


def test_a_jpeg_decoded_small_shows_the_same(make_tree: MakeTree) -> None:
    root = make_tree(suffixes=[".jpg"])
    for path in root.rglob("*.jpg"):
        photograph(path, 640, 480)
    data = open_dataset(f"folder:{root}", stream=True, image_size=48)
    images, _ = next(data.test_batches(1, 0.8))
    with Image.open(root / "test" / "ant" / "0.jpg") as image:
        short = image.resize((80, 60), Image.Resampling.BILINEAR).crop((16, 6, 64, 54))
    expected = torch.from_numpy(np.array(short)).permute(2, 0, 1) / 255
    assert (images[0] - expected).abs().mean() < 2 / 255
    assert not torch.allclose(images[0], expected.flip(2), atol=0.1)


def test_crops_and_jitter_stream_too(make_tree: MakeTree) -> None:
    data = open_dataset(f"folder:{make_tree(sizes=[(16, 12), (20, 30)])}", image_size=8, stream=True)
    recipe = Augmentation(crop=2, flip=True, jitter=0.4)
    batch = next(data.loader(Protocol(batch_size=5, augmentation=recipe), seed=0, views=("rotations",)).batches())
    assert batch.images.shape == (5, 3, 8, 8)
    assert batch.views["rotations"].shape == (5, 4, 3, 8, 8)
    assert (batch.images == 0).all(1).any()  # padding shows somewhere
