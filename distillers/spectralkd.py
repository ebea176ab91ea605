"""SpectralKD: the student matches the Fourier spectrum of the teacher's stages, without any module to train."""

import torch
from torch import Tensor, nn

from kdzoo import Batch, DataSpec, Distiller, Fidelity, Needs, Output
from kdzoo.connectors import CommonGrid, check_stages
from kdzoo.errors import UserError
from kdzoo.losses import cross_entropy, softened_kl
from kdzoo.spectral import average_rows
from kdzoo.tensors import full_precision


def spectrum_mse(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared error of the real and imaginary parts of the orthonormal rfft2 of maps (B, C, H, W)."""
    difference = torch.fft.rfft2(full_precision(student) - full_precision(teacher), norm="ortho")
    return torch.view_as_real(difference).square().mean()


class Channels(nn.Module):
    """Adaptive average pooling of neighbouring channels: (B, C, H, W) -> (B, size, H, W)."""

    rows: Tensor

    def __init__(self, channels: int, size: int):
        super().__init__()
        self.register_buffer("rows", average_rows(channels, size).float(), persistent=False)

    def forward(self, maps: Tensor) -> Tensor:
        return (self.rows @ maps.flatten(2)).unflatten(2, maps.shape[2:])


class SpectralKD(Distiller):
    r"""SpectralKD: interpreting and distilling vision transformers via spectral analysis.

    .. math:: L = w_{ce} H(y, p_s) + w_{kd} T^2 KL(p_t^{(T)} \| p_s^{(T)})
        + w_{spectral} \operatorname{mean}_l \operatorname{MSE}(R(f_s^l), R(f_t^l))

    R stacks the real and imaginary parts of the orthonormal two-dimensional rfft. The wider network's channels
    are averaged in groups of neighbours, down to the narrower one's. By Parseval's theorem the MSE over the whole
    spectrum would be half the MSE of the maps themselves; the half that a rfft keeps weighs the waves that have no
    horizontal part, or the highest, twice as much as the others. That is all the transform adds to the loss.

    The authors pool the teacher's channels only and need equal grids. Here the student's are pooled where it is
    the wider one, and maps of the finer grid are averaged to the coarser one. Their stages are chosen by hand for
    each pair (for DeiT the blocks 0, 1 and the last six); here they are the four that every network shows.

    Args:
        ce: weight of the cross-entropy with the ground truth.
        kd: weight of the distillation of logits.
        spectral: weight of the spectra's term; the authors take 0.05 for a Swin pair.
        temperature: T, which softens both distributions.
        stages: which stages are matched.

    Source: losses.py and README.md of the authors' repository, thy960112/SpectralKD.
    """

    paper = "arXiv:2412.19055"
    fidelity = Fidelity.EXACT

    def __init__(
        self,
        student: Output,
        teacher: Output,
        data: DataSpec,
        *,
        ce: float = 0.1,
        kd: float = 0.9,
        spectral: float = 0.2,
        temperature: float = 1.0,
        stages: tuple[int, ...] = (0, 1, 2, 3),
    ):
        super().__init__()
        if not temperature > 0:
            raise UserError(f"temperature {temperature}: expected a number above 0; 1 softens nothing")
        self.ce, self.kd, self.spectral, self.temperature = ce, kd, spectral, temperature
        if not spectral:
            self.needs = Needs(features=False)
            return
        self.stages = check_stages(stages, student, teacher)
        self.grids, self.student_channels, self.teacher_channels = (nn.ModuleList() for _ in range(3))
        for stage in self.stages:
            s_maps, t_maps = student.features[stage], teacher.features[stage]
            width = min(s_maps.shape[1], t_maps.shape[1])
            self.grids.append(CommonGrid(s_maps, t_maps))
            for channels, maps in ((self.student_channels, s_maps), (self.teacher_channels, t_maps)):
                channels.append(Channels(maps.shape[1], width) if maps.shape[1] > width else nn.Identity())

    def loss(self, student: Output, teacher: Output, batch: Batch) -> dict[str, Tensor]:
        terms = {}
        if self.ce:
            terms["ce"] = self.ce * cross_entropy(student.logits, batch.targets)
        if self.kd:
            terms["kd"] = self.kd * softened_kl(student.logits, teacher.logits.detach(), self.temperature)
        if self.spectral:
            errors = []
            modules = zip(self.grids, self.student_channels, self.teacher_channels, strict=True)
            for stage, (grid, channels_s, channels_t) in zip(self.stages, modules, strict=True):
                f_s, f_t = grid(student.features[stage], teacher.features[stage])
                errors.append(spectrum_mse(channels_s(f_s), channels_t(f_t)))
            terms["spectral"] = self.spectral * torch.stack(errors).mean()
        return terms
