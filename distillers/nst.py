"""NST: the student's channels, as patterns over positions, are distributed as the teacher's."""

import torch
from torch import Tensor
from torch.nn import functional as F

from kdzoo import Batch, DataSpec, Distiller, Fidelity, Needs, Output
from kdzoo.connectors import CommonGrids
from kdzoo.losses import cross_entropy


def channel_discrepancy(student: Tensor, teacher: Tensor) -> Tensor:
    """Compute the squared MMD of the channels of maps (B, C_s, H, W) and (B, C_t, H, W): a scalar, the mean over B.

    The kernel is (x . y)^2. With S (C, N) the normalised channels, its sum over pairs of channels is the squared norm
    of S S', and that of S' S as well. So the discrepancy is a distance of two N x N matrices, which is taken where
    they are the smaller; otherwise the three C x C matrices are.
    """
    s, t = (F.normalize(maps.flatten(2), dim=2, eps=1e-6) for maps in (student, teacher))
    (_, c_s, positions), c_t = s.shape, t.shape[1]
    if positions**2 <= c_s * c_t:
        gap = s.mT @ s / c_s - t.mT @ t / c_t
        return gap.square().sum(dim=(1, 2)).mean()
    within_s, within_t, across = ((a @ b.mT).square().mean() for a, b in ((s, s), (t, t), (s, t)))
    return within_s + within_t - 2 * across


class NST(Distiller):
    r"""Neuron Selectivity Transfer.

    .. math:: L = w_{ce} H(y, p_s) + w_{nst} \sum_l \operatorname{mean}_{cc'} k(s_c, s_{c'})
        + \operatorname{mean}_{cc'} k(t_c, t_{c'}) - 2 \operatorname{mean}_{cc'} k(s_c, t_{c'}),
        \quad k(x, y) = (x \cdot y)^2

    s_c and t_c are the flattened channels of stage l, each of length 1. Where the grids of a stage differ, the larger
    map is average-pooled to the smaller height and width; widths need not agree. Memory is C x C or HW x HW numbers
    for an image, whichever is smaller.

    Args:
        ce: weight of the cross-entropy with the ground truth.
        nst: weight of the sum over stages.
        stages: which stages are matched. The default leaves out the first, which is the stem's map where networks
            have three stages.

    Source: Huang and Wang 2017, the polynomial kernel with d = 2 and c = 0; weight and stages of RepDistiller,
    ``distiller_zoo/NST.py``.
    """

    paper = "arXiv:1707.01219"
    fidelity = Fidelity.EXACT
    needs = Needs(logits=False)

    def __init__(self, *, ce: float = 1.0, nst: float = 50.0, stages: tuple[int, ...] = (1, 2, 3)):
        super().__init__(ce=ce, nst=nst)
        self.stages = stages

    def build(self, student: Output, teacher: Output, data: DataSpec) -> None:
        self.grids = CommonGrids(student, teacher, self.stages)

    def loss(self, student: Output, teacher: Output, batch: Batch) -> dict[str, Tensor]:
        return self.weigh(
            ce=lambda: cross_entropy(student.logits, batch.targets), nst=lambda: self.discrepancy(student, teacher)
        )

    def discrepancy(self, student: Output, teacher: Output) -> Tensor:
        """Sum the discrepancies of the stages: a scalar."""
        return torch.stack([channel_discrepancy(*maps) for maps in self.grids(student, teacher)]).sum()
