"""Matching of compact spectra of features."""

import numpy as np
import pytest
import torch
from kdzoo.distillers.uhkd import UHKD, compact_map, fourier_alignment
from torch import nn

from kdzoo.connectors import Positions
from kdzoo.errors import UserError
from kdzoo.spectral import apply_basis, half_basis

SPECTRA = ("complex", "amplitude", "log_amplitude", "spatial")
ALIGNMENTS = ("fft", "learned")
NORMALISATIONS = ("image", "batch")
ODD = ((3, 7, 5), (4, 5, 7), (5, 3, 1), (6, 1, 1))


def standardised(maps, normalisation):
    """By image or over the batch, in numpy; flat."""
    flat = maps.reshape(len(maps), -1)
    axis, small = (1, 1e-5) if normalisation == "image" else (0, 1e-6)
    return (flat - flat.mean(axis, keepdims=True)) / np.sqrt(flat.var(axis, keepdims=True) + small)


def reference_map(maps, k, sigma, spectrum, normalisation):
    """The teacher's transform by numpy's FFT, as the docstring writes it."""
    whole = np.fft.fftshift(np.fft.fft2(maps, norm="forward"), axes=(-2, -1))
    top, left = (n // 2 - k // 2 for n in maps.shape[-2:])
    v, h = np.mgrid[-(k // 2) : k // 2 + 1, -(k // 2) : k // 2 + 1] / max(k // 2, 1)
    crop = whole[..., top : top + k, left : left + k] * np.exp(-(v**2 + h**2) / (2 * sigma**2))
    if spectrum == "complex":
        return standardised(np.stack([crop.real, crop.imag], axis=2), normalisation)
    return standardised(np.log1p(np.abs(crop)) if spectrum == "log_amplitude" else np.abs(crop), normalisation)


@pytest.mark.parametrize("normalisation", NORMALISATIONS)
@pytest.mark.parametrize("spectrum", ["log_amplitude", "amplitude", "complex"])
@pytest.mark.parametrize("grid", [(8, 8), (7, 5), (1, 1)])
def test_the_transform_is_a_weighed_crop_of_the_fft_then_normalised(waves, spectrum, grid, normalisation):
    maps = waves(3, 4, *grid, dtype=torch.float64)
    k = min(5, *grid)
    seen = compact_map(apply_basis(maps, half_basis(grid, k, 0.5)), spectrum, normalisation)
    expected = reference_map(maps.numpy(), k, 0.5, spectrum, normalisation)
    np.testing.assert_allclose(seen.flatten(1).numpy(), expected, rtol=1e-6, atol=1e-9)


def on_common_grid(student, teacher, stage):
    """The student's map, averaged to the coarsest grid that holds what is compared."""
    s, t = student.features[stage], teacher.features[stage]
    return nn.functional.adaptive_avg_pool2d(
        s, tuple(min(*sides, 8) for sides in zip(s.shape[2:], t.shape[2:], strict=True))
    )


def test_a_finer_student_is_aligned_on_the_teachers_grid(teacher, data):
    finer = teacher._replace(
        features=tuple(f.repeat_interleave(4, 2).repeat_interleave(4, 3) for f in teacher.features)
    )
    torch.manual_seed(0)
    one = UHKD().assemble(teacher, teacher, data()).eval()
    torch.manual_seed(0)
    other = UHKD().assemble(finer, teacher, data()).eval()
    for a, b, f, g in zip(one.alignments, other.alignments, teacher.features, finer.features, strict=True):
        torch.testing.assert_close(a(f), b(g), rtol=1e-4, atol=1e-5)


def test_the_term_is_the_weighed_error_between_aligned_and_transformed_stages(student, teacher, data, batch):
    weights = (0.5, 0.3, 0.2)
    method = UHKD(spectral=2.0, stages=(0, 2, 3), stage_weights=weights).assemble(student, teacher, data()).eval()
    expected = 0.0
    for n, (stage, k) in enumerate(((0, 7), (2, 3), (3, 1))):  # 7 fits a side of 8, 3 one of 4, 1 one of 2
        _, (mix, norm, gelu, depthwise, norm2, _, last) = method.alignments[n]
        hidden = norm2(depthwise(gelu(norm(mix(on_common_grid(student, teacher, stage))))))
        whole = torch.einsum("oc,bchw->bohw", last.weight[:, :, 0], hidden)  # here before the transform
        maps = [f.detach().double().numpy() for f in (whole, teacher.features[stage])]
        z_s, z_t = (reference_map(m, k, 0.5, "complex", "image") for m in maps)
        expected += 2.0 * weights[n] * np.mean((z_s - z_t) ** 2)
    assert method.loss(student, teacher, batch())["spectral"].item() == pytest.approx(expected, rel=1e-4)


def test_stages_share_one_weight_equally_unless_told_otherwise(student, teacher, data):
    assert UHKD(stages=(1, 3)).assemble(student, teacher, data()).stage_weights == (0.5, 0.5)


def test_the_control_pools_where_the_others_transform(student, teacher, data, batch):
    method = UHKD(spectrum="spatial", stages=(2,)).assemble(student, teacher, data()).eval()
    _, (mix, norm, gelu, depthwise, norm2, _, last) = method.alignments[0]
    seen = on_common_grid(student, teacher, 2)
    whole = last(norm2(depthwise(gelu(norm(mix(seen))))).flatten(2)).unflatten(2, seen.shape[2:])
    pooled = (nn.functional.adaptive_avg_pool2d(f, 3) for f in (whole, teacher.features[2]))
    z_s, z_t = (standardised(p.detach().double().numpy(), "image") for p in pooled)
    term = method.loss(student, teacher, batch())["spectral"]
    assert term.item() == pytest.approx(np.mean((z_s - z_t) ** 2), rel=1e-4)


def test_control_and_method_have_equally_many_parameters(student, teacher, data):
    sizes = {
        s: sum(p.numel() for p in UHKD(spectrum=s).assemble(student, teacher, data()).parameters()) for s in SPECTRA
    }
    assert len(set(sizes.values())) == 1


def test_amplitudes_of_the_teacher_are_blind_to_its_circular_shifts(student, teacher, data, batch):
    moved = teacher._replace(features=tuple(f.roll((2, 3), (2, 3)) for f in teacher.features))
    for spectrum in SPECTRA:
        method = UHKD(spectrum=spectrum).assemble(student, teacher, data()).eval()
        here, there = (method.loss(student, t, batch())["spectral"].item() for t in (teacher, moved))
        assert (here == pytest.approx(there, rel=1e-4)) is ("amplitude" in spectrum)


def test_the_alignment_does_not_commute_with_the_transform_for_its_nonlinearity(waves):
    maps = waves(4, 3, 6, 6)
    align = fourier_alignment(3, 5, Positions(half_basis((6, 6), 3, 0.5))).eval()
    linear = nn.Sequential(*(module for module in align if not isinstance(module, nn.GELU)))
    for module, additive in ((align, False), (linear, True)):
        with torch.no_grad():
            both, parts = module(maps + maps.flip(0)), module(maps) + module(maps.flip(0))
        assert torch.allclose(both, parts, rtol=1e-3, atol=1e-5) is additive


def test_all_that_trains_gets_a_gradient(student, teacher, data, batch):
    for alignment in ALIGNMENTS:
        method = UHKD(kd=0, alignment=alignment).assemble(student, teacher, data())
        method.loss(student, teacher, batch())["spectral"].backward()
        assert all(f.grad.abs().sum() > 0 for f in student.features)
        assert all(p.grad is not None for p in method.parameters())


@pytest.mark.parametrize("normalisation", NORMALISATIONS)
@pytest.mark.parametrize("alignment", ALIGNMENTS)
@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("constant", [None, 0.0, 1.0])
def test_terms_and_gradients_are_finite_for_any_grids_zeros_and_constants(
    output, data, batch, spectrum, alignment, normalisation, constant
):
    student, teacher = output(ODD, constant=constant), output(((5, 3, 8),) * 4, constant=constant)
    keywords = {"spectrum": spectrum, "alignment": alignment, "normalisation": normalisation}
    method = UHKD(**keywords).assemble(student, teacher, data())
    terms = method.loss(student, teacher, batch())
    sum(terms.values()).backward()
    assert all(term.isfinite() for term in terms.values())
    gradients = [f.grad for f in student.features] + [p.grad for p in method.parameters()]
    assert all(g.isfinite().all() for g in gradients)


@pytest.mark.parametrize("spectrum", ["log_amplitude", "complex"])
def test_gradients_of_the_transform_are_those_of_the_values(waves, spectrum):
    maps, basis = waves(2, 2, 4, 3, dtype=torch.float64), half_basis((4, 3), 3, 0.5)
    assert torch.autograd.gradcheck(lambda f: compact_map(apply_basis(f, basis), spectrum), (maps.requires_grad_(),))


def test_over_the_batch_what_all_images_have_in_common_counts_for_nothing(student, teacher, data, batch):
    torch.manual_seed(0)
    method = UHKD(spectrum="spatial", normalisation="batch").assemble(student, teacher, data())
    shifted = teacher._replace(features=tuple(f.detach() + f.detach()[:1] for f in teacher.features))
    seen = [method.loss(student, other, batch())["spectral"].detach() for other in (teacher, shifted)]
    torch.testing.assert_close(*seen)
    by_image = UHKD(spectrum="spatial").assemble(student, teacher, data())
    seen = [by_image.loss(student, other, batch())["spectral"].detach() for other in (teacher, shifted)]
    assert not torch.isclose(*seen)


def test_a_weight_of_zero_leaves_its_term_and_its_modules_out(student, teacher, data, batch):
    method = UHKD(spectral=0).assemble(student, teacher, data())
    assert method.loss(student, teacher, batch()).keys() == {"ce", "kd"}
    assert not list(method.parameters())
    assert not method.needs.features
    assert UHKD().assemble(student, teacher, data()).needs.features
    assert UHKD(ce=0, kd=0).assemble(student, teacher, data()).loss(student, teacher, batch()).keys() == {"spectral"}


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"temperature": 0}, "temperature=0: expected"),
        ({"sigma": 0}, "sigma=0: expected"),
        ({"size": 6}, "size=6: expected an odd number"),
        ({"spectrum": "amplitudes"}, "did you mean amplitude"),
        ({"alignment": "learnt"}, "did you mean learned"),
        ({"normalisation": "images"}, "did you mean image"),
        ({"stages": ()}, "expected distinct numbers from 0 to 3"),
        ({"stages": (1, 1)}, "expected distinct numbers from 0 to 3"),
        ({"stage_weights": (1.0,)}, "give one for each stage"),
    ],
)
def test_a_bad_keyword_is_the_users_error_in_one_line(student, teacher, data, keywords, message):
    with pytest.raises(UserError, match=message) as error:
        UHKD(**keywords).assemble(student, teacher, data())
    assert "\n" not in str(error.value)
