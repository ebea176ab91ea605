"""NST: the student's channels, as patterns over space, are distributed as the teacher's."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kdzoo import Batch, DataSpec, Distiller, Fidelity, Needs, Output
from kdzoo.connectors import CommonGrid, check_stages
from kdzoo.losses import cross_entropy
from kdzoo.tensors import full_precision


def channel_discrepancy(student: Tensor, teacher: Tensor) -> Tensor:
    """Squared MMD of the channels of maps (B, C_s, H, W) and (B, C_t, H, W), under the kernel (x . y)^2, mean over B.

    With S (C, N) the normalised channels, the sum of (x . y)^2 over pairs of channels is the squared norm of
    S S', and that of S' S as well. So the discrepancy is a distance of two N x N matrices, which is taken where
    they are the smaller; otherwise the three C x C matrices are.
    """
    s, t = (F.normalize(full_precision(maps).flatten(2), dim=2, eps=1e-6) for maps in (student, teacher))
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

    def __init__(
        self,
        student: Output,
        teacher: Output,
        data: DataSpec,
        *,
        ce: float = 1.0,
        nst: float = 50.0,
        stages: tuple[int, ...] = (1, 2, 3),
    ):
        super().__init__()
        self.ce, self.nst = ce, nst
        if not nst:
            self.needs = Needs(features=False)
            return
        self.stages = check_stages(stages, student, teacher)
        self.grids = nn.ModuleList(CommonGrid(student.features[l], teacher.features[l]) for l in self.stages)

    def loss(self, student: Output, teacher: Output, batch: Batch) -> dict[str, Tensor]:
        terms = {}
        if self.ce:
            terms["ce"] = self.ce * cross_entropy(student.logits, batch.targets)
        if self.nst:
            losses = []
            for l, grid in zip(self.stages, self.grids, strict=True):
                f_s, f_t = grid(student.features[l], teacher.features[l])
                losses.append(channel_discrepancy(f_s, f_t))
            terms["nst"] = self.nst * torch.stack(losses).sum()
        return terms
