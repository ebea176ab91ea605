"""RSD: against numpy's correlations, its invariances, and embeddings that do not vary."""

import numpy as np
import pytest
import torch
from kdzoo.distillers.rsd import RSD, redundancy_loss, standardize

from kdzoo import Batch, DataSpec, Output
from kdzoo.errors import UserError


def embedding(phase, width=5, rows=9):
    steps = torch.arange(rows * width, dtype=torch.float64)
    return (2 * torch.sin(0.7 * steps + phase) + torch.cos(1.9 * steps)).view(rows, width)


def reference(student, teacher, kappa):
    s, t = ((e - e.mean(0)) / (e.std(0) + 1e-5) for e in (student.numpy(), teacher.numpy()))
    total = 0.0
    for i in range(t.shape[1]):
        for j in range(s.shape[1]):
            c = (t[:, i] * s[:, j]).mean()
            total += (c - 1) ** 2 if i == j else kappa * c**2
    return total


@pytest.mark.parametrize("kappa", [0.0, 0.01, 1.0])
def test_it_is_the_distance_of_the_cross_correlations_from_the_identity(kappa):
    student, teacher = embedding(0.3), embedding(1.1)
    found = redundancy_loss(student, teacher, kappa).item()
    assert found == pytest.approx(reference(student, teacher, kappa), rel=1e-6)


def test_scale_and_offset_of_each_number_are_of_no_account():
    student, teacher = embedding(0.3), embedding(1.1)
    scale, offset = torch.arange(1, 6).double(), torch.linspace(-3, 9, 5).double()
    before = redundancy_loss(student, teacher, 0.01).item()
    assert redundancy_loss(scale * student + offset, teacher, 0.01).item() == pytest.approx(before, rel=1e-4)
    assert redundancy_loss(student, scale * teacher + offset, 0.01).item() == pytest.approx(before, rel=1e-4)
    assert redundancy_loss(-student, teacher, 0.01).item() != pytest.approx(before, rel=1e-2)


def test_the_order_of_images_is_of_no_account_as_long_as_both_share_it():
    student, teacher, order = embedding(0.3), embedding(1.1), [8, 2, 0, 4, 6, 1, 3, 5, 7]
    before = redundancy_loss(student, teacher, 0.01).item()
    assert redundancy_loss(student[order], teacher[order], 0.01).item() == pytest.approx(before, rel=1e-9)
    assert redundancy_loss(student[order], teacher, 0.01).item() != pytest.approx(before, rel=1e-2)


def test_an_equal_embedding_of_independent_numbers_costs_nothing():
    angle = 2 * torch.pi * torch.arange(16).double() / 16
    waves = torch.stack([torch.sin(k * angle) for k in (1, 2, 3)], dim=1)
    assert redundancy_loss(waves, waves, 1.0).item() == pytest.approx(0, abs=1e-8)
    assert redundancy_loss(waves.roll(1, 1), waves, 1.0).item() == pytest.approx(6, rel=1e-4)


def test_numbers_that_do_not_vary_have_finite_gradients():
    student = torch.full((4, 5), 0.1, requires_grad=True)
    redundancy_loss(student, embedding(1.1, rows=4).float(), 0.01).backward()
    assert student.grad.isfinite().all()
    assert standardize(torch.ones(4, 5)).abs().max() == 0


def test_gradients_are_those_of_the_formula():
    teacher = embedding(1.1)
    assert torch.autograd.gradcheck(lambda e: redundancy_loss(e, teacher, 0.01), embedding(0.3).requires_grad_())


def method(**keywords):
    student, teacher = (Output(torch.empty(1, 7), torch.empty(1, width), ()) for width in (5, 8))
    return RSD(**keywords).assemble(student, teacher, DataSpec("toy", 7, tuple("abcdefg"), 8, torch.arange(7)))


def test_the_student_is_projected_to_the_teachers_width_by_weights_without_biases():
    shapes = [tuple(p.shape) for p in method().projector.parameters() if p.ndim == 2]
    assert shapes == [(10, 5), (8, 10)]
    assert sum(p.numel() for p in method().parameters()) == 10 * 5 + 2 * 10 + 8 * 10


def test_a_weight_of_0_builds_no_projector():
    assert not list(method(rsd=0.0).parameters())


def test_the_term_is_a_tenth_of_the_loss_of_the_projected_embedding():
    torch.manual_seed(0)
    rsd = method().double().eval()
    outputs = [Output(torch.zeros(9, 7).double(), embedding(1.0, width), ()) for width in (5, 8)]
    found = rsd.loss(*outputs, Batch.of(torch.zeros(9, 3, 8, 8), torch.arange(9) % 7, 7))["rsd"].item()
    with torch.no_grad():
        projected = rsd.projector(embedding(1.0, 5))
    assert found == pytest.approx(0.1 * reference(projected, embedding(1.0, 8), 0.01), rel=1e-6)


def test_a_projector_without_width_is_refused():
    with pytest.raises(UserError, match="expansion=0: expected"):
        method(expansion=0)


def test_the_reference_itself_tells_a_sign_error():
    student = embedding(0.3)
    assert np.isclose(reference(student, student, 0.0), 0, atol=1e-4)
    assert reference(student, -student, 0.0) == pytest.approx(20, rel=1e-3)
