"""LSKD: knowledge distillation of logits normalised to mean 0 and deviation 1, image by image."""

from torch import Tensor

from kdzoo import Batch, Distiller, Fidelity, Output
from kdzoo.keywords import positive
from kdzoo.losses import cross_entropy, softened_kl


def standardize(logits: Tensor) -> Tensor:
    """Subtract each row's mean from (B, K) and divide by its deviation (unbiased) + 1e-7; a constant row becomes 0."""
    centred = logits - logits.mean(dim=1, keepdim=True)
    variance = centred.square().sum(dim=1, keepdim=True) / (logits.shape[1] - 1)
    return centred / (variance.clamp_min(1e-30).sqrt() + 1e-7)  # clamped: the root has no finite slope at 0


class LSKD(Distiller):
    r"""Logit Standardization in Knowledge Distillation.

    .. math:: L = w_{ce} H(y, p_s) + w_{kd} T^2 KL(\operatorname{softmax}(Z(z_t) / T) \|
        \operatorname{softmax}(Z(z_s) / T)), \quad Z(z) = \frac{z - \bar z}{\sigma(z) + 10^{-7}}

    The student need not repeat how large the teacher's logits are, only how they lie to each other. Two standardised
    numbers are always the same two, so it takes three classes.

    Args:
        ce: weight of the cross-entropy with the ground truth.
        kd: weight of the distillation term.
        temperature: T, the base temperature, which multiplies each image's deviation.

    Source: Sun et al. 2024; ``mdistiller/distillers/KD.py`` of sunshangquan/logit-standardization-KD.
    """

    paper = "arXiv:2403.01427"
    fidelity = Fidelity.EXACT
    fewest_classes = 3

    def __init__(self, *, ce: float = 0.1, kd: float = 9.0, temperature: float = 2.0):
        super().__init__(ce=ce, kd=kd)
        self.temperature = positive(temperature=temperature)

    def loss(self, student: Output, teacher: Output, batch: Batch) -> dict[str, Tensor]:
        return self.weigh(
            ce=lambda: cross_entropy(student.logits, batch.targets),
            kd=lambda: softened_kl(standardize(student.logits), standardize(teacher.logits), self.temperature),
        )
