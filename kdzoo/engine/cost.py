"""Measure what a student costs where it runs: operations of one image, and latency."""

import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from statistics import median
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from kdzoo.modes import evaluating

BATCHES = (1, 64)  # images, whose latency is measured
FEWEST = 3  # passes of a batch after one to warm up
SECONDS = 0.05  # after which no further pass begins beyond these
LONGEST = 0.5  # seconds after which none begins at all; a first pass that took so long is the measurement
Number = TypeVar("Number", int, float)


class Cost(NamedTuple):
    """What a network costs; None where it cannot be measured."""

    flops: int | None = None  # of one image; a multiplication with its addition is two
    latency_1: float | None = None  # milliseconds of one image
    latency_64: float | None = None  # milliseconds of 64 images in one batch


def measure(network: nn.Module, image_size: int, device: torch.device) -> Cost:
    """Measure a network on its device, in float32 and evaluation mode.

    After one pass to warm up, a batch passes until a twentieth of a second is over, at least three times, or until half
    a second is over; the median counts. Where the first pass takes half a second, it counts, and no other follows.
    What a network cannot do, such as read a single image, is left out.

    Args:
        network: images (B, 3, H, W) in [0, 1] -> an ``Output``.
        image_size: H and W.
        device: where the network lies.
    """
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(max(BATCHES), 3, image_size, image_size, generator=generator).to(device)
    images = images.contiguous(memory_format=torch.channels_last)
    compiled = any(getattr(module, "_compiled_call_impl", None) is not None for module in network.modules())
    with evaluating(network), torch.compiler.set_stance("force_eager") if compiled else nullcontext():
        one, many = (_tried(partial(_latency, network, images[:count])) for count in BATCHES)
        return Cost(_tried(partial(_flops, network, images[:1])), one, many)


def _flops(network: nn.Module, images: Tensor) -> int:
    # With gradients, and attention as products: torch's fused kernels for inference are not counted on every device.
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        network(images)
    return int(counter.get_total_flops())


def _latency(network: nn.Module, images: Tensor) -> float:
    wait = torch.accelerator.synchronize if images.device.type != "cpu" else lambda: None

    def once() -> float:
        wait()
        begun = time.perf_counter()
        network(images)
        wait()
        return time.perf_counter() - begun

    with torch.inference_mode():
        first, seconds = once(), list[float]()
        while first < LONGEST and sum(seconds) < (LONGEST if len(seconds) < FEWEST else SECONDS):
            seconds.append(once())
    return round(1000 * median(seconds or [first]), 3)


def _tried(work: Callable[[], Number]) -> Number | None:
    """Do a work that is not worth the failure of a run that is trained: None where it fails."""
    try:
        return work()
    except Exception:
        return None
