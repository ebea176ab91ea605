"""Wavelet distillation: the student matches the fine detail of the teacher's maps, as wavelets see it."""

import torch
from torch import Tensor, nn

from kdzoo import Batch, DataSpec, Distiller, Fidelity, Needs, Output
from kdzoo.connectors import CommonGrid, Wavelets, check_stages
from kdzoo.errors import UserError
from kdzoo.losses import cross_entropy, softened_kl
from kdzoo.spectral import largest_level


def detail_size(details: list[Tensor]) -> Tensor:
    """Mean absolute value of the bands (B, C, 3, H', W') of each level, summed over levels."""
    return torch.stack([bands.abs().mean() for bands in details]).sum()


class WKD(Distiller):
    r"""Wavelet Knowledge Distillation, carried over from generated images to features.

    .. math:: L = w_{ce} H(y, p_s) + w_{kd} T^2 KL(p_t^{(T)} \| p_s^{(T)})
        + w_{detail} \operatorname{mean}_l \sum_j \operatorname{mean} |D_j P f_s^l - D_j f_t^l|

    D_j takes the three detail bands of level j of a discrete wavelet transform, so the mean and the coarsest
    shapes of a map are the student's own affair. P is a 1x1 convolution to the teacher's channels; it commutes
    with the transform.

    The paper compares images that two generators made of one input. Ours are the features instead, P, the
    averaging of the finer of two grids to the coarser one, the padding (reflection: a copy of the last of an odd
    number of samples would have no detail), and the mean over stages. A map is split as often as it can be, up to
    ``levels``; one that cannot be split at all, such as 1x1, has content alone and is compared as it is.

    Args:
        ce: weight of the cross-entropy with the ground truth.
        detail: weight of the wavelet term.
        kd: weight of the distillation of logits.
        temperature: T of the distillation of logits.
        wavelet: a discrete wavelet that PyWavelets knows.
        levels: how often maps are split, at most.
        padding: how maps go on past their edges: a signal extension mode of PyWavelets.
        stages: which stages are matched.

    Source: Zhang et al. 2022, section 3.2 (L1 norm of the high-frequency bands).
    """

    paper = "arXiv:2203.06321"
    fidelity = Fidelity.ADAPTED

    def __init__(
        self,
        student: Output,
        teacher: Output,
        data: DataSpec,
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
        super().__init__()
        if not temperature > 0:
            raise UserError(f"temperature {temperature}: expected a number above 0; 4 is usual")
        if levels < 1:
            raise UserError(f"levels {levels}: expected a number from 1; as many are used as fit a map")
        self.ce, self.detail, self.kd, self.temperature = ce, detail, kd, temperature
        if not detail:
            self.needs = Needs(features=False)
            return
        self.stages = check_stages(stages, student, teacher)
        self.grids, self.projectors, self.bands = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        for stage in self.stages:
            s_maps, t_maps = student.features[stage], teacher.features[stage]
            grid = CommonGrid(s_maps, t_maps)
            self.grids.append(grid)
            self.projectors.append(nn.Conv2d(s_maps.shape[1], t_maps.shape[1], 1))
            self.bands.append(Wavelets(grid.size, wavelet, min(levels, largest_level(grid.size, wavelet)), padding))

    def loss(self, student: Output, teacher: Output, batch: Batch) -> dict[str, Tensor]:
        terms = {}
        if self.ce:
            terms["ce"] = self.ce * cross_entropy(student.logits, batch.targets)
        if self.kd:
            terms["kd"] = self.kd * softened_kl(student.logits, teacher.logits.detach(), self.temperature)
        if self.detail:
            distances = []
            modules = zip(self.grids, self.projectors, self.bands, strict=True)
            for stage, (grid, project, bands) in zip(self.stages, modules, strict=True):
                f_s, f_t = grid(student.features[stage], teacher.features[stage])
                content, details = bands(project(f_s) - f_t)  # linear: one transform instead of two
                distances.append(detail_size(details or [content]))
            terms["detail"] = self.detail * torch.stack(distances).mean()
        return terms
