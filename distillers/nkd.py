"""NKD: the cross-entropy is weighted by the teacher's certainty, and the other classes are distilled apart."""

import torch
from torch import Tensor

from kdzoo import Batch, Distiller, Fidelity, Needs, Output
from kdzoo.keywords import not_negative, positive
from kdzoo.losses import cross_entropy, soft_target_loss, true_class


def other_classes_entropy(student: Tensor, teacher: Tensor, target: Tensor, temperature: float) -> Tensor:
    """Compute T^2 times the cross-entropy of the distributions over the other classes, mean over B."""
    s, t = ((logits / temperature).masked_fill(target, -torch.inf).log_softmax(dim=1) for logits in (student, teacher))
    return -(t.exp() * s.masked_fill(target, 0)).sum(dim=1).mean() * temperature**2


class NKD(Distiller):
    r"""Normalized Knowledge Distillation.

    .. math:: L = w_{ce} H(y, p_s) + w_{nkd} \Big( -p_t^y \log p_s^y
        - \gamma T^2 \sum_{k \ne y} \hat p_t^k \log \hat p_s^k \Big)

    p^y is not softened; p-hat is softened by T and sums to 1 over all classes but the true one, which is the
    largest of the batch's targets. With two classes p-hat is 1, so it takes three. Before its last change, the authors'
    file kept every class in the second part, by a mask that was true everywhere; we follow the corrected one.

    Args:
        ce: weight of the cross-entropy with the ground truth.
        nkd: weight of both parts of the distillation.
        gamma: weight of the other classes inside it; the authors take 1.5 on ImageNet and 3.5 on CIFAR-100.
        temperature: T, which softens the other classes; the authors take 1 on ImageNet and 3 on CIFAR-100.

    Source: Yang et al. 2023; ``mmcls/models/dis_losses/nkd.py`` and ``configs/distillers`` of yzd-v/cls_KD.
    """

    paper = "arXiv:2303.13005"
    fidelity = Fidelity.EXACT
    label_terms = ("ce", "nkd")
    fewest_classes = 3
    needs = Needs(features=False, embedding=False)

    def __init__(self, *, ce: float = 1.0, nkd: float = 1.0, gamma: float = 1.5, temperature: float = 1.0):
        super().__init__(ce=ce, nkd=nkd)
        self.gamma, self.temperature = not_negative(gamma=gamma), positive(temperature=temperature)

    def loss(self, student: Output, teacher: Output, batch: Batch) -> dict[str, Tensor]:
        given = student.logits, teacher.logits, true_class(batch.targets)
        return self.weigh(
            ce=lambda: cross_entropy(student.logits, batch.targets),
            nkd=lambda: soft_target_loss(*given) + self.gamma * other_classes_entropy(*given, self.temperature),
        )
