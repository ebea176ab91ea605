"""Augment batches on the device by a few tensor operations, each image with its own random draw."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Generator, Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class Draws:
    """Draw random numbers for all rows of a batch, and keep those of the rows that this process has.

    They are drawn for every row, so that a row's are the same however many processes the batch is spread over.
    """

    generator: Generator  # on the images' device
    rows: int  # of the whole batch
    here: Tensor | None = None  # (B,) int64: which of them the images are; None: all

    def of(self, numbers: Tensor, dim: int = 0) -> Tensor:
        """Select the numbers of the rows that are here, out of those of all rows along ``dim``."""
        return numbers if self.here is None else numbers.index_select(dim, self.here)


def floats(pixels: Tensor) -> Tensor:
    """Convert pixels (B, H, W, C) uint8 to images (B, C, H, W) float in [0, 1], channels last."""
    return pixels.permute(0, 3, 1, 2).to(torch.float32).div_(255)


def crop_and_flip(images: Tensor, draws: Draws, padding: int = 0, flip: bool = False) -> Tensor:
    """Cut random crops of the original size after zero padding, and mirror half of them if ``flip`` is set.

    Args:
        images: (B, H, W, C), any dtype.
        draws: what random numbers come from.
        padding: pixels added at each side.
        flip: whether half of the images are mirrored left to right.

    Returns:
        (B, H, W, C), the same dtype.
    """
    batch, height, width, _ = images.shape
    device, generator = images.device, draws.generator
    if padding:
        shifts = torch.randint(2 * padding + 1, (2, draws.rows), generator=generator, device=device)
        down, right = draws.of(shifts, dim=1)
        padded = F.pad(images, (0, 0, padding, padding, padding, padding))
        # A view of every window, (B, 2p+1, 2p+1, H, W, C), from which one gather takes each sample's.
        windows = padded.unfold(1, height, 1).unfold(2, width, 1).permute(0, 1, 2, 4, 5, 3)
        images = windows[torch.arange(batch, device=device), down, right]
    if flip:
        mirrored = draws.of(torch.rand(draws.rows, 1, 1, 1, generator=generator, device=device)) < 0.5
        images = torch.where(mirrored, images.flip(2), images)
    return images


def resized_crop(
    images: Tensor,
    draws: Draws,
    size: int,
    scale: tuple[float, float],
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
    flip: bool = False,
) -> Tensor:
    """Cut a random box out of each image and resize it to a square by bilinear interpolation.

    As in torchvision, a box that does not fit is drawn again; after ten it is the whole image.

    Args:
        images: (B, C, H, W) float in [0, 1], square.
        draws: what random numbers come from.
        size: side of the result in pixels.
        scale: range of the box's share of the area.
        ratio: range of the box's width over its height.
        flip: whether half of the boxes are mirrored left to right.

    Returns:
        (B, C, size, size) float in [0, 1], channels last.
    """
    batch, device, generator = len(images), images.device, draws.generator
    low, high = math.log(ratio[0]), math.log(ratio[1])
    tries = draws.of(torch.rand(2, draws.rows, 10, generator=generator, device=device), dim=1)
    area, aspect = scale[0] + (scale[1] - scale[0]) * tries[0], torch.exp(low + (high - low) * tries[1])
    width, height = (area * aspect).sqrt(), (area / aspect).sqrt()  # (B, 10), shares of the image's side
    fits = (width <= 1) & (height <= 1)
    first = fits.to(torch.uint8).argmax(1, keepdim=True)
    whole = ~fits.any(1)
    width = width.gather(1, first).squeeze(1).masked_fill(whole, 1.0)
    height = height.gather(1, first).squeeze(1).masked_fill(whole, 1.0)
    # Centres in affine_grid's coordinates, where the image spans -1 to 1.
    places = 2 * draws.of(torch.rand(2, draws.rows, generator=generator, device=device), dim=1) - 1
    x, y = places[0] * (1 - width), places[1] * (1 - height)
    if flip:
        mirrored = draws.of(torch.rand(draws.rows, generator=generator, device=device)) < 0.5
        width = torch.where(mirrored, -width, width)
    nothing = torch.zeros_like(x)
    theta = torch.stack([width, nothing, x, nothing, height, y], dim=1).view(batch, 2, 3)
    grid = F.affine_grid(theta, [batch, images.shape[1], size, size], align_corners=False)
    crops = F.grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=False)
    return crops.clamp_(0, 1).contiguous(memory_format=torch.channels_last)


def resize(images: Tensor, size: int) -> Tensor:
    """Resize images (B, C, H, W) float in [0, 1] to squares: bilinear, smoothed first where they shrink."""
    if images.shape[-2:] == (size, size):
        return images
    shrinks = images.shape[-1] > size
    resized = F.interpolate(images, (size, size), mode="bilinear", align_corners=False, antialias=shrinks)
    return resized.clamp_(0, 1).contiguous(memory_format=torch.channels_last)


def jitter(images: Tensor, draws: Draws, strength: float) -> Tensor:
    """Scale brightness, contrast and saturation, each by a factor from [1 - strength, 1 + strength].

    torchvision shuffles the three; here their order is fixed. Images (B, 3, H, W) float in [0, 1].
    """
    factors = torch.empty(3, draws.rows, 1, 1, 1, device=images.device)
    factors.uniform_(max(0.0, 1 - strength), 1 + strength, generator=draws.generator)
    brightness, contrast, saturation = draws.of(factors, dim=1)
    images = (images * brightness).clamp_(0, 1)
    mean = _gray(images).mean((1, 2, 3), keepdim=True)
    images = torch.lerp(mean, images, contrast).clamp_(0, 1)
    return torch.lerp(_gray(images), images, saturation).clamp_(0, 1)


def _gray(images: Tensor) -> Tensor:
    """Compute luma (B, 1, H, W) by ITU-R BT.601, which Pillow and torchvision use."""
    red, green, blue = images.split(1, dim=1)
    return 0.299 * red + 0.587 * green + 0.114 * blue


def erase(images: Tensor, draws: Draws, probability: float, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Erase a random rectangle in a share of the images: it becomes noise, normal once images are normalised.

    A box covers 2% to a third of the area with a height over width of 0.3 to 1/0.3, as in timm; noise outside
    of [0, 1] is clamped. Images (B, 3, H, W) float in [0, 1].
    """
    _, channels, height, width = images.shape
    device, generator = images.device, draws.generator
    numbers = torch.rand(5, draws.rows, 1, 1, 1, generator=generator, device=device)
    chosen, area, aspect, down, right = draws.of(numbers, dim=1)
    area = (0.02 + (1 / 3 - 0.02) * area) * height * width
    aspect = torch.exp((2 * aspect - 1) * math.log(1 / 0.3))
    tall = (area * aspect).sqrt().round().clamp(max=height)
    wide = (area / aspect).sqrt().round().clamp(max=width)
    top, left = (down * (height - tall + 1)).floor(), (right * (width - wide + 1)).floor()
    y = torch.arange(height, device=device).view(-1, 1)
    x = torch.arange(width, device=device)
    inside = (y >= top) & (y < top + tall) & (x >= left) & (x < left + wide) & (chosen < probability)
    last = torch.channels_last if images.is_contiguous(memory_format=torch.channels_last) else torch.contiguous_format
    noise = torch.empty(draws.rows, channels, height, width, device=device, memory_format=last)
    noise = draws.of(noise.normal_(generator=generator))
    for channel in range(channels):
        noise[:, channel].mul_(std[channel]).add_(mean[channel])
    return torch.where(inside, noise.clamp_(0, 1), images)


def rotations(images: Tensor) -> Tensor:
    """Turn images (B, C, H, H) by 0, 90, 180 and 270 degrees: (B, 4, C, H, H)."""
    return torch.stack([images.rot90(turns, (2, 3)) for turns in range(4)], dim=1)
