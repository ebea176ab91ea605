"""Find feature maps in the outputs of modules, and bring them to (B, C, H, W)."""

from __future__ import annotations

from math import isqrt
from typing import Any, NamedTuple

from torch import Tensor, nn


class CannotRead(Exception):
    """This way of reading does not suit the network; another may."""


# What constructors and forwards raise on sizes that they do not suit.
FAILURES = (
    CannotRead,
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    NotImplementedError,
    RuntimeError,
    TypeError,
    ValueError,
)

PREFIXES = range(6)  # class, distillation and up to four register tokens


class Layout(NamedTuple):
    """How the output of a module holds its map: dimension order, height and width."""

    kind: str  # NCHW, NHWC or tokens
    height: int
    width: int


class Slot:
    """Storage for one module's input or output: a hook writes it, the reader takes it."""

    def __init__(self) -> None:
        self.value: Any = None

    def output(self, module: nn.Module, inputs: tuple, output: Any) -> None:
        self.value = output

    def input(self, module: nn.Module, inputs: tuple) -> None:
        self.value = inputs[0]

    def take(self) -> Any:
        value, self.value = self.value, None
        return value


def layout_of(output: Any, batch: int) -> Layout | None:
    """Find out how an output holds a map; None if it holds none.

    A map is (B, C, H, W), (B, H, W, C), or tokens (B, N, C) with N a square after prefix tokens.
    """
    if not isinstance(output, Tensor) or output.ndim not in (3, 4) or output.shape[0] != batch:
        return None
    if output.ndim == 4:
        _, a, b, c = output.shape
        return Layout("NHWC", a, b) if a == b != c else Layout("NCHW", b, c)
    for prefix in PREFIXES:
        side = isqrt(max(output.shape[1] - prefix, 0))
        if side > 1 and side * side == output.shape[1] - prefix:
            return Layout("tokens", side, side)
    return None


def as_map(output: Tensor, layout: Layout) -> Tensor:
    """Bring an output of known layout to (B, C, H, W)."""
    if layout.kind == "NCHW":
        return output
    if layout.kind == "NHWC":
        return output.permute(0, 3, 1, 2)
    grid = output[:, output.shape[1] - layout.height * layout.width :]
    return grid.transpose(1, 2).unflatten(2, (layout.height, layout.width))


def close_to(found: Tensor, wanted: Tensor, tolerance: float = 1e-5) -> bool:
    """Check that two tensors have one shape and differ by at most ``tolerance`` times the largest number of ``wanted``.

    A share, because the maps of a network that was never trained may be tiny.
    """
    return found.shape == wanted.shape and bool((found - wanted).abs().max() <= tolerance * wanted.abs().max())


def evenly_spaced(depth: int) -> list[int]:
    """Choose four of ``depth`` equal blocks: 1, 3, 9 and 11 of twelve, and the same fractions of other depths."""
    if depth < 4:
        raise CannotRead(f"{depth} blocks")
    if depth == 4:
        return [0, 1, 2, 3]
    return [round(depth * share / 12) - 1 for share in (2, 4, 10, 12)]
