"""SKD: beside softened probabilities, the angles between the logits of a batch's images agree."""

import torch
from torch import Tensor
from torch.nn import functional as F

from kdzoo import Batch, Distiller, Fidelity, Needs, Output
from kdzoo.keywords import positive
from kdzoo.losses import cross_entropy, softened_kl


def direction_loss(student: Tensor, teacher: Tensor, ridge: float, whiten: bool = True) -> Tensor:
    """Compute the mean length of the rows of G_s - G_t, the cosines between rows of logits (B, K) over K.

    ``whiten`` takes the Mahalanobis length, by the covariance of these rows plus ``ridge`` times the identity; else the
    covariance is left out.
    """
    s, t = (F.normalize(logits, dim=1, eps=1e-6) for logits in (student, teacher))
    rows = (s @ s.mT - t @ t.mT) / s.shape[1]
    lengths = rows / ridge**0.5
    if whiten:
        centred = rows - rows.mean(dim=0)
        covariance = centred.mT @ centred / max(len(rows) - 1, 1)
        identity = torch.eye(len(rows), device=rows.device, dtype=rows.dtype)
        factor, _ = torch.linalg.cholesky_ex(covariance + ridge * identity)  # unlike cholesky, it asks no device
        lengths = torch.linalg.solve_triangular(factor, rows.mT, upper=False).mT
    return lengths.square().sum(dim=1).clamp_min(1e-12).sqrt().mean()  # clamped: the root has no finite slope at 0


class SKD(Distiller):
    r"""Streamlined Knowledge Distillation.

    .. math:: L = w_{ce} H(y, p_s) + w_{kd} T^2 KL(p_t^{(T)} \| p_s^{(T)})
        + w_{skd} \operatorname{mean}_i \sqrt{d_i^\top (\operatorname{cov} D + \lambda I)^{-1} d_i},
        \quad D = (G_s - G_t) / K

    G are the cosines between the logits of the batch's images, and d_i the rows of D. With the division by K and
    lambda = 0.1 the covariance is far below lambda, so the last term is nearly the plain length of d_i over the root of
    lambda (``whiten=False``); a small lambda measures d_i in units of the rows' own spread. Where the two networks give
    all angles alike, it is 0.

    The authors write weights of 0.5 for ``kd`` and ``skd`` and multiply both scalars by the mean of a mask that is half
    ones; our defaults are what remains.

    Args:
        ce: weight of the cross-entropy with the ground truth.
        kd: weight of the distillation of logits.
        skd: weight of the direction term.
        temperature: T, which softens both distributions.
        ridge: lambda, which is added to the covariance.
        whiten: whether the covariance divides; False keeps lambda alone.

    Source: the authors' ``mdistiller/distillers/SKD.py`` in HyunJunSik/StreamLined (CVPR 2026).
    """

    paper = "github.com/HyunJunSik/StreamLined"
    fidelity = Fidelity.EXACT
    needs = Needs(features=False, embedding=False)

    def __init__(
        self,
        *,
        ce: float = 0.5,
        kd: float = 0.25,
        skd: float = 0.25,
        temperature: float = 4.0,
        ridge: float = 0.1,
        whiten: bool = True,
    ):
        super().__init__(ce=ce, kd=kd, skd=skd)
        self.temperature, self.ridge, self.whiten = positive(temperature=temperature), positive(ridge=ridge), whiten

    def loss(self, student: Output, teacher: Output, batch: Batch) -> dict[str, Tensor]:
        return self.weigh(
            ce=lambda: cross_entropy(student.logits, batch.targets),
            kd=lambda: softened_kl(student.logits, teacher.logits, self.temperature),
            skd=lambda: direction_loss(student.logits, teacher.logits, self.ridge, self.whiten),
        )
