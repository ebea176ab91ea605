"""DCT-AT: the spectrum of the student's attention maps resembles the teacher's, where the teacher is right."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from kdzoo import Batch, DataSpec, Distiller, Fidelity, Output
from kdzoo.connectors import CommonGrids, paired_features
from kdzoo.keywords import one_of, positive
from kdzoo.losses import cross_entropy, softened_kl
from kdzoo.spectral import cosine_basis, separable


def unit_range(maps: Tensor) -> Tensor:
    """Scale each of maps (B, H, W) to [0, 1]; one that is constant, up to rounding, becomes 0."""
    low, high = maps.amin(dim=(1, 2), keepdim=True), maps.amax(dim=(1, 2), keepdim=True)
    span = high - low
    flat = span <= 1e-6 * torch.maximum(high.abs(), low.abs()) + 1e-12
    return torch.where(flat, 0.0, (maps - low) / torch.where(flat, 1.0, span))


def attention_spectrum(attention: Tensor, bases: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """Transform attention maps (B, H, W), scaled to [0, 1] before and after: (B, H, W).

    ``bases`` are the ``cosine_basis`` of H and of W; without them it is the real part of the Fourier transform.
    """
    maps = unit_range(attention)
    maps = maps - maps.mean(dim=(1, 2), keepdim=True)
    return unit_range(separable(maps, *bases) if bases else torch.fft.fft2(maps).real)


def spectrum_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Compute the Euclidean distance of spectra (B, H, W): (B,), with gradient 0 where they are equal."""
    return (student - teacher).square().sum(dim=(1, 2)).clamp_min(1e-24).sqrt()


class Spectrum(nn.Module):
    """The spectrum of attention maps (B, *grid), with its matrices kept."""

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

    .. math:: L = w_{ce} H(y, p_s) + w_{dct} \operatorname{mean}_i [\operatorname{argmax} z_{t,i} = y_i]
        \sum_l \|D(a_{s,i}^l) - D(a_{t,i}^l)\|_2 + w_{kd} T^2 KL(p_t^{(T)} \| p_s^{(T)})

    The attention map a is the mean over channels of f^2. D takes it to [0, 1], subtracts its mean, transforms it,
    and takes the spectrum to [0, 1]. The authors' "DCT" is the real part of a Fourier transform, the default here.

    The history of their repository has two forms. This is the one of the final paper, whose ranges end at 1; the one
    of the submission divides by the maximum before the shift and takes absolute values of the spectrum.

    Differs from the authors' code:

    - Both of their forms divide 0 by 0 where a map is constant; here such a map, a 1x1 one above all, has the
      spectrum 0.
    - Where grids differ, squares are averaged to the coarser one.
    - Theirs are the three or four stages before the pooled features; here the four.

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
        *,
        ce: float = 1.0,
        dct: float = 1.0,
        kd: float = 0.0,
        temperature: float = 4.0,
        transform: str = "fft",
        guided: bool = True,
        stages: tuple[int, ...] = (0, 1, 2, 3),
    ):
        super().__init__(ce=ce, dct=dct, kd=kd)
        self.temperature = positive(temperature=temperature)
        self.transform = one_of(("fft", "dct"), transform=transform)
        self.guided, self.stages = guided, stages
        if guided:
            self.label_terms = ("ce", "dct")

    def build(self, student: Output, teacher: Output, data: DataSpec) -> None:
        self.grids = CommonGrids(student, teacher, self.stages)
        self.spectra = nn.ModuleList(Spectrum(size, self.transform) for size in self.grids.sizes)

    def loss(self, student: Output, teacher: Output, batch: Batch) -> dict[str, Tensor]:
        return self.weigh(
            ce=lambda: cross_entropy(student.logits, batch.targets),
            dct=lambda: self.distance(student, teacher, batch.labels),
            kd=lambda: softened_kl(student.logits, teacher.logits, self.temperature),
        )

    def distance(self, student: Output, teacher: Output, labels: Tensor) -> Tensor:
        """Average the distance of spectra over images and sum it over stages: a scalar."""
        distances = []
        for f_s, f_t, grid, spectrum in paired_features(student, teacher, self.stages, self.grids, self.spectra):
            attention = grid(*(maps.square().mean(dim=1, keepdim=True) for maps in (f_s, f_t)))
            distances.append(spectrum_distance(*(spectrum(maps.squeeze(1)) for maps in attention)))
        distance = torch.stack(distances).sum(dim=0)
        if self.guided:
            distance = distance * (teacher.logits.argmax(dim=1) == labels)
        return distance.mean()
