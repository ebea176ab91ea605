"""Contrast of windows and of channels."""

import numpy as np
import pytest
import torch
from kdzoo.distillers.lfcc import LFCC
from kdzoo.distillers.msdcrd import MSDCRD, feature_contrast, sample_contrast, sliding_basis, sliding_rows
from scipy.special import logsumexp
from torch.nn import functional as F

from kdzoo.errors import UserError

ODD = ((3, 7, 5), (4, 5, 7), (5, 3, 1), (6, 1, 1))


def contrast(similarities):
    return np.mean(logsumexp(similarities, axis=1) - np.diag(similarities))


def unit(rows):
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def samples(maps):
    """Windows (B, C, N) as rows, image by image."""
    return unit(maps.transpose(0, 2, 1).reshape(-1, maps.shape[1]))


def channels(maps):
    rows = maps.transpose(1, 0, 2).reshape(maps.shape[1], -1)
    return unit(rows - rows.mean(1, keepdims=True))


def sliding(maps, g):
    """Averages of windows by unfolding, for sides that 2 g divides: (B, C, N)."""
    length = maps.shape[2] // g
    return F.avg_pool2d(maps, length, length // 2).flatten(2).double().numpy()


@pytest.mark.parametrize("g", [1, 2, 4])
def test_windows_slide_by_half_their_length(waves, g):
    maps = waves(2, 3, 8, 8)
    found = maps.flatten(2).double() @ sliding_basis((8, 8), g).mT
    np.testing.assert_allclose(found, sliding(maps, g), rtol=1e-6, atol=1e-7)
    assert found.shape[2] == (2 * g - 1) ** 2


@pytest.mark.parametrize(("n", "parts"), [(7, 2), (5, 4), (3, 3), (1, 1)])
def test_windows_of_a_broken_length_are_averages_that_cover_all_alike(n, parts):
    rows = sliding_rows(n, parts)
    torch.testing.assert_close(rows.sum(1), torch.ones(2 * parts - 1, dtype=torch.float64))
    torch.testing.assert_close(rows[::2].sum(0), torch.full((n,), parts / n, dtype=torch.float64))
    assert rows.min() >= 0


def test_the_terms_are_the_means_over_scales_of_both_contrasts(student, teacher, data, batch):
    eight = student._replace(features=(student.features[0],) * 4)
    coarse = teacher._replace(features=(F.adaptive_avg_pool2d(teacher.features[0], 4),) * 4)
    method = MSDCRD(sample=2.0, feature=3.0, tau=0.2).assemble(eight, coarse, data())
    weight = method.projectors[0].weight[:, :, 0].detach()
    mixed = torch.einsum("oc,bchw->bohw", weight, eight.features[3].detach())
    pairs = [(sliding(mixed, g), sliding(coarse.features[3].detach(), g)) for g in (1, 2)]
    terms = method.loss(eight, coarse, batch())
    expected = np.mean([contrast(samples(s) @ samples(t).T / 0.2) for s, t in pairs])
    assert terms["sample"].item() == pytest.approx(2 * expected, rel=1e-5)
    expected = np.mean([contrast(channels(s) @ channels(t).T / 0.2) for s, t in pairs])
    assert terms["feature"].item() == pytest.approx(3 * expected, rel=1e-5)


def test_one_window_for_each_image_is_what_lfcc_contrasts(student, teacher, data, batch):
    method = MSDCRD(sample=1.0, scales=(1,), stages=(0, 2)).assemble(student, teacher, data())
    flat = LFCC(contrast=1.0, scales=(1,), stages=(0, 2)).assemble(student, teacher, data())
    flat.projectors.load_state_dict(method.projectors.state_dict())
    expected = flat.loss(student, teacher, batch())["contrast"].item()
    assert method.loss(student, teacher, batch())["sample"].item() == pytest.approx(expected, rel=1e-5)
    for each in (method := MSDCRD(scales=(2,), stages=(0, 2)), flat := LFCC(contrast=1.0, scales=(2,), stages=(0, 2))):
        each.assemble(student, teacher, data())
    flat.projectors.load_state_dict(method.projectors.state_dict())
    other = flat.loss(student, teacher, batch())["contrast"].item()
    assert method.loss(student, teacher, batch())["sample"].item() != pytest.approx(other, rel=1e-2)


def test_windows_of_images_that_share_content_or_a_class_do_not_repel(waves):
    student, teacher = waves(4, 3, 2), waves(4, 3, 2, phase=1.0)
    mask = torch.zeros(4, 4, dtype=torch.bool)
    mask[0, 2] = mask[1, 1] = True
    similarities = samples(student.double().numpy()) @ samples(teacher.double().numpy()).T / 0.2
    similarities[0:2, 4:6] = -np.inf  # the windows of image 0 and of image 2
    similarities[2, 3] = similarities[3, 2] = -np.inf  # the other window of image 1
    found = sample_contrast(student, teacher, 0.2, mask).item()
    assert found == pytest.approx(contrast(similarities), rel=1e-5)
    assert found != pytest.approx(sample_contrast(student, teacher, 0.2, None).item(), rel=1e-3)


def test_partners_and_classes_are_masked_where_they_should(student, teacher, data, batch):
    mixed = batch()._replace(partner=torch.tensor([1, 0, 3, 2, 5, 4]))
    values = []
    for method in (MSDCRD(), MSDCRD(mask_same_class=True)):
        torch.manual_seed(0)
        method.assemble(student, teacher, data())
        values += [method.loss(student, teacher, each)["sample"].item() for each in (batch(), mixed)]
    assert len({round(value, 4) for value in values}) == 4
    assert values[1] < values[0]  # fewer repel
    assert values[2] < values[0]


def test_windows_in_place_are_closer_than_windows_moved(waves):
    maps = waves(4, 5, 9)
    for contrasted in (lambda s: sample_contrast(s, maps, 0.07, None), lambda s: feature_contrast(s, maps, 0.07)):
        assert contrasted(maps) < contrasted(maps.roll(1, 0)) / 2
        assert contrasted(2 * maps).item() == pytest.approx(contrasted(maps).item(), rel=1e-5)
    assert sample_contrast(maps.roll(1, 2), maps, 0.07, None) > 2 * sample_contrast(maps, maps, 0.07, None)
    assert feature_contrast(maps + 3, maps, 0.07).item() == pytest.approx(
        feature_contrast(maps, maps, 0.07).item(), rel=1e-4
    )


@pytest.mark.parametrize("constant", [None, 0.0, 1.0])
def test_terms_and_gradients_are_finite_for_any_grids_zeros_and_constants(output, teacher, data, batch, constant):
    student = output(ODD, constant=constant)
    method = MSDCRD(stages=(0, 1, 2, 3), scales=(1, 2, 4)).assemble(student, teacher, data())
    assert [len(windows) for windows in method.windows] == [3, 3, 1, 1]
    sum(method.loss(student, teacher, batch()).values()).backward()
    assert all(f.grad.isfinite().all() for f in student.features)


def test_a_weight_of_zero_leaves_its_term_out(student, teacher, data, batch):
    method = MSDCRD(sample=0, feature=0).assemble(student, teacher, data())
    assert method.loss(student, teacher, batch()).keys() == {"ce"}
    assert not list(method.parameters())
    assert MSDCRD(sample=0).assemble(student, teacher, data()).loss(student, teacher, batch()).keys() == {
        "ce",
        "feature",
    }


@pytest.mark.parametrize(
    ("keywords", "message"), [({"tau": 0}, "tau=0"), ({"scales": (0,)}, "scales"), ({"stages": (4,)}, "stages")]
)
def test_a_bad_keyword_is_the_users_error(student, teacher, data, keywords, message):
    with pytest.raises(UserError, match=message):
        MSDCRD(**keywords).assemble(student, teacher, data())
