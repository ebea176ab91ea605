"""What the loss terms were, summed where they arise."""

from typing import Any

import torch
from torch import Tensor

from kdzoo.errors import UserError

_NEVER = 2**62


class Meter:
    """Means of the loss terms over an epoch, summed on the device and read only when asked.

    What is summed stays where it is in memory, so that a captured step keeps writing there.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.count = torch.zeros((), device=device, dtype=torch.int64)
        self.sums: dict[str, Tensor] = {}
        self.first_bad: dict[str, Tensor] = {}

    def reset(self) -> None:
        """Begin another epoch."""
        self.count.zero_()
        for name, total in self.sums.items():
            total.zero_()
            self.first_bad[name].fill_(_NEVER)

    def add(self, terms: dict[str, Tensor], step: int | Tensor) -> None:
        """Add the terms of one batch, in this step, without waiting for the device."""
        self.count += 1
        for name, term in terms.items():
            if name not in self.sums:
                self.sums[name] = torch.zeros((), device=self.device)
                self.first_bad[name] = torch.full((), _NEVER, device=self.device, dtype=torch.int64)
            term = term.detach()
            bad = self.first_bad[name]
            self.sums[name] += term
            bad.copy_(torch.where(term.isfinite(), bad, bad.clamp(max=step)))

    def read(self) -> dict[str, float]:
        """Read the means so far.

        Raises:
            UserError: a term was not finite; says which and when.
        """
        count = int(self.count)
        if not count or not self.sums:
            return {}
        first = torch.stack(list(self.first_bad.values())).tolist()
        bad = {name: step for name, step in zip(self.first_bad, first, strict=True) if step != _NEVER}
        if bad:
            name = min(bad, key=lambda key: bad[key])
            raise UserError(
                f"the loss term '{name}' is not finite at step {bad[name]}; the last good checkpoint is kept: "
                "lower protocol.lr or the term's weight, or set protocol.clip"
            )
        sums = torch.stack(list(self.sums.values())).tolist()
        return {name: total / count for name, total in zip(self.sums, sums, strict=True)}

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count, "sums": self.sums, "first_bad": self.first_bad}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.count.copy_(state["count"])
        self.sums = {name: value.to(self.device, copy=True) for name, value in state["sums"].items()}
        self.first_bad = {name: value.to(self.device, copy=True) for name, value in state["first_bad"].items()}
