"""Find feature maps in the outputs of modules, and bring them to (B, C, H, W)."""

from __future__ import annotations

from collections.abc import Mapping
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
    place: int | None = None  # which tensor of an output of several it is; None: the output is the tensor


def first_of(inputs: tuple, keywords: Mapping[str, Any]) -> Any:
    """Find the first of what a module was called with, by its place or by its name; None where it was nothing."""
    return next(iter((*inputs, *keywords.values())), None)


class Slot:
    """Storage for one module's input or output: a hook writes it, the reader takes it.

    It is filled in the passes for which it was opened: the hook stays on a network that its owner calls, copies and
    saves as well.
    """

    def __init__(self) -> None:
        self.is_open = False
        self.value: Any = None

    def __reduce__(self) -> tuple[Any, ...]:  # after a pass that failed it holds a map, which no copy may
        return type(self), ()

    def open(self) -> None:
        self.is_open = True

    def output(self, module: nn.Module, inputs: tuple, output: Any) -> None:
        if self.is_open:
            self.value = output

    def input(self, module: nn.Module, inputs: tuple, keywords: Mapping[str, Any]) -> None:
        if self.is_open:
            self.value = first_of(inputs, keywords)

    def take(self) -> Any:
        value, self.value, self.is_open = self.value, None, False
        return value


def tensors_in(output: Any) -> list[Tensor]:
    """List the tensors of an output in their order: of tuples, lists and mappings, nested in any way."""
    if isinstance(output, Tensor):
        return [output]
    parts = output.values() if isinstance(output, Mapping) else output if isinstance(output, tuple | list) else ()
    return [tensor for part in parts for tensor in tensors_in(part)]


def logits_in(output: Any) -> Any:
    """Find the logits in what a network returns.

    They are the output itself, the first of a tuple or list, or what a mapping or object calls ``logits``. Further
    outputs, such as those of auxiliary heads in training, are passed over.
    """
    if isinstance(output, Tensor):
        return output
    if isinstance(output, Mapping):
        return output.get("logits")
    if hasattr(output, "logits"):
        return output.logits
    return logits_in(output[0]) if isinstance(output, tuple | list) and output else None


def layout_of(output: Any, batch: int) -> Layout | None:
    """Find out how an output holds a map; None if it holds none. Of several maps the first is taken.

    A map is (B, C, H, W), (B, H, W, C), or tokens (B, N, C) with N a square after prefix tokens.
    """
    if isinstance(output, Tensor):
        return _layout_of(output, batch)
    layouts = (_layout_of(tensor, batch) for tensor in tensors_in(output))
    return next((layout._replace(place=i) for i, layout in enumerate(layouts) if layout is not None), None)


def _layout_of(output: Tensor, batch: int) -> Layout | None:
    if output.ndim not in (3, 4) or output.shape[0] != batch:
        return None
    if output.ndim == 4:
        _, a, b, c = output.shape
        return Layout("NHWC", a, b) if a == b != c else Layout("NCHW", b, c)
    for prefix in PREFIXES:
        side = isqrt(max(output.shape[1] - prefix, 0))
        if side > 1 and side * side == output.shape[1] - prefix:
            return Layout("tokens", side, side)
    return None


def as_map(output: Any, layout: Layout) -> Tensor:
    """Bring the map in an output of known layout to (B, C, H, W)."""
    tensor: Tensor = output if layout.place is None else tensors_in(output)[layout.place]
    if layout.kind == "NCHW":
        return tensor
    if layout.kind == "NHWC":
        return tensor.permute(0, 3, 1, 2)
    grid = tensor[:, tensor.shape[1] - layout.height * layout.width :]
    return grid.transpose(1, 2).unflatten(2, (layout.height, layout.width))


def close_to(found: Tensor, wanted: Tensor, tolerance: float = 1e-5) -> bool:
    """Check that two tensors have one shape and differ by at most ``tolerance`` times the largest number of ``wanted``.

    A share, because the maps of a network that was never trained may be tiny.
    """
    if not found.numel():
        return found.shape == wanted.shape
    return found.shape == wanted.shape and bool((found - wanted).abs().max() <= tolerance * wanted.abs().max())


def evenly_spaced(depth: int) -> list[int]:
    """Choose four of ``depth`` equal blocks: 1, 3, 9 and 11 of twelve, and the same fractions of other depths."""
    if depth < 4:
        raise CannotRead(f"{depth} blocks")
    if depth == 4:
        return [0, 1, 2, 3]
    return [round(depth * share / 12) - 1 for share in (2, 4, 10, 12)]
