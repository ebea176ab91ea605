"""SpectralKD: the student matches the Fourier spectrum of the teacher's stages, without any module to train."""

import torch
from torch import Tensor, nn

from kdzoo import Batch, DataSpec, Distiller, Fidelity, Needs, Output
from kdzoo.connectors import CommonGrids, paired_features
from kdzoo.keywords import positive
from kdzoo.losses import cross_entropy, softened_kl
from kdzoo.spectral import average_rows


def spectrum_mse(student: Tensor, teacher: Tensor) -> Tensor:
    """Compute the MSE of the real and imaginary parts of the orthonormal rfft2 of maps (B, C, H, W)."""
    difference = torch.fft.rfft2(student - teacher, norm="ortho")
    return torch.view_as_real(difference).square().mean()


class Channels(nn.Module):
    """Averages of neighbouring channels, as adaptive pooling makes them: (B, C, H, W) -> (B, size, H, W)."""

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

    Differs from the authors' code:

    - They pool the teacher's channels only; here the student's are pooled where it is the wider one.
    - They need equal grids; here maps of the finer grid are averaged to the coarser one.
    - Their stages are chosen by hand for each pair (for DeiT the blocks 0, 1 and the last six); here they are the four
      that every network shows.

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
    needs = Needs(logits=False)

    def __init__(
        self,
        *,
        ce: float = 0.1,
        kd: float = 0.9,
        spectral: float = 0.2,
        temperature: float = 1.0,
        stages: tuple[int, ...] = (0, 1, 2, 3),
    ):
        super().__init__(ce=ce, kd=kd, spectral=spectral)
        self.temperature = positive(temperature=temperature)
        self.stages = stages

    def build(self, student: Output, teacher: Output, data: DataSpec) -> None:
        self.grids = CommonGrids(student, teacher, self.stages)
        self.student_channels, self.teacher_channels = nn.ModuleList(), nn.ModuleList()
        for f_s, f_t in paired_features(student, teacher, self.stages):
            width = min(f_s.shape[1], f_t.shape[1])
            for channels, maps in ((self.student_channels, f_s), (self.teacher_channels, f_t)):
                channels.append(Channels(maps.shape[1], width) if maps.shape[1] > width else nn.Identity())

    def loss(self, student: Output, teacher: Output, batch: Batch) -> dict[str, Tensor]:
        return self.weigh(
            ce=lambda: cross_entropy(student.logits, batch.targets),
            kd=lambda: softened_kl(student.logits, teacher.logits, self.temperature),
            spectral=lambda: self.error(student, teacher),
        )

    def error(self, student: Output, teacher: Output) -> Tensor:
        """Average the errors of the spectra over stages: a scalar."""
        stages = zip(self.grids(student, teacher), self.student_channels, self.teacher_channels, strict=True)
        errors = [spectrum_mse(narrow_s(f_s), narrow_t(f_t)) for (f_s, f_t), narrow_s, narrow_t in stages]
        return torch.stack(errors).mean()
