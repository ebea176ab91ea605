"""DIST+: against scipy's correlations over channels and over images, and what they do not see."""

import numpy as np
import pytest
import torch
from kdzoo.distillers.distplus import DISTPlus, channel_distance, spatial_distance
from scipy import stats


def correlation(one, two):
    return stats.pearsonr(one, two).statistic


@pytest.fixture
def maps(waves):
    return [waves(5, 6, 2, 3, phase=phase, dtype=torch.float64) for phase in (0.3, 1.1)]


def test_the_channel_term_is_one_minus_the_correlation_of_channels_at_each_place(maps):
    student, teacher = (m.numpy() for m in maps)
    places = [(b, i, j) for b in range(5) for i in range(2) for j in range(3)]
    expected = np.mean([1 - correlation(student[b, :, i, j], teacher[b, :, i, j]) for b, i, j in places])
    assert channel_distance(*maps).item() == pytest.approx(expected, rel=1e-6)


def test_the_spatial_term_is_one_minus_the_correlation_of_images_at_each_place(maps):
    student, teacher = (m.sum(1).numpy() for m in maps)
    places = [(i, j) for i in range(2) for j in range(3)]
    expected = np.mean([1 - correlation(student[:, i, j], teacher[:, i, j]) for i, j in places])
    assert spatial_distance(*maps).item() == pytest.approx(expected, rel=1e-6)


def test_a_map_is_nearest_to_itself_however_bright_and_farthest_from_its_negative(maps):
    _, teacher = maps
    for distance in (channel_distance, spatial_distance):
        assert distance(2 * teacher + 3, teacher).item() == pytest.approx(0, abs=1e-6)
        assert distance(-teacher, teacher).item() == pytest.approx(2, rel=1e-6)


def test_only_the_spatial_term_is_blind_to_the_order_of_channels(maps):
    student, teacher = maps
    moved = student[:, [3, 0, 5, 1, 4, 2]]
    assert spatial_distance(moved, teacher).item() == pytest.approx(spatial_distance(student, teacher).item(), rel=1e-9)
    assert channel_distance(moved, teacher).item() != pytest.approx(channel_distance(student, teacher).item(), rel=0.01)


def test_gradients_are_those_of_the_formulas(maps):
    student, teacher = (m[:3, :3] for m in maps)
    for distance in (channel_distance, spatial_distance):
        assert torch.autograd.gradcheck(lambda m, of=distance: of(m, teacher), student.clone().requires_grad_())


def test_the_terms_of_the_last_stage_go_through_the_common_grid_and_the_connector(student, teacher, data, batch):
    method = DISTPlus().assemble(student, teacher, data())  # 2 x 2 under 7 x 7
    f_s, f_t = student.features[-1], torch.nn.functional.adaptive_avg_pool2d(teacher.features[-1], 2)
    terms = method.loss(student, teacher, batch())
    assert terms["spatial"].item() == pytest.approx(spatial_distance(f_s, f_t).item(), rel=1e-5)
    assert terms["channel"].item() == pytest.approx(channel_distance(method.connector(f_s), f_t).item(), rel=1e-4)


def test_without_its_features_terms_it_is_dist(student, teacher, data, batch):
    method = DISTPlus(channel=0.0, spatial=0.0).assemble(student, teacher, data())
    assert method.loss(student, teacher, batch()).keys() == {"ce", "dist"}
    assert not list(method.parameters())
    assert not method.needs.features
