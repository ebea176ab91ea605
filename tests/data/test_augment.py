"""Device augmentations against images taken apart by hand, and by what geometry promises."""

import numpy as np
import pytest
import torch
from torch import Tensor

from kdzoo.data import augment


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def draws(rows: int, here: Tensor | None = None) -> augment.Draws:
    return augment.Draws(generator(), rows, here)


def ramps(batch: int, side: int) -> Tensor:
    """(B, 2, side, side): each pixel holds the place of its centre, x and y in (0, 1)."""
    places = (torch.arange(side) + 0.5) / side
    return torch.stack(torch.meshgrid(places, places, indexing="xy")).expand(batch, 2, side, side).contiguous()


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("padding", [0, 1, 2])
def test_every_crop_is_one_of_the_image_s_own_and_all_of_them_occur(padding: int, flip: bool) -> None:
    images = np.random.default_rng(0).integers(1, 256, (400, 5, 6, 3), dtype=np.uint8)
    crops = augment.crop_and_flip(torch.from_numpy(images), draws(400), padding, flip).numpy()
    found = set()
    for image, crop in zip(images, crops, strict=True):
        padded = np.zeros((5 + 2 * padding, 6 + 2 * padding, 3), np.uint8)
        padded[padding : padding + 5, padding : padding + 6] = image
        matches = [
            (down, right, mirrored)
            for down in range(2 * padding + 1)
            for right in range(2 * padding + 1)
            for mirrored in {False, flip}
            if np.array_equal(crop, padded[down : down + 5, right : right + 6][:, :: -1 if mirrored else 1])
        ]
        assert len(matches) == 1
        found.add(matches[0])
    assert len(found) == (2 * padding + 1) ** 2 * (1 + flip)


def test_a_resized_crop_of_everything_is_the_image() -> None:
    images = torch.rand(6, 3, 9, 9, generator=generator())
    whole = augment.resized_crop(images, draws(6), 9, (1.0, 1.0), (1.0, 1.0))
    part = augment.resized_crop(images, draws(6), 9, (0.5, 0.5), (1.0, 1.0))
    assert torch.allclose(whole, images, atol=1e-5)
    assert not torch.allclose(part, images, atol=1e-2)


def test_a_resized_crop_of_everything_is_mirrored_in_half_of_the_images() -> None:
    images = torch.rand(64, 3, 9, 9, generator=generator())
    crops = augment.resized_crop(images, draws(64), 9, (1.0, 1.0), (1.0, 1.0), flip=True)
    straight = torch.isclose(crops, images, atol=1e-5).all((1, 2, 3))
    mirrored = torch.isclose(crops, images.flip(3), atol=1e-5).all((1, 2, 3))
    assert torch.all(straight ^ mirrored)
    assert 16 < mirrored.sum() < 48


def test_resized_crops_have_the_areas_and_ratios_asked_for_and_lie_everywhere() -> None:
    side, size = 64, 32
    crops = augment.resized_crop(ramps(500, side), draws(500), size, (0.2, 0.5))
    # A box's width from the step between two pixels well inside, where the border does not clamp.
    width = (crops[:, 0, 16, 20] - crops[:, 0, 16, 12]) / 8 * size
    height = (crops[:, 1, 20, 16] - crops[:, 1, 12, 16]) / 8 * size
    area, ratio = width * height, width / height
    assert 0.199 < area.min() < 0.22
    assert 0.48 < area.max() < 0.501
    assert 0.749 < ratio.min() < 0.78
    assert 1.30 < ratio.max() < 1.334
    left, right = crops[:, 0, 16, 0], crops[:, 0, 16, -1]
    assert left.min() < 0.03
    assert right.max() > 0.97


def test_resizing_up_and_down_keeps_a_ramp() -> None:
    for size in (32, 8):
        assert torch.allclose(augment.resize(ramps(1, 16), size).mean(), torch.tensor(0.5), atol=1e-6)
    inner = augment.resize(ramps(1, 16), 32)[:, :, 4:-4, 4:-4]
    assert torch.allclose(inner, ramps(1, 32)[:, :, 4:-4, 4:-4], atol=1e-6)


def test_jitter_of_nothing_changes_nothing_and_gray_stays_gray() -> None:
    images = torch.rand(8, 3, 6, 6, generator=generator())
    assert torch.allclose(augment.jitter(images, draws(8), 0.0), images, atol=1e-6)
    gray = images[:, :1].expand(-1, 3, -1, -1)
    jittered = augment.jitter(gray, draws(8), 0.4)
    assert torch.allclose(jittered[:, 0], jittered[:, 2], atol=1e-6)
    assert not torch.allclose(jittered, gray, atol=1e-2)
    assert 0 <= jittered.min() <= jittered.max() <= 1


def test_erasing_replaces_one_rectangle_of_a_share_of_the_images() -> None:
    images = torch.full((600, 3, 32, 32), 2.0)  # out of range, so that noise never equals it
    erased = augment.erase(images, draws(600), 0.25, (0.5, 0.5, 0.5), (0.2, 0.2, 0.2))
    changed = (erased != images).all(1)
    assert torch.equal(changed, (erased != images).any(1))
    hit = changed.any(2).any(1)
    assert 0.18 < hit.float().mean() < 0.32
    for mask in changed[hit]:
        rows, columns = mask.any(1), mask.any(0)
        assert mask.sum() == rows.sum() * columns.sum()
        assert torch.equal(mask, rows[:, None] & columns[None])
        assert 0.01 < mask.float().mean() < 0.37
    noise = erased[erased <= 1]
    assert torch.allclose(noise.mean(), torch.tensor(0.5), atol=0.01)
    assert torch.allclose(noise.std(), torch.tensor(0.2), atol=0.01)
    assert torch.equal(augment.erase(images, draws(600), 0.0, (0.5,) * 3, (0.2,) * 3), images)


AUGMENTATIONS = {
    "crop_and_flip": lambda images, draws: augment.crop_and_flip(images, draws, padding=2, flip=True),
    "resized_crop": lambda images, draws: augment.resized_crop(images, draws, 8, (0.3, 1.0), flip=True),
    "jitter": lambda images, draws: augment.jitter(images, draws, 0.4),
    "erase": lambda images, draws: augment.erase(images, draws, 0.7, (0.5,) * 3, (0.2,) * 3),
}


@pytest.mark.parametrize("augmentation", AUGMENTATIONS.values(), ids=AUGMENTATIONS)
def test_some_rows_of_a_batch_are_augmented_as_they_are_in_the_whole(augmentation) -> None:
    images = torch.rand(32, 3, 8, 8, generator=generator())
    here = torch.tensor([3, 4, 17, 30])
    whole, some = augmentation(images, draws(32)), augmentation(images[here], draws(32, here))
    assert torch.equal(some, whole[here])
    assert not torch.equal(augmentation(images[here], draws(4)), whole[here])


def test_rotations_turn_counter_clockwise() -> None:
    images = torch.rand(2, 3, 5, 5, generator=generator())
    turned = augment.rotations(images).numpy()
    assert turned.shape == (2, 4, 3, 5, 5)
    for turns in range(4):
        assert np.array_equal(turned[:, turns], np.rot90(images.numpy(), turns, (2, 3)))
