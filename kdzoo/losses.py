"""Losses that several methods share: pure functions of tensors, computed in float32 or better."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.linalg import vector_norm
from torch.nn import functional as F

from kdzoo.tensors import full_precision


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Compute the cross-entropy of ``logits`` (B, K) against distributions ``targets`` (B, K), mean over the batch."""
    if logits.shape != targets.shape:
        raise ValueError(
            f"the logits are of shape {tuple(logits.shape)} and the targets of shape {tuple(targets.shape)}; "
            "expected the same, with a batch made with num_classes=... of the networks"
        )
    logits = full_precision(logits)
    return F.cross_entropy(logits, targets.to(logits.dtype))


def softened_kl(student: Tensor, teacher: Tensor, temperature: float | Tensor) -> Tensor:
    """Compute T^2 KL(softmax(teacher / T) || softmax(student / T)) of logits (B, K): sum over K, mean over B.

    T^2 keeps the gradient's size as T grows (Hinton, Vinyals and Dean 2015, section 2.1).
    """
    log_s = F.log_softmax(full_precision(student) / temperature, dim=1)
    log_t = F.log_softmax(full_precision(teacher) / temperature, dim=1)
    return F.kl_div(log_s, log_t, reduction="batchmean", log_target=True) * temperature**2


def centred_mse(student: Tensor, teacher: Tensor) -> Tensor:
    """Compute the mean squared error of logits (B, K) after subtracting each row's mean.

    No softmax can see that mean.
    """
    difference = full_precision(student) - full_precision(teacher)
    return (difference - difference.mean(dim=1, keepdim=True)).square().mean()


def standardised(values: Tensor, dim: int | tuple[int, ...], eps: float) -> Tensor:
    """Normalise ``values`` to mean 0 and variance 1 over the dimensions ``dim``; ``eps`` is added to the variance."""
    centred = values - values.mean(dim=dim, keepdim=True)
    return centred * (centred.square().mean(dim=dim, keepdim=True) + eps).rsqrt()


def true_class(targets: Tensor) -> Tensor:
    """Mark the largest entry of each row of ``targets`` (B, K), the first of equal ones: (B, K) bool."""
    return torch.arange(targets.shape[1], device=targets.device) == targets.argmax(dim=1, keepdim=True)


def warm_up(progress: Tensor, share: float) -> Tensor:
    """Compute a factor that rises linearly from 0 to 1 over the first ``share`` of training and then stays 1.

    ``progress`` () is the share of training that is done. The code of papers changes such a factor once an epoch. If it
    counts epochs from 1, it is half an epoch ahead of this line on average, and from 0 half an epoch behind.
    """
    return (progress / share).clamp(max=1) if share > 0 else torch.ones_like(progress)


def info_nce(queries: Tensor, keys: Tensor, temperature: float, mask: Tensor | None = None) -> Tensor:
    """Pull query i towards key i and push it away from all other keys.

    Args:
        queries: (B, D), normalised by the caller.
        keys: (N, D) with N >= B, of which row i belongs to query i and the rest only repel.
        temperature: divides the similarities.
        mask: (B, N) bool, true for pairs that do not repel; its diagonal is ignored.

    Source: van den Oord, Li and Vinyals 2018, eq. 4.
    """
    logits = full_precision(queries) @ full_precision(keys).mT / temperature
    positives = torch.arange(len(queries), device=queries.device)
    if mask is not None:
        others = torch.arange(len(keys), device=keys.device) != positives[:, None]
        logits = logits.masked_fill(mask & others, -torch.inf)
    return F.cross_entropy(logits, positives)


def pearson_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Compute 1 - the correlation of rows (N, M) of the two networks, mean over rows; 1 for constant rows."""
    s, t = (full_precision(rows) for rows in (student, teacher))
    s, t = s - s.mean(dim=1, keepdim=True), t - t.mean(dim=1, keepdim=True)
    norms = vector_norm(s, dim=1) * vector_norm(t, dim=1)
    return 1 - ((s * t).sum(dim=1) / (norms + 1e-8)).mean()


def dist_loss(student: Tensor, teacher: Tensor, inter: float, intra: float, temperature: float) -> Tensor:
    """Compute T^2 (inter * distance of rows + intra * distance of columns) of the softened logits (B, K).

    Source: Huang et al. 2022 (DIST).
    """
    p_s, p_t = ((full_precision(logits) / temperature).softmax(dim=1) for logits in (student, teacher))
    both = inter * pearson_distance(p_s, p_t) + intra * pearson_distance(p_s.mT, p_t.mT)
    return temperature**2 * both


def row_kl(student: Tensor, teacher: Tensor) -> Tensor:
    """Compute KL(softmax(teacher) || softmax(student)) of logits (B, K), row by row: (B,)."""
    log_s, log_t = (F.log_softmax(full_precision(logits), dim=1) for logits in (student, teacher))
    return F.kl_div(log_s, log_t, reduction="none", log_target=True).sum(dim=1)


def class_or_rest(logits: Tensor, chosen: Tensor) -> Tensor:
    """Compute log(p, 1 - p) of each row's ``chosen`` class: logits (B, K), mask (B, K) bool -> (B, 2).

    1 - p is summed over the other classes, so that it is right also where p rounds to 1.
    """
    log_p = F.log_softmax(full_precision(logits), dim=1)
    of_chosen = log_p.masked_fill(~chosen, 0).sum(dim=1)
    of_others = log_p.masked_fill(chosen, -torch.inf).logsumexp(dim=1)
    return torch.stack([of_chosen, of_others], dim=1)


def other_classes_loss(student: Tensor, teacher: Tensor, dropped: Tensor, temperature: float) -> Tensor:
    """Compute T^2 KL between the distributions over the classes that are not ``dropped``, mean over B.

    Logits (B, K), mask (B, K) bool. A row with one class left, or none, adds 0.
    """
    far = -1e9  # no probability; and finite, so that a row without classes is uniform on both sides
    kept = [(full_precision(logits) / temperature).masked_fill(dropped, far) for logits in (student, teacher)]
    return row_kl(*kept).mean() * temperature**2


def doubling_sum(losses: Sequence[Tensor]) -> Tensor:
    """Sum the losses of stages, shallow to deep, each with twice the weight of the one before it; the last counts 1."""
    weights = [0.5**depth for depth in reversed(range(len(losses)))]
    return torch.stack([weight * loss for weight, loss in zip(weights, losses, strict=True)]).sum()


def soft_target_loss(student: Tensor, teacher: Tensor, target: Tensor) -> Tensor:
    """Compute -p_t[y] log p_s[y] of logits (B, K) and ``target`` (B, K) bool, mean over B.

    Source: Yang et al. 2023, the true class's part of NKD.
    """
    certainty = full_precision(teacher).softmax(dim=1)
    log_p = F.log_softmax(full_precision(student), dim=1)
    return -(certainty * log_p).masked_fill(~target, 0).sum(dim=1).mean()


def ofa_loss(student: Tensor, teacher: Tensor, target: Tensor, eps: float, temperature: float = 1.0) -> Tensor:
    """Compute -sum_k ((p_t + m)^eps - m) log p_s of logits (B, K), m = ``target`` (B, K) bool, mean over B.

    Source: Hao et al. 2023; ``distillers/ofa.py`` of Hao840/OFAKD.
    """
    p_t = (teacher / temperature).softmax(dim=1)
    log_p = F.log_softmax(student / temperature, dim=1)
    raised = (p_t + target.to(p_t.dtype)) ** eps - target.to(p_t.dtype)
    return -(raised * log_p).sum(dim=1).mean()


def context_loss(student: Tensor, teacher: Tensor, pyramid: Callable[[Tensor], list[Tensor]]) -> Tensor:
    """Average the MSE of maps (B, C, H, W) over levels, weighted 1, 1/2, 1/4 ...: the hierarchical context loss.

    Source: Chen et al. 2021 (ReviewKD).
    """
    gaps = pyramid(student - teacher)  # averaging is linear: that of the gap will do
    weights = [0.5**level for level in range(len(gaps))]
    losses = [weight * gap.square().mean() for weight, gap in zip(weights, gaps, strict=True)]
    return torch.stack(losses).sum() / sum(weights)
