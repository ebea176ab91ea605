"""Leading directions of maps, their gradient, and how those of following stages relate."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from kdzoo.distillers.kdsvd import KDSVD, aligned, leading_directions, relation

from kdzoo import Output, toys
from kdzoo.errors import UserError


def directions(maps, count):
    """Singular values and right singular vectors by numpy, with sums of at least 0."""
    b, c = maps.shape[:2]
    _, s, vt = np.linalg.svd(maps.reshape(b, c, -1).transpose(0, 2, 1), full_matrices=False)
    v = vt.transpose(0, 2, 1)[:, :, :count]
    return s[:, :count], v * np.where(v.sum(axis=1, keepdims=True) < 0, -1, 1)


@pytest.mark.parametrize("shape", [(3, 4, 5, 2), (3, 6, 2, 2)])
@pytest.mark.parametrize("count", [1, 3])
def test_directions_are_the_right_singular_vectors(waves, shape, count):
    maps = waves(*shape, dtype=torch.float64)
    values, vectors = leading_directions(maps, count)
    expected = directions(maps.numpy(), count)
    np.testing.assert_allclose(values.numpy(), expected[0], rtol=1e-6)
    np.testing.assert_allclose(vectors.numpy(), expected[1], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("shape", [(2, 3, 4, 1), (2, 4, 3, 1)])
def test_their_gradient_is_that_of_the_decomposition(waves, shape):
    maps = waves(*shape, dtype=torch.float64).requires_grad_()
    weights = waves(2, shape[1], 2, phase=2.0, dtype=torch.float64)
    (found,) = torch.autograd.grad((leading_directions(maps, 2)[1] * weights).sum(), maps)
    expected, step = np.zeros(shape), 1e-6
    for index in np.ndindex(*shape):
        ends = []
        for sign in (1, -1):
            moved = maps.detach().numpy().copy()
            moved[index] += sign * step
            ends.append((directions(moved, 2)[1] * weights.numpy()).sum())
        expected[index] = (ends[0] - ends[1]) / (2 * step)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-4, atol=1e-6)
    assert np.abs(expected).max() > 0.01


@pytest.mark.parametrize("maps", [torch.zeros(2, 3, 2, 2), torch.ones(2, 3, 2, 2), torch.eye(4).view(1, 4, 2, 2)])
def test_gradients_are_finite_where_singular_values_coincide(maps):
    maps = maps.clone().requires_grad_()
    (leading_directions(maps, 2)[1] * torch.arange(2.0)).sum().backward()
    assert maps.grad.isfinite().all()


def shown(waves, phase):
    maps, shift = [(4, 6), (5, 3), (6, 3)], (0.0, 0.5, 0.7)
    features = [
        waves(3, c, n, n, phase=phase + s, dtype=torch.float64).abs() for (c, n), s in zip(maps, shift, strict=True)
    ]
    return Output(torch.zeros(3, 4), torch.zeros(3, 6), (*features, torch.zeros(3, 6, 1, 1)))


def test_the_loss_is_that_of_the_reference_code(waves):
    student, teacher = shown(waves, 0.0), shown(waves, 1.0)
    method = KDSVD(stages=(0, 1, 2)).assemble(student, teacher, toys.data())
    # KDSVD of HobbitLong/RepDistiller@b84f547, distiller_zoo/KDSVD.py; with rectified maps all signs agree
    expected = 0.0006881145865861556 + 0.0015502407762060767
    assert method.distance(student, teacher).item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("k", [1, 2])
def test_the_term_sums_the_differences_of_relations(waves, k):
    student, teacher = shown(waves, 0.0), shown(waves, 1.0)
    method = KDSVD(kdsvd=0.5, directions=k, stages=(0, 1, 2)).assemble(student, teacher, toys.data())
    pairs = []
    for f_s, f_t in zip(student.features[:3], teacher.features[:3], strict=True):
        s, v_t = directions(f_t.numpy(), k)
        _, v_s = directions(f_s.numpy(), k + 3)
        s = s / np.linalg.norm(s, axis=1, keepdims=True)
        picked = np.zeros_like(v_t)
        for b in range(3):
            for i in range(k):
                cosines = v_s[b].T @ v_t[b, :, i]
                best = np.abs(cosines).argmax()
                picked[b, :, i] = np.sign(cosines[best]) * v_s[b, :, best]
        pairs.append((picked * s[:, None], v_t * s[:, None]))
    expected = 0.0
    for (s0, t0), (s1, t1) in pairwise(pairs):
        gap = [np.exp(-((a[:, :, None] - b[:, None]) ** 2) / 8) for a, b in ((s1, s0), (t1, t0))]
        expected += 0.5 * np.sum((gap[0] - gap[1]) ** 2) / 3
    assert method.distance(student, teacher).item() * 0.5 == pytest.approx(expected, rel=1e-6)


def test_maps_are_compared_up_to_their_size_sign_and_order_of_positions(waves):
    student, teacher = shown(waves, 0.0), shown(waves, 1.0)
    method = KDSVD(stages=(0, 1, 2)).assemble(student, teacher, toys.data())
    expected = method.distance(student, teacher)
    for change in (lambda f: 3 * f, lambda f: -f, lambda f: f.flip(2)):
        torch.testing.assert_close(
            method.distance(student._replace(features=tuple(change(f) for f in student.features)), teacher), expected
        )
    turned = student._replace(features=tuple(f.flip(1) for f in student.features))
    assert method.distance(turned, teacher).item() != pytest.approx(expected.item(), rel=1e-2)
    assert method.distance(teacher, teacher).item() == pytest.approx(0, abs=1e-12)


def test_the_nearest_direction_is_picked_up_to_sign():
    student, teacher = torch.eye(3)[None], torch.tensor([[[0.1], [-2.0], [0.5]]])
    torch.testing.assert_close(aligned(student, teacher), torch.tensor([[[0.0], [-1.0], [0.0]]]))


def test_relations_are_gaussian_in_the_difference_of_numbers():
    found = relation(torch.tensor([[[0.0], [2.0]]]), torch.tensor([[[0.0], [4.0]]]))[0, :, :, 0]
    torch.testing.assert_close(found, torch.tensor([[0.0, 16], [4, 4]]).div(-8).exp())


def test_widths_that_differ_are_bridged_by_a_trained_map(student, teacher, data, batch):
    method = KDSVD(ce=0).assemble(student, teacher, data())
    method.loss(student, teacher, batch())["kdsvd"].backward()
    assert [f.grad is not None for f in student.features] == [False, True, True, True]
    assert all(parameter.grad.abs().sum() > 0 for parameter in method.parameters())


def test_a_weight_of_zero_leaves_its_term_and_its_modules_out(student, teacher, data, batch):
    method = KDSVD(kdsvd=0).assemble(student, teacher, data())
    assert method.loss(student, teacher, batch()).keys() == {"ce"}
    assert not list(method.parameters())


@pytest.mark.parametrize("wrong", [{"directions": 0}, {"stages": (1,)}, {"stages": (1, 4)}])
def test_values_without_a_meaning_are_refused(student, teacher, data, wrong):
    with pytest.raises(UserError, match="expected"):
        KDSVD(**wrong).assemble(student, teacher, data())
