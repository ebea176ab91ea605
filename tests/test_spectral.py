"""The transforms against numpy and PyWavelets in float64, and what mathematics promises of them."""

import numpy as np
import pytest
import pywt
import torch
from torch import Tensor
from torch.nn import functional as F

from kdzoo.errors import UserError
from kdzoo.spectral import (
    amplitude,
    apply_basis,
    disk,
    fourier_basis,
    fourier_filter,
    half_basis,
    mirrored,
    pooling_basis,
    radius,
    wavelet_basis,
    whole_spectrum,
)

GRIDS = [(8, 8), (7, 5), (1, 1), (4, 9), (32, 32)]


def waves(*shape: int, phase: float = 0.0) -> Tensor:
    """Numbers of size 1 by a closed form, without a pattern along any axis."""
    t = torch.arange(int(np.prod(shape)), dtype=torch.float64)
    return (torch.sin(1.7 * t + phase) + torch.cos(0.61 * t * t.sqrt() - phase)).reshape(shape)


def cropped_fft(maps: Tensor, size: int) -> np.ndarray:
    """The centred crop of a shifted FFT, in numpy."""
    whole = np.fft.fftshift(np.fft.fft2(maps.numpy(), norm="forward"), axes=(-2, -1))
    (top, left) = (n // 2 - size // 2 for n in maps.shape[-2:])
    return whole[..., top : top + size, left : left + size]


def coefficients(maps: Tensor, size: int) -> Tensor:
    """Complex low frequencies (..., size * size) of maps (..., H, W)."""
    real, imaginary = apply_basis(maps, fourier_basis(maps.shape[-2:], size)).chunk(2, dim=-1)
    return torch.complex(real, imaginary)


# Fourier


@pytest.mark.parametrize(
    ("grid", "size"), [(grid, size) for grid in GRIDS for size in (1, 3, 4, 7) if size <= min(grid)]
)
def test_low_frequencies_are_the_centred_crop_of_the_fft(grid, size):
    maps = waves(2, 3, *grid)
    expected = cropped_fft(maps, size).reshape(2, 3, -1)
    np.testing.assert_allclose(coefficients(maps, size).numpy(), expected, rtol=1e-6, atol=1e-12)
    single = coefficients(maps.float(), size)
    np.testing.assert_allclose(single.numpy(), expected, rtol=1e-5, atol=1e-6)


def test_a_gaussian_weighs_frequencies_by_their_radius():
    maps = waves(1, 9, 8)
    vertical, horizontal = np.mgrid[-2:3, -2:3]
    weight = np.exp(-(vertical**2 + horizontal**2) / 4 / (2 * 0.5**2))
    expected = (cropped_fft(maps, 5) * weight).reshape(1, -1)
    weighed = apply_basis(maps, fourier_basis((9, 8), 5, sigma=0.5))
    np.testing.assert_allclose(weighed[:, :25].numpy(), expected.real, rtol=1e-6, atol=1e-12)
    np.testing.assert_allclose(weighed[:, 25:].numpy(), expected.imag, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("grid", [(7, 7), (8, 8), (5, 5)])
def test_orthonormal_full_spectrum_error_is_the_spatial_error(grid):
    student, teacher = waves(4, *grid), waves(4, *grid, phase=1.0)
    cells = grid[0] * grid[1]
    difference = coefficients(student, grid[0]) - coefficients(teacher, grid[0])
    spectral = (difference.abs().square() * cells).mean()  # norm="ortho" is sqrt(H W) times norm="forward"
    torch.testing.assert_close(spectral, F.mse_loss(student, teacher))
    cropped = (coefficients(student, 3) - coefficients(teacher, 3)).abs().square() * cells
    assert not torch.isclose(cropped.sum() / difference.numel(), spectral, rtol=1e-2)


def test_a_convolution_over_channels_commutes_with_the_transform_and_a_nonlinearity_does_not():
    maps, basis, mix = waves(2, 3, 6, 5), fourier_basis((6, 5), 3), waves(4, 3)
    before = apply_basis(torch.einsum("oc,bchw->bohw", mix, maps), basis)
    after = torch.einsum("oc,bcn->bon", mix, apply_basis(maps, basis))
    torch.testing.assert_close(before, after)
    assert not torch.allclose(apply_basis(F.gelu(maps), basis), F.gelu(apply_basis(maps, basis)), rtol=0.1)


def test_amplitudes_are_blind_to_circular_shifts_and_coefficients_are_not():
    maps = waves(2, 8, 7)
    moved = maps.roll((3, 2), dims=(-2, -1))
    torch.testing.assert_close(coefficients(maps, 7).abs(), coefficients(moved, 7).abs())
    assert not torch.allclose(coefficients(maps, 7), coefficients(moved, 7), rtol=0.1)
    cut = F.pad(maps, (2, -2, 3, -3))  # shifted, but what leaves on one side does not come back on the other
    assert not torch.allclose(coefficients(maps, 7).abs(), coefficients(cut, 7).abs(), rtol=0.1)


def test_forward_norm_amplitudes_agree_across_grids_and_orthonormal_ones_do_not():
    y, x = torch.meshgrid(torch.arange(56.0) / 56, torch.arange(56.0) / 56, indexing="ij")
    fine = (2 + torch.sin(6.28 * (x + 2 * y)) + 0.5 * torch.cos(6.28 * (2 * x - y) + 1)).double()
    coarse = F.avg_pool2d(fine[None], 4)[0]
    large, small = (coefficients(maps, 5).abs() for maps in (fine, coarse))
    assert (large - small).norm() / large.norm() < 0.05
    assert (large * 56 - small * 14).norm() / (large * 56).norm() > 0.7


def test_the_logarithm_lowers_the_share_of_the_mean_in_the_loss():
    student, teacher = waves(4, 8, 8).relu() * 8, waves(4, 8, 8, phase=1.0).relu() * 9
    raw = (coefficients(student, 7).abs() - coefficients(teacher, 7).abs()).square().sum(0)
    logs = (coefficients(student, 7).abs().log1p() - coefficients(teacher, 7).abs().log1p()).square().sum(0)
    dc = 24  # the centre of 7 x 7
    assert logs[dc] / logs.sum() < 0.5 * raw[dc] / raw.sum()


@pytest.mark.parametrize(("size", "symmetric"), [(3, True), (5, True), (7, True), (4, False), (6, False)])
def test_only_odd_crops_keep_every_frequency_with_its_negative(size, symmetric):
    crop = coefficients(waves(8, 8), size)
    assert torch.allclose(crop, crop.flip(-1).conj()) is symmetric


@pytest.mark.parametrize("grid", [(8, 8), (7, 5), (1, 1)])
def test_half_of_a_real_maps_frequencies_tells_the_others(grid):
    maps, size = waves(2, 3, *grid), min(5, *grid)
    whole, half = (apply_basis(maps, basis(grid, size, 0.5)) for basis in (fourier_basis, half_basis))
    assert half.shape[-1] == size * size + 1
    torch.testing.assert_close(whole_spectrum(half), whole)
    torch.testing.assert_close(mirrored(amplitude(half)), amplitude(whole))


def test_amplitude_has_gradient_zero_where_the_plain_root_has_none():
    at_zero = torch.zeros(2, 8, requires_grad=True)
    amplitude(at_zero).log1p().sum().backward()
    assert (at_zero.grad == 0).all()
    plain = torch.zeros(2, 8, requires_grad=True)
    plain.unflatten(-1, (2, -1)).square().sum(-2).sqrt().sum().backward()
    assert plain.grad.isnan().all()


def test_amplitude_is_the_absolute_value_with_its_gradient():
    parts = waves(3, 8).requires_grad_()
    torch.testing.assert_close(amplitude(parts), torch.complex(*parts.chunk(2, -1)).abs())
    assert torch.autograd.gradcheck(
        lambda maps: amplitude(apply_basis(maps, fourier_basis((4, 3), 3))), waves(2, 4, 3).requires_grad_()
    )


@pytest.mark.parametrize("grid", GRIDS)
def test_radius_is_relative_to_the_nyquist_rate(grid):
    vertical, horizontal = (np.fft.fftfreq(n) * 2 for n in grid)
    expected = np.hypot(vertical[:, None], horizontal)
    np.testing.assert_allclose(radius(*grid).numpy(), expected, rtol=1e-12)


@pytest.mark.parametrize("grid", GRIDS)
def test_a_disk_begins_with_the_mean_alone_and_grows_to_everything(grid):
    for cutoff in (-1.0, 0.0, 1e-6):
        mask = disk(*grid, cutoff)
        assert mask[0, 0]
        assert mask.sum() == 1
    assert disk(*grid, 2.0).all()


@pytest.mark.parametrize("grid", GRIDS)
def test_the_filter_keeps_what_lies_in_the_disk(grid):
    maps, mask = waves(2, *grid), disk(*grid, 0.5)
    expected = np.fft.ifft2(np.fft.fft2(maps.numpy()) * mask.numpy()).real
    low = fourier_filter(maps, mask)
    np.testing.assert_allclose(low.numpy(), expected, rtol=1e-6, atol=1e-12)
    torch.testing.assert_close(fourier_filter(low, mask), low)
    assert grid == (1, 1) or not torch.allclose(low, maps, rtol=0.1)


# Pooling


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("size", [(1, 1), (2, 3), (4, 4), (7, 7)])
def test_pooling_is_adaptive_average_pooling(grid, size):
    maps = waves(2, *grid)
    expected = F.adaptive_avg_pool2d(maps, size).flatten(1)
    torch.testing.assert_close(apply_basis(maps, pooling_basis(grid, size)), expected)


def test_a_blur_before_pooling_is_a_gaussian_of_rows_that_sum_to_one():
    grid, size, sigma = (8, 6), (2, 3), 0.5
    axes = []
    for n, cells in zip(grid, size, strict=True):
        kernel = np.exp(-(np.subtract.outer(np.arange(n), np.arange(n)) ** 2) / (2 * (sigma * n / cells) ** 2))
        axes.append(kernel / kernel.sum(axis=1, keepdims=True))
    blurred = axes[0] @ waves(*grid).numpy() @ axes[1].T
    expected = blurred.reshape(2, 4, 3, 2).mean(axis=(1, 3)).ravel()
    basis = pooling_basis(grid, size, blur=sigma)
    np.testing.assert_allclose(apply_basis(waves(*grid), basis).numpy(), expected, rtol=1e-6, atol=1e-12)
    torch.testing.assert_close(basis.sum(dim=1), torch.ones(6, dtype=torch.float64))
    assert not torch.allclose(basis, pooling_basis(grid, size), rtol=0.1)


# Wavelets


@pytest.mark.parametrize("n", [32, 64])
@pytest.mark.parametrize(("wavelet", "level"), [("haar", 1), ("haar", 3), ("db2", 2), ("sym4", 1), ("bior2.2", 2)])
def test_wavelet_bands_are_those_of_pywavelets(n, wavelet, level):
    content, detail = wavelet_basis(n, wavelet, level, "periodization")
    z = waves(3, n)
    expected = pywt.wavedec(z.numpy(), wavelet, mode="periodization", level=level)
    np.testing.assert_allclose((z @ content.mT).numpy(), expected[0], rtol=1e-6, atol=1e-12)
    np.testing.assert_allclose((z @ detail.mT).numpy(), np.concatenate(expected[1:], 1), rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("padding", ["zero", "constant", "symmetric", "reflect", "periodic", "smooth", "antisymmetric"])
def test_every_padding_is_that_of_pywavelets(padding):
    content, detail = wavelet_basis(30, "db2", 1, padding)
    z = waves(3, 30)
    low, high = pywt.dwt(z.numpy(), "db2", padding)
    np.testing.assert_allclose((z @ content.mT).numpy(), low, rtol=1e-6, atol=1e-12)
    np.testing.assert_allclose((z @ detail.mT).numpy(), high, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize(("wavelet", "level"), [("haar", 5), ("db2", 3), ("sym4", 2)])
def test_content_and_detail_together_are_orthonormal_where_nothing_is_padded(wavelet, level):
    whole = torch.cat(wavelet_basis(32, wavelet, level, "periodization"))
    torch.testing.assert_close(whole.mT @ whole, torch.eye(32, dtype=torch.float64), rtol=0, atol=1e-9)


@pytest.mark.parametrize("n", [3, 67, 101])
@pytest.mark.parametrize("padding", ["periodization", "symmetric", "constant"])
def test_the_last_of_an_odd_number_of_classes_has_a_detail_as_it_has_not_in_pywavelets(n, padding):
    _, detail = wavelet_basis(n, "haar", 1, padding)
    assert detail[-1].abs().max() > 0.5
    assert detail[:, -1].abs().max() > 0.5
    _, theirs = pywt.dwt(np.eye(n), "haar", padding, axis=0)
    assert not theirs[:, -1].any()


@pytest.mark.parametrize("n", [2, 10, 67, 100, 101])
def test_detail_does_not_see_a_constant_and_content_does(n):
    content, detail = wavelet_basis(n, "haar", 1, "periodization")
    assert detail.sum(dim=1).abs().max() < 1e-12
    assert content.sum(dim=1).abs().min() > 1


def test_an_unknown_wavelet_names_the_nearest():
    with pytest.raises(UserError, match="unknown wavelet 'har'; did you mean haar"):
        wavelet_basis(10, "har", 1, "periodization")


def test_an_unknown_padding_names_the_nearest():
    with pytest.raises(UserError, match="unknown padding 'symetric'; did you mean symmetric"):
        wavelet_basis(10, "haar", 1, "symetric")


@pytest.mark.parametrize(
    ("n", "wavelet", "level", "largest"), [(100, "haar", 7, 6), (10, "db4", 1, 0), (10, "haar", 0, 3)]
)
def test_a_level_that_does_not_fit_names_the_largest(n, wavelet, level, largest):
    with pytest.raises(UserError, match=f"the largest is {largest}"):
        wavelet_basis(n, wavelet, level, "periodization")
