"""DCT-AT: the spectrum of the student's attention maps resembles the teacher's, where the teacher is right."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from kdzoo import Batch, DataSpec, Distiller, Fidelity, Needs, Output
from kdzoo.connectors import CommonGrid, check_stages
from kdzoo.errors import UserError, unknown
from kdzoo.losses import cross_entropy, softened_kl
from kdzoo.spectral import cosine_basis, separable
from kdzoo.tensors import full_precision

TRANSFORMS = ("fft", "dct")


def unit_range(maps: Tensor) -> Tensor:
    """Maps (B, H, W), each taken to [0, 1]; one that is constant, up to rounding, becomes 0."""
    low, high = maps.amin(dim=(1, 2), keepdim=True), maps.amax(dim=(1, 2), keepdim=True)
    span = high - low
    flat = span <= 1e-6 * torch.maximum(high.abs(), low.abs()) + 1e-12
    return torch.where(flat, 0.0, (maps - low) / torch.where(flat, 1.0, span))


def attention_spectrum(attention: Tensor, bases: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """The spectrum of attention maps (B, H, W), in [0, 1] as they are before it: (B, H, W).

    ``bases`` are the ``cosine_basis`` of H and of W; without them it is the real part of the Fourier transform.
    """
    maps = unit_range(full_precision(attention))
    maps = maps - maps.mean(dim=(1, 2), keepdim=True)
    return unit_range(separable(maps, *bases) if bases else torch.fft.fft2(maps).real)


def spectrum_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Euclidean distance of spectra (B, H, W): (B,), with gradient 0 where they are equal."""
    return (student - teacher).square().sum(dim=(1, 2)).clamp_min(1e-24).sqrt()


class Spectrum(nn.Module):
    """``attention_spectrum`` of maps (B, H, W) = (B, *grid), its bases kept."""

    rows: Tensor
    columns: Tensor

    def __init__(self, grid: Sequence[int], transform: str):
        super().__init__()
        self.transform = transform
        if transform == "dct":
            self.register_buffer("rows", cosine_basis(grid[0]).float(), persistent=False)
            self.register_buffer("columns", cosine_basis(grid[1]).float(), persistent=False)

    def forward(self, attention: Tensor) -> Tensor:
        return attention_spectrum(attention, (self.rows, self.columns) if self.transform == "dct" else None)


class DCTAT(Distiller):
    r"""A DCT-driven loss in attention-based knowledge distillation.

    .. math:: L = w_{ce} H(y, p_s) + w_{dct} \operatorname{mean}_i [\arg\max z_{t,i} = y_i]
        \sum_l \|D(a_{s,i}^l) - D(a_{t,i}^l)\|_2 + w_{kd} T^2 KL(p_t^{(T)} \| p_s^{(T)})

    The attention map a is the mean over channels of f^2. D takes it to [0, 1], subtracts its mean, transforms it,
    and takes the spectrum to [0, 1]. The authors' "DCT" is the real part of a Fourier transform, the default here.

    Of the two forms in the history of their repository this is the one of the final paper, whose ranges end at 1;
    the one of the submission divides by the maximum before the shift and takes absolute values of the spectrum.
    Both divide 0 by 0 where a map is constant; here such a map, a 1x1 one above all, has the spectrum 0. Where
    grids differ, squares are averaged to the coarser one. Theirs are the three or four stages before the pooled
    features; here the four.

    Args:
        ce: weight of the cross-entropy with the ground truth.
        dct: weight of the spectra's term, a sum over stages.
        kd: weight of the distillation of logits.
        temperature: T of the distillation of logits.
        transform: "fft", or "dct" for the orthonormal DCT-II of the paper's text.
        guided: images that the teacher takes for another class than their label add nothing.
        stages: which stages are matched.

    Source: López-Cifuentes et al. 2022, section 3; "Distillation Zoo/DFTOurs.py" (commit f00a087) and
    Distillation.py of the authors' repository, alexlopezcifuentes/Distillation-Attention.
    """

    paper = "arXiv:2205.01997"
    fidelity = Fidelity.EXACT

    def __init__(
        self,
        student: Output,
        teacher: Output,
        data: DataSpec,
        *,
        ce: float = 1.0,
        dct: float = 1.0,
        kd: float = 0.0,
        temperature: float = 4.0,
        transform: str = "fft",
        guided: bool = True,
        stages: tuple[int, ...] = (0, 1, 2, 3),
    ):
        super().__init__()
        if not temperature > 0:
            raise UserError(f"temperature {temperature}: expected a number above 0; 4 is usual")
        if transform not in TRANSFORMS:
            raise unknown("transform", transform, TRANSFORMS)
        self.ce, self.dct, self.kd, self.temperature = ce, dct, kd, temperature
        self.guided = guided
        if not dct:
            self.needs = Needs(features=False)
            return
        self.stages = check_stages(stages, student, teacher)
        grids = [CommonGrid(student.features[stage], teacher.features[stage]) for stage in self.stages]
        self.grids = nn.ModuleList(grids)
        self.spectra = nn.ModuleList(Spectrum(grid.size, transform) for grid in grids)

    def loss(self, student: Output, teacher: Output, batch: Batch) -> dict[str, Tensor]:
        terms = {}
        if self.ce:
            terms["ce"] = self.ce * cross_entropy(student.logits, batch.targets)
        if self.dct:
            distances = []
            for stage, grid, spectrum in zip(self.stages, self.grids, self.spectra, strict=True):
                a_s, a_t = (f[stage].square().mean(dim=1, keepdim=True) for f in (student.features, teacher.features))
                d_s, d_t = (spectrum(attention.squeeze(1)) for attention in grid(a_s, a_t))
                distances.append(spectrum_distance(d_s, d_t))
            distance = torch.stack(distances).sum(dim=0)
            if self.guided:
                distance = distance * (teacher.logits.argmax(dim=1) == batch.labels)
            terms["dct"] = self.dct * distance.mean()
        if self.kd:
            terms["kd"] = self.kd * softened_kl(student.logits, teacher.logits.detach(), self.temperature)
        return terms
