"""Relations of embeddings within a batch."""

import numpy as np
import pytest
import torch
from kdzoo.distillers.rkd import RKD, angle_loss, angles, distance_loss, relative_distances
from scipy.spatial.distance import cdist


def smooth_l1(x):
    return np.where(np.abs(x) < 1, x**2 / 2, np.abs(x) - 0.5)


def relations(rows):
    """Relative distances, and cosines of the angle at i between j and k, one by one."""
    d, n = cdist(rows, rows), len(rows)
    cosines = np.zeros((n, n, n))
    for i, j, k in np.ndindex(n, n, n):
        if i not in (j, k):
            cosines[i, j, k] = (rows[j] - rows[i]) @ (rows[k] - rows[i]) / d[i, j] / d[i, k]
    return d / (d.sum() / (n * n - n)), cosines


def test_distances_and_angles_are_compared_by_smooth_l1(waves):
    e_s, e_t = 3 * waves(6, 4, dtype=torch.float64), waves(6, 9, phase=1.0, dtype=torch.float64)
    (d_s, a_s), (d_t, a_t) = relations(e_s.numpy()), relations(e_t.numpy())
    assert distance_loss(e_s, e_t).item() == pytest.approx(smooth_l1(d_s - d_t).mean(), rel=1e-9)
    assert angle_loss(e_s, e_t).item() == pytest.approx(smooth_l1(a_s - a_t).mean(), rel=1e-9)


def test_the_term_weighs_both(student, teacher, data, batch):
    (d_s, a_s), (d_t, a_t) = (relations(o.embedding.detach().double().numpy()) for o in (student, teacher))
    expected = 25 * smooth_l1(d_s - d_t).mean() + 50 * smooth_l1(a_s - a_t).mean()
    term = RKD(rkd=0.5).assemble(student, teacher, data()).loss(student, teacher, batch())["rkd"]
    assert term.item() == pytest.approx(expected / 2, rel=1e-5)


@pytest.mark.parametrize("relation", [relative_distances, angles])
def test_relations_are_blind_to_shift_scale_and_rotation_and_to_nothing_else(waves, relation):
    rows = waves(6, 4, dtype=torch.float64)
    rotation, _ = torch.linalg.qr(waves(4, 4, phase=2.0, dtype=torch.float64))
    torch.testing.assert_close(relation(5 * rows @ rotation + 7), relation(rows))
    assert (relation(rows.square()) - relation(rows)).abs().max() > 0.01


@pytest.mark.parametrize("loss", [distance_loss, angle_loss])
def test_images_that_fall_together_get_a_sane_gradient(waves, loss):
    rows = waves(6, 4)
    rows[3] = rows[1]
    rows.requires_grad_()
    loss(rows, waves(6, 5, phase=1.0)).backward()
    assert rows.grad.isfinite().all()
    assert 0 < rows.grad.abs().max() < 10


@pytest.mark.parametrize("constant", [0.0, 1.0])
def test_embeddings_that_are_all_the_same_get_no_gradient(output, teacher, data, batch, constant):
    student = output(constant=constant)
    RKD().assemble(student, teacher, data()).loss(student, teacher, batch())["rkd"].backward()
    assert torch.equal(student.embedding.grad, torch.zeros_like(student.embedding))


def test_one_image_has_no_relations(waves):
    for loss in (distance_loss, angle_loss):
        assert loss(waves(1, 4), waves(1, 5)) == 0


def test_the_gradient_is_that_of_the_loss(waves):
    e_s, e_t = waves(4, 3, dtype=torch.float64).requires_grad_(), waves(4, 5, phase=1.0, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda e: distance_loss(e, e_t) + angle_loss(e, e_t), e_s)


def test_a_weight_of_zero_leaves_its_part_out(student, teacher, data, batch):
    def term(**weights):
        return RKD(**weights).assemble(student, teacher, data()).loss(student, teacher, batch())["rkd"]

    torch.testing.assert_close(term(angle=0) + term(distance=0), term())
    assert RKD(rkd=0).assemble(student, teacher, data()).loss(student, teacher, batch()).keys() == {"ce"}
    assert RKD(distance=0, angle=0).assemble(student, teacher, data()).loss(student, teacher, batch()).keys() == {"ce"}
    assert not RKD.needs.features
