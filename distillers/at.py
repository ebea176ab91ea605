"""AT: the student attends to the same places as the teacher, stage by stage."""

import torch
from torch import Tensor
from torch.nn import functional as F

from kdzoo import Batch, DataSpec, Distiller, Fidelity, Needs, Output
from kdzoo.connectors import CommonGrids
from kdzoo.keywords import at_least
from kdzoo.losses import cross_entropy


def attention_map(maps: Tensor, p: float) -> Tensor:
    """Average |maps|^p over channels, flattened and of length 1: (B, C, H, W) -> (B, H * W)."""
    return F.normalize(maps.abs().pow(p).mean(dim=1).flatten(1), eps=1e-6)


def attention_loss(student: Tensor, teacher: Tensor, p: float) -> Tensor:
    """Compute the mean squared error of the attention of maps (B, C_s, H, W) and (B, C_t, H, W)."""
    return F.mse_loss(attention_map(student, p), attention_map(teacher, p))


class AT(Distiller):
    r"""Attention Transfer.

    .. math:: L = w_{ce} H(y, p_s) + w_{at} \sum_l
        \operatorname{MSE}\left(\frac{Q_s^l}{\|Q_s^l\|_2}, \frac{Q_t^l}{\|Q_t^l\|_2}\right),
        \quad Q = \operatorname{mean}_c |f_c|^p

    The paper takes the norm of the difference; the authors' code, which is followed, takes the mean square over
    positions and batch. Where the grids of a stage differ, the larger map is average-pooled to the smaller height
    and width before Q is taken. A stage with one position has nothing to match.

    Args:
        ce: weight of the cross-entropy with the ground truth.
        at: weight of the sum over stages.
        p: power of each activation.
        stages: which stages are matched. The default leaves out the first, which is the stem's map where networks
            have three stages.

    Source: Zagoruyko and Komodakis 2017, eq. 2; the authors' ``cifar.py``; weight of RepDistiller.
    """

    paper = "arXiv:1612.03928"
    fidelity = Fidelity.EXACT
    needs = Needs(logits=False)

    def __init__(self, *, ce: float = 1.0, at: float = 1000.0, p: float = 2.0, stages: tuple[int, ...] = (1, 2, 3)):
        super().__init__(ce=ce, at=at)
        self.p = at_least(1.0, p=p)  # below 1 the gradient at 0 is not finite
        self.stages = stages

    def build(self, student: Output, teacher: Output, data: DataSpec) -> None:
        self.grids = CommonGrids(student, teacher, self.stages)

    def loss(self, student: Output, teacher: Output, batch: Batch) -> dict[str, Tensor]:
        return self.weigh(
            ce=lambda: cross_entropy(student.logits, batch.targets), at=lambda: self.transfer(student, teacher)
        )

    def transfer(self, student: Output, teacher: Output) -> Tensor:
        """Sum the attention losses of the stages: a scalar."""
        pooled = self.grids(student, teacher)
        return torch.stack([attention_loss(f_s, f_t, self.p) for f_s, f_t in pooled]).sum()
