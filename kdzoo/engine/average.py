"""The moving average of a module's weights, kept without asking the device for anything."""

from copy import deepcopy
from itertools import chain

import torch
from torch import Tensor, nn


class Average(nn.Module):
    """A copy whose parameters and buffers follow those of a module in training, from its first update on.

    Torch's ``AveragedModel`` does the same and keeps the same state, but copies its counter to the device at every
    update, which a CUDA graph cannot hold.

    Args:
        module: what is averaged.
        decay: the share of the old average that each update keeps.
    """

    n_averaged: Tensor

    def __init__(self, module: nn.Module, decay: float):
        super().__init__()
        self.module, self.decay = deepcopy(module), decay
        self.register_buffer("n_averaged", torch.tensor(0, device="cpu"))  # the host alone reads it

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        """Takes the module's present weights in; the first time it becomes equal to them."""
        first = int(self.n_averaged) == 0
        averages: list[Tensor] = []
        values: list[Tensor] = []
        for own, new in zip(_tensors(self.module), _tensors(module), strict=True):
            if first:
                own.copy_(new)
            elif own.is_floating_point():
                averages.append(own)
                values.append(new)
            else:
                own.copy_(own * self.decay + new * (1 - self.decay))
        if averages:
            torch._foreach_lerp_(averages, values, 1 - self.decay)
        self.n_averaged += 1


def _tensors(module: nn.Module) -> chain[Tensor]:
    return chain(module.parameters(), module.buffers())
