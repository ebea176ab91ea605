"""Whether bf16 is faster than float32 on this processor: measured once for each machine, then remembered."""

import json
import platform
import time
from collections.abc import Callable
from contextlib import suppress
from hashlib import blake2b
from pathlib import Path
from statistics import median

import torch
from filelock import FileLock
from torch.nn import functional as F

from kdzoo.errors import UserError
from kdzoo.files import cache_folder, write_text

ROUNDS = 11
CLEARLY = 1.2  # how many times as fast bf16 must be: a tie is float32's, and no noise decides it

Timer = Callable[[torch.dtype], float]  # seconds that the same work takes in a precision


def training_work(dtype: torch.dtype) -> float:
    """Seconds for a convolution and a product of matrices, forward and backward, under autocast to ``dtype``.

    On one thread: a run's precision is part of what it is, and the number of threads is not.
    """
    images = torch.ones(16, 64, 16, 16).contiguous(memory_format=torch.channels_last).requires_grad_()
    kernel = torch.ones(64, 64, 3, 3).contiguous(memory_format=torch.channels_last).requires_grad_()
    matrix = torch.ones(64, 1024, requires_grad=True)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        begun = time.perf_counter()
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            maps = F.conv2d(images, kernel, padding=1)
            mixed = maps.permute(0, 2, 3, 1).flatten(0, 2) @ matrix
        mixed.backward(torch.ones_like(mixed))
        return time.perf_counter() - begun
    finally:
        torch.set_num_threads(threads)


def speedup(seconds: Timer) -> float:
    """How many times as fast bf16 is as float32: the median over rounds in which both take turns."""
    for dtype in (torch.float32, torch.bfloat16):
        seconds(dtype)  # warm-up
    return median(seconds(torch.float32) / seconds(torch.bfloat16) for _ in range(ROUNDS))


def bf16_is_faster(seconds: Timer = training_work) -> bool:
    """Whether bf16 is clearly faster here: read where it was measured before, else measured and written down.

    Raises:
        UserError: the cache cannot be written, so the next run might decide otherwise.
    """
    machine = f"{processor()}, torch {torch.__version__}"
    file = cache_folder() / "precision" / f"{blake2b(machine.encode(), digest_size=6).hexdigest()}.json"
    known = _read(file)
    if known is not None:
        return known
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(file.with_suffix(".lock")):  # two that measure at once would disturb each other, and differ
            known = _read(file)
            if known is None:
                ratio = speedup(seconds)
                known = ratio >= CLEARLY
                found = {"bf16_is_faster": known, "times_as_fast": round(ratio, 2), "machine": machine}
                write_text(file, json.dumps(found, indent=2) + "\n")
    except OSError as error:
        raise UserError(
            f"{file.parent} cannot be written ({error.strerror}), and 'auto' keeps there which precision is faster; "
            "set KDZOO_CACHE to another folder, or engine.precision to float32 or bf16"
        ) from error
    return known


def processor() -> str:
    """The processor's model and what it can do, as far as the system and torch tell."""
    name = platform.processor()
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), name)
    capabilities: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
    return ", ".join([name, *(sorted(key for key, value in capabilities.items() if value is True))])


def _read(file: Path) -> bool | None:
    try:
        return bool(json.loads(file.read_text(encoding="utf-8"))["bf16_is_faster"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
