"""VID: the student predicts a Gaussian for the teacher's maps, with a learned variance, that makes them likely."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kdzoo import Batch, DataSpec, Distiller, Fidelity, Needs, Output
from kdzoo.connectors import CommonGrids, paired_features
from kdzoo.errors import UserError
from kdzoo.losses import cross_entropy

FLOOR = 1e-5  # the least variance


def gaussian_loss(mean: Tensor, target: Tensor, variance: Tensor) -> Tensor:
    """Compute the mean of -log N(target; mean, variance) of maps (B, C, H, W), less its constant; ``variance`` (C,)."""
    spread = variance[:, None, None]
    return ((mean - target).square() / spread + spread.log()).mean() / 2


class VID(Distiller):
    r"""Variational Information Distillation.

    .. math:: L = w_{ce} H(y, p_s) + \frac{w_{vid}}{2} \sum_l \operatorname{mean}_{bchw}
        \frac{(\mu(f_s)_{bchw} - f_{t,bchw})^2}{\sigma_c^2} + \log \sigma_c^2,
        \quad \sigma_c^2 = \operatorname{softplus}(\alpha_c) + 10^{-5}

    mu: three 1x1 convolutions with ReLU between them. alpha is a parameter, one number for each channel of a
    teacher's map. Where the grids of a stage differ, the larger map is average-pooled to the smaller height and
    width. The paper also has a term on logits and a constant that depends on nothing; RepDistiller, whose form this
    is, has neither.

    Args:
        ce: weight of the cross-entropy with the ground truth.
        vid: weight of the sum over stages.
        variance: sigma^2 before training.
        stages: which stages are matched. The default leaves out the first, which is the stem's map where networks
            have three stages.

    Source: Ahn et al. 2019; form, weight and variance of RepDistiller, ``distiller_zoo/VID.py``.
    """

    paper = "arXiv:1904.05835"
    fidelity = Fidelity.EXACT
    needs = Needs(logits=False)

    def __init__(
        self, *, ce: float = 1.0, vid: float = 1.0, variance: float = 5.0, stages: tuple[int, ...] = (1, 2, 3)
    ):
        super().__init__(ce=ce, vid=vid)
        if not variance > FLOOR:
            raise UserError(f"variance={variance}: expected a number above {FLOOR}")
        self.variance, self.stages = variance, stages

    def build(self, student: Output, teacher: Output, data: DataSpec) -> None:
        self.grids = CommonGrids(student, teacher, self.stages)
        self.regressors, self.alphas = nn.ModuleList(), nn.ParameterList()
        excess = self.variance - FLOOR
        alpha = excess + math.log(-math.expm1(-excess))  # softplus takes it back to the excess
        for f_s, f_t in paired_features(student, teacher, self.stages):
            width = f_t.shape[1]
            self.regressors.append(
                nn.Sequential(
                    nn.Conv2d(f_s.shape[1], width, 1, bias=False),
                    nn.ReLU(),
                    nn.Conv2d(width, width, 1, bias=False),
                    nn.ReLU(),
                    nn.Conv2d(width, width, 1, bias=False),
                )
            )
            self.alphas.append(nn.Parameter(torch.full((width,), alpha)))

    def loss(self, student: Output, teacher: Output, batch: Batch) -> dict[str, Tensor]:
        return self.weigh(
            ce=lambda: cross_entropy(student.logits, batch.targets), vid=lambda: self.likelihood(student, teacher)
        )

    def likelihood(self, student: Output, teacher: Output) -> Tensor:
        """Sum the negative log-likelihoods of the stages: a scalar."""
        stages = zip(self.grids(student, teacher), self.regressors, self.alphas, strict=True)
        losses = [gaussian_loss(regress(f_s), f_t, F.softplus(alpha) + FLOOR) for (f_s, f_t), regress, alpha in stages]
        return torch.stack(losses).sum()
