"""LFCC: low-pass features of one image attract across the two networks, those of different images repel."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kdzoo import Batch, DataSpec, Distiller, Fidelity, Needs, Output
from kdzoo.connectors import Positions, check_stages, paired_features
from kdzoo.errors import UserError
from kdzoo.keywords import at_least, each, one_of, positive
from kdzoo.losses import cross_entropy, info_nce, softened_kl
from kdzoo.spectral import disk, fourier_filter, pooling_basis
from kdzoo.tensors import gather

FILTERS = ("average", "gaussian", "ideal", "none", "highpass")


def contrast_loss(student: Tensor, teacher: Tensor, tau: float, mask: Tensor | None = None) -> Tensor:
    """Contrast maps (B, C, cells) and (N, C, cells), flattened and normalised, as ``info_nce`` does with ``mask``."""
    rows, columns = (F.normalize(maps.flatten(1), eps=1e-6) for maps in (student, teacher))
    return info_nce(rows, columns, tau, mask)


def exempt_pairs(labels: Tensor | None, partner: Tensor | None, same_class: bool) -> Tensor | None:
    """Find the pairs that must not repel, (B, N) bool: rows that share a mixed-in image or, optionally, a class.

    ``labels`` (B,) of this rank, which only ``same_class`` reads; ``partner`` (B,) the row that is mixed into each. N
    counts all ranks' rows.
    """
    same = labels[:, None] == gather(labels) if same_class and labels is not None else None
    if partner is None:
        return same
    mixed = partner[:, None] == torch.arange(len(partner), device=partner.device)
    mixed = F.pad(mixed | mixed.mT, (0, len(gather(partner)) - len(partner)))
    return mixed if same is None else same | mixed


def filter_basis(grid: Sequence[int], common: Sequence[int], size: Sequence[int], kind: str) -> Tensor:
    """Build the filter of this ``kind`` for maps (H, W) = ``grid`` as a matrix (cells, H * W).

    Filters end in ``size`` cells, but the high-pass in the cells of ``common``, the grid of both networks.
    """
    if kind == "highpass":
        whole, pooling = pooling_basis(grid, common), pooling_basis(common, size)
        return whole - torch.linalg.pinv(pooling) @ (pooling @ whole)
    basis = pooling_basis(grid, size, blur=0.5 if kind == "gaussian" else 0.0)
    if kind == "ideal":  # a symmetric filter may as well act on the basis as on every map
        mask = disk(grid[0], grid[1], min(size[0] / grid[0], size[1] / grid[1]))
        return fourier_filter(basis.unflatten(1, tuple(grid)), mask).flatten(1)
    return basis


class LFCC(Distiller):
    r"""Low-frequency cross-architecture contrast, reconstructed.

    .. math:: L = w_{ce} H(y, p_s) + w_{kd} T^2 KL(p_t^{(T)} \| p_s^{(T)})
        - w_{contrast} \operatorname{mean}_{l, g, i} \log \frac{\exp(u_{s,i}^{lg} \cdot u_{t,i}^{lg} / \tau)}
        {\sum_j \exp(u_{s,i}^{lg} \cdot u_{t,j}^{lg} / \tau)}

    u is stage l under a low-pass to g x g cells, flattened and normalised; the student's channels go through a 1x1
    convolution to the teacher's. It commutes with every filter over space, so it comes after, where few cells are
    left. j runs over the batch on all ranks. A map smaller than g keeps its sides; each grid counts once.

    The full text was not available. Known are low-pass filters of several scales, average pooling among them, a
    compact space, and contrast there between samples of teacher and student. Ours are the scales, tau, the
    convolution without bias, the other filters, the masks and every weight.

    Args:
        ce: weight of the cross-entropy with the ground truth.
        kd: weight of the distillation of logits.
        contrast: weight of the contrast, a mean over stages and scales.
        temperature: T of the distillation of logits.
        tau: divides the similarities.
        scales: the values of g.
        filter: "average", adaptive average pooling; "gaussian", a blur of half a cell before it; "ideal", a Fourier
            disk before it; or as controls "none", the finest grid of both, and "highpass", that less the average.
        stages: which stages are contrasted.
        mask_same_class: other images of the same class do not repel.

    Source: the abstract of arXiv 2405.18524; formulas reconstructed.
    """

    paper = "arXiv:2405.18524"
    fidelity = Fidelity.RECONSTRUCTED
    needs = Needs(logits=False)

    def __init__(
        self,
        *,
        ce: float = 0.1,
        kd: float = 0.9,
        contrast: float = 3.0,
        temperature: float = 4.0,
        tau: float = 0.07,
        scales: tuple[int, ...] = (1, 2, 4),
        filter: str = "average",
        stages: tuple[int, ...] = (0, 1, 2, 3),
        mask_same_class: bool = False,
    ):
        super().__init__(ce=ce, kd=kd, contrast=contrast)
        self.temperature, self.tau = positive(temperature=temperature), positive(tau=tau)
        self.scales, self.filter = each(at_least, 1, scales=scales), one_of(FILTERS, filter=filter)
        self.stages, self.mask_same_class = stages, mask_same_class
        if mask_same_class:
            self.label_terms = ("ce", "contrast")

    def build(self, student: Output, teacher: Output, data: DataSpec) -> None:
        stages: list[int] = []
        self.cells: list[list[int]] = []  # of each scale, by stage
        self.student_filters, self.teacher_filters, self.projectors = (nn.ModuleList() for _ in range(3))
        for stage in check_stages(self.stages, student, teacher):
            (_, inputs, *s_grid), (_, outputs, *t_grid) = student.features[stage].shape, teacher.features[stage].shape
            common = (min(s_grid[0], t_grid[0]), min(s_grid[1], t_grid[1]))
            sizes = dict.fromkeys((min(g, common[0]), min(g, common[1])) for g in self.scales)  # distinct, in order
            if self.filter == "none":
                sizes = {common: None}
            elif self.filter == "highpass":
                sizes.pop(common, None)  # pooling loses nothing there
            if not sizes:
                continue
            for filters, grid in ((self.student_filters, s_grid), (self.teacher_filters, t_grid)):
                bases = [filter_basis(grid, common, size, self.filter) for size in sizes]
                filters.append(Positions(torch.cat(bases)))
            stages.append(stage)
            self.cells.append([len(basis) for basis in bases])
            self.projectors.append(nn.Conv1d(inputs, outputs, 1, bias=False))
        if not stages:
            raise UserError(f"filter=highpass: scales={self.scales} leave nothing of these maps; choose smaller scales")
        self.stages = tuple(stages)

    def loss(self, student: Output, teacher: Output, batch: Batch) -> dict[str, Tensor]:
        return self.weigh(
            ce=lambda: cross_entropy(student.logits, batch.targets),
            kd=lambda: softened_kl(student.logits, teacher.logits, self.temperature),
            contrast=lambda: self.contrast(student, teacher, batch),
        )

    def contrast(self, student: Output, teacher: Output, batch: Batch) -> Tensor:
        """Average the contrast over stages and scales: a scalar."""
        mask = exempt_pairs(batch.labels, batch.partner, self.mask_same_class)
        modules = (self.cells, self.student_filters, self.projectors, self.teacher_filters)
        contrasts = []
        for f_s, f_t, cells, filter_s, project, filter_t in paired_features(student, teacher, self.stages, *modules):
            low_s = project(filter_s(f_s)).split(cells, dim=2)
            low_t = gather(filter_t(f_t)).split(cells, dim=2)
            contrasts += [contrast_loss(s, t, self.tau, mask) for s, t in zip(low_s, low_t, strict=True)]
        return torch.stack(contrasts).mean()
