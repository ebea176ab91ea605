"""How CUDA computes float32 products: in full, or with their inputs rounded to TF32."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch


class Products(NamedTuple):
    """Torch's ``fp32_precision``: ``ieee``, ``tf32``, or ``none``, which is what torch takes by itself."""

    matmul: str
    conv: str


_CONV: Any = torch.backends.cudnn.conv  # type: ignore[attr-defined]  # it is there, though stubs do not know
FULL = Products("ieee", "ieee")
TF32 = Products("tf32", "tf32")


def switchable(device: str) -> bool:
    """Whether there is a choice: on CUDA, and not while torch's compiler traces, which cannot follow the switches."""
    return device == "cuda" and not torch.compiler.is_compiling()


def current() -> Products:
    """What holds now."""
    return Products(torch.backends.cuda.matmul.fp32_precision, _CONV.fp32_precision)


@contextmanager
def computed(how: Products) -> Iterator[None]:
    """Products are computed so inside; what held before is put back."""
    before = current()
    if before == how:
        yield
        return
    _set(how)
    try:
        yield
    finally:
        _set(before)


def _set(how: Products) -> None:
    # Torch has an older and a newer set of switches, and whatever reads the older ones (its compiler does) fails
    # where the two disagree; so the older are set first, and then the newer, which know more values.
    torch.set_float32_matmul_precision("high" if how.matmul == "tf32" else "highest")
    torch.backends.cudnn.allow_tf32 = how.conv == "tf32"
    torch.backends.cuda.matmul.fp32_precision = how.matmul
    _CONV.fp32_precision = how.conv
