"""SGKD: of many noisy embeddings that dropout makes of the teacher's, the student picks those that are nearest."""

from math import ceil

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kdzoo import Batch, DataSpec, Distiller, Fidelity, Needs, Output
from kdzoo.keywords import at_least, fraction, positive
from kdzoo.losses import cross_entropy


@torch.no_grad()
def attended(student: Tensor, teacher: Tensor, temperature: float, quantile: float) -> Tensor:
    """Average embeddings (N, B, D) with weights that the student's (B, D) give: (B, D), without a gradient.

    Weights are the softmax over N of the dot products over ``temperature``. Those below their
    ``quantile`` become 0, and the others are made to sum to 1.
    """
    weights = ((student * teacher).sum(dim=2) / temperature).softmax(dim=0)  # (N, B)
    # No weight lies between the quantile and the next in order. torch 2.11 cannot compile its own quantile.
    edge = weights.sort(dim=0).values[ceil(quantile * (len(weights) - 1))]
    weights = weights * (weights >= edge)
    return (weights[:, :, None] * teacher).sum(dim=0) / weights.sum(dim=0)[:, None]


class SGKD(Distiller):
    r"""Student-Guided Knowledge Distillation from a Stochastic Teacher.

    .. math:: L = w_{ce} H(y, p_s) + w_{sgkd} \operatorname{MSE}\Big(P e_s, \sum_r a_r e_t^r\Big),
        \quad a = \operatorname{normalised}_{\ge q} \operatorname{softmax}_r(P e_s \cdot e_t^r / \tau)

    e_t^r are N embeddings of the teacher with random dropout; weights below their q-th quantile are left out. The
    teacher's logits are not read.

    Carried over from time series, with these differences:

    - The authors switch on the dropout of their teacher's last part. Networks for images rarely have any, so dropout is
      put on the teacher's embedding; the teacher runs once.
    - Their networks are alike; P is a linear map where the widths differ, else nothing.
    - Their gradient flows through the weights too; here these are constants.

    Args:
        ce: weight of the cross-entropy with the ground truth.
        sgkd: weight of the squared error, a mean over all numbers.
        dropout: share of the embedding's numbers that is dropped.
        samples: N.
        temperature: tau, which divides the dot products.
        quantile: q, from 0 to below 1; 0 keeps all weights.

    Source: the authors' ``src/ssd_utils.py`` and ``src/Tdistillation.py`` in moonblume/StochasticTeacher-StudentKD.
    """

    paper = "arXiv:2504.14307"
    fidelity = Fidelity.ADAPTED
    needs = Needs(logits=False, features=False)

    def __init__(
        self,
        *,
        ce: float = 0.5,
        sgkd: float = 0.5,
        dropout: float = 0.1,
        samples: int = 30,
        temperature: float = 5.0,
        quantile: float = 0.9,
    ):
        super().__init__(ce=ce, sgkd=sgkd)
        self.dropout, self.samples = fraction(dropout=dropout), at_least(1, samples=samples)
        self.temperature, self.quantile = positive(temperature=temperature), fraction(quantile=quantile)

    def build(self, student: Output, teacher: Output, data: DataSpec) -> None:
        inputs, outputs = student.embedding.shape[1], teacher.embedding.shape[1]
        self.project = nn.Identity() if inputs == outputs else nn.Linear(inputs, outputs)

    def loss(self, student: Output, teacher: Output, batch: Batch) -> dict[str, Tensor]:
        return self.weigh(
            ce=lambda: cross_entropy(student.logits, batch.targets),
            sgkd=lambda: self.error(student.embedding, teacher.embedding),
        )

    def error(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Compute the squared error of embeddings (B, D_s) from the chosen average of (B, D_t)."""
        own = self.project(student)
        noisy = F.dropout(teacher.expand(self.samples, *teacher.shape), self.dropout)
        return F.mse_loss(own, attended(own, noisy, self.temperature, self.quantile))
