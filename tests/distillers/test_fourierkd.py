"""Comparison of fused spectra on the Riemann sphere."""

import numpy as np
import pytest
import torch
from kdzoo.distillers.fourierkd import (
    AmplitudeFusion,
    FourierKD,
    riemann,
    spectrum_parts,
    sphere_distance,
    unlikeness,
)
from torch import nn

from kdzoo.errors import UserError

ALIKE = ((4, 8, 8), (4, 7, 5), (4, 4, 4), (4, 1, 1))


def sphere(z):
    """Complex numbers as points of the sphere."""
    square = np.abs(z) ** 2
    return np.stack([2 * z.real, 2 * z.imag, square - 1]) / (square + 1)


def reference_distance(student, teacher, weight):
    """The authors' loss by numpy, of complex spectra (B, C, H, W)."""
    total = 0.0
    for s, t in zip(sphere(student), sphere(teacher), strict=True):
        s, t = (
            (x - x.mean(axis=(0, 2, 3), keepdims=True)) / np.sqrt(x.var(axis=(0, 2, 3), keepdims=True) + 1e-5)
            for x in (s, t)
        )
        total += np.mean((s - t) ** 2 * weight) / 2
    return total


def reference_weight(student, teacher):
    s, t = (maps.reshape(*maps.shape[:2], -1) for maps in (student, teacher))
    cosine = (s * t).sum(axis=2) / (np.linalg.norm(s, axis=2) * np.linalg.norm(t, axis=2))
    return 1 - cosine[..., None, None]


def parts(z):
    return torch.from_numpy(np.stack([z.real, z.imag]))


@pytest.mark.parametrize("grid", [(8, 8), (7, 5), (1, 1)])
def test_amplitude_and_phase_are_numpys(waves, grid):
    maps = waves(2, 3, *grid, dtype=torch.float64)
    amplitude, phase = spectrum_parts(maps)
    spectrum = np.fft.fft2(maps.numpy(), norm="ortho")
    np.testing.assert_allclose(amplitude.numpy(), np.abs(spectrum), rtol=1e-6, atol=1e-12)
    np.testing.assert_allclose((amplitude * phase).numpy(), np.stack([spectrum.real, spectrum.imag]), atol=1e-12)


def test_the_sphere_has_radius_one_and_its_equator_amplitude_one(waves):
    points = riemann(waves(2, 3, 4, 5, 6, dtype=torch.float64))
    torch.testing.assert_close(points.square().sum(dim=0), torch.ones(3, 4, 5, 6, dtype=torch.float64))
    unit = torch.tensor([[0.6], [0.8]], dtype=torch.float64)
    torch.testing.assert_close(riemann(unit), torch.tensor([[0.6], [0.8], [0.0]], dtype=torch.float64))
    assert riemann(torch.zeros(2, 1))[2].item() == -1
    assert riemann(torch.full((2, 1), 1e6))[2].item() == pytest.approx(1)


def test_the_distance_is_the_authors(waves):
    spectra = [np.fft.fft2(waves(3, 4, 7, 5, phase=p, dtype=torch.float64).numpy(), norm="ortho") for p in (0, 1)]
    weight = waves(3, 4, 1, 1, dtype=torch.float64).square()
    seen = sphere_distance(*(parts(z) for z in spectra), weight)
    assert seen.item() == pytest.approx(reference_distance(*spectra, weight.numpy()), rel=1e-6)


def test_the_term_is_the_mean_over_stages_of_fused_spectra(output, data, batch):
    student, teacher = output(ALIKE), output(ALIKE, phase=1.0)
    method = FourierKD(fourier=2.0, noise=False, stages=(0, 1, 2)).assemble(student, teacher, data())
    expected = []
    for n in range(3):
        fuse = method.fusions[n]
        nn.init.constant_(fuse.share, 0.3)
        f_s, f_t = method.projectors[n](student.features[n]), teacher.features[n]
        weight = reference_weight(*(f.detach().double().numpy() for f in (f_s, f_t)))
        f_s = method.predictors[n](f_s)
        z_s, z_t = (np.fft.fft2(f.detach().double().numpy(), norm="ortho") for f in (f_s, f_t))
        a_s, a_t = (torch.from_numpy(np.abs(z)).float() for z in (z_s, z_t))
        share = 1 / (1 + np.exp(-0.3))
        amplitude = (share * fuse.student(a_s) + (1 - share) * fuse.teacher(a_t)).detach().double().numpy()
        expected.append(reference_distance(amplitude * np.exp(1j * np.angle(z_s)), z_t, weight))
    term = method.loss(student, teacher, batch())["fourier"]
    assert term.item() == pytest.approx(2 * np.mean(expected), rel=1e-3)


def test_each_image_is_weighed_by_its_own_likeness(output, data, batch):
    student, teacher = output(ALIKE), output(ALIKE, phase=1.0)
    method = FourierKD(noise=False, stages=(0,)).assemble(student, teacher, data())
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    shuffled = [o._replace(features=tuple(f[order] for f in o.features)) for o in (student, teacher)]
    usual, other = (method.loss(*pair, batch())["fourier"].item() for pair in ((student, teacher), shuffled))
    assert other == pytest.approx(usual, rel=1e-4)
    z_s, z_t = (np.fft.fft2(o.features[0].detach().double().numpy(), norm="ortho") for o in (student, teacher))
    weight = reference_weight(*(o.features[0].detach().double().numpy() for o in (student, teacher)))
    rolled = [reference_distance(np.roll(z_s, 3, 0), np.roll(z_t, 3, 0), w) for w in (weight, np.roll(weight, 3, 0))]
    assert rolled[0] != pytest.approx(rolled[1], rel=1e-3)  # the shift over all axes that the authors' code makes


def test_likeness_is_seen_by_channel_and_not_at_single_positions(waves):
    maps = waves(2, 3, 4, 4)
    assert unlikeness(maps, 2 * maps).abs().max() < 1e-6
    torch.testing.assert_close(unlikeness(maps, -maps), torch.full((2, 3, 1, 1), 2.0))
    assert (unlikeness(maps[..., :1, :1], maps[..., 1:2, :1]) == 1).all()


def test_noise_shakes_the_fused_amplitudes_alone(waves):
    phase = spectrum_parts(waves(2, 3, 4, 4))[1]
    amplitude_s, amplitude_t = waves(2, 3, 4, 4).abs(), waves(2, 3, 4, 4, phase=1.0).abs()
    shaken, still = AmplitudeFusion(3, noise=True), AmplitudeFusion(3, noise=False)
    still.load_state_dict(shaken.state_dict())
    torch.manual_seed(0)
    first, second, third = (f(amplitude_s, phase, amplitude_t) for f in (shaken, shaken, still))
    assert not torch.equal(first, second)
    ratio = first / torch.where(third == 0, 1, third)
    assert (ratio >= 0).all()
    assert (ratio <= 1.001).all()
    torch.manual_seed(0)
    assert torch.equal(shaken(amplitude_s, phase, amplitude_t), first)


@pytest.mark.parametrize("constant", [0.0, 1.0])
def test_zeros_and_constants_have_finite_gradients(output, data, batch, constant):
    student, teacher = output(ALIKE, constant=constant), output(ALIKE, constant=constant)
    method = FourierKD(stages=(0, 1, 2, 3)).assemble(student, teacher, data())
    method.loss(student, teacher, batch())["fourier"].backward()
    assert all(f.grad.isfinite().all() for f in student.features)
    assert all(p.grad.isfinite().all() for p in method.parameters())


def test_gradients_are_those_of_finite_differences(waves):
    maps, other = waves(2, 2, 4, 3, dtype=torch.float64), waves(2, 2, 4, 3, phase=1.0, dtype=torch.float64)

    def distance(student):
        amplitude, phase = spectrum_parts(student)
        return sphere_distance(phase * amplitude.exp(), torch.stack([other, other]), unlikeness(student, other))

    assert torch.autograd.gradcheck(distance, maps.requires_grad_())


def test_all_that_trains_gets_a_gradient(student, teacher, data, batch):
    method = FourierKD(stages=(0, 3)).assemble(student, teacher, data())
    method.loss(student, teacher, batch())["fourier"].backward()
    assert all(p.grad is not None and p.grad.any() for p in method.parameters())


def test_a_temperature_of_nothing_is_refused(student, teacher, data):
    with pytest.raises(UserError, match="temperature=0"):
        FourierKD(temperature=0).assemble(student, teacher, data())
