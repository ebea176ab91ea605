"""MSDCRD: each window of the student's map resembles the teacher's same window, and no other of the batch."""

from collections.abc import Sequence

import torch
from kdzoo.distillers.lfcc import exempt_pairs
from torch import Tensor, nn
from torch.nn import functional as F

from kdzoo import Batch, DataSpec, Distiller, Fidelity, Needs, Output
from kdzoo.connectors import Positions, check_stages, paired_features
from kdzoo.keywords import at_least, each, positive
from kdzoo.losses import cross_entropy, info_nce
from kdzoo.tensors import gather


def sliding_rows(n: int, parts: int) -> Tensor:
    """Build the matrix that averages windows of n samples, each 1 / ``parts`` of them long, every half window: (M, n).

    M is 2 ``parts`` - 1. Windows of a broken length share their edge samples in proportion.
    """
    starts, length = torch.arange(2 * parts - 1, dtype=torch.float64) * n / (2 * parts), n / parts
    sample = torch.arange(n, dtype=torch.float64)
    covered = torch.minimum(starts[:, None] + length, sample + 1) - torch.maximum(starts[:, None], sample)
    return covered.clamp_min(0) / length


def sliding_basis(grid: Sequence[int], parts: int) -> Tensor:
    """Build the matrix that averages the windows of maps (H, W) = ``grid``: (M * M, H * W)."""
    return torch.kron(*(sliding_rows(side, parts) for side in grid))


def sample_contrast(student: Tensor, teacher: Tensor, tau: float, mask: Tensor | None) -> Tensor:
    """Contrast the windows of maps (B, C, N) and (M, C, N), M >= B: each attracts its own and no other.

    ``mask`` (B, M) bool is true for images whose windows do not repel each other.
    """
    rows, columns = (F.normalize(maps.mT.flatten(0, 1), eps=1e-6) for maps in (student, teacher))
    windows = student.shape[2]
    if mask is not None:
        mask = mask.repeat_interleave(windows, dim=0).repeat_interleave(windows, dim=1)
    return info_nce(rows, columns, tau, mask)


def feature_contrast(student: Tensor, teacher: Tensor, tau: float) -> Tensor:
    """Contrast the channels of maps (B, C, N): over all windows, each correlates with its own and no other."""
    centred = (maps - maps.mean(dim=(0, 2), keepdim=True) for maps in (student, teacher))
    queries, keys = (F.normalize(maps.transpose(0, 1).flatten(1), eps=1e-6) for maps in centred)
    return info_nce(queries, keys, tau)


class MSDCRD(Distiller):
    r"""Contrastive Representation Distillation via Multi-Scale Feature Decoupling, reconstructed.

    .. math:: L = w_{ce} H(y, p_s) + \operatorname{mean}_{l, g} \big(w_{sample} \operatorname{NCE}_{i n}(u_s, u_t)
        + w_{feature} \operatorname{NCE}_{c}(v_s, v_t)\big)

    Windows of 1 / g of the sides of stage l slide over it by half a window and are averaged: (2 g - 1)^2 of them. Each
    window n of image i is one sample: u is its vector of channels, of length 1, and NCE is InfoNCE with the
    student's samples as queries, the teacher's same window as the positive and all other windows of the batch, on all
    ranks, as negatives. v is a channel over all windows of this rank's batch, centred and of length 1; its positive is
    the teacher's same channel. The student's channels go through a 1x1 convolution to the teacher's. Windows are no
    smaller than a pixel of the coarser map; a scale's similarities are (B (2 g - 1)^2)^2 numbers.

    The full text was not available. Known are sliding windows of several scales, samples that are sorted or selected, a
    loss by samples and one by features, and that one batch suffices. Ours are the windows' sizes and steps, which
    samples repel, that features are centred, both tau, the convolution (an abstract says that theirs has no
    parameters), the stages and every weight.

    Args:
        ce: weight of the cross-entropy with the ground truth.
        sample: weight of the contrast of windows, a mean over stages and scales.
        feature: weight of the contrast of channels, a mean over stages and scales.
        tau: divides the similarities of both.
        scales: the values of g.
        stages: which stages are contrasted.
        mask_same_class: windows of images of the same class do not repel, nor those of the same image.

    Source: the abstracts of arXiv 2502.05835, versions 1 to 3; formulas reconstructed.
    """

    paper = "arXiv:2502.05835"
    fidelity = Fidelity.RECONSTRUCTED
    needs = Needs(logits=False)

    def __init__(
        self,
        *,
        ce: float = 1.0,
        sample: float = 1.0,
        feature: float = 1.0,
        tau: float = 0.07,
        scales: tuple[int, ...] = (1, 2),
        stages: tuple[int, ...] = (3,),
        mask_same_class: bool = False,
    ):
        super().__init__(ce=ce, sample=sample, feature=feature)
        self.tau, self.scales = positive(tau=tau), each(at_least, 1, scales=scales)
        self.stages, self.mask_same_class = stages, mask_same_class
        if mask_same_class:
            self.label_terms = ("ce", "sample")

    def build(self, student: Output, teacher: Output, data: DataSpec) -> None:
        self.stages = check_stages(self.stages, student, teacher)
        self.windows: list[list[int]] = []  # of each scale, by stage
        self.student_windows, self.teacher_windows, self.projectors = (nn.ModuleList() for _ in range(3))
        for f_s, f_t in paired_features(student, teacher, self.stages):
            finest = min(*f_s.shape[2:], *f_t.shape[2:])
            scales = dict.fromkeys(min(g, finest) for g in self.scales)  # distinct, in order
            for windows, maps in ((self.student_windows, f_s), (self.teacher_windows, f_t)):
                windows.append(Positions(torch.cat([sliding_basis(maps.shape[2:], g) for g in scales])))
            self.windows.append([(2 * g - 1) ** 2 for g in scales])
            self.projectors.append(nn.Conv1d(f_s.shape[1], f_t.shape[1], 1, bias=False))

    def loss(self, student: Output, teacher: Output, batch: Batch) -> dict[str, Tensor]:
        pairs = self.pairs(student, teacher) if self.is_active else []
        mask = exempt_pairs(batch.labels, batch.partner, self.mask_same_class)
        return self.weigh(
            ce=lambda: cross_entropy(student.logits, batch.targets),
            sample=lambda: torch.stack([sample_contrast(s, gather(t), self.tau, mask) for s, t in pairs]).mean(),
            feature=lambda: torch.stack([feature_contrast(s, t, self.tau) for s, t in pairs]).mean(),
        )

    def pairs(self, student: Output, teacher: Output) -> list[tuple[Tensor, Tensor]]:
        """Average the windows of each stage and scale: (B, C_t, N) of both networks."""
        modules = (self.windows, self.student_windows, self.projectors, self.teacher_windows)
        found: list[tuple[Tensor, Tensor]] = []
        for f_s, f_t, windows, slide_s, project, slide_t in paired_features(student, teacher, self.stages, *modules):
            both = project(slide_s(f_s)).split(windows, dim=2), slide_t(f_t).split(windows, dim=2)
            found += zip(*both, strict=True)
        return found
