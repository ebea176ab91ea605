"""Fourier, wavelet, Gaussian and pooling transforms of feature maps (..., H, W) and of logits (..., N).

A transform that keeps few coefficients, or that is taken of a few hundred classes, is a small matrix. The
``*_basis`` functions build such matrices once, in float64; methods keep them as buffers and multiply. That is
exact, deterministic on every device, one kernel forward and one backward, and one graph for ``torch.compile``,
where a wavelet library's loops over filters break the graph and a complex FFT leaves the compiler no fusion.
"""

import math
from collections.abc import Sequence

import numpy as np
import pywt
import torch
from torch import Tensor

from kdzoo.errors import UserError, unknown
from kdzoo.tensors import full_precision


def apply_basis(maps: Tensor, basis: Tensor) -> Tensor:
    """Multiply maps (..., H, W) by a transform matrix ``basis`` (N, H * W): coefficients (..., N)."""
    flat = full_precision(maps).flatten(-2)
    return flat @ basis.to(flat.dtype).mT


def fourier_basis(grid: Sequence[int], size: int, sigma: float = math.inf) -> Tensor:
    """Build the matrix of the low Fourier frequencies of maps (H, W) = ``grid``: (2 * size * size, H * W).

    The first half of its rows gives the real parts of the coefficients, the second half the imaginary ones.
    The coefficients are the centred size x size crop of ``fftshift(fft2(maps, norm="forward"))``, row by row,
    times exp(-rho^2 / 2 sigma^2) with rho = radius / (size // 2). The division by H * W makes coefficients of one
    image agree across grids; an odd size keeps every frequency together with its negative.
    """
    frequency = torch.arange(size) - size // 2
    weight = (-(frequency / max(size // 2, 1)).double().square() / (2 * sigma**2)).exp()
    axes = []
    for n in grid:
        turns = torch.outer(frequency, torch.arange(n)) % n  # reduced as integers: angles stay exact
        angle = turns.double() * (-2 * math.pi / n)
        axes.append(torch.polar(weight[:, None].expand_as(angle) / n, angle))
    both = torch.kron(*axes)
    return torch.cat([both.real, both.imag])


def half_basis(grid: Sequence[int], size: int, sigma: float = math.inf) -> Tensor:
    """Build the half of ``fourier_basis`` that determines a real map's coefficients: (size * size + 1, H * W).

    These are the rows up to DC. Of a real map the other coefficients are conjugates.
    """
    return fourier_basis(grid, size, sigma).unflatten(0, (2, -1))[:, : size * size // 2 + 1].flatten(0, 1)


def mirrored(half: Tensor) -> Tensor:
    """Repeat the amplitudes of frequencies up to DC, (..., (N + 1) / 2), for their negatives: (..., N)."""
    return torch.cat([half, half[..., :-1].flip(-1)], dim=-1)


def whole_spectrum(half: Tensor) -> Tensor:
    """Complete coefficients of ``half_basis``, (..., N + 1), to those of all frequencies, (..., 2 N).

    The others are their conjugates.
    """
    real, imaginary = half.chunk(2, dim=-1)
    return torch.cat([mirrored(real), imaginary, -imaginary[..., :-1].flip(-1)], dim=-1)


def amplitude(coefficients: Tensor) -> Tensor:
    """Compute the absolute value of complex numbers given as real and imaginary parts: (..., 2 N) -> (..., N).

    Its gradient is 0 where both parts are 0.
    """
    return coefficients.unflatten(-1, (2, -1)).square().sum(dim=-2).clamp_min(1e-30).sqrt()


def radius(height: int, width: int) -> Tensor:
    """Compute the radius of each frequency of fft2, as a share of the Nyquist frequency: (H, W).

    The order is fft2's, unshifted: 0 at DC, 1 at the Nyquist frequency of an axis.
    """
    vertical, horizontal = (torch.fft.fftfreq(n, dtype=torch.float64) * 2 for n in (height, width))
    return torch.hypot(*torch.meshgrid(vertical, horizontal, indexing="ij"))


def disk(height: int, width: int, cutoff: float) -> Tensor:
    """Build a mask of the frequencies whose relative radius is at most ``cutoff``: (H, W) bool.

    DC is always selected.
    """
    return radius(height, width) <= max(cutoff, 0.0) + 1e-9  # rounding must not decide about the rim


def fourier_filter(maps: Tensor, mask: Tensor) -> Tensor:
    """Keep only the frequencies of maps (..., H, W) that ``mask`` (H, W, symmetric, unshifted) selects."""
    maps = full_precision(maps)
    spectrum = torch.fft.rfft2(maps) * mask[:, : maps.shape[-1] // 2 + 1]
    return torch.fft.irfft2(spectrum, s=maps.shape[-2:])


def cycles(height: int, width: int) -> Tensor:
    """Compute the radius of each frequency of fft2 in cycles per image: (H, W), 0 at DC on every grid.

    The order is fft2's, unshifted.
    """
    vertical, horizontal = (torch.fft.fftfreq(n, d=1 / n, dtype=torch.float64) for n in (height, width))
    return torch.hypot(*torch.meshgrid(vertical, horizontal, indexing="ij"))


def low_pass(height: int, width: int, cutoff: float) -> Tensor:
    """Build a mask of the frequencies up to ``cutoff`` cycles per image for ``fourier_filter``: (H, W) bool.

    DC is always selected.
    As the unit is the image, 7x7 and 56x56 maps of one image lose the same waves of it.
    """
    return cycles(height, width) <= max(cutoff, 0.0) + 1e-9  # rounding must not decide about the rim


def high_pass(height: int, width: int, cutoff: float) -> Tensor:
    """Build a mask of the frequencies above ``cutoff`` cycles per image for ``fourier_filter``: (H, W) bool.

    From 0 on it is the complement of ``low_pass``, but that a map too coarse for any such wave keeps its highest
    frequency, and a 1x1 map its one number.
    """
    highest = math.hypot(height // 2, width // 2)
    return cycles(height, width) > min(cutoff, highest - 1e-6) + 1e-9


def radial_basis(grid: Sequence[int]) -> Tensor:
    """Build the matrix that averages ``spectral_power`` over rings of equal radius, in whole cycles: (R, H * W)."""
    rings = cycles(*grid).round().long().flatten()
    rows = (rings == torch.arange(int(rings.max()) + 1)[:, None]).double()
    return rows / rows.sum(dim=1, keepdim=True)  # every ring up to the corner has a frequency


def band_basis(grid: Sequence[int], edges: Sequence[float]) -> Tensor:
    """Build the matrix that sums ``spectral_power`` by bands between ``edges``, in cycles: (len(edges) + 1, H * W).

    A band holds its upper edge, the first one DC, the last one all that is left. Their sum is the mean of squares.

    Raises:
        UserError: the edges do not rise.
    """
    if list(edges) != sorted(set(edges)):
        raise UserError(f"edges {tuple(edges)}: expected rising numbers of cycles per image; sort them")
    band = torch.bucketize(cycles(*grid).flatten() - 1e-9, torch.tensor(edges, dtype=torch.float64))
    return (band == torch.arange(len(edges) + 1)[:, None]).double()


def spectral_power(maps: Tensor, basis: Tensor) -> Tensor:
    """Compute the power spectrum of maps (..., H, W), grouped by ``radial_basis`` or ``band_basis``: (..., N).

    |fft2|^2 with ``norm="forward"``: of one wave the same on every grid that holds it.
    """
    spectrum = torch.view_as_real(torch.fft.fft2(full_precision(maps), norm="forward"))
    return apply_basis(spectrum.square().sum(dim=-1), basis)


def separable(maps: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Transform maps (..., H, W) along both axes by ``rows`` (M, H) and ``columns`` (N, W): (..., M, N)."""
    maps = full_precision(maps)
    return rows.to(maps.dtype) @ maps @ columns.to(maps.dtype).mT


def cosine_basis(n: int) -> Tensor:
    """Build the matrix of the orthonormal DCT-II of n samples: (n, n).

    ``samples @ basis.mT`` transforms samples, ``separable`` transforms maps.
    Its transpose is the DCT-III, which is the inverse.
    """
    order = torch.arange(n)
    turns = torch.outer(order, 2 * order + 1) % (4 * n)  # reduced as integers: angles stay exact
    rows = (turns.double() * (math.pi / (2 * n))).cos() * math.sqrt(2 / n)
    rows[0] /= math.sqrt(2)
    return rows


def average_rows(n: int, size: int) -> Tensor:
    """Build the matrix of adaptive average pooling of n samples to ``size`` cells: (size, n)."""
    rows = torch.zeros(size, n, dtype=torch.float64)
    for cell in range(size):
        begin, end = cell * n // size, -(-(cell + 1) * n // size)
        rows[cell, begin:end] = 1 / (end - begin)
    return rows


def blur_rows(n: int, sigma: float) -> Tensor:
    """Build the matrix of a Gaussian blur of n samples, with ``sigma`` in samples: (n, n).

    Its rows sum to 1, so constants stay, also at edges.
    """
    position = torch.arange(n, dtype=torch.float64)
    rows = (-(position[:, None] - position).square() / (2 * sigma**2)).exp()
    return rows / rows.sum(dim=1, keepdim=True)


def pooling_basis(grid: Sequence[int], size: Sequence[int], blur: float = 0.0) -> Tensor:
    """Build the matrix of adaptive average pooling of maps (H, W) = ``grid`` to ``size`` = (k, l): (k * l, H * W).

    ``blur``, in cells, is the sigma of a Gaussian before it; 0 is none.
    """
    axes = [average_rows(n, cells) for n, cells in zip(grid, size, strict=True)]
    if blur:
        axes = [rows @ blur_rows(n, blur * n / len(rows)) for rows, n in zip(axes, grid, strict=True)]
    return torch.kron(*axes)


def largest_level(grid: Sequence[int], wavelet: str) -> int:
    """Compute how many times ``wavelet`` can split maps (H, W) = ``grid``, or n samples = (n,); 0 if it is too long.

    Raises:
        UserError: the wavelet does not exist.
    """
    if wavelet not in pywt.wavelist(kind="discrete"):
        raise unknown("wavelet", wavelet, pywt.wavelist(kind="discrete"))
    return min(pywt.dwt_max_level(n, pywt.Wavelet(wavelet).dec_len) for n in grid)


def _check_level(grid: Sequence[int], what: str, wavelet: str, level: int, padding: str) -> None:
    largest = largest_level(grid, wavelet)
    if padding not in pywt.Modes.modes:
        raise unknown("padding", padding, pywt.Modes.modes)
    if not 1 <= level <= largest:
        advice = f"choose 1 to {largest}" if largest else "choose a shorter wavelet, such as haar"
        raise UserError(f"level {level} of '{wavelet}' does not fit {what}: the largest is {largest}; {advice}")


def wavelet_basis(n: int, wavelet: str, level: int, padding: str) -> tuple[Tensor, Tensor]:
    """Build the discrete wavelet transform of n samples as two matrices: content (M, n) and detail (N, n).

    Detail holds the bands of all levels, coarse to fine. An odd length is first made even by repeating the sample
    before the last, at every level: PyWavelets would pair the last sample with itself, and its Haar detail, thus
    its gradient, would vanish. Even lengths are PyWavelets' own transform. The matrices hold n^2 numbers, which
    is nothing up to some thousand classes.

    Args:
        n: how many samples, or classes.
        wavelet: a discrete wavelet that PyWavelets knows.
        level: how often content is split again, from 1.
        padding: one of PyWavelets' signal extension modes.

    Raises:
        UserError: the wavelet or the padding does not exist, or the level does not fit.
    """
    _check_level((n,), f"{n} classes", wavelet, level, padding)
    content = np.eye(n)
    details: list[np.ndarray] = []
    for _ in range(level):
        if len(content) % 2:
            content = np.concatenate([content, content[-2:-1]])
        content, detail = pywt.dwt(content, wavelet, padding, axis=0)
        details.insert(0, detail)
    return torch.from_numpy(content), torch.from_numpy(np.concatenate(details))


def dwt_basis(n: int, wavelet: str, level: int, padding: str) -> list[Tensor]:
    """Build PyWavelets' transform of n samples as one matrix (2 M, n') for each level, fine to coarse.

    Each takes the n' samples, or the content of the level before, to M numbers of content and M of detail;
    ``dwt2`` takes one basis for each axis. As matrices they know every wavelet and every padding, also where a map
    is shorter than the filter, and trace into one graph; ptwt knows five of nine paddings and breaks it.

    Args:
        n: how many samples.
        wavelet: a discrete wavelet that PyWavelets knows.
        level: how often content is split, from 1.
        padding: one of PyWavelets' signal extension modes. With odd lengths all but "reflect" and its kin pair
            the last sample with a copy of itself or with 0.

    Raises:
        UserError: the wavelet or the padding does not exist, or the level does not fit.
    """
    _check_level((n,), f"a side of {n}", wavelet, level, padding)
    basis = []
    for _ in range(level):
        basis.append(torch.from_numpy(np.concatenate(pywt.dwt(np.eye(n), wavelet, padding, axis=0))))
        n = len(basis[-1]) // 2
    return basis


def idwt_basis(n: int, wavelet: str, level: int, padding: str) -> list[Tensor]:
    """Build the inverse of ``dwt_basis`` for the same arguments: a matrix (n', 2 M) for each level, fine to coarse."""
    basis = []
    for forward in dwt_basis(n, wavelet, level, padding):
        content, detail = np.split(np.eye(len(forward)), 2)
        whole = pywt.idwt(content, detail, wavelet, padding, axis=0)
        basis.append(torch.from_numpy(whole[: forward.shape[1]]))
    return basis


def dwt2(maps: Tensor, rows: Sequence[Tensor], columns: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """Transform maps (..., H, W) by wavelets: content (..., M, N), and details (..., 3, M', N') fine to coarse.

    Content is the part of low frequencies that is left.
    The three are PyWavelets' horizontal, vertical and diagonal detail; ``rows`` and ``columns`` are the
    ``dwt_basis`` of H and of W.
    """
    content, details = maps, []
    for row, column in zip(rows, columns, strict=True):
        upper, lower = separable(content, row, column).chunk(2, dim=-2)
        content, vertical = upper.chunk(2, dim=-1)
        horizontal, diagonal = lower.chunk(2, dim=-1)
        details.append(torch.stack([horizontal, vertical, diagonal], dim=-3))
    return content, details


def idwt2(content: Tensor, details: Sequence[Tensor], rows: Sequence[Tensor], columns: Sequence[Tensor]) -> Tensor:
    """Invert ``dwt2``, with the ``idwt_basis`` of H and of W: maps (..., H, W)."""
    for detail, row, column in zip(reversed(details), reversed(rows), reversed(columns), strict=True):
        horizontal, vertical, diagonal = detail.unbind(dim=-3)
        upper, lower = torch.cat([content, vertical], dim=-1), torch.cat([horizontal, diagonal], dim=-1)
        content = separable(torch.cat([upper, lower], dim=-2), row, column)
    return content


def frequency_filter(maps: Tensor, weight: Tensor, mask: Tensor) -> Tensor:
    """Mix each frequency of maps (B, I, H, W) over channels, or scale it, and mask it: (B, O, H, W).

    Args:
        weight: real and imaginary parts, (I, O, H, W, 2) to mix, or (I, H, W, 2) to scale each channel.
        mask: (H, W), unshifted, equal for each two opposite frequencies; multiplies every coefficient.
    """
    mixing = torch.view_as_complex(weight.contiguous()) * mask  # training may keep weights with channels last
    opposite = mixing.flip(-2, -1).roll((1, 1), (-2, -1)).conj()  # of the frequency with the other sign
    half = ((mixing + opposite) / 2)[..., : maps.shape[-1] // 2 + 1]  # all that the real part of the result keeps
    spectrum = torch.fft.rfft2(maps, norm="ortho")
    mixed = torch.einsum("bihw,iohw->bohw", spectrum, half) if half.ndim == 4 else spectrum * half
    return torch.fft.irfft2(mixed, maps.shape[-2:], norm="ortho")
