"""RKD: distances and angles between a batch's embeddings are the same for student and teacher."""

import torch
from torch import Tensor
from torch.nn import functional as F

from kdzoo import Batch, Distiller, Fidelity, Needs, Output
from kdzoo.keywords import not_negative
from kdzoo.losses import cross_entropy

NEAR = 1e-6  # rows no further apart count as one: they have distance 0, no angle, and no gradient


def distances(embeddings: Tensor) -> Tensor:
    """Compute the Euclidean distances of rows (B, D), with a gradient of 0 where they are 0: (B, B)."""
    return torch.cdist(embeddings, embeddings, compute_mode="donot_use_mm_for_euclid_dist")


def relative_distances(embeddings: Tensor) -> Tensor:
    """Divide the distances of rows (B, D) by their mean over different rows: (B, B)."""
    apart = distances(embeddings)
    pairs = max(len(apart) * (len(apart) - 1), 1)
    return apart / (apart.sum() / pairs).clamp_min(NEAR)


def angles(embeddings: Tensor) -> Tensor:
    """Compute the cosine at row i of the angle between rows j and k of (B, D): (B, B, B) by i, j, k."""
    rows, apart = embeddings, distances(embeddings)
    inverse = apart.masked_fill(apart <= NEAR, torch.inf).reciprocal()
    directions = (rows - rows[:, None]) * inverse[:, :, None]
    return directions @ directions.mT


def distance_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Compute the smooth L1 of the relative distances of embeddings (B, D_s) and (B, D_t), mean over pairs."""
    return F.smooth_l1_loss(relative_distances(student), relative_distances(teacher))


def angle_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Compute the smooth L1 of the cosines of embeddings (B, D_s) and (B, D_t), mean over triplets."""
    return F.smooth_l1_loss(angles(student), angles(teacher))


class RKD(Distiller):
    r"""Relational Knowledge Distillation.

    .. math:: L = w_{ce} H(y, p_s) + w_{rkd} \left(w_{distance} \operatorname{mean}_{ij}
        \ell_1\left(\frac{d_{ij}^s}{\mu^s}, \frac{d_{ij}^t}{\mu^t}\right) + w_{angle} \operatorname{mean}_{ijk}
        \ell_1(\cos \angle^s_{jik}, \cos \angle^t_{jik})\right)

    l_1 is smooth L1, d the distance of two embeddings and mu its mean over different images. Means are over all
    B^2 pairs and B^3 triplets, as in the authors' code. Embeddings of any two widths compare; no map is read.
    The angles take memory B^2 D + B^3. Rows at distance 0 have no angle and no gradient of their own.

    Args:
        ce: weight of the cross-entropy with the ground truth.
        rkd: weight of both relations together.
        distance: weight of the distances within it.
        angle: weight of the angles within it.

    Source: Park et al. 2019; the authors' ``metric/loss.py``; weights of RepDistiller.
    """

    paper = "arXiv:1904.05068"
    fidelity = Fidelity.EXACT
    needs = Needs(logits=False, features=False)

    def __init__(self, *, ce: float = 1.0, rkd: float = 1.0, distance: float = 25.0, angle: float = 50.0):
        super().__init__(ce=ce, rkd=rkd if distance or angle else 0.0)
        self.distance, self.angle = not_negative(distance=distance), not_negative(angle=angle)

    def loss(self, student: Output, teacher: Output, batch: Batch) -> dict[str, Tensor]:
        return self.weigh(
            ce=lambda: cross_entropy(student.logits, batch.targets),
            rkd=lambda: self.relations(student.embedding, teacher.embedding),
        )

    def relations(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Sum the losses of distances and angles with their weights; a weight of 0 skips its part."""
        parts = []
        if self.distance:
            parts.append(self.distance * distance_loss(student, teacher))
        if self.angle:
            parts.append(self.angle * angle_loss(student, teacher))
        return torch.stack(parts).sum()
