"""Matching of the Fourier spectra of stages."""

import numpy as np
import pytest
import torch
from kdzoo.distillers.spectralkd import SpectralKD, spectrum_mse
from torch import nn

from kdzoo.errors import UserError

GRIDS = ((6, 8, 8), (6, 7, 5), (5, 4, 4), (3, 1, 1))


def reference(student, teacher):
    """The authors' loss of one stage by numpy."""
    s, t = (np.fft.rfft2(maps, norm="ortho") for maps in (student, teacher))
    return np.mean(np.stack([s.real - t.real, s.imag - t.imag]) ** 2)


@pytest.mark.parametrize("grid", [(8, 8), (7, 5), (5, 7), (1, 1)])
def test_the_error_is_that_of_real_and_imaginary_parts(waves, grid):
    student, teacher = waves(3, 4, *grid, dtype=torch.float64), waves(3, 4, *grid, phase=1.0, dtype=torch.float64)
    expected = reference(student.numpy(), teacher.numpy())
    assert spectrum_mse(student, teacher).item() == pytest.approx(expected, rel=1e-6)


def test_the_full_spectrum_would_give_half_the_error_of_the_maps(waves):
    student, teacher = waves(3, 4, 7, 5, dtype=torch.float64), waves(3, 4, 7, 5, phase=1.0, dtype=torch.float64)
    whole = np.fft.fft2((student - teacher).numpy(), norm="ortho")
    error = np.mean(np.stack([whole.real, whole.imag]) ** 2)
    assert error == pytest.approx((student - teacher).square().mean().item() / 2, rel=1e-10)
    assert spectrum_mse(student, teacher).item() != pytest.approx(error, rel=1e-3)


def test_waves_without_a_horizontal_part_weigh_twice_as_much():
    steps = torch.arange(8, dtype=torch.float64) * 2 * torch.pi / 8
    vertical, horizontal = steps.cos()[:, None].expand(1, 1, 8, 8), steps.cos().expand(1, 1, 8, 8)
    errors = [spectrum_mse(wave, torch.zeros_like(wave)) for wave in (vertical, horizontal)]
    assert (errors[0] / errors[1]).item() == pytest.approx(2.0)


def test_the_wider_teacher_is_averaged_over_neighbouring_channels(output, data, batch):
    student = output(GRIDS)
    teacher = output(tuple((2 * c + 1, h, w) for c, h, w in GRIDS), phase=1.0)
    expected = []
    for f_s, f_t in zip(student.features, teacher.features, strict=True):
        pooled = nn.functional.adaptive_avg_pool3d(f_t, (f_s.shape[1], None, None))  # as the authors do
        expected.append(reference(f_s.detach().double().numpy(), pooled.detach().double().numpy()))
    term = SpectralKD(spectral=2.0).assemble(student, teacher, data()).loss(student, teacher, batch())["spectral"]
    assert term.item() == pytest.approx(2 * np.mean(expected), rel=1e-5)
    method = SpectralKD().assemble(teacher, student, data())  # and so is a student
    term = method.loss(teacher, student, batch())["spectral"]
    assert term.item() == pytest.approx(0.2 * np.mean(expected), rel=1e-5)


def test_the_finer_grid_is_averaged_to_the_coarser(student, teacher, data, batch):
    method = SpectralKD(stages=(0,)).assemble(student, teacher, data())
    f_s = nn.functional.adaptive_avg_pool2d(student.features[0], 7)
    f_t = nn.functional.adaptive_avg_pool3d(teacher.features[0], (4, None, None))
    expected = reference(f_s.detach().double().numpy(), f_t.detach().double().numpy())
    assert method.loss(student, teacher, batch())["spectral"].item() == pytest.approx(0.2 * expected, rel=1e-5)


def test_it_is_blind_to_a_shift_of_both_maps_but_not_of_one(waves):
    student, teacher = waves(2, 3, 8, 8), waves(2, 3, 8, 8, phase=1.0)
    usual = spectrum_mse(student, teacher).item()
    moved = [maps.roll((2, 3), (2, 3)) for maps in (student, teacher)]
    assert spectrum_mse(*moved).item() == pytest.approx(usual, rel=1e-5)
    assert spectrum_mse(student, moved[1]).item() != pytest.approx(usual, rel=1e-2)


def test_there_is_no_module_to_train_and_every_stage_of_the_student_gets_a_gradient(student, teacher, data, batch):
    method = SpectralKD().assemble(student, teacher, data())
    assert not list(method.parameters())
    sum(method.loss(student, teacher, batch()).values()).backward()
    assert all(f.grad.abs().sum() > 0 for f in student.features)


def test_without_the_term_no_features_are_asked_for(student, teacher, data, batch):
    method = SpectralKD(spectral=0).assemble(student, teacher, data())
    assert not method.needs.features
    assert set(method.loss(student._replace(features=()), teacher._replace(features=()), batch())) == {"ce", "kd"}


def test_a_temperature_of_nothing_is_refused(student, teacher, data):
    with pytest.raises(UserError, match="temperature=0"):
        SpectralKD(temperature=0).assemble(student, teacher, data())
