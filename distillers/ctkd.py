"""CTKD: knowledge distillation with a temperature that is learned adversarially, from easy to hard."""

import math

import torch
from torch import Tensor, nn

from kdzoo import Batch, DataSpec, Distiller, Fidelity, Needs, Output
from kdzoo.keywords import not_negative, positive, share
from kdzoo.losses import cross_entropy, softened_kl, warm_up


def reverse_gradient(x: Tensor, strength: float | Tensor) -> Tensor:
    """Return ``x`` unchanged, and multiply its gradient by -``strength`` in the backward pass."""
    return x.detach() + strength * (x.detach() - x)


def cosine_rise(progress: Tensor, share: float) -> Tensor:
    """Compute a factor that rises from 0 to 1 by half a cosine over the first ``share`` of training, then stays 1."""
    return (1 - torch.cos(math.pi * warm_up(progress, share))) / 2


class CTKD(Distiller):
    r"""Curriculum Temperature for Knowledge Distillation.

    .. math:: L = w_{ce} H(y, p_s) + w_{kd} T^2 KL(p_t^{(T)} \| p_s^{(T)}), \quad T = T_0 + \Delta \, \sigma(g)

    One number g is learned for all images (the authors' global version), and in the opposite direction: its
    gradient is multiplied by -lambda, and lambda rises from 0 to 1. T^2 is part of what g can raise, as in the
    authors' code.

    Args:
        ce: weight of the cross-entropy with the ground truth.
        kd: weight of the distillation term.
        lowest: T_0, the least that the temperature can be.
        span: Delta, by how much it can rise above that.
        start: g at the beginning; 1 means T = 15.6.
        warmup: share of training over which lambda rises; the authors' rises once an epoch, from the cosine's value at
            1/10 in the first of 240, on average half an epoch ahead of ours.

    Source: Li et al. 2023; ``train_student.py``, ``helper/loops.py`` and ``scripts/run_cifar_distill.sh`` of
    zhengli97/CTKD.
    """

    paper = "arXiv:2211.16231"
    fidelity = Fidelity.EXACT
    needs = Needs(features=False, embedding=False)
    logit_terms = ("ce",)  # kd has a temperature to train

    def __init__(
        self,
        *,
        ce: float = 0.1,
        kd: float = 0.9,
        lowest: float = 1.0,
        span: float = 20.0,
        start: float = 1.0,
        warmup: float = 10 / 240,
    ):
        super().__init__(ce=ce, kd=kd)
        self.lowest, self.span = positive(lowest=lowest), not_negative(span=span)
        self.start, self.warmup = start, share(warmup=warmup)

    def build(self, student: Output, teacher: Output, data: DataSpec) -> None:
        self.hardness = nn.Parameter(torch.tensor(float(self.start)))  # g

    def temperature(self, progress: Tensor) -> Tensor:
        """Compute the current temperature T, (), with its gradient reversed."""
        hardness = reverse_gradient(self.hardness, cosine_rise(progress, self.warmup))
        return self.lowest + self.span * hardness.sigmoid()

    def loss(self, student: Output, teacher: Output, batch: Batch) -> dict[str, Tensor]:
        return self.weigh(
            ce=lambda: cross_entropy(student.logits, batch.targets),
            kd=lambda: softened_kl(student.logits, teacher.logits, self.temperature(batch.progress)),
        )
