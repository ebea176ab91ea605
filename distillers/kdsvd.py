"""KD-SVD: the leading directions of following stages relate to each other in the student as in the teacher."""

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kdzoo import Batch, DataSpec, Distiller, Fidelity, Needs, Output
from kdzoo.connectors import check_stages, paired_features
from kdzoo.errors import UserError
from kdzoo.keywords import at_least
from kdzoo.losses import cross_entropy


def leading_vectors(matrices: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Compute the largest eigenvalues (B, k) of symmetric ``matrices`` (B, N, N) and their vectors (B, N, k).

    The gradient of the vectors is that of first-order perturbation theory. Where two eigenvalues are nearer than about
    1e-4 of the largest, it is damped towards 0 instead of growing without limit; the values carry none.
    """
    fixed = matrices.detach()
    values, vectors = torch.linalg.eigh(fixed)
    values, vectors = values.flip(1), vectors.flip(2)
    leading = vectors[:, :, :count]
    gaps = values[:, None, :count] - values[:, :, None]  # (B, N, k)
    damping = (1e-4 * values[:, :1, None]).square() + 1e-30
    turn = vectors.mT @ (matrices - fixed) @ leading * gaps / (gaps.square() + damping)  # 0, but its gradient is not
    return values[:, :count], leading + vectors @ turn


def leading_directions(maps: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Compute the largest singular values (B, k) of each image's map (B, C, H, W) and their directions (B, C, k).

    The matrix has a row for each position and a column for each channel; the directions are its right singular
    vectors, of which the numbers of each have a sum of at least 0. k is ``count``, or the matrix's smaller side.
    """
    rows = maps.flatten(2)  # (B, C, HW)
    if rows.shape[1] <= rows.shape[2]:
        values, vectors = leading_vectors(rows @ rows.mT, count)
    else:
        values, vectors = leading_vectors(rows.mT @ rows, count)
        vectors = rows @ vectors
    sign = torch.where(vectors.detach().sum(dim=1, keepdim=True) < 0, -1.0, 1.0)
    return values.clamp(min=0).sqrt(), F.normalize(sign * vectors, dim=1, eps=1e-6)


def aligned(student: Tensor, teacher: Tensor) -> Tensor:
    """Pick for each of the teacher's directions (B, C, k) the student's (B, C, m) that is nearest up to sign."""
    cosines = student.mT @ teacher  # (B, m, k)
    nearest = cosines.abs().argmax(dim=1, keepdim=True)
    sign = torch.where(cosines.gather(1, nearest) < 0, -1.0, 1.0)
    return sign * student.gather(2, nearest.expand(-1, student.shape[1], -1))


def relation(first: Tensor, second: Tensor) -> Tensor:
    """Compute exp(-(a - b)^2 / 8) for all numbers of directions (B, C, k) and (B, D, k): (B, C, D, k)."""
    return (-(first[:, :, None] - second[:, None]).square() / 8).exp()


class KDSVD(Distiller):
    r"""Self-supervised Knowledge Distillation Using Singular Value Decomposition.

    .. math:: L = w_{ce} H(y, p_s) + \frac{w_{kdsvd}}{B} \sum_l \sum_{bcdk}
        \left(R(v_s^{l+1}, v_s^l) - R(v_t^{l+1}, v_t^l)\right)_{bcdk}^2,
        \quad R(a, b)_{cd} = e^{-(a_c - b_d)^2 / 8}

    v_t are the first k right singular vectors of an image's map, as a matrix of positions by channels, times their
    singular values, which are first taken to length 1 together. v_s: for each of them the nearest of the student's
    first k + 3, up to sign, times the teacher's singular values. Grids of any size fit. Memory is C times D times k
    numbers for an image and two following stages of widths C and D.

    Differs from the authors' code:

    - A decomposition leaves the signs open, and the loss depends on them; here the sum of a vector's numbers is not
      negative.
    - Where the widths of a stage differ, a 1x1 convolution first brings the student's map to the teacher's; the
      authors' loss is not defined there.
    - They cut the distillation's gradient to the length of the ground truth's. As in RepDistiller and mdistiller, it
      is added as it is. mdistiller's matrix has a column for each column of the image, not for each channel.

    Args:
        ce: weight of the cross-entropy with the ground truth.
        kdsvd: weight of the sum over pairs of stages.
        directions: k.
        stages: two or more stages, shallow to deep; each is compared with the next. The default leaves out the first,
            which is the stem's map where networks have three stages.

    Source: Lee, Kim and Song 2018; ``nets/SVP.py`` and ``nets/Multiple.py`` of
    sseung0703/Knowledge_distillation_methods_wtih_Tensorflow; RepDistiller, ``distiller_zoo/KDSVD.py``; weight of
    mdistiller.
    """

    paper = "arXiv:1807.06819"
    fidelity = Fidelity.ADAPTED
    needs = Needs(logits=False)

    def __init__(
        self, *, ce: float = 1.0, kdsvd: float = 1.0, directions: int = 1, stages: tuple[int, ...] = (1, 2, 3)
    ):
        super().__init__(ce=ce, kdsvd=kdsvd)
        self.directions, self.stages = at_least(1, directions=directions), stages

    def build(self, student: Output, teacher: Output, data: DataSpec) -> None:
        self.stages = check_stages(self.stages, student, teacher)
        if len(self.stages) < 2:
            raise UserError(f"stages {self.stages}: expected at least two, of which each is compared with the next")
        widths = [(f_s.shape[1], f_t.shape[1]) for f_s, f_t in paired_features(student, teacher, self.stages)]
        self.projectors = nn.ModuleList(nn.Identity() if a == b else nn.Conv2d(a, b, 1, bias=False) for a, b in widths)
        sides = (min(f_t.shape[1], f_t[0, 0].numel()) for _, f_t in paired_features(student, teacher, self.stages))
        self.count = min(self.directions, *sides)  # every stage has so many

    def loss(self, student: Output, teacher: Output, batch: Batch) -> dict[str, Tensor]:
        return self.weigh(
            ce=lambda: cross_entropy(student.logits, batch.targets), kdsvd=lambda: self.distance(student, teacher)
        )

    def distance(self, student: Output, teacher: Output) -> Tensor:
        """Sum the squared differences of the relations of following stages, mean over the batch: a scalar."""
        scaled = []
        for f_s, f_t, project in paired_features(student, teacher, self.stages, self.projectors):
            values, v_t = leading_directions(f_t, self.count)
            _, v_s = leading_directions(project(f_s), self.count + 3)
            values = F.normalize(values, dim=1, eps=1e-6)[:, None]
            scaled.append((aligned(v_s, v_t) * values, v_t * values))
        gaps = [relation(s, s_before) - relation(t, t_before) for (s_before, t_before), (s, t) in pairwise(scaled)]
        return torch.stack([gap.square().sum() for gap in gaps]).sum() / len(student.logits)
