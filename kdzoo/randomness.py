"""Named random seeds: each use has its own, so a resumed run repeats them and runs cannot disturb each other."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import blake2b

import numpy as np
import torch


def seed_of(*name: int | str) -> int:
    """Compute a seed in [0, 2^63) from the name of its use, such as ``(seed, step, "weak")``."""
    return int.from_bytes(blake2b(repr(name).encode(), digest_size=8).digest(), "big") >> 1


def seed_torch(seed: int) -> None:
    """Seed torch's global generators as ``torch.manual_seed`` does, which takes long to find no accelerator."""
    if torch.accelerator.is_available():
        torch.manual_seed(seed)
    else:
        torch.default_generator.manual_seed(seed)


@contextmanager
def restored(device: torch.device) -> Iterator[None]:
    """Restore the state of torch's generators on exit: of the CPU's and of ``device``'s; no other device is touched."""
    on_cpu = device.type == "cpu"
    with torch.random.fork_rng([] if on_cpu else [device], device_type="cuda" if on_cpu else device.type):
        yield


@contextmanager
def globally_seeded(*name: int | str) -> Iterator[None]:
    """Seed the global generators of Python, NumPy and torch, and restore their state on exit.

    Python's, numpy's and torch's CPU generator; CUDA's are left alone, as nothing under this draws from them.
    """
    # timm draws from numpy's global generator, hence the legacy calls.
    before = random.getstate(), np.random.get_state(), torch.default_generator.get_state()  # noqa: NPY002
    seed = seed_of(*name)
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])  # noqa: NPY002
        torch.default_generator.set_state(before[2])
