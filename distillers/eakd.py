"""EA-KD: knowledge distillation whose images count by how unsure teacher and student are of them."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from kdzoo import Batch, Distiller, Fidelity, Output
from kdzoo.keywords import positive
from kdzoo.losses import cross_entropy, row_kl


def entropy(logits: Tensor) -> Tensor:
    """Compute the entropy of the softmax of logits (B, K), row by row, in nats: (B,)."""
    log_p = F.log_softmax(logits, dim=1)
    return -(log_p.exp() * log_p).sum(dim=1)


@torch.no_grad()
def sample_weights(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Compute H_t (1 + H_s / log K) / 2 of logits (B, K): (B,), with entropies H at ``temperature``."""
    h_s, h_t = (entropy(logits / temperature) for logits in (student, teacher))
    return h_t * (1 + h_s / math.log(student.shape[1])) / 2


class EAKD(Distiller):
    r"""EA-KD: Entropy-based Adaptive Knowledge Distillation.

    .. math:: L = w_{ce} H(y, p_s) + w_{kd} \operatorname{mean}_i w_i T^2 KL(p_t^{(T)} \| p_s^{(T)}),
        \quad w = \frac{H_t}{2} \Big(1 + \frac{H_s}{\log K}\Big)

    H are entropies at a temperature that is theirs, and w carries no gradient. The authors weigh the images of other
    methods in the same way. That needs a loss for each image, where the terms of a method here are means over images,
    and relations between images have none; so this is the classical distillation alone.

    The authors' code writes 100 for K, and in its classical distillation on CIFAR-100 leaves out the logarithm, so that
    H_s hardly counts there; its other methods and its ImageNet have log K, as here.

    Args:
        ce: weight of the cross-entropy with the ground truth.
        kd: weight of the distillation term.
        temperature: T, which softens both distributions.
        entropy_temperature: softens the distributions whose entropy is taken; the authors take 3 on CIFAR-100 and 2 on
            ImageNet.

    Source: Su et al. 2025; ``mdistiller/distillers/KD.py`` and ``configs`` of cpsu00/EA-KD.
    """

    paper = "arXiv:2311.13621"
    fidelity = Fidelity.EXACT

    def __init__(self, *, ce: float = 0.1, kd: float = 0.9, temperature: float = 4.0, entropy_temperature: float = 3.0):
        super().__init__(ce=ce, kd=kd)
        self.temperature = positive(temperature=temperature)
        self.entropy_temperature = positive(entropy_temperature=entropy_temperature)

    def loss(self, student: Output, teacher: Output, batch: Batch) -> dict[str, Tensor]:
        return self.weigh(
            ce=lambda: cross_entropy(student.logits, batch.targets),
            kd=lambda: self.weighted(student.logits, teacher.logits),
        )

    def weighted(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Compute the weighted T^2 KL of logits (B, K), mean over B."""
        weights = sample_weights(student, teacher, self.entropy_temperature)
        return (weights * row_kl(student / self.temperature, teacher / self.temperature)).mean() * self.temperature**2
