"""LSKD: knowledge distillation of logits that are first brought to mean 0 and deviation 1, image by image."""

from torch import Tensor

from kdzoo import Batch, DataSpec, Distiller, Fidelity, Needs, Output
from kdzoo.errors import UserError
from kdzoo.losses import cross_entropy, softened_kl
from kdzoo.tensors import full_precision


def standardize(logits: Tensor) -> Tensor:
    """Each row of (B, K) less its mean, over its deviation (unbiased) + 1e-7; a constant row becomes 0."""
    logits = full_precision(logits)
    centred = logits - logits.mean(dim=1, keepdim=True)
    variance = centred.square().sum(dim=1, keepdim=True) / (logits.shape[1] - 1)
    return centred / (variance.clamp_min(1e-30).sqrt() + 1e-7)  # clamped: the root has no finite slope at 0


class LSKD(Distiller):
    r"""Logit Standardization in Knowledge Distillation.

    .. math:: L = w_{ce} H(y, p_s) + w_{kd} T^2 KL(\operatorname{softmax}(Z(z_t) / T) \|
        \operatorname{softmax}(Z(z_s) / T)), \quad Z(z) = \frac{z - \bar z}{\sigma(z) + 10^{-7}}

    The student need not repeat how large the teacher's logits are, only how they lie to each other.

    Args:
        ce: weight of the cross-entropy with the ground truth.
        kd: weight of the distillation term.
        temperature: T, the base temperature, which multiplies each image's deviation.

    Source: Sun et al. 2024; ``mdistiller/distillers/KD.py`` of sunshangquan/logit-standardization-KD.
    """

    paper = "arXiv:2403.01427"
    fidelity = Fidelity.EXACT
    needs = Needs(features=False)

    def __init__(
        self,
        student: Output,
        teacher: Output,
        data: DataSpec,
        *,
        ce: float = 0.1,
        kd: float = 9.0,
        temperature: float = 2.0,
    ):
        super().__init__()
        if not temperature > 0:
            raise UserError(f"temperature {temperature}: expected a number above 0; 2 is usual")
        self.ce, self.kd, self.temperature = ce, kd, temperature

    def loss(self, student: Output, teacher: Output, batch: Batch) -> dict[str, Tensor]:
        terms = {}
        if self.ce:
            terms["ce"] = self.ce * cross_entropy(student.logits, batch.targets)
        if self.kd:
            given = standardize(student.logits), standardize(teacher.logits.detach())
            terms["kd"] = self.kd * softened_kl(*given, self.temperature)
        return terms
