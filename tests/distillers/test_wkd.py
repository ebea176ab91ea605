"""Matching of the wavelet detail of stages."""

import numpy as np
import pytest
import pywt
import torch
from kdzoo.distillers.wkd import WKD, detail_size
from torch import nn

from kdzoo.connectors import Wavelets
from kdzoo.errors import UserError
from kdzoo.spectral import dwt2, dwt_basis

SQUARE = ((4, 16, 16), (5, 8, 8), (6, 7, 5), (7, 1, 1))


def reference(student, teacher, level, wavelet="haar", padding="reflect"):
    """The mean absolute difference of all detail of a level, summed over levels, by PyWavelets."""
    pairs = zip(*(pywt.wavedec2(m, wavelet, padding, level)[1:] for m in (student, teacher)), strict=True)
    return sum(np.mean(np.abs(np.stack(s) - np.stack(t))) for s, t in pairs)


@pytest.mark.parametrize(("grid", "level"), [((16, 16), 4), ((7, 5), 2), ((8, 8), 1), ((2, 2), 1)])
@pytest.mark.parametrize("padding", ["reflect", "symmetric", "zero"])
def test_the_distance_is_that_of_pywavelets_bands(waves, grid, level, padding):
    student, teacher = waves(2, 3, *grid, dtype=torch.float64), waves(2, 3, *grid, phase=1.0, dtype=torch.float64)
    bases = [dwt_basis(n, "haar", level, padding) for n in grid]
    distance = detail_size(dwt2(student - teacher, *bases)[1])
    expected = reference(student.numpy(), teacher.numpy(), level, padding=padding)
    assert distance.item() == pytest.approx(expected, rel=1e-6)


def test_the_term_is_the_mean_over_stages_of_what_fits_each(output, data, batch):
    student, teacher = output(SQUARE), output(tuple((3, h, w) for _, h, w in SQUARE), phase=1.0)
    method = WKD(detail=2.0).assemble(student, teacher, data())
    expected = []
    for n, level in enumerate((4, 3, 2, 0)):
        f_s = method.projectors[n](student.features[n]).detach().double().numpy()
        f_t = teacher.features[n].detach().double().numpy()
        expected.append(reference(f_s, f_t, level) if level else np.mean(np.abs(f_s - f_t)))
    term = method.loss(student, teacher, batch())["detail"]
    assert term.item() == pytest.approx(2 * np.mean(expected), rel=1e-5)


@pytest.mark.parametrize("wavelet", ["haar", "db2", "bior2.2"])
def test_other_wavelets_are_pywavelets_too(output, data, batch, wavelet):
    grids = ((3, 12, 14),)
    student, teacher = output(grids), output(grids, phase=1.0)
    method = WKD(wavelet=wavelet, levels=1, stages=(0,)).assemble(student, teacher, data())
    nn.init.dirac_(method.projectors[0].weight)
    nn.init.zeros_(method.projectors[0].bias)
    maps = (output.features[0].detach().double().numpy() for output in (student, teacher))
    term = method.loss(student, teacher, batch())["detail"]
    assert term.item() == pytest.approx(reference(*maps, 1, wavelet), rel=1e-5)


def test_detail_is_blind_to_the_mean_of_maps_unless_they_have_nothing_else(output, data, batch):
    student, teacher = output(SQUARE), output(SQUARE, phase=1.0)
    raised = teacher._replace(features=tuple(f.detach() + 3 for f in teacher.features))
    for stages, blind in (((0, 1, 2), True), ((3,), False)):
        method = WKD(stages=stages).assemble(student, teacher, data())
        usual, other = (method.loss(student, t, batch())["detail"].item() for t in (teacher, raised))
        assert (other == pytest.approx(usual, rel=1e-4)) is blind


def test_the_last_column_of_odd_maps_counts(waves):
    student = torch.zeros(1, 1, 5, 5)
    student[..., -1] = 1
    for padding, counts in (("reflect", True), ("symmetric", False)):
        _, details = Wavelets((5, 5), "haar", 1, padding)(student)
        assert bool(detail_size(details) > 1e-3) is counts


def test_the_projector_may_as_well_come_after_the_transform(waves):
    maps, project, bands = waves(2, 3, 8, 8), nn.Conv2d(3, 5, 1, bias=False), Wavelets((8, 8), "haar", 2, "reflect")
    before, after = bands(project(maps))[1], bands(maps)[1]
    for first, second in zip(before, after, strict=True):
        swapped = torch.einsum("oc,bcnhw->bonhw", project.weight[:, :, 0, 0], second)
        torch.testing.assert_close(first, swapped, rtol=1e-4, atol=1e-5)


def test_all_that_trains_gets_a_gradient(student, teacher, data, batch):
    method = WKD().assemble(student, teacher, data())
    method.loss(student, teacher, batch())["detail"].backward()
    assert all(f.grad.abs().sum() > 0 for f in student.features)
    assert all(p.grad is not None for p in method.parameters())


def test_what_does_not_exist_is_refused(student, teacher, data):
    for keywords, message in (
        ({"wavelet": "harr"}, "did you mean haar"),
        ({"padding": "reflct"}, "did you mean reflect"),
        ({"levels": 0}, "expected a number from 1"),
        ({"temperature": 0.0}, "temperature=0"),
    ):
        with pytest.raises(UserError, match=message):
            WKD(**keywords).assemble(student, teacher, data())
