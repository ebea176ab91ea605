"""WKD: the student matches the fine detail of the teacher's maps, as wavelets see it."""

import torch
from torch import Tensor, nn

from kdzoo import Batch, DataSpec, Distiller, Fidelity, Needs, Output
from kdzoo.connectors import CommonGrids, Wavelets, paired_features
from kdzoo.keywords import at_least, positive
from kdzoo.losses import cross_entropy, softened_kl
from kdzoo.spectral import largest_level


def detail_size(details: list[Tensor]) -> Tensor:
    """Sum the mean absolute values of the bands (B, C, 3, H', W') over levels: a scalar."""
    return torch.stack([bands.abs().mean() for bands in details]).sum()


class WKD(Distiller):
    r"""Wavelet Knowledge Distillation, carried over from generated images to features.

    .. math:: L = w_{ce} H(y, p_s) + w_{kd} T^2 KL(p_t^{(T)} \| p_s^{(T)})
        + w_{detail} \operatorname{mean}_l \sum_j \operatorname{mean} |D_j P f_s^l - D_j f_t^l|

    D_j takes the three detail bands of level j of a discrete wavelet transform, so the mean and the coarsest
    shapes of a map are left to the student. P is a 1x1 convolution to the teacher's channels; it commutes
    with the transform. A map is split as often as it can be, up to ``levels``; one that cannot be split at all, such
    as 1x1, has content alone and is compared as it is.

    Differs from the paper, which compares images that two generators made of one input:

    - Features are compared, through P, and the distance is a mean over stages.
    - Maps of the finer grid are averaged to the coarser one.
    - The padding is reflection: a copy of the last of an odd number of samples would have no detail.

    Args:
        ce: weight of the cross-entropy with the ground truth.
        detail: weight of the wavelet term.
        kd: weight of the distillation of logits.
        temperature: T of the distillation of logits.
        wavelet: a discrete wavelet that PyWavelets knows.
        levels: how often maps are split, at most.
        padding: how maps are extended past their edges: a signal extension mode of PyWavelets.
        stages: which stages are matched.

    Source: Zhang et al. 2022, section 3.2 (L1 norm of the high-frequency bands).
    """

    paper = "arXiv:2203.06321"
    fidelity = Fidelity.ADAPTED
    needs = Needs(logits=False)

    def __init__(
        self,
        *,
        ce: float = 1.0,
        detail: float = 1.0,
        kd: float = 0.0,
        temperature: float = 4.0,
        wavelet: str = "haar",
        levels: int = 4,
        padding: str = "reflect",
        stages: tuple[int, ...] = (0, 1, 2, 3),
    ):
        super().__init__(ce=ce, detail=detail, kd=kd)
        self.temperature = positive(temperature=temperature)
        self.levels = at_least(1, levels=levels)
        self.wavelet, self.padding, self.stages = wavelet, padding, stages

    def build(self, student: Output, teacher: Output, data: DataSpec) -> None:
        self.grids = CommonGrids(student, teacher, self.stages)
        self.projectors, self.bands = nn.ModuleList(), nn.ModuleList()
        for f_s, f_t, size in paired_features(student, teacher, self.stages, self.grids.sizes):
            level = min(self.levels, largest_level(size, self.wavelet))
            self.projectors.append(nn.Conv2d(f_s.shape[1], f_t.shape[1], 1))
            self.bands.append(Wavelets(size, self.wavelet, level, self.padding))

    def loss(self, student: Output, teacher: Output, batch: Batch) -> dict[str, Tensor]:
        return self.weigh(
            ce=lambda: cross_entropy(student.logits, batch.targets),
            kd=lambda: softened_kl(student.logits, teacher.logits, self.temperature),
            detail=lambda: self.distance(student, teacher),
        )

    def distance(self, student: Output, teacher: Output) -> Tensor:
        """Average the distances of the stages' details: a scalar."""
        distances = []
        for (f_s, f_t), project, bands in zip(self.grids(student, teacher), self.projectors, self.bands, strict=True):
            content, details = bands(project(f_s) - f_t)  # linear: one transform instead of two
            distances.append(detail_size(details or [content]))
        return torch.stack(distances).mean()
