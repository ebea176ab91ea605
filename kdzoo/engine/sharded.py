"""Data parallel with student, method and optimiser divided among the processes: whole when saved or shown (FSDP)."""

from collections.abc import Iterable
from copy import deepcopy
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from kdzoo.engine.parallel import DataParallel, Forward, Module
from kdzoo.errors import UserError


class Sharded(DataParallel):
    """Every process holds a part of each parameter and of its optimiser state; they are put together for each pass."""

    def wrap(self, module: nn.Module) -> Forward:
        scalars = [name for name, p in module.named_parameters() if p.requires_grad and p.ndim == 0]
        if scalars:
            raise UserError(f"fsdp cannot divide the single number {scalars[0]}; use --strategy ddp")
        return super().wrap(module)

    def copy(self, module: Module) -> Module:
        return deepcopy(module)

    def update(self, copy: nn.Module, module: nn.Module) -> None:
        copy.load_state_dict(self.gathered(module.state_dict()))

    def gathered(self, state: Any) -> Any:
        if isinstance(state, dict):
            return {key: self.gathered(value) for key, value in state.items()}
        if isinstance(state, list):
            return [self.gathered(value) for value in state]
        return state.full_tensor() if isinstance(state, DTensor) else state

    def load(self, module: nn.Module, state: dict[str, Tensor]) -> None:
        own = module.state_dict()
        super().load(module, {name: divided(value, own[name]) for name, value in state.items()})

    def divide(self, optimizers: Iterable[torch.optim.Optimizer]) -> None:
        for optimizer in optimizers:
            for parameter, state in optimizer.state.items():
                state |= {key: divided(value, parameter) for key, value in state.items()}


def shard(distillation: nn.Module, mesh: Any) -> nn.Module:
    """Divides what is trained of student and method over the processes of the mesh; the teacher stays whole."""
    for parameter in distillation.parameters():
        parameter.data = parameter.data.contiguous()  # what is channels last cannot be divided
    frozen = {p for p in distillation.parameters() if not p.requires_grad}
    for module in (distillation.student, distillation.distiller, distillation):
        # Whole until the backward pass: some methods read the student's classifier after its forward pass.
        fully_shard(
            cast(nn.Module, module), mesh=mesh["data_parallel"], ignored_params=frozen, reshard_after_forward=False
        )
    return distillation


def divided(value: Any, like: Any) -> Any:
    """A whole tensor divided as ``like`` is; anything else as it is."""
    if isinstance(like, DTensor) and isinstance(value, Tensor) and value.shape == like.shape:
        return distribute_tensor(value.to(like.device), like.device_mesh, like.placements)
    return value
