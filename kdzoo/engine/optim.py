"""Optimisers and schedules as protocols describe them."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from kdzoo.recipe import Protocol


def learning_rate(protocol: Protocol, base: float, step: int, steps_per_epoch: int) -> float:
    """The rate of one step, a function of nothing but the step, so that resuming needs no schedule's state."""
    epoch = step / steps_per_epoch
    if epoch < protocol.warmup:
        return base * (step + 1) / (protocol.warmup * steps_per_epoch + 1)
    if protocol.schedule == "step":
        passed = sum(epoch >= milestone for milestone in protocol.milestones)
        return base * protocol.gamma**passed
    if protocol.schedule == "cosine":
        share = (epoch - protocol.warmup) / max(protocol.epochs - protocol.warmup, 1e-9)
        return protocol.min_lr + (base - protocol.min_lr) * (1 + math.cos(math.pi * share)) / 2
    return base


def parameter_groups(module: nn.Module, protocol: Protocol) -> dict[str, list[nn.Parameter]]:
    """Every trainable parameter, once, by how it is treated.

    ``matrices``: 2-D weights inside a network's repeated blocks, which Muon takes. ``plain``: norms and
    biases, which are not decayed where the protocol says so. ``rest``: all others.
    """
    groups: dict[str, list[nn.Parameter]] = {"matrices": [], "rest": [], "plain": []}
    seen: set[nn.Parameter] = set()
    for path, owner in module.named_modules():
        for parameter in owner.parameters(recurse=False):
            if not parameter.requires_grad or parameter in seen:
                continue
            seen.add(parameter)
            if not protocol.decay_norms and parameter.ndim < 2:
                groups["plain"].append(parameter)
            elif protocol.optimizer == "muon" and _in_block(path) and parameter.ndim == 2:
                groups["matrices"].append(parameter)
            else:
                groups["rest"].append(parameter)
    return groups


class Optimizer:
    """One or two torch optimisers that step together; norms and biases are undecayed where asked.

    Fused ones read their learning rate from a tensor, so that a step which is captured once follows the schedule.
    """

    def __init__(self, module: nn.Module, protocol: Protocol):
        groups = parameter_groups(module, protocol)
        self.parameters = [p for group in groups.values() for p in group]
        self.clip = protocol.clip
        device = self.parameters[0].device if self.parameters else torch.device("cpu")
        fused = all(p.device.type in ("cpu", "cuda") for p in self.parameters)
        # CUDA's kernels read float32; on the CPU a float64 leaves a step's bits as a plain number would.
        dtype = torch.float32 if device.type == "cuda" else torch.float64
        self._rate = torch.tensor(protocol.lr, device=device, dtype=dtype) if fused else None
        rate: Any = protocol.lr if self._rate is None else self._rate
        decayed = [
            {"params": groups["rest"], "weight_decay": protocol.weight_decay},
            {"params": groups["plain"], "weight_decay": 0.0},
        ]
        decayed = [group for group in decayed if group["params"]]
        self.parts: list[torch.optim.Optimizer] = []
        if groups["matrices"]:
            self.parts.append(
                torch.optim.Muon(
                    groups["matrices"],
                    lr=protocol.lr,
                    weight_decay=protocol.weight_decay,
                    momentum=0.95,
                    adjust_lr_fn="match_rms_adamw",
                )
            )
        if decayed and protocol.optimizer == "sgd":
            self.parts.append(torch.optim.SGD(decayed, lr=rate, momentum=protocol.momentum, fused=fused))
        elif decayed:
            capturable = device.type == "cuda"
            self.parts.append(torch.optim.AdamW(decayed, lr=rate, fused=fused, capturable=capturable))

    @property
    def host_bound(self) -> str | None:
        """Why a step cannot be captured; None where it can."""
        kinds = [type(part).__name__ for part in self.parts if not isinstance(part.param_groups[0]["lr"], Tensor)]
        return f"{kinds[0]} takes its learning rate from the host" if kinds else None

    def set_rate(self, rate: float) -> None:
        """Sets the learning rate of the steps to come, without waiting for the device."""
        if self._rate is not None:
            self._rate.fill_(rate)
        for part in self.parts:
            for group in part.param_groups:
                if not isinstance(group["lr"], Tensor):
                    group["lr"] = rate

    def step(self, rate: float | None = None) -> None:
        """Clips, steps, at the learning rate that was set before where none is given, and forgets the gradients."""
        if rate is not None:
            self.set_rate(rate)
        if self.clip:
            nn.utils.clip_grad_norm_(self.parameters, self.clip)
        for part in self.parts:
            part.step()
        self.forget()

    def forget(self) -> None:
        """Drops the gradients."""
        for part in self.parts:
            part.zero_grad(set_to_none=True)

    def state_dict(self) -> list[dict[str, Any]]:
        """What ``load_state_dict`` takes."""
        return [part.state_dict() for part in self.parts]

    def load_state_dict(self, state: list[dict[str, Any]]) -> None:
        """Restores moments and counters; what the protocol and the device say stays."""
        for part, saved in zip(self.parts, state, strict=True):
            part.load_state_dict({**saved, "param_groups": part.state_dict()["param_groups"]})
            for group in part.param_groups:
                if isinstance(group["lr"], Tensor):
                    group["lr"] = self._rate  # not the copy that torch has made of it


def _in_block(path: str) -> bool:
    return any(part in ("blocks", "layers", "stages", "transformer", "encoder") for part in path.split("."))
