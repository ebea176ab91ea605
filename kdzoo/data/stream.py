"""Pictures decoded and augmented one by one, in worker processes where asked: large sets and RandAugment."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from PIL import Image
from timm.data.auto_augment import RandAugment, posterize
from timm.data.transforms_factory import create_transform
from torch import Tensor
from torch.utils.data import DataLoader, default_collate
from torch.utils.data import Dataset as TorchDataset
from torchvision import transforms

from kdzoo.config import Augmentation
from kdzoo.data.sources import Pictures
from kdzoo.errors import UserError
from kdzoo.randomness import globally_seeded

Transform = Callable[[Any], Tensor]  # a Pillow image -> (3, H, W) uint8


def train_transform(augmentation: Augmentation, size: int, mean: tuple[float, ...]) -> Transform:
    """timm's training transform, up to erasing and mixing, which follow on the device.

    As everywhere in timm, colour jitter is left out where RandAugment is on.
    """
    primary, secondary, final = create_transform(
        size,
        is_training=True,
        scale=augmentation.resized_crop,
        hflip=0.5 if augmentation.flip else 0.0,
        color_jitter=augmentation.jitter or None,  # type: ignore[arg-type]  # None is off
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
    return transforms.Compose([primary, secondary, final])


def _posterize(image: Image.Image, bits: int, **options: Any) -> Image.Image:
    """timm's, which at full strength keeps no bit: black, though Pillow has come to refuse that."""
    return posterize(image, bits, **options) if bits > 0 else Image.new(image.mode, image.size)


def whole_transform(size: int, test_crop: float) -> Transform:
    """The short side resized to ``size / test_crop``, then the centre."""
    return create_transform(size, interpolation="bilinear", crop_pct=test_crop, normalize=False)


class Streamed(TorchDataset[Any]):
    """(epoch, row) -> the picture once through each transform, as a dict of (3, H, W) uint8.

    A draw is seeded by epoch, row and transform's name: neither workers nor further transforms change it.
    """

    def __init__(self, pictures: Pictures, transforms: Mapping[str, Transform], seed: int):
        self.pictures, self.transforms, self.seed = pictures, transforms, seed

    def __getitem__(self, key: tuple[int, int]) -> "dict[str, Tensor] | UserError":
        epoch, row = key
        try:
            picture = self.pictures[row]
        except UserError as error:  # raised, it would come back from a worker wrapped in a traceback
            return error
        drawn = {}
        for name, transform in self.transforms.items():
            with globally_seeded(self.seed, epoch, row, name):
                drawn[name] = transform(picture)
        return drawn


def stream(
    dataset: Streamed, keys: Iterable[list[tuple[int, int]]], workers: int, device: torch.device
) -> Iterator[dict[str, Tensor]]:
    """One dict of (B, 3, H, W) float tensors in [0, 1] on the device, channels last, per list of keys."""
    loader: DataLoader[Any] = DataLoader(
        dataset,
        batch_sampler=keys,
        num_workers=workers,
        collate_fn=_collate,
        pin_memory=device.type == "cuda",
        generator=torch.Generator(),  # else the loader draws its base seed from the global one
    )
    for batch in loader:
        if isinstance(batch, UserError):
            raise batch
        yield {name: _floats(images.to(device, non_blocking=True)) for name, images in batch.items()}


def _collate(items: list[Any]) -> Any:
    errors = [item for item in items if isinstance(item, UserError)]
    return errors[0] if errors else default_collate(items)


def _floats(images: Tensor) -> Tensor:
    return images.to(torch.float32, memory_format=torch.channels_last).div_(255)
