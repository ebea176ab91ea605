"""Matching of the spectra of attention maps."""

import numpy as np
import pytest
import scipy.fft
import torch
from kdzoo.distillers.dctat import DCTAT, attention_spectrum, spectrum_distance, unit_range

from kdzoo.errors import UserError
from kdzoo.spectral import cosine_basis

ALIKE = ((4, 8, 8), (5, 7, 5), (6, 4, 4), (7, 2, 3))


def to_range(maps):
    low, high = (f(maps, axis=(1, 2), keepdims=True) for f in (np.min, np.max))
    return (maps - low) / (high - low)


def reference(features, transform):
    """The spectrum of the attention of features (B, C, H, W), by numpy and scipy."""
    maps = to_range((features**2).mean(axis=1))
    maps = maps - maps.mean(axis=(1, 2), keepdims=True)
    spectrum = np.fft.fft2(maps).real if transform == "fft" else scipy.fft.dctn(maps, axes=(1, 2), norm="ortho")
    return to_range(spectrum)


def bases(grid, transform):
    return tuple(cosine_basis(n) for n in grid) if transform == "dct" else None


@pytest.mark.parametrize("transform", ["fft", "dct"])
@pytest.mark.parametrize("grid", [(8, 8), (7, 5), (2, 3)])
def test_the_spectrum_is_numpys_between_two_ranges(waves, grid, transform):
    features = waves(3, 4, *grid, dtype=torch.float64)
    seen = attention_spectrum(features.square().mean(dim=1), bases(grid, transform))
    np.testing.assert_allclose(seen.numpy(), reference(features.numpy(), transform), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("transform", ["fft", "dct"])
def test_the_term_is_a_sum_over_stages_and_a_mean_over_the_images_the_teacher_knows(output, data, batch, transform):
    student, teacher = output(ALIKE), output(ALIKE, phase=1.0)
    right = teacher.logits.argmax(dim=1)
    labels = torch.where(torch.arange(6) < 4, right, (right + 1) % 10)  # it is wrong of the last two
    given = batch()._replace(labels=labels)
    distances = np.zeros(6)
    for f_s, f_t in zip(student.features, teacher.features, strict=True):
        d_s, d_t = (reference(f.detach().double().numpy(), transform) for f in (f_s, f_t))
        distances += np.sqrt(((d_s - d_t) ** 2).sum(axis=(1, 2)))
    for guided, expected in ((True, distances[:4].sum() / 6), (False, distances.mean())):
        method = DCTAT(dct=2.0, transform=transform, guided=guided).assemble(student, teacher, data())
        assert method.loss(student, teacher, given)["dct"].item() == pytest.approx(2 * expected, rel=1e-4)


def test_a_teacher_that_is_always_wrong_teaches_nothing(student, teacher, data, batch):
    given = batch()._replace(labels=(teacher.logits.argmax(dim=1) + 1) % 10)
    loss = DCTAT().assemble(student, teacher, data()).loss(student, teacher, given)["dct"]
    loss.backward()
    assert loss.item() == 0
    assert all(not f.grad.any() for f in student.features)


def test_it_is_blind_to_the_scale_of_features_and_the_order_of_channels_but_not_to_a_shift(waves):
    features = waves(2, 4, 7, 5)
    usual = attention_spectrum(features.square().mean(dim=1))
    for same in (features * 7, -features, features.flip(1)):
        torch.testing.assert_close(attention_spectrum(same.square().mean(dim=1)), usual, rtol=1e-4, atol=1e-5)
    moved = attention_spectrum(features.roll(1, 2).square().mean(dim=1))
    assert not torch.allclose(moved, usual, atol=1e-2)


@pytest.mark.parametrize("value", [0.0, 1.0, 1e4])
@pytest.mark.parametrize("transform", ["fft", "dct"])
def test_constant_maps_have_no_spectrum_and_finite_gradients(value, transform):
    attention = torch.full((2, 7, 5), value, requires_grad=True)
    spectrum = attention_spectrum(attention, bases((7, 5), transform))
    spectrum_distance(spectrum, torch.linspace(0, 1, 35).reshape(1, 7, 5)).sum().backward()
    assert not spectrum.any()
    assert attention.grad.isfinite().all()
    with np.errstate(invalid="ignore"):
        assert np.isnan(to_range(np.full((2, 7, 5), value))).all()  # what the authors' code would do


def test_rounding_does_not_pass_for_structure(waves):
    noise = 1 + 1e-7 * waves(1, 4, 4)
    assert not unit_range(noise).any()
    assert unit_range(1 + 1e-4 * waves(1, 4, 4)).amax() == 1


def test_equal_spectra_have_no_gradient(waves):
    spectrum = waves(2, 4, 4).requires_grad_()
    distance = spectrum_distance(spectrum, spectrum.detach())
    distance.sum().backward()
    assert distance.max() < 1e-6
    assert not spectrum.grad.any()


@pytest.mark.parametrize("transform", ["fft", "dct"])
def test_gradients_of_the_spectrum_are_those_of_finite_differences(waves, transform):
    attention = waves(2, 4, 3, dtype=torch.float64).square().requires_grad_()
    assert torch.autograd.gradcheck(lambda maps: attention_spectrum(maps, bases((4, 3), transform)), attention)


def test_the_finer_grid_is_averaged_after_squaring(student, teacher, data, batch):
    given = batch()._replace(labels=teacher.logits.argmax(dim=1))
    method = DCTAT(stages=(0,)).assemble(student, teacher, data())
    pooled = torch.nn.functional.adaptive_avg_pool2d(student.features[0].square().mean(dim=1, keepdim=True), 7)
    d_s = reference(pooled.sqrt().detach().double().numpy(), "fft")
    d_t = reference(teacher.features[0].detach().double().numpy(), "fft")
    expected = np.sqrt(((d_s - d_t) ** 2).sum(axis=(1, 2))).mean()
    assert method.loss(student, teacher, given)["dct"].item() == pytest.approx(expected, rel=1e-4)


def test_there_is_no_module_to_train_and_every_stage_of_the_student_gets_a_gradient(student, teacher, data, batch):
    method = DCTAT(guided=False).assemble(student, teacher, data())
    assert not list(method.parameters())
    method.loss(student, teacher, batch())["dct"].backward()
    assert all(f.grad.abs().sum() > 0 for f in student.features)


def test_an_unknown_transform_is_refused(student, teacher, data):
    with pytest.raises(UserError, match="did you mean dct"):
        DCTAT(transform="dtc").assemble(student, teacher, data())
    with pytest.raises(UserError, match="temperature=0"):
        DCTAT(temperature=0).assemble(student, teacher, data())
