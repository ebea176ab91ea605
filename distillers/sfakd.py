"""SFAKD: SimKD with learned weights of each frequency, less the slowest, before the projector."""

import torch
from kdzoo.distillers.simkd import SimKD
from torch import Tensor, nn

from kdzoo import Fidelity
from kdzoo.connectors import conv_batch_norm
from kdzoo.keywords import positive
from kdzoo.spectral import cycles, frequency_filter


def soft_high_pass(height: int, width: int, sigma: float) -> Tensor:
    """Build a mask of frequencies for ``frequency_filter``, 0 at DC and at most 1: (H, W), all 0 for one position.

    1 - exp(-rho^2 / 2 s^2) over its largest value, where rho is in cycles per image and s is ``sigma`` of the shorter
    side.
    """
    mask = 1 - (-cycles(height, width).square() / (2 * (sigma * min(height, width)) ** 2)).exp()
    return mask / mask.max().clamp_min(1e-12)


class SmoothedFrequencies(nn.Module):
    """Filtered maps plus a 1x1 convolution of them, with learned weights: (B, C, H, W) -> the same shape.

    Args:
        channels: C.
        grid: H and W.
        sigma: of the filter's mask; None leaves the filter out, as does a grid of one position.
    """

    mask: Tensor

    def __init__(self, channels: int, grid: tuple[int, int], sigma: float | None):
        super().__init__()
        self.convolve = nn.Conv2d(channels, channels, 1)
        self.filters = sigma is not None and grid != (1, 1)
        self.shares = nn.Parameter(torch.full((1 + self.filters,), 0.5))
        if sigma is not None and self.filters:
            self.weight = nn.Parameter(torch.rand(channels, *grid, 2) / channels**2)
            self.register_buffer("mask", soft_high_pass(*grid, sigma).float(), persistent=False)

    def forward(self, maps: Tensor) -> Tensor:
        convolved = self.shares[0] * self.convolve(maps)
        return (
            convolved + self.shares[1] * frequency_filter(maps, self.weight, self.mask) if self.filters else convolved
        )


class SFAKD(SimKD):
    r"""Smoothed Frequency Augmentation for Knowledge Distillation.

    .. math:: L = w_{simkd} \operatorname{MSE}(P(a \, \Re F^{-1}(M \cdot W \cdot F f_s) + b V f_s), f_t)

    SimKD, whose projector P reads the student's last map after a filter: F is the orthonormal Fourier transform, W a
    trained complex weight for each channel and frequency, M a mask that is 0 at DC and rises to 1, V a 1x1 convolution,
    and a and b begin at 1/2. P: a 1x1 convolution to half the sum of both widths, a depthwise 3x3 and a 1x1
    convolution, and a 1x1 convolution to the teacher's width, each pair with batch norm and ReLU. What ships is the
    student, filter, P and the teacher's classifier, for one size of images, as W belongs to a grid. A map of one
    position has no filter.

    W starts between 0 and 1 / C^2, so that the filter's branch is some 10^5 times smaller than the other for 256
    channels, and weight decay keeps it small. Whether it helps can only be told from the same projector without it:
    ``filter=false``. docs/frequency.md has more.

    Differs from the authors' code as ``simkd`` does: what is matched, and the last ReLU, are decided by a batch.

    Args:
        simkd: weight of the squared error, a mean over all numbers.
        filter: whether the filter's branch is there; false is its control.
        sigma: width of the mask around DC, in sides of the map.

    Source: ``mdistiller/distillers/SFAKD.py`` of the authors' repository, Myleswork/SFAKD. Their paper was not
    available.
    """

    paper = "github:Myleswork/SFAKD"
    fidelity = Fidelity.EXACT

    def __init__(self, *, simkd: float = 1.0, filter: bool = True, sigma: float = 0.1):
        super().__init__(simkd=simkd)
        self.filter, self.sigma = filter, positive(sigma=sigma)

    def layers(self, inputs: int, outputs: int, grid: tuple[int, int]) -> nn.Module:
        """Make the filter, and the projector but for its last ReLU: (B, inputs, *grid) -> (B, outputs, *grid)."""
        middle = (inputs + outputs) // 2
        return nn.Sequential(
            SmoothedFrequencies(inputs, grid, self.sigma if self.filter else None),
            *conv_batch_norm(inputs, middle),
            nn.ReLU(),
            nn.Conv2d(middle, middle, 3, padding=1, groups=middle, bias=False),
            *conv_batch_norm(middle, middle),
            nn.ReLU(),
            *conv_batch_norm(middle, outputs),
        )
