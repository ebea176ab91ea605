"""FourierKD: spectra of the last stage, fused with the teacher's amplitudes, are compared on the Riemann sphere."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kdzoo import Batch, DataSpec, Distiller, Fidelity, Needs, Output
from kdzoo.connectors import CommonGrid, check_stages, paired_features
from kdzoo.keywords import positive
from kdzoo.losses import cross_entropy, softened_kl, standardised


def spectrum_parts(maps: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the amplitude (B, C, H, W) and the phase as a complex unit (2, B, C, H, W) of the orthonormal fft2.

    Where nothing is to be seen of a wave (below 1e-6) its phase is near 0, so that gradients stay finite.
    """
    spectrum = torch.view_as_real(torch.fft.fft2(maps, norm="ortho")).movedim(-1, 0)
    amplitude = spectrum.square().sum(dim=0).clamp_min(1e-12).sqrt()
    return amplitude, spectrum / amplitude


def riemann(spectrum: Tensor) -> Tensor:
    """Project complex numbers (2, ...) stereographically to points of the unit sphere (3, ...)."""
    squared = spectrum.square().sum(dim=0)
    return torch.cat([2 * spectrum, (squared - 1)[None]]) / (squared + 1)


def unlikeness(student: Tensor, teacher: Tensor) -> Tensor:
    """Compute 1 - cosine of maps (B, C, H, W) in each channel: (B, C, 1, 1); 1 where maps have one position.

    The cosine of maps with one position would be a sign alone.
    """
    if student.shape[2:].numel() == 1:
        return torch.ones_like(student)
    return 1 - F.cosine_similarity(student.flatten(2), teacher.flatten(2), dim=2, eps=1e-6)[..., None, None]


def sphere_distance(student: Tensor, teacher: Tensor, weight: Tensor) -> Tensor:
    """Compute half the weighted squared distance of sphere points of spectra (2, B, C, H, W), mean over points.

    Each coordinate has mean 0 and variance 1 in each channel, over the batch, as batch norm in training gives it.
    """
    points = (standardised(riemann(spectrum), (1, 3, 4), 1e-5) for spectrum in (student, teacher))
    return (torch.sub(*points).square().sum(dim=0) * weight).mean() / 2


class AmplitudeFusion(nn.Module):
    """The student's spectrum with amplitudes mixed with the teacher's, and noise: (2, B, C, H, W)."""

    def __init__(self, channels: int, noise: bool):
        super().__init__()
        self.noise = noise
        self.student, self.teacher = nn.Conv2d(channels, channels, 1), nn.Conv2d(channels, channels, 1)
        self.share = nn.Parameter(torch.zeros(channels, 1, 1))

    def forward(self, student: Tensor, phase: Tensor, teacher: Tensor) -> Tensor:
        share = self.share.sigmoid()
        amplitude = share * self.student(student) + (1 - share) * self.teacher(teacher)
        return phase * (amplitude * torch.rand_like(amplitude) if self.noise else amplitude)


class FourierKD(Distiller):
    r"""Knowledge distillation in the Fourier domain, carried over from dense prediction to classification.

    .. math:: L = w_{ce} H(y, p_s) + w_{kd} T^2 KL(p_t^{(T)} \| p_s^{(T)})
        + w_{fourier} \operatorname{mean}_l \operatorname{mean} (1 - \cos(f_s, f_t)) \|N R(S) - N R(F(f_t))\|^2 / 2

    F is the orthonormal Fourier transform and R(x + iy) = (2x, 2y, r^2 - 1) / (r^2 + 1) the point of the Riemann
    sphere. S has the phase of F(Q f_s) and the amplitude u (s A \|F(Q f_s)\| + (1 - s) B \|F(f_t)\|), with 1x1
    convolutions Q, A and B, a learned share s of each channel, and u uniform noise in [0, 1). N takes each
    coordinate to mean 0 and variance 1 by channel; the cosine is taken over each channel of each image. f_s has
    been through a 1x1 convolution to the teacher's channels.

    Differs from the authors' code:

    - Theirs rolls batch and channels with the spectrum, so that the cosines weigh other images, and other channels,
      than their own; here each is weighed with its own.
    - Theirs reads the last of several maps only; here the term is the mean over stages.
    - Theirs resizes no map; here the finer of two grids is averaged to the coarser one.
    - Maps of one position, whose cosine is a sign, weigh 1.

    Args:
        ce: weight of the cross-entropy with the ground truth.
        fourier: weight of the spectra's term; the authors take 41 for their segmenter.
        kd: weight of the distillation of logits.
        temperature: T of the distillation of logits.
        noise: u; False is u = 1.
        stages: which stages are matched.

    Source: mmrazor/models/losses/fourier_loss.py of the authors' repository, lawlawCodes/FourierKD.
    """

    paper = "doi:10.1109/LSP.2024.3515795"
    fidelity = Fidelity.ADAPTED
    needs = Needs(logits=False)

    def __init__(
        self,
        *,
        ce: float = 1.0,
        fourier: float = 1.0,
        kd: float = 0.0,
        temperature: float = 4.0,
        noise: bool = True,
        stages: tuple[int, ...] = (3,),
    ):
        super().__init__(ce=ce, fourier=fourier, kd=kd)
        self.temperature = positive(temperature=temperature)
        self.noise, self.stages = noise, stages

    def build(self, student: Output, teacher: Output, data: DataSpec) -> None:
        self.stages = check_stages(self.stages, student, teacher)
        self.grids, self.projectors, self.predictors, self.fusions = (nn.ModuleList() for _ in range(4))
        for f_s, f_t in paired_features(student, teacher, self.stages):
            channels = f_t.shape[1]
            self.grids.append(CommonGrid(f_s, f_t))
            self.projectors.append(nn.Conv2d(f_s.shape[1], channels, 1))
            self.predictors.append(nn.Conv2d(channels, channels, 1))
            self.fusions.append(AmplitudeFusion(channels, self.noise))

    def loss(self, student: Output, teacher: Output, batch: Batch) -> dict[str, Tensor]:
        return self.weigh(
            ce=lambda: cross_entropy(student.logits, batch.targets),
            fourier=lambda: self.spectra_distance(student, teacher),
            kd=lambda: softened_kl(student.logits, teacher.logits, self.temperature),
        )

    def spectra_distance(self, student: Output, teacher: Output) -> Tensor:
        """Average the distances of fused and original spectra over the stages: a scalar."""
        distances = []
        modules = (self.grids, self.projectors, self.predictors, self.fusions)
        for f_s, f_t, grid, project, predict, fuse in paired_features(student, teacher, self.stages, *modules):
            f_s, f_t = grid(f_s, f_t)
            f_s = project(f_s)
            weight = unlikeness(f_s, f_t)
            amplitude_s, phase_s = spectrum_parts(predict(f_s))
            amplitude_t, phase_t = spectrum_parts(f_t)
            fused = fuse(amplitude_s, phase_s, amplitude_t)
            distances.append(sphere_distance(fused, amplitude_t * phase_t, weight))
        return torch.stack(distances).mean()
