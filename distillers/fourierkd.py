"""FourierKD: spectra of the last stage, fused with the teacher's amplitudes, are compared on the Riemann sphere."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kdzoo import Batch, DataSpec, Distiller, Fidelity, Needs, Output
from kdzoo.connectors import CommonGrid, check_stages
from kdzoo.errors import UserError
from kdzoo.losses import cross_entropy, softened_kl
from kdzoo.tensors import full_precision


def spectrum_parts(maps: Tensor) -> tuple[Tensor, Tensor]:
    """Amplitude (B, C, H, W), and real and imaginary part of the phase (2, B, C, H, W), of the orthonormal fft2.

    Where nothing is to be seen of a wave (below 1e-6) its phase is near 0, so that gradients stay finite.
    """
    spectrum = torch.view_as_real(torch.fft.fft2(full_precision(maps), norm="ortho")).movedim(-1, 0)
    amplitude = spectrum.square().sum(dim=0).clamp_min(1e-12).sqrt()
    return amplitude, spectrum / amplitude


def riemann(spectrum: Tensor) -> Tensor:
    """Real and imaginary parts (2, ...) as points of the unit sphere (3, ...), by stereographic projection."""
    squared = spectrum.square().sum(dim=0)
    return torch.cat([2 * spectrum, (squared - 1)[None]]) / (squared + 1)


def normalised(values: Tensor) -> Tensor:
    """Values (..., B, C, H, W) to mean 0 and variance 1 in each channel, over the batch, as batch norm in training."""
    centred = values - values.mean(dim=(-4, -2, -1), keepdim=True)
    return centred * (centred.square().mean(dim=(-4, -2, -1), keepdim=True) + 1e-5).rsqrt()


def unlikeness(student: Tensor, teacher: Tensor) -> Tensor:
    """1 - cosine of maps (B, C, H, W) in each channel: (B, C, 1, 1); 1 where maps have one position, so only signs."""
    if student.shape[2:].numel() == 1:
        return torch.ones_like(student)
    student, teacher = full_precision(student).flatten(2), full_precision(teacher).flatten(2)
    return 1 - F.cosine_similarity(student, teacher, dim=2, eps=1e-6)[..., None, None]


def sphere_distance(student: Tensor, teacher: Tensor, weight: Tensor) -> Tensor:
    """Half the squared distance of normalised sphere points of spectra (2, B, C, H, W), weighed; mean over points."""
    points = (normalised(riemann(spectrum)) for spectrum in (student, teacher))
    return (torch.sub(*points).square().sum(dim=0) * weight).mean() / 2


class AmplitudeFusion(nn.Module):
    """The student's spectrum (2, B, C, H, W), its amplitudes mixed with the teacher's and shaken by noise."""

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

    The authors' code also rolls batch and channels with the spectrum, so that the cosines weigh other images, and
    other channels, than their own; when it is given several maps it reads the last only, and resizes none. Ours
    weighs each with its own, takes the mean over stages, and averages the finer of two grids to the coarser one.
    Maps of one position, whose cosine is a sign, weigh 1.

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

    def __init__(
        self,
        student: Output,
        teacher: Output,
        data: DataSpec,
        *,
        ce: float = 1.0,
        fourier: float = 1.0,
        kd: float = 0.0,
        temperature: float = 4.0,
        noise: bool = True,
        stages: tuple[int, ...] = (3,),
    ):
        super().__init__()
        if not temperature > 0:
            raise UserError(f"temperature {temperature}: expected a number above 0; 4 is usual")
        self.ce, self.fourier, self.kd, self.temperature = ce, fourier, kd, temperature
        if not fourier:
            self.needs = Needs(features=False)
            return
        self.stages = check_stages(stages, student, teacher)
        self.grids, self.projectors, self.predictors, self.fusions = (nn.ModuleList() for _ in range(4))
        for stage in self.stages:
            s_maps, t_maps = student.features[stage], teacher.features[stage]
            channels = t_maps.shape[1]
            self.grids.append(CommonGrid(s_maps, t_maps))
            self.projectors.append(nn.Conv2d(s_maps.shape[1], channels, 1))
            self.predictors.append(nn.Conv2d(channels, channels, 1))
            self.fusions.append(AmplitudeFusion(channels, noise))

    def loss(self, student: Output, teacher: Output, batch: Batch) -> dict[str, Tensor]:
        terms = {}
        if self.ce:
            terms["ce"] = self.ce * cross_entropy(student.logits, batch.targets)
        if self.fourier:
            distances = []
            modules = zip(self.grids, self.projectors, self.predictors, self.fusions, strict=True)
            for stage, (grid, project, predict, fuse) in zip(self.stages, modules, strict=True):
                f_s, f_t = grid(student.features[stage], teacher.features[stage])
                f_s = project(f_s)
                weight = unlikeness(f_s, f_t)
                amplitude_s, phase_s = spectrum_parts(predict(f_s))
                amplitude_t, phase_t = spectrum_parts(f_t)
                fused = fuse(amplitude_s, phase_s, amplitude_t)
                distances.append(sphere_distance(fused, amplitude_t * phase_t, weight))
            terms["fourier"] = self.fourier * torch.stack(distances).mean()
        if self.kd:
            terms["kd"] = self.kd * softened_kl(student.logits, teacher.logits.detach(), self.temperature)
        return terms
