"""FDL: the logits' spectra over the classes have alike distributions, a control of figkd that knows no place."""

import torch
from torch import Tensor
from torch.nn import functional as F

from kdzoo import Batch, DataSpec, Distiller, Fidelity, Needs, Output
from kdzoo.keywords import at_least
from kdzoo.losses import cross_entropy
from kdzoo.spectral import amplitude


def sliced_distance(student: Tensor, teacher: Tensor, directions: Tensor) -> Tensor:
    """Compute the sliced Wasserstein distance between the patches of two signals (B, C, F), mean over B.

    Every patch of the signal is projected on each of the ``directions`` (N, C, P), and the projections are sorted along
    the signal: the mean absolute difference of these is a Wasserstein distance of two sets of numbers.
    """
    s, t = (F.conv1d(signal, directions.to(signal.dtype)).sort(dim=-1).values for signal in (student, teacher))
    return (s - t).abs().mean()


def unit_directions(number: int, channels: int, length: int) -> Tensor:
    """Draw vectors of length 1, evenly over all directions: (number, channels, length)."""
    drawn = torch.randn(number, channels * length)
    return F.normalize(drawn, dim=1).unflatten(1, (channels, length))


class FDL(Distiller):
    r"""Frequency Distribution Loss of logits, carried over from images.

    .. math:: L = w_{ce} H(y, p_s) + w_{amplitude} \, SW(|\hat z_s|, |\hat z_t|)
        + w_{phase} \, SW(\hat z_s / |\hat z_s|, \hat z_t / |\hat z_t|)

    z-hat is the orthonormal Fourier transform of the logits over the classes in the data set's order, without frequency
    0, which no softmax sees, and without negative frequencies, which are conjugates. SW, the sliced Wasserstein
    distance, compares the set of all patches of neighbouring frequencies, so it does not know at which frequency one
    stands. Like ``figkd``, whose control it is, it depends on the order of the classes, but not on where in that order
    something happens: amplitudes are the same for all cyclic shifts of the classes.

    Carried over from maps of images, with these differences: logits have one dimension and one channel; the transform
    is orthonormal; and the phase is a point of the unit circle, where the authors compare angles, which jump at half a
    turn. A public attempt on logits sorts the projections of one whole spectrum instead of its patches. With many
    projections that compares hardly more than the lengths of two vectors.

    Args:
        ce: weight of the cross-entropy with the ground truth.
        amplitude: weight of the distance between amplitudes.
        phase: weight of the distance between phases.
        patch: frequencies of a patch, or all where there are fewer.
        projections: how many directions are drawn.

    Source: Ni et al. 2024; ``FDL_pytorch/FDL.py`` of eezkni/FDL.
    """

    paper = "arXiv:2402.18192"
    fidelity = Fidelity.ADAPTED
    needs = Needs(features=False, embedding=False)

    basis: Tensor  # (2 F, K): real parts of the transform, then imaginary ones
    amplitude_directions: Tensor  # (N, 1, P)
    phase_directions: Tensor  # (N, 2, P)

    def __init__(
        self, *, ce: float = 1.0, amplitude: float = 1.0, phase: float = 1.0, patch: int = 5, projections: int = 256
    ):
        super().__init__(ce=ce, amplitude=amplitude, phase=phase)
        self.patch, self.projections = at_least(1, patch=patch), at_least(1, projections=projections)

    def build(self, student: Output, teacher: Output, data: DataSpec) -> None:
        rows = torch.fft.rfft(torch.eye(data.num_classes, dtype=torch.float64), norm="ortho")[:, 1:].mT
        self.register_buffer("basis", torch.cat([rows.real, rows.imag]).float(), persistent=False)
        length = min(self.patch, len(rows))
        self.register_buffer("amplitude_directions", unit_directions(self.projections, 1, length))
        self.register_buffer("phase_directions", unit_directions(self.projections, 2, length))

    def loss(self, student: Output, teacher: Output, batch: Batch) -> dict[str, Tensor]:
        terms = self.weigh(ce=lambda: cross_entropy(student.logits, batch.targets))
        if not self.is_active:
            return terms
        (size_s, turn_s), (size_t, turn_t) = (self.spectrum(output.logits) for output in (student, teacher))
        return terms | self.weigh(
            amplitude=lambda: sliced_distance(size_s, size_t, self.amplitude_directions),
            phase=lambda: sliced_distance(turn_s, turn_t, self.phase_directions),
        )

    def spectrum(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Compute amplitudes (B, 1, F) and phases on the unit circle (B, 2, F) of logits (B, K)."""
        parts = logits @ self.basis.to(logits.dtype).mT
        size = amplitude(parts)[:, None]
        return size, parts.unflatten(1, (2, -1)) / (size + 1e-6)
