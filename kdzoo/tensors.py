"""Tensor helpers: precision, range, nested structures, and communication between the ranks of a distributed run."""

import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist
from torch.utils._pytree import tree_leaves

BRIGHTEST = 1.5  # of images in [0, 1], with room for what resizing and changes of colour add


def full_precision(tensor: Tensor) -> Tensor:
    """Convert half precision to float32; leave float32 and float64 as they are."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def warn_of_bytes(images: Tensor, otherwise: str) -> None:
    """Warn where the first images go from 0 to 255; ``otherwise`` says what helps beside dividing them."""
    least, most = (value.item() for value in images.aminmax()) if images.numel() else (0.0, 0.0)
    if least >= 0 and most > BRIGHTEST:  # what is normalised has numbers below 0
        warnings.warn(
            f"images of the first batch reach {most:g}, and kdzoo expects them in [0, 1]; divide them by 255, "
            f"{otherwise}",
            stacklevel=3,
        )


def leaves(nested: Any) -> list[Tensor]:
    """List all tensors in nested tuples, lists and dictionaries, always in the same order."""
    return [leaf for leaf in tree_leaves(nested) if isinstance(leaf, Tensor)]


def trained_by(loss: Tensor) -> Iterator[Tensor]:
    """Iterate over the tensors that a loss's backward pass gives a gradient to."""
    nodes, seen = [loss.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is not None and node not in seen:
            seen.add(node)
            nodes.extend(following for following, _ in node.next_functions)
            if hasattr(node, "variable"):
                yield node.variable


def gather(tensor: Tensor) -> Tensor:
    """Collect the rows (B, ...) of all ranks, this rank's first and with their gradient: (B * ranks, ...).

    Own rows first means that row i still belongs to sample i. Without ``torch.distributed`` it is the tensor
    itself. Every rank must bring equally many rows.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return tensor
    parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, tensor.detach().contiguous())
    del parts[dist.get_rank()]
    return torch.cat([tensor, *parts])


def all_sum(tensor: Tensor) -> Tensor:
    """Sum a tensor over all ranks, with the same bits on each and no gradient.

    Without ``torch.distributed`` it is ``tensor`` itself.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return tensor
    total = tensor.detach().clone()
    dist.all_reduce(total)
    return total
