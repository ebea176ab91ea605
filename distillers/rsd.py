"""RSD: each number of the student's embedding repeats one of the teacher's and is uncorrelated with the others."""

from torch import Tensor, nn

from kdzoo import Batch, DataSpec, Distiller, Fidelity, Needs, Output
from kdzoo.keywords import at_least, not_negative
from kdzoo.losses import cross_entropy


def standardize(embedding: Tensor) -> Tensor:
    """Subtract the batch mean from each column of (B, D) and divide by its deviation (biased) + 1e-5."""
    centred = embedding - embedding.mean(dim=0)
    deviation = centred.square().mean(dim=0).clamp_min(1e-30).sqrt()  # clamped: the root has no finite slope at 0
    return centred / (deviation + 1e-5)


def redundancy_loss(student: Tensor, teacher: Tensor, kappa: float) -> Tensor:
    """Compute sum_i (C_ii - 1)^2 + kappa sum_{i != j} C_ij^2, C the cross-correlation of two embeddings (B, D)."""
    correlation = standardize(teacher).mT @ standardize(student) / len(student)
    diagonal = correlation.diagonal()
    return (diagonal - 1).square().sum() + kappa * (correlation - diagonal.diag()).square().sum()


class RSD(Distiller):
    r"""Redundancy Suppression Distillation.

    .. math:: L = w_{ce} H(y, p_s) + w_{rsd} \Big( \sum_i (C_{ii} - 1)^2 + \kappa \sum_{i \ne j} C_{ij}^2 \Big),
        \quad C = \frac{1}{B} Z(e_t)^\top Z(P e_s)

    e is the embedding, Z standardises each of its numbers over the batch, and P is a small network (linear, batch
    norm, GELU, linear; no biases) that spares the student's own embedding. Its weights start as PyTorch's do, the
    authors' as normal numbers of deviation 0.02; Z makes the scale of no account.

    Args:
        ce: weight of the cross-entropy with the ground truth.
        rsd: weight of the redundancy term, a sum over D x D correlations.
        kappa: weight of the off-diagonal correlations inside it.
        expansion: width of P's hidden layer, in widths of the student's embedding.

    Source: Zhang et al. 2025; ``distillers/rsd.py`` and ``train.py`` of spacewanderx/RSD.
    """

    paper = "arXiv:2507.21844"
    fidelity = Fidelity.EXACT
    needs = Needs(logits=False, features=False)

    def __init__(self, *, ce: float = 1.0, rsd: float = 0.1, kappa: float = 0.01, expansion: int = 2):
        super().__init__(ce=ce, rsd=rsd)
        self.kappa, self.expansion = not_negative(kappa=kappa), at_least(1, expansion=expansion)

    def build(self, student: Output, teacher: Output, data: DataSpec) -> None:
        inputs, outputs = student.embedding.shape[1], teacher.embedding.shape[1]
        self.projector = nn.Sequential(
            nn.Linear(inputs, self.expansion * inputs, bias=False),
            nn.BatchNorm1d(self.expansion * inputs),
            nn.GELU(),
            nn.Linear(self.expansion * inputs, outputs, bias=False),
        )

    def loss(self, student: Output, teacher: Output, batch: Batch) -> dict[str, Tensor]:
        return self.weigh(
            ce=lambda: cross_entropy(student.logits, batch.targets),
            rsd=lambda: redundancy_loss(self.projector(student.embedding), teacher.embedding, self.kappa),
        )
