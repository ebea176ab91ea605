"""Optimisers and schedules as protocols describe them."""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kdzoo.recipe import Protocol

# Polynomials a x + b x^3 + c x^5 that, one after another, bring singular values from a hundredth upwards to between 0.1
# and 2: the first three of Polar Express, arXiv:2505.16932.
POLYNOMIALS = (
    (8.237312490495555, -23.157747414558198, 16.680568411445915),
    (4.082441999064835, -2.893047735332586, 0.5252849256975648),
    (3.9263479922546582, -2.8547468034765298, 0.5318022422894988),
)


def learning_rate(protocol: Protocol, base: float, step: int, steps_per_epoch: int) -> float:
    """Compute the learning rate of one step from the step alone, so that resuming needs no schedule's state."""
    epoch = step / steps_per_epoch
    if epoch < protocol.warmup:
        return base * (step + 1) / (protocol.warmup * steps_per_epoch + 1)
    if protocol.schedule == "step":
        passed = sum(epoch >= milestone for milestone in protocol.milestones)
        return base * protocol.gamma**passed
    if protocol.schedule == "cosine":
        share = (epoch - protocol.warmup) / max(protocol.epochs - protocol.warmup, 1e-9)
        lowest = min(protocol.min_lr, base)
        return lowest + (base - lowest) * (1 + math.cos(math.pi * share)) / 2
    return base


def block_matrices(module: nn.Module) -> set[Tensor]:
    """Find the weights of linear layers and attention inside repeated blocks.

    A block is a child of a ``Sequential`` or ``ModuleList`` that has layers inside and a sibling of its class.
    Embeddings, tables of positions, convolutions and classifiers are not among them.
    """
    found: set[Tensor] = set()
    for container in module.modules():
        if not isinstance(container, (nn.Sequential, nn.ModuleList)):
            continue
        siblings = Counter(map(type, container))
        for block in container:
            if siblings[type(block)] == 1 or isinstance(block, nn.Sequential) or not any(block.children()):
                continue
            for layer in block.modules():
                if isinstance(layer, nn.Linear):
                    found.add(layer.weight)
                elif isinstance(layer, nn.MultiheadAttention) and layer.in_proj_weight is not None:
                    found.add(layer.in_proj_weight)
    return found


def _is_last(weight: Tensor) -> bool:
    """Tell whether a weight lies in memory with its channels last, and in no other order."""
    return weight.ndim == 4 and weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous()


def _is_map(value: Any) -> bool:
    """Tell whether a part of an optimiser's state has an order of four dimensions."""
    return isinstance(value, Tensor) and value.ndim == 4


def _in_order(weight: Tensor) -> Tensor:
    """View a channels-last weight (D, C, H, W) as it lies in memory: (D, H, W, C)."""
    return weight.permute(0, 2, 3, 1)


def parameter_groups(module: nn.Module, protocol: Protocol) -> dict[str, list[nn.Parameter]]:
    """Sort every trainable parameter, once, into the group that the protocol treats alike.

    ``matrices``: ``block_matrices``, which Muon takes. ``plain``: norms and biases, which are not decayed where
    the protocol says so. ``rest``: all others.
    """
    groups: dict[str, list[nn.Parameter]] = {"matrices": [], "rest": [], "plain": []}
    matrices = block_matrices(module) if protocol.optimizer == "muon" else set[Tensor]()
    for parameter in module.parameters():
        if not parameter.requires_grad:
            continue
        if not protocol.decay_norms and parameter.ndim < 2:
            groups["plain"].append(parameter)
        else:
            groups["matrices" if parameter in matrices else "rest"].append(parameter)
    return groups


def orthogonal(matrix: Tensor) -> Tensor:
    """Bring a matrix's singular values near 1, and keep its directions.

    An odd polynomial of X is X times a polynomial of X^T X, so all products but the first and the last are of matrices
    as small as X's shorter side. For a layer four times as wide as long that is two fifths less work than the usual
    iteration on X itself.

    Args:
        matrix: (out, in), of float32, since half precision loses the small singular values of X^T X.
    """
    wide = matrix.shape[0] < matrix.shape[1]
    x = matrix / matrix.norm().clamp_min(1e-7)
    gram = x @ x.T if wide else x.T @ x
    product = factor = _factor(gram, POLYNOMIALS[0])
    for coefficients in POLYNOMIALS[1:]:
        gram = factor @ gram @ factor
        factor = _factor(gram, coefficients)
        product = product @ factor
    return product @ x if wide else x @ product


def _factor(gram: Tensor, coefficients: tuple[float, float, float]) -> Tensor:
    """Compute what a polynomial multiplies X with: a + b G + c G^2."""
    a, b, c = coefficients
    factor = torch.addmm(gram, gram, gram, beta=b, alpha=c)
    factor.diagonal().add_(a)
    return factor


class Muon(torch.optim.Optimizer):
    """Step along each matrix's momentum, made orthogonal in float32; torch's and timm's Muon use bf16 on any machine.

    Args:
        matrices: parameters (out, in).
        lr: learning rate; steps are as long as AdamW's at the same one.
        weight_decay: share of the weights, times the learning rate, that each step takes away.
        momentum: of the gradients, Nesterov's.
        every: each matrix steps once in so many steps, by turns, and the square root of it as far. Making matrices
            orthogonal is most of a step's work for small batches; momentum changes little from one step to the next.

    Source: https://kellerjordan.github.io/posts/muon/; length of the steps: arXiv:2502.16982, eq. 4.
    """

    def __init__(
        self,
        matrices: Sequence[nn.Parameter],
        *,
        lr: float,
        weight_decay: float,
        momentum: float = 0.95,
        every: int = 1,
    ):
        super().__init__(matrices, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})
        self.every = every

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Take one step; ``closure`` is not used."""
        for group in self.param_groups:
            rate = group["lr"] * math.sqrt(self.every)
            for place, matrix in enumerate(group["params"]):
                if matrix.grad is None:
                    continue
                state = self.state[matrix]
                if not state:
                    state.update(momentum_buffer=torch.zeros_like(matrix), turn=place)
                momentum = state["momentum_buffer"]
                momentum.lerp_(matrix.grad, 1 - group["momentum"])
                state["turn"] += 1
                if state["turn"] % self.every:
                    continue
                direction = orthogonal(matrix.grad.lerp(momentum, group["momentum"]).float())
                matrix.mul_(1 - rate * group["weight_decay"])
                matrix.sub_(direction, alpha=rate * 0.2 * math.sqrt(max(matrix.shape)))


class Optimizer:
    """One or two torch optimisers that step together; norms and biases are undecayed where asked.

    Fused ones read their learning rate from a tensor, so that a step which is captured once follows the schedule.

    Args:
        module: what is trained.
        protocol: the recipe.
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
        # torch's fused steps on a CPU copy each gradient that is not contiguous, and then do not use the copy: weights
        # of another layout are given to them as views in the order of their memory.
        on_cpu = fused and device.type == "cpu"
        self._views = {p: nn.Parameter(_in_order(p.detach())) for p in groups["rest"] if on_cpu and _is_last(p)}
        decayed = [
            {"params": [self._views.get(p, p) for p in groups["rest"]], "weight_decay": protocol.weight_decay},
            {"params": groups["plain"], "weight_decay": 0.0},
        ]
        decayed = [group for group in decayed if group["params"]]
        self.optimizers: list[torch.optim.Optimizer] = []
        if groups["matrices"]:
            given = {"lr": protocol.lr, "weight_decay": protocol.weight_decay, "momentum": protocol.momentum}
            self.optimizers.append(Muon(groups["matrices"], **given, every=protocol.muon_every))
        if decayed and protocol.optimizer == "sgd":
            self.optimizers.append(torch.optim.SGD(decayed, lr=rate, momentum=protocol.momentum, fused=fused))
        elif decayed:
            capturable = device.type == "cuda"
            self.optimizers.append(torch.optim.AdamW(decayed, lr=rate, fused=fused, capturable=capturable))
        self._begin_momentum()

    def _begin_momentum(self) -> None:
        """Give SGD's momentum its 0 before the first gradient: fused steps fail where some parameters lack theirs."""
        for optimizer in self.optimizers:
            if isinstance(optimizer, torch.optim.SGD):
                for group in optimizer.param_groups:
                    for p in group["params"] if group["momentum"] else ():
                        if optimizer.state[p].get("momentum_buffer") is None:
                            optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)

    @property
    def host_bound(self) -> str | None:
        """Say why a step cannot be captured; None where it can."""
        bound = [one for one in self.optimizers if not isinstance(one.param_groups[0]["lr"], Tensor)]
        return f"{type(bound[0]).__name__} takes its learning rate from the host" if bound else None

    def set_rate(self, rate: float) -> None:
        """Set the learning rate of the steps to come, without waiting for the device."""
        if self._rate is not None:
            self._rate.fill_(rate)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                if not isinstance(group["lr"], Tensor):
                    group["lr"] = rate

    def step(self) -> None:
        """Clip the gradients, take a step at the learning rate that was set before, and drop the gradients."""
        if self.clip:
            nn.utils.clip_grad_norm_(self.parameters, self.clip)
        for p, view in self._views.items():
            if view.data_ptr() != p.data_ptr():  # a method has exchanged the weight for another
                p.data = p.data.contiguous(memory_format=torch.channels_last)
                view.data = _in_order(p.detach())
            view.grad = None if p.grad is None else _in_order(p.grad).contiguous()
        for optimizer in self.optimizers:
            optimizer.step()
        self.forget()

    def forget(self) -> None:
        """Drop the gradients."""
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        for p in self._views:
            p.grad = None

    def state_dict(self) -> list[dict[str, Any]]:
        """Return what ``load_state_dict`` takes, here or on another device: all of it in the shapes of the weights."""

        def turned(p: Tensor, value: Any) -> Any:
            return value.permute(0, 3, 1, 2) if self._is_view(p) and _is_map(value) else value

        return [_changed(optimizer, optimizer.state_dict(), turned) for optimizer in self.optimizers]

    def load_state_dict(self, state: list[dict[str, Any]]) -> None:
        """Restore moments and counters; what the protocol and the device say stays.

        Raises:
            ValueError: they belong to weights of other shapes.
        """

        def laid_out(p: Tensor, value: Any) -> Any:  # as the weight lies, in whose order fused steps read it
            if not _is_map(value):
                return value
            value = _in_order(value) if self._is_view(p) else value
            if value.shape != p.shape:
                raise ValueError(f"a moment of shape {tuple(value.shape)} for a weight of shape {tuple(p.shape)}")
            return torch.empty_like(p, requires_grad=False).copy_(value)

        for optimizer, saved in zip(self.optimizers, state, strict=True):
            changed = _changed(optimizer, saved, laid_out)
            optimizer.load_state_dict({**changed, "param_groups": optimizer.state_dict()["param_groups"]})
            for group in optimizer.param_groups:
                if isinstance(group["lr"], Tensor):
                    group["lr"] = self._rate  # not the copy that torch has made of it
        self._begin_momentum()

    def _is_view(self, p: Tensor) -> bool:
        return any(p is view for view in self._views.values())


def _changed(
    optimizer: torch.optim.Optimizer, saved: dict[str, Any], change: Callable[[Tensor, Any], Any]
) -> dict[str, Any]:
    """Change each part of an optimiser's saved state, given the parameter that it belongs to."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state = {
        i: {name: change(parameters[i], value) for name, value in parts.items()} for i, parts in saved["state"].items()
    }
    return {**saved, "state": state}
