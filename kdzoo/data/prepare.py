"""Prepare images for use: decide their size, decode those that fit into memory, measure how bright they are."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import psutil
import torch
from numpy.typing import NDArray

from kdzoo.data.cache import cached_pixels, read_facts, square, write_facts
from kdzoo.data.pictures import Files, Pictures, Pixels
from kdzoo.data.sources import Source, stratified
from kdzoo.errors import UserError

_ALWAYS_FITS = 4 * 2**30  # bytes
_SAMPLE = 2048  # images that are decoded to measure a set that is too large for memory

Channels = tuple[float, ...]


class Ready(NamedTuple):
    """Images that are ready, with the mean and standard deviation of training images in [0, 1]."""

    train: Pictures
    test: Pictures
    image_size: int
    fits: bool
    mean: Channels
    std: Channels


def prepare(
    source: Source,
    image_size: int | None,
    device: torch.device,
    folder: Path,
    report: Callable[[str], object] | None,
    stream: bool | None,
) -> Ready:
    """Decide the size of images and whether the device keeps them, and decode those into the cache ``folder``.

    ``report`` is called with a line of progress.
    """
    if image_size is not None and image_size < 1:
        raise UserError(f"image size is {image_size}; expected a side in pixels")
    train, test = source.train, source.test
    if isinstance(train, Pixels):
        mean, std = measured(train.array)
        return Ready(train, test, image_size or train.array.shape[1], not stream, mean, std)
    assert isinstance(test, Files)

    place = folder / source.key
    digests = train.digest(), test.digest()
    notes, digest = place / f"{train.split}.json", "".join(digests)
    facts = read_facts(notes, digest)
    known = dict(facts)
    if "size" not in facts:
        common = train.common_size()
        facts["size"] = min(common) if common and common == test.common_size() else None
    native: int | None = facts["size"]
    image_size = image_size or native or 224
    # A test crop of 0.875 wants this much; a set of one size needs no more than it has.
    side = min(round(image_size / 0.875), native or 2**31)
    fits = not stream if stream is not None else _fits((len(train) + len(test)) * side**2 * 3, device)
    if fits:
        train, test = (
            cached_pixels(files, side, its, place / f"{files.split}-{side}.npy", report)
            for files, its in zip((train, test), digests, strict=True)
        )
    brightness = f"{'all' if fits else 'sample'} at {side}"
    if brightness not in facts:
        facts[brightness] = measured(train.array if isinstance(train, Pixels) else _sampled(train, side))
    if facts != known:
        write_facts(notes, digest, facts)
    mean, std = (tuple(values) for values in facts[brightness])
    return Ready(train, test, image_size, fits, mean, std)


def measured(pixels: NDArray[np.uint8]) -> tuple[Channels, Channels]:
    """Measure mean and standard deviation per channel of pixels (N, H, W, 3), in units of images in [0, 1]."""
    counts = np.zeros((3, 256))
    for start in range(0, len(pixels), 1024):
        for channel in range(3):
            values = pixels[start : start + 1024, ..., channel]
            counts[channel] += np.bincount(values.ravel(), minlength=256)
    shades = np.arange(256) / 255
    shares = counts / counts.sum(1, keepdims=True)
    mean = shares @ shades
    std = np.sqrt(shares @ shades**2 - mean**2)
    return tuple(mean.round(6).tolist()), tuple(std.round(6).tolist())


def _sampled(files: Files, side: int) -> NDArray[np.uint8]:
    rows = stratified(files.labels, _SAMPLE)
    return np.stack([square(files, row, side) for row in rows.tolist()])


def _fits(size: int, device: torch.device) -> bool:
    """Tell whether so many bytes may be kept: up to 4 GiB, or a third of the device's memory.

    Of all its memory, not of what is free: a run that resumes beside another one must take the same path.
    """
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory
    else:
        memory = psutil.virtual_memory().total
    return size <= max(_ALWAYS_FITS, memory // 3)
