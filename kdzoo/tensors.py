"""Helpers for tensors that are no losses: full precision, and rows gathered from all ranks."""

import torch
from torch import Tensor
from torch import distributed as dist


def full_precision(tensor: Tensor) -> Tensor:
    """Half precision as float32; float32 and float64 as they are."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def gather(tensor: Tensor) -> Tensor:
    """The rows (B, ...) of every rank, this rank's own first and with their gradient: (B * ranks, ...).

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
    """The sum over every rank, the same bits on each; no gradient. Without ``torch.distributed`` it is ``tensor``."""
    if not (dist.is_available() and dist.is_initialized()):
        return tensor
    total = tensor.detach().clone()
    dist.all_reduce(total)
    return total
