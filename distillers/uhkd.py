"""UHKD: the student matches compact low-frequency spectra of the teacher's features, stage by stage."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kdzoo import Batch, DataSpec, Distiller, Fidelity, Needs, Output
from kdzoo.connectors import Pool, Positions, check_stages, conv_batch_norm, paired_features
from kdzoo.errors import UserError
from kdzoo.keywords import odd, one_of, positive
from kdzoo.losses import cross_entropy, softened_kl, standardised
from kdzoo.spectral import amplitude, half_basis, mirrored, pooling_basis, whole_spectrum


def compact_map(values: Tensor, spectrum: str, normalisation: str = "image") -> Tensor:
    """Normalise the spectrum of coefficients (B, C, k k + 1) of ``half_basis``; "spatial" values stay (B, C, N).

    All frequencies come out: (B, C, k k) amplitudes, or (B, C, 2 k k) real, then imaginary parts for "complex".
    """
    if spectrum == "complex":
        values = whole_spectrum(values)
    elif spectrum != "spatial":
        values = amplitude(values)
        values = mirrored(values.log1p() if spectrum == "log_amplitude" else values)
    return F.layer_norm(values, values.shape[1:]) if normalisation == "image" else standardised(values, 0, 1e-6)


def fourier_alignment(inputs: int, outputs: int, transform: nn.Module) -> nn.Sequential:
    """Map student maps (B, inputs, H, W) to their own coefficients (B, outputs, k k + 1)."""
    width = min(inputs, outputs)
    return nn.Sequential(
        *conv_batch_norm(inputs, width),
        nn.GELU(),  # without it the module would commute with the transform
        *conv_batch_norm(width, width, kernel=3, groups=width),
        transform,
        nn.Conv1d(width, outputs, 1, bias=False),  # does commute, and few frequencies are fewer than positions
    )


def learned_alignment(inputs: int, outputs: int, pool: nn.Module, cells: int, parts: int) -> nn.Sequential:
    """Map student maps (B, inputs, H, W) to (B, outputs, parts * cells), by a linear map of the pooled ``cells``."""
    return nn.Sequential(
        *conv_batch_norm(inputs, outputs),
        nn.GELU(),
        pool,
        nn.Linear(cells, parts * cells),
        nn.BatchNorm1d(outputs),
        nn.GELU(),
        nn.Conv1d(outputs, outputs, 1),
    )


class UHKD(Distiller):
    r"""Unified Heterogeneous Knowledge Distillation in the frequency domain, reconstructed.

    .. math:: L = w_{ce} H(y, p_s) + w_{kd} T^2 KL(p_t^{(T)} \| p_s^{(T)})
        + w_{spectral} \sum_l w_l \operatorname{MSE}(Z_s^l, Z_t^l)

    Z_t: the k x k lowest Fourier coefficients of the teacher's stage (divided by H W), times
    exp(-rho^2 / 2 sigma^2) with rho = radius / (k // 2), as real and imaginary parts or amplitudes, normalised; k is
    the largest odd number not above ``size`` or a side of either grid. Z_s: the student's stage, pooled to the
    coarsest grid that holds these frequencies (of size + 1, or the teacher's where that is coarser), then aligned.

    The full text was not available. Known are a Fourier transform that compacts the teacher's features, a
    learnable alignment of the student's, and matching of several levels by MSE beside KL on logits. Ours are
    both alignments ("fft" convolves in the narrower of both widths), the pooling before them, the Gaussian crop, the
    spectra, both normalisations and every default. docs/frequency.md says why, and that the control is ahead.

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
        alignment: "fft", convolutions and the same transform, or "learned", a learned map of positions.
        normalisation: what has mean 0 and variance 1 in Z: "image", all numbers of one image (layer norm), or
            "batch", each number over the batch, which leaves out what all images have in common.

    Source: the abstract of arXiv 2510.24116; formulas reconstructed.
    """

    paper = "arXiv:2510.24116"
    fidelity = Fidelity.RECONSTRUCTED
    needs = Needs(logits=False)

    def __init__(
        self,
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
        super().__init__(ce=ce, kd=kd, spectral=spectral)
        self.temperature, self.sigma = positive(temperature=temperature), positive(sigma=sigma)
        self.spectrum = one_of(("complex", "amplitude", "log_amplitude", "spatial"), spectrum=spectrum)
        self.alignment = one_of(("fft", "learned"), alignment=alignment)
        self.aligned = spectrum if alignment == "fft" else "spatial"
        self.normalisation = one_of(("image", "batch"), normalisation=normalisation)
        self.stages, self.size = stages, odd(size=size)
        self.stage_weights = tuple(1 / len(stages) for _ in stages) if stage_weights is None else stage_weights
        if len(self.stage_weights) != len(stages):
            raise UserError(f"stage_weights={stage_weights}: expected {len(stages)} numbers; give one for each stage")

    def build(self, student: Output, teacher: Output, data: DataSpec) -> None:
        self.stages = check_stages(self.stages, student, teacher)
        self.transforms, self.alignments = nn.ModuleList(), nn.ModuleList()
        for f_s, f_t in paired_features(student, teacher, self.stages):
            (_, inputs, *s_grid), (_, outputs, *t_grid) = f_s.shape, f_t.shape
            k = (min(self.size, *s_grid, *t_grid) + 1) // 2 * 2 - 1
            coarse = [min(*sides, self.size + 1) for sides in zip(s_grid, t_grid, strict=True)]
            transform_s, transform_t = (
                Positions(pooling_basis(grid, (k, k)) if kind == "spatial" else half_basis(grid, k, self.sigma))
                for grid, kind in ((coarse, self.aligned), (t_grid, self.spectrum))
            )
            if self.alignment == "fft":
                align = fourier_alignment(inputs, outputs, transform_s)
            else:
                align = learned_alignment(inputs, outputs, transform_s, k * k, 2 if self.spectrum == "complex" else 1)
            self.transforms.append(transform_t)
            self.alignments.append(nn.Sequential(Pool(s_grid, coarse), align))

    def loss(self, student: Output, teacher: Output, batch: Batch) -> dict[str, Tensor]:
        return self.weigh(
            ce=lambda: cross_entropy(student.logits, batch.targets),
            kd=lambda: softened_kl(student.logits, teacher.logits, self.temperature),
            spectral=lambda: self.match(student, teacher),
        )

    def match(self, student: Output, teacher: Output) -> Tensor:
        """Sum the weighted errors of the stages: a scalar."""
        maps = paired_features(student, teacher, self.stages, self.stage_weights, self.transforms, self.alignments)
        errors = []
        for f_s, f_t, weight, transform, align in maps:
            z_s = compact_map(align(f_s), self.aligned, self.normalisation)
            z_t = compact_map(transform(f_t), self.spectrum, self.normalisation)
            errors.append(weight * F.mse_loss(z_s, z_t))
        return torch.stack(errors).sum()
