"""The transforms of kdzoo.spectral against scipy, PyWavelets, ptwt and numpy: size x dtype x mode, and round trips."""

import math

import numpy as np
import ptwt
import pytest
import pywt
import scipy.fft
import torch

from kdzoo import spectral
from kdzoo.connectors import Wavelets
from kdzoo.errors import UserError

GRIDS = [(1, 1), (2, 2), (4, 4), (7, 5), (8, 8), (14, 14), (5, 1), (56, 56)]
DTYPES = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 1e-5, torch.float16: 1e-5}
WAVELETS = ["haar", "db2", "db4", "sym3", "coif1", "bior2.2", "bior3.1", "rbio1.3"]
MODES = pywt.Modes.modes


def waves(*shape, dtype=torch.float64):
    """Numbers of no symmetry: the sine of a growing quadratic phase."""
    count = torch.arange(math.prod(shape), dtype=torch.float64)
    return torch.sin(0.7 + 1.3 * count + 0.01 * count**2).reshape(shape).to(dtype)


def plane_wave(side, vertical, horizontal):
    """One wave of an image, sampled on a side x side grid."""
    y, x = torch.meshgrid(*[torch.arange(side, dtype=torch.float64) / side] * 2, indexing="ij")
    return torch.cos(2 * math.pi * (vertical * y + horizontal * x))


def close(ours, reference, tolerance=1e-10):
    reference = torch.as_tensor(reference)
    assert ours.shape == reference.shape
    torch.testing.assert_close(ours.double(), reference.double(), rtol=tolerance, atol=tolerance)


def split(grid, wavelet, level, padding):
    return [spectral.dwt_basis(n, wavelet, level, padding) for n in grid]


def joined(grid, wavelet, level, padding):
    return [spectral.idwt_basis(n, wavelet, level, padding) for n in grid]


# Cosines


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("grid", GRIDS)
def test_the_cosine_transform_is_scipys_along_both_axes(grid, dtype):
    maps = waves(2, *grid, dtype=dtype)
    rows, columns = (spectral.cosine_basis(n) for n in grid)
    ours = spectral.separable(maps, rows, columns)
    assert ours.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    close(ours, scipy.fft.dctn(maps.double().numpy(), type=2, axes=(1, 2), norm="ortho"), 10 * DTYPES[dtype])
    close(
        spectral.separable(maps, rows.mT, columns.mT),
        scipy.fft.dctn(maps.double().numpy(), type=3, axes=(1, 2), norm="ortho"),
        10 * DTYPES[dtype],
    )


@pytest.mark.parametrize("n", [1, 2, 7, 67, 100, 1000])
def test_the_transposed_cosine_basis_is_its_inverse(n):
    basis = spectral.cosine_basis(n)
    close(basis @ basis.mT, torch.eye(n, dtype=torch.float64))
    samples = waves(3, n)
    close(samples @ basis.mT, scipy.fft.dct(samples.numpy(), type=2, norm="ortho"), 1e-9)
    close(samples @ basis.mT @ basis, samples)


def test_the_first_cosine_coefficient_is_the_mean_and_the_rest_are_blind_to_it():
    maps = waves(7, 5)
    rows, columns = spectral.cosine_basis(7), spectral.cosine_basis(5)
    usual, raised = spectral.separable(maps, rows, columns), spectral.separable(maps + 3, rows, columns)
    close(raised[0, 0] - usual[0, 0], torch.tensor(3 * math.sqrt(35), dtype=torch.float64))
    close(raised.flatten()[1:], usual.flatten()[1:])


# Fourier masks


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("cutoff", [-1.0, 0.0, 1.0, 2.5, 100.0])
def test_no_mask_is_empty_and_low_pass_always_holds_the_mean(grid, cutoff):
    low, high = spectral.low_pass(*grid, cutoff), spectral.high_pass(*grid, cutoff)
    assert low[0, 0]
    assert high.any()
    assert (low | high).all()


@pytest.mark.parametrize("grid", [(7, 5), (8, 8), (14, 14), (56, 56)])
def test_low_and_high_pass_share_the_map_between_them(grid):
    maps = waves(2, *grid)
    low, high = spectral.low_pass(*grid, 1.5), spectral.high_pass(*grid, 1.5)
    assert not (low & high).any()
    parts = [spectral.fourier_filter(maps, mask) for mask in (low, high)]
    close(sum(parts), maps)
    close(torch.stack([part.square().sum() for part in parts]).sum(), maps.square().sum())


@pytest.mark.parametrize("grid", [(7, 5), (8, 8), (6, 9)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_filter_is_numpys_transform_masked(grid, dtype):
    maps = waves(2, *grid, dtype=dtype)
    frequency = np.hypot(*np.meshgrid(*(np.fft.fftfreq(n) * n for n in grid), indexing="ij"))
    for cutoff in (0, 1, 2):
        spectrum = np.fft.fft2(maps.double().numpy())
        for name, keep in (("low_pass", frequency <= cutoff + 1e-9), ("high_pass", frequency > cutoff + 1e-9)):
            ours = spectral.fourier_filter(maps, getattr(spectral, name)(*grid, cutoff))
            assert ours.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
            close(ours, np.fft.ifft2(spectrum * keep).real, 10 * DTYPES[dtype])


@pytest.mark.parametrize("side", [7, 14, 28, 56])
def test_a_cutoff_means_the_same_waves_on_every_grid(side):
    slow, fast = plane_wave(side, 1, 1), plane_wave(side, 0, 3)
    low = spectral.fourier_filter(slow + fast, spectral.low_pass(side, side, 2.0))
    high = spectral.fourier_filter(slow + fast, spectral.high_pass(side, side, 2.0))
    close(low, slow)
    close(high, fast)
    relative = spectral.fourier_filter(slow + fast, spectral.disk(side, side, 2 / 3.5))
    assert side == 7 or not torch.allclose(relative, slow)  # a radius in shares of the grid's own is no such thing


# Spectra


@pytest.mark.parametrize("grid", GRIDS)
def test_band_energies_sum_to_the_mean_of_squares(grid):
    maps = waves(2, 3, *grid)
    for edges in ((), (0.0,), (1.0, 2.5)):
        energies = spectral.spectral_power(maps, spectral.band_basis(grid, edges))
        assert energies.shape == (2, 3, len(edges) + 1)
        close(energies.sum(dim=-1), maps.square().mean(dim=(-2, -1)))


@pytest.mark.parametrize("grid", GRIDS)
def test_the_radial_spectrum_is_numpys_averaged_over_rings(grid):
    maps = waves(2, *grid)
    power = np.abs(np.fft.fft2(maps.numpy(), norm="forward")) ** 2
    rings = np.round(np.hypot(*np.meshgrid(*(np.fft.fftfreq(n) * n for n in grid), indexing="ij")))
    reference = np.stack([power[:, rings == ring].mean(axis=1) for ring in range(int(rings.max()) + 1)], axis=1)
    close(spectral.spectral_power(maps, spectral.radial_basis(grid)), reference)


@pytest.mark.parametrize("side", [8, 14, 56])
def test_a_wave_has_its_energy_in_its_band_on_every_grid(side):
    bands = spectral.spectral_power(plane_wave(side, 3, 0), spectral.band_basis((side, side), (0, 2, 3)))
    close(bands, torch.tensor([0, 0, 0.5, 0], dtype=torch.float64))


def test_spectra_are_blind_to_circular_shifts():
    maps, basis = waves(7, 5), spectral.radial_basis((7, 5))
    close(spectral.spectral_power(maps.roll((2, 3), (0, 1)), basis), spectral.spectral_power(maps, basis))
    assert not torch.allclose(spectral.spectral_power(maps.flip(0) * maps, basis), spectral.spectral_power(maps, basis))


def test_edges_that_do_not_rise_are_refused():
    with pytest.raises(UserError, match="sort them"):
        spectral.band_basis((8, 8), (2.0, 1.0))


# Wavelets


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("wavelet", WAVELETS)
@pytest.mark.parametrize("grid", [(2, 2), (7, 5), (8, 8), (14, 9), (28, 28), (100, 21)])
def test_the_wavelet_transform_of_maps_is_pywavelets_and_comes_back(grid, wavelet, mode):
    for level in range(1, spectral.largest_level(grid, wavelet) + 1):
        maps = waves(2, 3, *grid)
        content, details = spectral.dwt2(maps, *split(grid, wavelet, level, mode))
        first, *rest = pywt.wavedec2(maps.numpy(), wavelet, mode, level)
        close(content, first)
        for ours, theirs in zip(reversed(details), rest, strict=True):
            close(ours, np.stack(theirs, axis=-3))
        close(spectral.idwt2(content, details, *joined(grid, wavelet, level, mode)), maps)


@pytest.mark.parametrize("wavelet", pywt.wavelist(kind="discrete"))
def test_every_discrete_wavelet_is_there(wavelet):
    n = 2 * pywt.Wavelet(wavelet).dec_len
    maps = waves(n, n)
    content, (detail,) = spectral.dwt2(maps, *split((n, n), wavelet, 1, "reflect"))
    first, details = pywt.dwt2(maps.numpy(), wavelet, "reflect")
    close(content, first)
    close(detail, np.stack(details))


@pytest.mark.parametrize("mode", ["zero", "constant", "symmetric", "reflect", "periodic"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("grid", "level"), [((14, 9), 1), ((33, 28), 3)])
def test_where_ptwt_knows_the_mode_it_agrees(grid, level, mode, dtype):
    maps = waves(2, 3, *grid, dtype=dtype)
    content, details = spectral.dwt2(maps, *split(grid, "db2", level, mode))
    first, *rest = ptwt.wavedec2(maps, "db2", mode=mode, level=level)
    close(content, first, DTYPES[dtype])
    for ours, theirs in zip(reversed(details), rest, strict=True):
        close(ours, torch.stack(tuple(theirs), dim=-3), DTYPES[dtype])


@pytest.mark.parametrize("wavelet", ["haar", "db4"])
def test_an_orthonormal_wavelet_keeps_the_energy(wavelet):
    maps = waves(2, 16, 16)
    content, (detail,) = spectral.dwt2(maps, *split((16, 16), wavelet, 1, "periodization"))
    close(content.square().sum() + detail.square().sum(), maps.square().sum())
    content, (detail,) = spectral.dwt2(maps, *split((16, 16), "bior2.2", 1, "periodization"))
    assert abs(content.square().sum() + detail.square().sum() - maps.square().sum()) > 1e-3  # which is no such one


@pytest.mark.parametrize(("grid", "level"), [((7, 5), 2), ((8, 8), 1), ((1, 1), 0), ((8, 8), 0)])
def test_the_wavelet_module_is_the_transform_with_its_matrices_kept(grid, level):
    maps, module = waves(2, 3, *grid, dtype=torch.float32), Wavelets(grid, "haar", level, "reflect")
    content, details = module(maps)
    assert len(details) == level
    first, rest = spectral.dwt2(maps, *split(grid, "haar", level, "reflect")) if level else (maps, [])
    for ours, theirs in zip([content, *details], [first, *rest], strict=True):
        close(ours, theirs, 1e-5)
    close(module.inverse(content, details), maps, 1e-5)
    assert module(maps.bfloat16())[0].dtype == torch.float32
    assert not module.state_dict()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_transformed_in_float32(dtype):
    maps = waves(2, 3, 8, 8, dtype=dtype)
    rows, columns = split((8, 8), "db2", 1, "reflect")
    content, details = spectral.dwt2(maps, rows, columns)
    exact = spectral.dwt2(maps.double(), rows, columns)
    close(content, exact[0], 1e-5)
    close(details[0], exact[1][0], 1e-5)
    power = spectral.spectral_power(maps, spectral.radial_basis((8, 8)))
    back = spectral.idwt2(
        content.to(dtype), [detail.to(dtype) for detail in details], *joined((8, 8), "db2", 1, "reflect")
    )
    assert {t.dtype for t in (content, *details, power, back)} == {torch.float32}


def test_the_last_of_an_odd_number_of_samples_has_detail_under_reflection_alone():
    last = torch.zeros(5, dtype=torch.float64)
    last[-1] = 1
    for mode, found in (("reflect", True), ("symmetric", False), ("periodization", False)):
        (basis,) = spectral.dwt_basis(5, "haar", 1, mode)
        _, detail = (basis @ last).chunk(2)
        assert bool(detail.abs().sum() > 1e-6) == found


def test_a_wavelet_that_does_not_exist_is_named_with_its_neighbours():
    for ask in (lambda: spectral.dwt_basis(8, "harr", 1, "zero"), lambda: spectral.largest_level((8, 8), "harr")):
        with pytest.raises(UserError, match=r"unknown wavelet 'harr'; did you mean haar"):
            ask()
    with pytest.raises(UserError, match="did you mean periodic"):
        spectral.idwt_basis(8, "haar", 1, "periodicly")


def test_a_level_too_deep_is_refused_with_the_largest_that_fits():
    with pytest.raises(UserError, match="level 3 of 'haar' does not fit a side of 7: the largest is 2; choose 1 to 2"):
        spectral.dwt_basis(7, "haar", 3, "zero")
    with pytest.raises(UserError, match="choose a shorter wavelet"):
        spectral.dwt_basis(4, "db4", 1, "zero")
    assert [spectral.largest_level(grid, "haar") for grid in ((1, 8), (7, 5), (56, 56))] == [0, 2, 5]


# Gradients and graphs


def transforms(grid):
    rows, columns = (spectral.cosine_basis(n) for n in grid)
    wavelet = split(grid, "db2", 1, "reflect")
    inverse = joined(grid, "db2", 1, "reflect")
    mask, rings = spectral.high_pass(*grid, 1.0), spectral.radial_basis(grid)

    def wavelets(maps):
        content, details = spectral.dwt2(maps, *wavelet)
        return spectral.idwt2(content.sin(), details, *inverse)

    return {
        "cosine": lambda maps: spectral.separable(maps, rows, columns),
        "filter": lambda maps: spectral.fourier_filter(maps, mask),
        "power": lambda maps: spectral.spectral_power(maps, rings),
        "wavelets": wavelets,
    }


@pytest.mark.parametrize("name", transforms((7, 6)))
def test_gradients_are_those_of_finite_differences(name):
    assert torch.autograd.gradcheck(transforms((7, 6))[name], waves(2, 7, 6).requires_grad_())


@pytest.mark.parametrize("name", transforms((7, 6)))
def test_transforms_trace_into_one_graph(name):
    transform = transforms((7, 6))[name]
    maps = waves(2, 7, 6, dtype=torch.float32)
    torch.compiler.reset()
    compiled = torch.compile(transform, fullgraph=True, backend="aot_eager")
    close(compiled(maps), transform(maps), 1e-6)


def test_ptwt_does_not_which_is_why_there_are_matrices():
    torch.compiler.reset()
    compiled = torch.compile(lambda maps: ptwt.wavedec2(maps, "db2", level=1)[0], fullgraph=True, backend="aot_eager")
    with pytest.raises(Exception, match="trace"):
        compiled(waves(2, 7, 6, dtype=torch.float32))
