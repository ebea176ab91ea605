"""Compare what faster code computes with what plain code does, from the same state."""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from kdzoo.tensors import leaves

if TYPE_CHECKING:
    from kdzoo.engine.lane import Lane

# Largest differences that rounding explains, as shares of the norm of what is compared. Where a gradient is nothing but
# rounding, as that of a bias before a batch norm, some optimisers make whole steps of it: hence the room for weights.
OUTPUTS = {"float32": 1e-3, "tf32": 2e-2, "bf16": 5e-2}  # of networks, by their precision
TERMS, WEIGHTS = 1e-2, 0.1  # of the loss terms of a step, and of what it changes in the weights


def distance(some: Iterable[Tensor], others: Iterable[Tensor]) -> float:
    """Compute the norm of the difference between tensors; numbers that are not finite count as 0."""
    gaps = [
        torch.linalg.vector_norm(one.double().nan_to_num(0, 0, 0) - other.double().nan_to_num(0, 0, 0))
        for one, other in zip(some, others, strict=True)
    ]
    return float(torch.stack(gaps).norm()) if gaps else 0.0


def agree(
    found: Sequence[Tensor],
    plain: Sequence[Tensor],
    again: Sequence[Tensor],
    share: float,
    before: Sequence[Tensor] | None = None,
) -> bool:
    """Tell whether tensors are those of plain code, within the spread of two plain results and rounding.

    Args:
        found: what faster code made.
        plain: what plain code made from the same state.
        again: what it made from that state the second time.
        share: of the change from ``before`` to ``plain``, that rounding may take.
        before: the same tensors in that state; None: zeros.
    """
    zeros = [torch.zeros_like(tensor) for tensor in plain] if before is None else before
    return distance(found, plain) <= 2 * distance(again, plain) + share * distance(plain, zeros)


class Snapshot(NamedTuple):
    """Copies of a lane's tensors, on the host, which has more memory."""

    terms: list[Tensor]  # sums of the loss terms
    weights: list[Tensor]  # and statistics
    all: list[Tensor]

    def difference(self, plain: "Snapshot", again: "Snapshot", before: "Snapshot") -> str | None:
        """Name what a step made other than two plain ones from the same state; None for nothing."""
        if not agree(self.terms, plain.terms, again.terms, TERMS, before.terms):
            return "loss terms"
        return None if agree(self.weights, plain.weights, again.weights, WEIGHTS, before.weights) else "weights"


class LaneState:
    """All tensors that the steps of a lane write to, read and written where they are."""

    def __init__(self, lane: "Lane"):
        self.terms = list(lane.meter.sums.values())
        state = [*lane.trained.parameters(), *lane.trained.buffers()]
        self.weights = [tensor for tensor in state if tensor.is_floating_point()]
        modules = [*lane.trained.modules(), *([] if lane.average is None else lane.average.modules())]
        held = [list(vars(module).values()) for module in modules]
        moments = [list(optimizer.state.values()) for optimizer in lane.optimizer.optimizers]
        found = leaves([vars(lane.meter), held, moments])
        self.all = list({id(tensor): tensor for tensor in found}.values())

    def read(self) -> Snapshot:
        """Copy the state as it is now."""
        return Snapshot(*([tensor.detach().to("cpu", copy=True) for tensor in part] for part in self._parts()))

    @torch.no_grad()
    def write(self, snapshot: Snapshot) -> None:
        """Put a state back."""
        for tensor, saved in zip(self.all, snapshot.all, strict=True):
            tensor.copy_(saved)

    def _parts(self) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        return self.terms, self.weights, self.all
