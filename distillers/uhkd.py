"""UHKD: the student matches compact low-frequency spectra of the teacher's features, stage by stage."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kdzoo import Batch, DataSpec, Distiller, Fidelity, Needs, Output
from kdzoo.connectors import Pool, Positions, check_stages
from kdzoo.errors import UserError, unknown
from kdzoo.losses import cross_entropy, softened_kl
from kdzoo.spectral import amplitude, fourier_basis, pooling_basis

SPECTRA = ("complex", "amplitude", "log_amplitude", "spatial")
ALIGNMENTS = ("fft", "learned")
NORMALISATIONS = ("image", "batch")


def half_basis(grid: Sequence[int], k: int, sigma: float) -> Tensor:
    """The rows of ``fourier_basis`` up to DC, (k k + 1, H * W): of a real map the others are their conjugates."""
    return fourier_basis(grid, k, sigma).unflatten(0, (2, -1))[:, : k * k // 2 + 1].flatten(0, 1)


def mirrored(half: Tensor, sign: float = 1.0) -> Tensor:
    """All k k frequencies (..., k k) of those up to DC (..., (k k + 1) / 2); ``sign`` -1 for imaginary parts."""
    return torch.cat([half, sign * half[..., :-1].flip(-1)], dim=-1)


def normalised(values: Tensor, normalisation: str) -> Tensor:
    """Mean 0 and variance 1 of (B, C, N): of each image ("image"), or of each number over the batch ("batch")."""
    if normalisation == "image":
        return F.layer_norm(values, values.shape[1:])
    centred = values - values.mean(dim=0)
    return centred * (centred.square().mean(dim=0) + 1e-6).rsqrt()


def compact_map(values: Tensor, spectrum: str, normalisation: str = "image") -> Tensor:
    """What is compared: a spectrum, normalised, or the values (B, C, N) themselves where it is "spatial".

    Else the values are coefficients (B, C, k k + 1) up to DC, real parts first, and the spectrum has all
    frequencies: (B, C, k k) amplitudes, or (B, C, 2 k k) for "complex".
    """
    if spectrum == "complex":
        real, imaginary = values.chunk(2, dim=-1)
        values = torch.cat([mirrored(real), mirrored(imaginary, -1.0)], dim=-1)
    elif spectrum != "spatial":
        values = amplitude(values)
        values = mirrored(values.log1p() if spectrum == "log_amplitude" else values)
    return normalised(values, normalisation)


def fourier_alignment(inputs: int, outputs: int, transform: nn.Module) -> nn.Sequential:
    """Student maps (B, inputs, H, W) -> their own coefficients (B, outputs, k k + 1)."""
    width = min(inputs, outputs)
    return nn.Sequential(
        nn.Conv2d(inputs, width, 1, bias=False),
        nn.BatchNorm2d(width),
        nn.GELU(),  # without it the module would commute with the transform
        nn.Conv2d(width, width, 3, padding=1, groups=width, bias=False),
        nn.BatchNorm2d(width),
        transform,
        nn.Conv1d(width, outputs, 1, bias=False),  # does commute, and few frequencies are fewer than positions
    )


def learned_alignment(inputs: int, outputs: int, pool: nn.Module, cells: int, numbers: int) -> nn.Sequential:
    """Student maps (B, inputs, H, W) -> (B, outputs, numbers), by a linear map of the pooled ``cells``."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.GELU(),
        pool,
        nn.Linear(cells, numbers),
        nn.BatchNorm1d(outputs),
        nn.GELU(),
        nn.Conv1d(outputs, outputs, 1),
    )


class UHKD(Distiller):
    r"""Unified Heterogeneous Knowledge Distillation in the frequency domain, reconstructed.

    .. math:: L = w_{ce} H(y, p_s) + w_{kd} T^2 KL(p_t^{(T)} \| p_s^{(T)})
        + w_{spectral} \sum_l w_l \operatorname{MSE}(Z_s^l, Z_t^l)

    Z_t: the k x k lowest Fourier coefficients of the teacher's stage (divided by H W), times
    exp(-rho^2 / 2 sigma^2) with rho = radius / (k // 2), as real and imaginary parts or amplitudes, then layer
    norm over channels and frequencies; k is the largest odd number not above ``size`` or a side of either grid.
    Z_s: the student's stage, pooled to the coarsest grid that holds the frequencies kept (of size + 1, or the
    teacher's where that is coarser), through convolutions and the same transform, or through a learned map of
    positions.

    The full text was not available. Known are a Fourier transform that compacts the teacher's features, a
    learnable alignment of the student's, and matching of several levels by MSE beside KL on logits. Ours are
    both forms of alignment (the one with the transform convolves in the narrower of both widths), the pooling
    before them, the Gaussian crop, the spectra, the layer norms and every default; docs/frequency.md tells what the
    defaults rest on, and that the control is ahead of them.

    Args:
        ce: weight of the cross-entropy with the ground truth.
        kd: weight of the distillation of logits.
        spectral: weight of the features' term.
        temperature: T of the distillation of logits.
        stages: which stages are matched.
        stage_weights: w_l of these stages; None shares 1 among them.
        size: frequencies kept on each axis; odd, so that each comes with its negative.
        sigma: width of the Gaussian over frequencies, relative to the crop's own radius.
        spectrum: "complex", real and imaginary part; "amplitude"; "log_amplitude", log(1 + amplitude); or
            "spatial", the control: the same modules with average pooling to k x k where the others transform.
        alignment: "fft", where the student is transformed too, or "learned", where it is not.
        normalisation: what has mean 0 and variance 1 in Z: "image", all numbers of one image (layer norm), or
            "batch", each number over the batch, which leaves out what all images have in common.

    Source: the abstract of arXiv 2510.24116; formulas reconstructed.
    """

    paper = "arXiv:2510.24116"
    fidelity = Fidelity.RECONSTRUCTED

    def __init__(
        self,
        student: Output,
        teacher: Output,
        data: DataSpec,
        *,
        ce: float = 0.1,
        kd: float = 0.9,
        spectral: float = 1.0,
        temperature: float = 4.0,
        stages: tuple[int, ...] = (0, 1, 2, 3),
        stage_weights: tuple[float, ...] | None = None,
        size: int = 7,
        sigma: float = 0.5,
        spectrum: str = "complex",
        alignment: str = "fft",
        normalisation: str = "image",
    ):
        super().__init__()
        for name, value in (("temperature", temperature), ("sigma", sigma)):
            if not value > 0:
                raise UserError(f"{name} {value}: expected a number above 0; raise it")
        if size < 1 or size % 2 == 0:
            raise UserError(f"size {size}: expected an odd number from 1; choose 7 or one near it")
        if spectrum not in SPECTRA:
            raise unknown("spectrum", spectrum, SPECTRA)
        if alignment not in ALIGNMENTS:
            raise unknown("alignment", alignment, ALIGNMENTS)
        if normalisation not in NORMALISATIONS:
            raise unknown("normalisation", normalisation, NORMALISATIONS)
        if stage_weights is not None and len(stage_weights) != len(stages):
            raise UserError(f"stage_weights {stage_weights}: expected {len(stages)}; give one for each stage")
        self.ce, self.kd, self.spectral, self.temperature = ce, kd, spectral, temperature
        self.normalisation = normalisation
        self.spectrum, self.aligned = spectrum, spectrum if alignment == "fft" else "spatial"
        if not spectral:
            self.needs = Needs(features=False)
            return
        self.stages = check_stages(stages, student, teacher)
        self.stage_weights = stage_weights or (1 / len(stages),) * len(stages)
        self.transforms, self.alignments = nn.ModuleList(), nn.ModuleList()
        for stage in self.stages:
            _, inputs, *s_grid = student.features[stage].shape
            _, outputs, *t_grid = teacher.features[stage].shape
            k = (min(size, *s_grid, *t_grid) + 1) // 2 * 2 - 1
            coarse = [min(*sides, size + 1) for sides in zip(s_grid, t_grid, strict=True)]
            s_pool, t_pool = (Positions(pooling_basis(grid, (k, k))) for grid in (coarse, t_grid))
            s_low, t_low = (Positions(half_basis(grid, k, sigma)) for grid in (coarse, t_grid))
            self.transforms.append(t_pool if spectrum == "spatial" else t_low)
            if alignment == "learned":
                numbers = 2 * k * k if spectrum == "complex" else k * k
                align = learned_alignment(inputs, outputs, s_pool, k * k, numbers)
            else:
                align = fourier_alignment(inputs, outputs, s_pool if spectrum == "spatial" else s_low)
            self.alignments.append(nn.Sequential(Pool(s_grid, coarse), align))

    def loss(self, student: Output, teacher: Output, batch: Batch) -> dict[str, Tensor]:
        terms = {}
        if self.ce:
            terms["ce"] = self.ce * cross_entropy(student.logits, batch.targets)
        if self.kd:
            terms["kd"] = self.kd * softened_kl(student.logits, teacher.logits, self.temperature)
        if self.spectral:
            matches = []
            stages = zip(self.stages, self.stage_weights, self.transforms, self.alignments, strict=True)
            for stage, weight, transform, align in stages:
                with torch.no_grad():
                    target = compact_map(transform(teacher.features[stage]), self.spectrum, self.normalisation)
                seen = compact_map(align(student.features[stage]), self.aligned, self.normalisation)
                matches.append(weight * F.mse_loss(seen, target))
            terms["spectral"] = self.spectral * torch.stack(matches).sum()
        return terms
