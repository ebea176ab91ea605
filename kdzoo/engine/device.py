"""Which device and precision to compute in."""

import ctypes
from contextlib import AbstractContextManager, nullcontext

import torch

from kdzoo.engine.precision import bf16_is_faster
from kdzoo.errors import UserError
from kdzoo.settings import EngineSettings


def find_device(name: str) -> torch.device:
    """The device of that name; for ``auto`` cuda, mps or cpu, the first that is there.

    Raises:
        UserError: the name is no device, or the device is not there.
    """
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if name == "auto":
        return accelerator if accelerator is not None and accelerator.type in ("cuda", "mps") else torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"'{name}' is no device; expected cpu, cuda, cuda:1 or mps") from error
    if device.type != "cpu" and (accelerator is None or accelerator.type != device.type):
        raise UserError(f"this machine has no {device.type} device that torch can use; try --device cpu")
    if device.index is not None and device.type == "cuda" and device.index >= torch.cuda.device_count():
        raise UserError(f"no device {name}; this machine has {torch.cuda.device_count()} of them")
    return device


def find_precision(name: str, device: torch.device) -> str:
    """``name``, or for ``auto`` bf16 where the hardware has it and, on a CPU, was measured to be faster with it."""
    if name != "auto":
        return name
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    elif device.type == "cpu":
        known: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()
        fast = bool(known.get("avx512_bf16") or known.get("amx_bf16")) and bf16_is_faster()
    else:
        fast = False
    return "bf16" if fast else "float32"


def keep_freed_memory() -> bool:
    """Has the C library keep the memory of tensors that are gone, for those that follow; whether it can, as glibc can.

    It would give large ones back to the system at once, and a step would begin by asking for the same pages again.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    at_most, trim_threshold, mmap_max = 2**31 - 1, -1, -4  # bytes; names of malloc.h
    return bool(mallopt(mmap_max, 0) and mallopt(trim_threshold, at_most))


def settle(engine: EngineSettings) -> torch.device:
    """Replaces every ``auto`` by what it means on this machine, sets the threads, and gives the device."""
    device = find_device(engine.device)
    engine.device = str(device)
    engine.precision = find_precision(engine.precision, device)  # type: ignore[assignment]
    if engine.precision == "tf32" and device.type != "cuda":
        raise UserError(f"precision tf32 is for CUDA devices, and this is {device}; expected float32 or bf16")
    if engine.accumulate < 1:
        raise UserError(f"engine.accumulate={engine.accumulate}: expected how many parts a batch has, from 1")
    if not 0 < engine.memory <= 1:
        raise UserError(f"engine.memory={engine.memory:g}: expected a share of memory, above 0 and up to 1")
    if device.type == "cpu":
        keep_freed_memory()
    if engine.threads:
        torch.set_num_threads(engine.threads)
    return device


def current(device: torch.device) -> AbstractContextManager:
    """The context in which streams and graphs are this device's, where a machine has several."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
