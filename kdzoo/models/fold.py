"""Fold the batch norms of a frozen network into the layers before them, which saves a pass over memory for each."""

from collections import Counter
from collections.abc import Callable
from copy import deepcopy
from itertools import chain
from typing import Any

import torch
from timm.layers.norm_act import BatchNormAct2d
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval
from torch.overrides import TorchFunctionMode

from kdzoo.errors import is_shortage
from kdzoo.models.cast import probed
from kdzoo.models.maps import FAILURES, close_to, first_of
from kdzoo.models.network import Network
from kdzoo.tensors import leaves

TOLERANCE = 1e-4  # of the largest number of an output; float32 leaves about 1e-6

# Types whose arithmetic is known. Not what derives from them, which may do more with weights.
LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, BatchNormAct2d)


def fold_norms(network: Network) -> Network | None:
    """Copy a network with its batch norms folded into the convolutions and linear layers that they read.

    The copy shares all weights that stay the same. Its outputs are those of ``network`` but for rounding. Take the
    classifier, and stages that are called one by one, from ``network`` itself.

    Args:
        network: in evaluation mode, in float32, and never to be trained.

    Returns:
        The copy; ``network`` itself where there is nothing to fold, None where the copy's outputs would differ.
    """
    tensors = chain(network.parameters(), network.buffers())
    copy = deepcopy(network, {id(tensor): tensor for tensor in tensors})
    pairs = find_pairs(copy)
    if not pairs:
        return network

    def folded() -> Network:
        for layer, norm in pairs.items():
            _fold(copy, layer, norm)
        return copy

    return alike(folded, network)


def alike(make: Callable[[], Network], network: Network) -> Network | None:
    """Make a network that should show the same as another but for rounding; None where it does not, or fails."""
    try:
        made = make()
        outputs = zip(probed(made), probed(network), strict=True)
        return made if all(close_to(one, other, TOLERANCE) for one, other in outputs) else None
    except FAILURES as error:
        if is_shortage(error):
            raise
        return None


class _Reads(TorchFunctionMode):
    """Counts the operations that read each tensor, by its identity; those that only ask for its shape do not count."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[int] = Counter()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if leaves(found):
            self.count.update(map(id, leaves([args, kwargs])))
        return found


def find_pairs(network: Network) -> dict[str, str]:
    """Find the layers whose output a batch norm reads, and nothing else: the norms' names by the layers'."""
    made: dict[int, tuple[str, Tensor]] = {}  # outputs of layers, kept so that no identity is given again
    calls: Counter[str] = Counter()
    pairs: dict[str, str] = {}
    reads = _Reads()

    def after(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: tuple, output: Tensor) -> None:
            calls[name] += 1
            made[id(output)] = name, output
            reads.count[id(output)] = 0  # not those of an earlier tensor, now gone

        return hook

    def before(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: tuple, keywords: dict[str, Any]) -> None:
            calls[name] += 1
            if (read := id(first_of(inputs, keywords))) in made:
                pairs[made[read][0]] = name

        return hook

    modules = {name: module for name, module in network.named_modules() if type(module) in LAYERS + NORMS}
    hooked = {  # by who is shown what a folded layer does not give
        name
        for name, module in modules.items()
        if module._forward_pre_hooks or (module._forward_hooks and type(module) in LAYERS)
    }
    handles = [
        module.register_forward_hook(after(name))
        if type(module) in LAYERS
        else module.register_forward_pre_hook(before(name), with_kwargs=True)
        for name, module in modules.items()
    ]
    try:
        with reads:
            shown = set(map(id, probed(network)))
    finally:
        for handle in handles:
            handle.remove()
    alone = {name for tensor, (name, _) in made.items() if reads.count[tensor] == 1 and tensor not in shown}
    return {
        layer: norm
        for layer, norm in pairs.items()
        if layer in alone
        and calls[layer] == calls[norm] == 1
        and not {layer, norm} & hooked
        and modules[norm].running_mean is not None
    }


def _fold(network: nn.Module, layer: str, norm: str) -> None:
    """Put the folded layer in the layer's place, and what is left of the norm in the norm's."""
    one: Any = network.get_submodule(layer)
    other: Any = network.get_submodule(norm)
    for name, make in {"weight": torch.ones_like, "bias": torch.zeros_like}.items():
        if getattr(other, name) is None:  # which torch folds into convolutions alone
            setattr(other, name, nn.Parameter(make(other.running_mean)))
    fuse = fuse_linear_bn_eval if type(one) is nn.Linear else fuse_conv_bn_eval
    network.set_submodule(layer, fuse(one, other).requires_grad_(False))
    rest = nn.Sequential(other.drop, other.act) if type(other) is BatchNormAct2d else nn.Identity()
    for hook in other._forward_hooks.values():
        rest.register_forward_hook(hook)
    network.set_submodule(norm, rest.eval())
