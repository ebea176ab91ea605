"""Sets that stream: the same bits with any number of workers, and the same pictures as in memory."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from kdzoo.config import Augmentation, Protocol
from kdzoo.data import open_dataset

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


# Since Python 3.12 a fork beside other threads warns; the workers of torch's loader are forks on Linux.
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_workers_change_nothing(make_tree: MakeTree) -> None:
    data = open_dataset(f"folder:{make_tree()}", progress=False, stream=True)
    assert not data.fits
    views = ("weak", "strong")
    alone = list(data.loader(PROTOCOL, seed=0, views=views).batches())
    shared = list(data.loader(PROTOCOL, seed=0, views=views, workers=2).batches())
    assert len(alone) == 6
    for one, other in zip(alone, shared, strict=True):
        assert torch.equal(one.images, other.images)
        assert torch.equal(one.targets, other.targets)
        assert all(torch.equal(one.views[view], other.views[view]) for view in views)
    resumed = next(data.loader(PROTOCOL, seed=0, views=views).batches(4))
    assert torch.equal(resumed.images, alone[4].images)
    assert not torch.equal(resumed.images, alone[3].images)


def test_only_measures_are_cached(make_tree: MakeTree, cache: Path) -> None:
    name = f"folder:{make_tree()}"
    streamed = open_dataset(name, progress=False, stream=True)
    assert list(cache.rglob("*.u8")) == []
    kept = open_dataset(name, progress=False, stream=False)
    assert len(list(cache.rglob("*.u8"))) == 2
    assert streamed.spec.mean == kept.spec.mean
    assert streamed.spec.std == kept.spec.std


@pytest.mark.parametrize("crop", [1.0, 0.75])
def test_streamed_images_are_those_in_memory(make_tree: MakeTree, crop: float) -> None:
    name = f"folder:{make_tree(sizes=[(16, 16)])}"
    streamed = open_dataset(name, progress=False, stream=True)
    kept = open_dataset(name, progress=False)
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


def test_crops_and_jitter_stream_too(make_tree: MakeTree) -> None:
    data = open_dataset(f"folder:{make_tree(sizes=[(16, 12), (20, 30)])}", progress=False, image_size=8, stream=True)
    recipe = Augmentation(crop=2, flip=True, jitter=0.4)
    batch = next(data.loader(Protocol(batch_size=5, augmentation=recipe), seed=0, views=("rotations",)).batches())
    assert batch.images.shape == (5, 3, 8, 8)
    assert batch.views["rotations"].shape == (5, 4, 3, 8, 8)
    assert (batch.images == 0).all(1).any()  # padding shows somewhere
