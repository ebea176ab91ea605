"""RLD: the teacher's certainty and its less likely classes are distilled, and its mistakes are left out."""

import torch
from torch import Tensor
from torch.nn import functional as F

from kdzoo import Batch, Distiller, Fidelity, Needs, Output
from kdzoo.keywords import not_negative, positive, share
from kdzoo.losses import class_or_rest, cross_entropy, other_classes_loss, true_class, warm_up


def sample_confidence_loss(student: Tensor, teacher: Tensor, target: Tensor, temperature: float) -> Tensor:
    """Compute T^2 KL of the teacher's (max p, 1 - max p) from the student's (p_y, 1 - p_y), mean over B.

    Logits are (B, K), ``target`` (B, K) bool.
    """
    log_s = class_or_rest(student / temperature, target)
    log_t = class_or_rest(teacher / temperature, true_class(teacher))
    return F.kl_div(log_s, log_t, reduction="batchmean", log_target=True) * temperature**2


def at_least_as_likely(teacher: Tensor, target: Tensor) -> Tensor:
    """Mark the classes that the teacher's logits (B, K) put no lower than the true one: (B, K) bool."""
    return teacher >= teacher.masked_fill(~target, -torch.inf).amax(dim=1, keepdim=True)


class RLD(Distiller):
    r"""Knowledge Distillation with Refined Logits.

    .. math:: L = w_{ce} H(y, p_s) + w_{rld} r \, (\alpha \, \mathrm{SCD} + \beta \, \mathrm{MCD})

    .. math:: \mathrm{SCD} = T_c^2 KL((\max_k p_t^k, 1 - \max_k p_t^k) \| (p_s^y, 1 - p_s^y)),
        \quad \mathrm{MCD} = T^2 KL(\hat p_t \| \hat p_s)

    p-hat is p over the classes that the teacher takes for less likely than the true one, which is the largest of the
    batch's targets; where there are none, MCD is 0. r rises from 0 to 1. Where the teacher is right, SCD and MCD are
    the two parts of ``dkd``. Everything stays in logarithms, where the authors' code takes the log of a softmax.

    Args:
        ce: weight of the cross-entropy with the ground truth.
        rld: weight of both parts of the distillation.
        alpha: weight of SCD inside it.
        beta: weight of MCD inside it; the authors take 8 on CIFAR-100, and 0.5 or 2 on ImageNet.
        temperature: T, which softens the classes of MCD; the authors take 4 on CIFAR-100 and 1 on ImageNet.
        confidence_temperature: T_c, which softens SCD; the authors' command for CIFAR-100 takes T, their code's own
            default is 1.
        warmup: share of training over which r rises.

    Source: Sun et al. 2025; ``mdistiller/distillers/RLD.py``, ``engine/cfg.py`` and ``README.md`` of zju-SWJ/RLD.
    """

    paper = "arXiv:2408.07703"
    fidelity = Fidelity.EXACT
    label_terms = ("ce", "rld")
    fewest_classes = 3
    needs = Needs(features=False, embedding=False)

    def __init__(
        self,
        *,
        ce: float = 1.0,
        rld: float = 1.0,
        alpha: float = 1.0,
        beta: float = 8.0,
        temperature: float = 4.0,
        confidence_temperature: float = 4.0,
        warmup: float = 20 / 240,
    ):
        super().__init__(ce=ce, rld=rld)
        self.alpha, self.beta = not_negative(alpha=alpha), not_negative(beta=beta)
        self.temperature = positive(temperature=temperature)
        self.confidence_temperature = positive(confidence_temperature=confidence_temperature)
        self.warmup = share(warmup=warmup)

    def loss(self, student: Output, teacher: Output, batch: Batch) -> dict[str, Tensor]:
        return self.weigh(
            ce=lambda: cross_entropy(student.logits, batch.targets),
            rld=lambda: warm_up(batch.progress, self.warmup) * self.refined(student, teacher, batch),
        )

    def refined(self, student: Output, teacher: Output, batch: Batch) -> Tensor:
        """Sum both parts with their weights: a scalar."""
        z_s, z_t, target = student.logits, teacher.logits, true_class(batch.targets)
        confidence = sample_confidence_loss(z_s, z_t, target, self.confidence_temperature)
        less_likely = other_classes_loss(z_s, z_t, at_least_as_likely(z_t, target), self.temperature)
        return self.alpha * confidence + self.beta * less_likely
