"""An orthogonal map between embeddings of any two widths."""

import numpy as np
import pytest
import torch
from kdzoo.distillers.vkd import VKD, OrthogonalMap, orthonormal

from kdzoo.errors import UserError


def reference(projected, teacher):
    normal = (teacher - teacher.mean(1, keepdims=True)) / np.sqrt(teacher.var(1, keepdims=True) + 1e-5)
    gap = np.abs(projected - normal)
    return np.where(gap < 1, gap**2 / 2, gap - 0.5).mean()


def test_the_term_is_the_smooth_distance_of_the_turned_embedding(student, teacher, data, batch):
    method = VKD(vkd=2.0, kd=0).assemble(student, teacher, data())
    basis = np.linalg.qr(method.projector.weight.detach().double().numpy())[0]  # of a matrix that begins orthonormal
    basis = basis * np.sign((basis * method.projector.weight.detach().numpy()).sum(0))
    e_s, e_t = (o.embedding.detach().double().numpy() for o in (student, teacher))
    terms = method.loss(student, teacher, batch())
    assert terms["vkd"].item() == pytest.approx(2 * reference(e_s @ basis, e_t), rel=1e-5)
    assert terms.keys() == {"ce", "vkd"}
    assert reference(e_s @ basis, 2 * e_t + 1) == pytest.approx(reference(e_s @ basis, e_t), rel=1e-4)
    assert reference(e_s @ basis, -e_t) != pytest.approx(reference(e_s @ basis, e_t), rel=1e-2)


def test_a_wider_teacher_sees_all_inner_products_and_a_narrower_one_does_not(waves):
    embedding = waves(6, 5)
    widening, narrowing = OrthogonalMap(5, 8), OrthogonalMap(5, 3)
    with torch.no_grad():
        for each in (widening, narrowing):
            each.weight.add_(0.5 * waves(*each.weight.shape))  # as training does
    wide, narrow = widening(embedding), narrowing(embedding)
    torch.testing.assert_close(wide @ wide.mT, embedding @ embedding.mT)
    assert narrow.shape == (6, 3)
    assert not torch.allclose(narrow @ narrow.mT, embedding @ embedding.mT, rtol=0.1)
    again = narrowing(narrow @ narrowing(torch.eye(5)).mT)
    torch.testing.assert_close(again, narrow)  # a projection


def test_columns_are_those_of_gram_schmidt(waves):
    weight = waves(7, 4, dtype=torch.float64)
    expected = []
    for column in weight.mT:
        for done in expected:
            column = column - (column @ done) * done
        expected.append(column / column.norm())
    torch.testing.assert_close(orthonormal(weight), torch.stack(expected, dim=1))


def test_orthonormal_columns_stay_and_scales_of_no_account(waves):
    columns = orthonormal(waves(7, 4))
    torch.testing.assert_close(orthonormal(columns), columns)
    torch.testing.assert_close(orthonormal(3 * columns), columns)
    assert not torch.allclose(orthonormal(-columns), columns)


def test_gradients_are_those_of_the_formula(waves):
    weight = waves(6, 4, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(orthonormal, weight)


def test_the_map_stays_orthonormal_in_training(student, teacher, data, batch):
    method = VKD().assemble(student, teacher, data())
    optimizer = torch.optim.SGD(method.parameters(), lr=1.0)
    before = method.projector(torch.eye(10)).detach()
    for _ in range(3):
        optimizer.zero_grad()
        method.loss(student, teacher, batch())["vkd"].backward()
        optimizer.step()
    after = method.projector(torch.eye(10)).detach()
    torch.testing.assert_close(after.mT @ after, torch.eye(5))
    assert (after - before).abs().max() > 1e-3


def test_a_weight_of_zero_builds_no_map(student, teacher, data, batch):
    method = VKD(vkd=0).assemble(student, teacher, data())
    assert method.loss(student, teacher, batch()).keys() == {"ce", "kd"}
    assert not list(method.parameters())
    assert not VKD.needs.features


def test_a_bad_temperature_is_the_users_error():
    with pytest.raises(UserError, match="temperature=0"):
        VKD(temperature=0)
