"""Decode, crop and resize images one by one, in worker processes if asked: for large sets and for RandAugment."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data.auto_augment import RandAugment, posterize
from timm.data.transforms_factory import create_transform
from torch import Tensor
from torch.utils.data import DataLoader, default_collate
from torch.utils.data import Dataset as TorchDataset
from torchvision import transforms

from kdzoo.data.pictures import Pictures
from kdzoo.errors import UserError
from kdzoo.own_code import script_hidden
from kdzoo.randomness import globally_seeded
from kdzoo.recipe import Augmentation

PLAIN = "plain"  # the view that is cropped and mirrored as the images are, and not changed otherwise
AHEAD = 4  # batches that each worker prepares in advance, so that one slow image delays nothing

DRAWN_AS = {PLAIN: "images"}  # the draws of a view that are those of another

# What torch says where a worker cannot hand over a batch, by an error or by its death.
OUT_OF_SHARED_MEMORY = ("shared memory", "No space left on device", "Bus error")
LOST = "DataLoader worker (pid"  # and where one has died
RAISED = "in DataLoader worker process"  # and where one has raised an error

Transform = Callable[[Image.Image], Image.Image]  # any size -> a square


def worker_transform(augmentation: Augmentation, size: int, mean: tuple[float, ...], whole: bool = True) -> Transform:
    """Make the part of a recipe that workers do: crop and resize, and with RandAugment all up to it.

    As everywhere in timm, colour jitter is left out where RandAugment is on. Without ``whole``, RandAugment itself is
    left out at the end, so that draws before it stay the same.
    """
    if not augmentation.rand_augment:
        augmentation = Augmentation(resized_crop=augmentation.resized_crop)
    primary, secondary, _ = create_transform(
        size,
        is_training=True,
        scale=augmentation.resized_crop,
        hflip=0.5 if augmentation.flip else 0.0,
        color_jitter=None,  # type: ignore[arg-type]  # None is off
        auto_augment=augmentation.rand_augment,
        interpolation="bilinear",
        mean=mean,
        normalize=False,
        separate=True,
    )
    if augmentation.resized_crop is None:
        crops: list[Callable[..., Any]] = [transforms.Resize(size), transforms.CenterCrop(size)]
        if augmentation.crop:
            crops.append(transforms.RandomCrop(size, padding=augmentation.crop))
        if augmentation.flip:
            crops.append(transforms.RandomHorizontalFlip())
        primary = transforms.Compose(crops)
    for transform in secondary.transforms:
        if isinstance(transform, RandAugment):
            for operation in transform.ops:
                if operation.aug_fn is posterize:
                    operation.aug_fn = _posterize
    return transforms.Compose([primary, secondary] if whole else [primary])


def left_for_the_device(augmentation: Augmentation) -> Augmentation:
    """Select the part of a recipe that remains for the device after ``worker_transform``."""
    return Augmentation() if augmentation.rand_augment else replace(augmentation, resized_crop=None)


def side_needed(augmentation: Augmentation, size: int) -> int:
    """Compute the short side in pixels at which no crop of the recipe has fewer than ``size`` pixels a side."""
    if augmentation.resized_crop is None:
        return size
    return math.ceil(size / math.sqrt(augmentation.resized_crop[0] * 3 / 4))  # boxes are up to 4 by 3


def whole_transform(size: int, test_crop: float) -> Transform:
    """Resize the short side to ``size / test_crop``, then cut out the centre."""
    return transforms.Compose([transforms.Resize(int(size / test_crop)), transforms.CenterCrop(size)])


def _posterize(image: Image.Image, bits: int, **options: Any) -> Image.Image:
    """Posterize as timm does; at full strength no bit is left, which Pillow refuses: the image is black."""
    return posterize(image, bits, **options) if bits > 0 else Image.new(image.mode, image.size)


class Streamed(TorchDataset[Any]):
    """Decode an image by (epoch, row) and pass it once through each transform: a dict of (S, S, 3) uint8.

    A draw is seeded by epoch, row and transform's name: neither workers nor further transforms change it. ``plain`` is
    drawn as ``images`` are.

    Args:
        pictures: the images.
        transforms: by name; each makes squares of one size.
        side: the short side in pixels that suffices for all of them; images may be decoded no larger.
        seed: of every draw.
    """

    def __init__(self, pictures: Pictures, transforms: Mapping[str, Transform], side: int, seed: int):
        self.pictures, self.transforms, self.side, self.seed = pictures, transforms, side, seed

    def __getitem__(self, key: tuple[int, int]) -> "dict[str, Tensor] | UserError":
        epoch, row = key
        try:
            picture = self.pictures.decoded(row, self.side)
        except UserError as error:  # raised, it would come back from a worker wrapped in a traceback
            return error
        drawn = {}
        for name, transform in self.transforms.items():
            with globally_seeded(self.seed, epoch, row, DRAWN_AS.get(name, name)):
                drawn[name] = torch.from_numpy(np.array(transform(picture)))
        return drawn


def stream(
    dataset: TorchDataset[Any], keys: Iterable[list[Any]], workers: int, device: torch.device
) -> Iterator[dict[str, Tensor]]:
    """Yield a dict of (B, S, S, 3) uint8 tensors on the device for each list of keys.

    One loader serves all keys, across epochs: its workers start once and are always some batches ahead. Bytes travel to
    the device, and floats are made there.
    """
    loader: DataLoader[Any] = DataLoader(
        dataset,
        batch_sampler=keys,
        num_workers=workers,
        prefetch_factor=AHEAD if workers else None,
        collate_fn=_collate,
        pin_memory=device.type == "cuda",
        generator=torch.Generator(),  # else the loader draws its base seed from the global one
    )
    with lost_workers_told(workers):
        with script_hidden():
            batches = iter(loader)
        for batch in batches:
            if isinstance(batch, UserError):
                raise batch
            yield {name: pixels.to(device, non_blocking=True) for name, pixels in batch.items()}


@contextmanager
def lost_workers_told(workers: int) -> Iterator[None]:
    """Raise a ``UserError`` in place of torch's where one of so many workers was lost, or cannot hand over a batch."""
    try:
        yield
    except (RuntimeError, EOFError, ConnectionError, FileNotFoundError) as error:
        said = str(error.__cause__ or "") or str(error) or type(error).__name__
        if not workers or RAISED in said:
            raise
        if any(sign in f"{error} {said}" for sign in OUT_OF_SHARED_MEMORY):
            raise UserError(
                f"shared memory does not hold the images that {workers} workers decode ahead; set data.workers=0, or "
                "give the container more, as docker run --shm-size=2g does"
            ) from error
        if isinstance(error, RuntimeError) and LOST not in said:
            raise
        raise UserError(  # it died at work, or while it handed a batch over by a socket
            f"a process that decodes images was lost ({said.strip().rstrip('.')}), mostly for lack of memory; run "
            "the same command again, with a lower data.workers or data.workers=0 where it happens again"
        ) from error


def _collate(items: list[Any]) -> Any:
    errors = [item for item in items if isinstance(item, UserError)]
    return errors[0] if errors else default_collate(items)
