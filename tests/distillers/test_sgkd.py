"""SGKD: the authors' number, a reference in numpy, which samples are picked, and what trains."""

import numpy as np
import pytest
import torch
from kdzoo.distillers.sgkd import SGKD, attended
from scipy.special import softmax
from torch.nn import functional as F

from kdzoo import Output
from kdzoo.errors import UserError


@pytest.fixture
def samples(waves):
    """Embeddings of 6 images: a student's (6, 7) and 30 of the teacher (30, 6, 7)."""
    return waves(6, 7, dtype=torch.float64), waves(30, 6, 7, phase=1.0, dtype=torch.float64)


def reference(student, teacher, temperature, quantile):
    targets = []
    for row, drawn in zip(student.numpy(), teacher.numpy().swapaxes(0, 1), strict=True):
        weights = softmax(drawn @ row / temperature)
        weights[weights < np.quantile(weights, quantile)] = 0
        targets.append(weights @ drawn / weights.sum())
    return np.stack(targets)


@pytest.mark.parametrize(("temperature", "quantile"), [(5.0, 0.9), (0.5, 0.3), (5.0, 0.0)])
def test_the_target_is_the_weighted_mean_of_the_nearest(samples, temperature, quantile):
    found = attended(*samples, temperature, quantile).numpy()
    np.testing.assert_allclose(found, reference(*samples, temperature, quantile), rtol=1e-6)


def test_the_authors_code_gives_the_same(samples):
    """Number of ``src/ssd_utils.py`` of moonblume/StochasticTeacher-StudentKD@67fb885 in float64."""
    found = F.mse_loss(samples[0], attended(*samples, 5.0, 0.9)).item()
    assert found == pytest.approx(0.3382911630840375, rel=1e-12)


def test_the_order_of_samples_is_of_no_account_and_far_ones_are_not_seen(samples):
    student, teacher = samples
    before = attended(student, teacher, 5.0, 0.9)
    torch.testing.assert_close(attended(student, teacher.flip(0), 5.0, 0.9), before)
    nearest = (student * teacher).sum(dim=2).topk(3, dim=0).indices
    far = torch.ones(30, 6, dtype=torch.bool).scatter(0, nearest, False)
    moved = torch.where(far[:, :, None], teacher - 2 * student, teacher)  # still further
    torch.testing.assert_close(attended(student, moved, 5.0, 0.9), before)
    assert not torch.allclose(attended(student, moved, 5.0, 0.0), attended(student, teacher, 5.0, 0.0), rtol=0.1)


@pytest.fixture
def method(waves, data):
    def build(inputs=7, outputs=7, **keywords):
        torch.manual_seed(0)
        shapes = [Output(torch.zeros(1, 10), torch.zeros(1, width)) for width in (inputs, outputs)]
        return SGKD(**keywords).assemble(*shapes, data())

    return build


def test_without_dropout_it_is_the_error_of_embeddings(waves, method):
    student, teacher = waves(6, 7), waves(6, 7, phase=1.0)
    plain = F.mse_loss(student, teacher).item()
    assert method(dropout=0.0).error(student, teacher).item() == pytest.approx(plain, rel=1e-5)
    torch.manual_seed(1)
    assert method(dropout=0.5).error(student, teacher).item() != pytest.approx(plain, rel=1e-2)


def test_dropout_lets_the_target_come_nearer_to_the_student_than_its_mean_is(waves, method):
    student, teacher = waves(6, 7), waves(6, 7, phase=1.0)
    noisy = F.dropout(teacher.expand(500, 6, 7), 0.5)
    picked, mean = ((attended(student, noisy, 1.0, q) * student).sum(dim=1).mean() for q in (0.9, 0.0))
    assert picked > mean > (noisy.mean(dim=0) * student).sum(dim=1).mean()


def test_the_target_carries_no_gradient_and_a_projection_is_trained_where_widths_differ(waves, method):
    assert not list(method().parameters())
    wider = method(inputs=5)
    student = waves(6, 5).requires_grad_()
    wider.error(student, waves(6, 7, phase=1.0)).backward()
    assert student.grad.any()
    assert all(p.grad.any() for p in wider.project.parameters())
    own, noisy = waves(6, 7).requires_grad_(), waves(3, 6, 7, phase=1.0)
    assert not attended(own, noisy, 5.0, 0.9).requires_grad


def test_draws_come_from_the_global_generator(waves, method):
    student, teacher, found = waves(6, 7), waves(6, 7, phase=1.0), []
    built = method(dropout=0.5)
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        found.append(built.error(student, teacher).item())
    assert found[0] == found[1] != found[2]


@pytest.mark.parametrize("wrong", [{"dropout": 1.0}, {"samples": 0}, {"temperature": 0.0}, {"quantile": 1.0}])
def test_values_without_a_meaning_are_refused(wrong):
    with pytest.raises(UserError, match="expected"):
        SGKD(**wrong)
