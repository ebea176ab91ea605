"""Detect what a step does in Python or on the host, where a CUDA graph cannot repeat it."""

import random
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


@contextmanager
def host_work(device: torch.device) -> Iterator[list[str]]:
    """Detect what a CUDA graph cannot capture: waiting for the device, and random numbers drawn by the host."""
    found: list[str] = []
    if device.type != "cuda":
        yield found
        return
    drawn, mode = generators(), torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield found
        finally:
            torch.cuda.set_sync_debug_mode(mode)
    for warning in caught:
        if "called a synchronizing" in str(warning.message):
            found.append(f"the host reads the device at {Path(warning.filename).name}:{warning.lineno}")
        elif "debug mode is a prototype" not in str(warning.message):
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
    if drawn != generators():
        found.append("the host draws random numbers in it")


def generators() -> tuple[Any, ...]:
    """Read the state of the host's generators, which a capture does not follow: Python's, numpy's and torch's."""
    # A method may draw from numpy's global generator, hence the legacy call.
    numbers = np.random.get_state(legacy=False)  # noqa: NPY002
    return (
        random.getstate(),
        str(numbers),
        numbers["state"]["key"].tobytes(),
        torch.default_generator.get_state().tolist(),
    )


def kept(module: nn.Module) -> dict[str, Any]:
    """Read what a module and its parts hold between steps: plain values, and where their tensors lie."""
    held: dict[str, Any] = {}
    for path, owner in module.named_modules():
        own = [*owner.named_parameters(recurse=False), *owner.named_buffers(recurse=False), *vars(owner).items()]
        for name, value in own:
            if isinstance(value, Tensor):
                held[f"{path}.{name}"] = value.data_ptr()
            elif isinstance(value, bool | int | float | str):
                held[f"{path}.{name}"] = value
    return held


def changed(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """List the names whose values differ."""
    return [name for name in {**before, **after} if before.get(name) != after.get(name)]


def first_line(error: BaseException) -> str:
    """Find the first error and its first line; a capture that was broken off raises again when it ends."""
    while error.__context__ is not None:
        error = error.__context__
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
