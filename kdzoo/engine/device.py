"""Which device and precision to compute in."""

import ctypes
import gc
import os
import re
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import replace

import torch

from kdzoo.errors import UserError
from kdzoo.settings import Place, Run

# Variables that limit the instructions of a CPU library, with the values that leave it those for bf16.
_ONEDNN = r"default|all|avx512_core_(bf16|fp16|amx.*)|avx10_.*"
KEEP_BF16 = {
    "ONEDNN_MAX_CPU_ISA": _ONEDNN,
    "DNNL_MAX_CPU_ISA": _ONEDNN,  # the older name, which is still read
    "ATEN_CPU_CAPABILITY": r"avx512.*|amx.*",  # its own "default" is the lowest of all
    "MKL_ENABLE_INSTRUCTIONS": r"avx512_e[3-9]|avx10.*",
}


def find_device(name: str) -> torch.device:
    """Find the device of that name; for ``auto`` the first of cuda, mps and cpu that is there.

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
    many = torch.cuda.device_count() if device.type == "cuda" else 1
    if device.index is not None and device.index >= many:
        raise UserError(f"no device {name}; this machine has {many} of them")
    return device


def find_precision(name: str, device: torch.device) -> str:
    """Name the precision of the networks: ``name`` itself, or for ``auto`` bf16 where it is fast, else float32."""
    if name != "auto":
        return name
    return "bf16" if bf16_is_fast(device) else "float32"


def bf16_is_fast(
    device: torch.device,
    capabilities: Mapping[str, object] | None = None,
    environment: Mapping[str, str] = os.environ,
) -> bool:
    """Tell whether a device has instructions for bf16 products. Nothing is measured, so the answer never changes.

    Args:
        device: a CPU needs AMX or AVX-512 instructions for bf16, a GPU compute capability 8.0 or more.
        capabilities: of the CPU; None: those that torch reports.
        environment: holds the variables that forbid a library some instructions of the CPU.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type != "cpu":
        return False
    if capabilities is None:
        capabilities = getattr(torch.cpu, "get_capabilities", dict)()
    limits = {name: environment[name] for name in KEEP_BF16 if environment.get(name)}
    if not all(re.fullmatch(KEEP_BF16[name], limit, re.IGNORECASE) for name, limit in limits.items()):
        return False
    return bool(capabilities.get("amx_bf16") or capabilities.get("avx512_bf16"))


def keep_freed_memory() -> bool:
    """Tell glibc to keep freed memory for the tensors to come. Returns False where that is not possible.

    It would give large ones back to the system at once, and a step would begin by asking for the same pages again.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    at_most, trim_threshold, mmap_max = 2**31 - 1, -1, -4  # bytes; names of malloc.h
    return bool(mallopt(mmap_max, 0) and mallopt(trim_threshold, at_most))


def give_back_memory() -> None:
    """Give the memory of tensors that are gone back to the system, where glibc keeps it."""
    gc.collect()  # tensors may be parts of cycles, which Python frees by their number and not their size
    with suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(ctypes.c_size_t(0))


def resolve_auto(run: Run) -> Run:
    """Replace every ``auto`` of a run by what it means on this machine.

    Raises:
        UserError: the device is not there, or it has no such precision.
    """
    engine = run.settings.engine
    device = find_device(run.place.engine.device)
    precision = find_precision(engine.precision, device)
    if precision == "tf32" and device.type != "cuda":
        raise UserError(f"precision tf32 is for CUDA devices, and this is {device}; expected float32 or bf16")
    settings = replace(run.settings, engine=replace(engine, precision=precision))  # type: ignore[arg-type]
    return Run(settings, run.place).within(engine={"device": str(device)})


def use(place: Place) -> torch.device:
    """Set this process's threads and memory as a place asks for, and return the place's device."""
    device = find_device(place.engine.device)
    if device.type == "cpu":
        keep_freed_memory()
    if place.engine.threads:
        torch.set_num_threads(place.engine.threads)
    return device


def current(device: torch.device) -> AbstractContextManager:
    """Make a context in which streams and graphs are this device's, where a machine has several."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
