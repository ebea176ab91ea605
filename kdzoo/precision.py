"""The precision of networks: autocast, and how CUDA multiplies float32 numbers."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch


class MatmulPrecision(NamedTuple):
    """How CUDA multiplies float32 numbers: ``ieee`` (exactly), ``tf32`` (inputs rounded) or ``none`` (by torch)."""

    matmul: str  # of matrix products
    conv: str  # of convolutions


IEEE, TF32 = MatmulPrecision("ieee", "ieee"), MatmulPrecision("tf32", "tf32")


class Precision(NamedTuple):
    """The number format that a network computes in."""

    dtype: torch.dtype | None  # autocast's; None: float32, without autocast
    matmul: MatmulPrecision | None = IEEE  # of float32 on CUDA; None leaves it as it is


FLOAT32 = Precision(None)
PRECISIONS = {"float32": FLOAT32, "tf32": Precision(None, TF32), "bf16": Precision(torch.bfloat16)}

_CONV: Any = torch.backends.cudnn.conv  # type: ignore[attr-defined]  # it is there, though stubs do not know


@contextmanager
def autocast(device: str, precision: Precision) -> Iterator[None]:
    """Compute in this precision inside the context, even if another one is set outside.

    Args:
        device: the type of device: cpu, cuda or mps. One that knows no autocast is left alone.
        precision: float32 switches autocast off.
    """
    casting = _castable(device)
    cast = torch.autocast(device, precision.dtype, enabled=precision.dtype is not None) if casting else nullcontext()
    with cast, matmul_precision(device, precision):
        yield


@contextmanager
def casting_anew() -> Iterator[None]:
    """Cast weights anew in each pass inside the context.

    Autocast keeps casts until its outermost context ends, and does not notice that an optimiser changed the weights.
    """
    before = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(before)


def matmul_precision(device: str, precision: Precision) -> AbstractContextManager[None]:
    """Multiply float32 numbers in this precision inside the context, and leave autocast unchanged.

    A backward pass needs this alone: autocast's types come from the forward pass. TF32 then also rounds the gradients
    of losses, though never a loss.
    """
    switches = _switchable(device) and precision.matmul is not None
    return _multiplying(precision.matmul) if switches else nullcontext()  # type: ignore[arg-type]


def ambient(device: str) -> Precision:
    """Return the precision that the surrounding code has set, by ``torch.autocast`` and torch's CUDA switches."""
    cast = _castable(device) and torch.is_autocast_enabled(device)
    return Precision(torch.get_autocast_dtype(device) if cast else None, current() if _switchable(device) else None)


def current() -> MatmulPrecision:
    """Return how CUDA multiplies float32 numbers now."""
    return MatmulPrecision(torch.backends.cuda.matmul.fp32_precision, _CONV.fp32_precision)


def _castable(device: str) -> bool:
    """Whether autocast knows the device; torch's own answer is one that the compiler of torch 2.11 cannot follow."""
    return device != "meta"


def _switchable(device: str) -> bool:
    """Whether there is a choice: on CUDA, and not while torch's compiler traces, which cannot follow the switches."""
    return device == "cuda" and not torch.compiler.is_compiling()


@contextmanager
def _multiplying(wanted: MatmulPrecision) -> Iterator[None]:
    before = current()
    if before == wanted:
        yield
        return
    _set(wanted)
    try:
        yield
    finally:
        _set(before)


def _set(wanted: MatmulPrecision) -> None:
    # Torch has an older and a newer set of switches, and code that reads the older ones (its compiler does) fails
    # where the two disagree; so the older are set first, and then the newer, which know more values.
    torch.set_float32_matmul_precision("high" if wanted.matmul == "tf32" else "highest")
    torch.backends.cudnn.allow_tf32 = wanted.conv == "tf32"
    torch.backends.cuda.matmul.fp32_precision = wanted.matmul
    _CONV.fp32_precision = wanted.conv
