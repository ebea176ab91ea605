"""Similarity-preserving distillation."""

import numpy as np
import pytest
import torch
from kdzoo.distillers.sp import SP, similarities, similarity_loss

from kdzoo.errors import UserError


def gram(features):
    rows = features.reshape(len(features), -1)
    g = rows @ rows.T
    return g / np.linalg.norm(g, axis=1, keepdims=True)


def test_the_loss_is_the_squared_distance_of_row_normalised_grams_over_b_squared(waves):
    f_s, f_t = waves(5, 3, 4, 2, dtype=torch.float64), waves(5, 7, 3, 3, phase=1.0, dtype=torch.float64)
    expected = np.sum((gram(f_s.numpy()) - gram(f_t.numpy())) ** 2) / 25
    assert similarity_loss(f_s, f_t).item() == pytest.approx(expected, rel=1e-9)


def test_the_term_reads_the_last_stage_as_it_is(student, teacher, data, batch):
    term = SP(sp=10.0).assemble(student, teacher, data()).loss(student, teacher, batch())["sp"]
    last = (o.features[3].detach().double().numpy() for o in (student, teacher))
    g_s, g_t = (gram(maps) for maps in last)
    assert term.item() == pytest.approx(10 * np.mean((g_s - g_t) ** 2), rel=1e-5)
    term.backward()
    assert [f.grad is not None for f in student.features] == [False, False, False, True]


def test_similarities_are_blind_to_scale_and_to_rotations_of_the_features_and_to_nothing_else(waves):
    rows = waves(5, 6, dtype=torch.float64)
    rotation, _ = torch.linalg.qr(waves(6, 6, phase=2.0, dtype=torch.float64))
    torch.testing.assert_close(similarities(4 * rows @ rotation), similarities(rows))
    assert (similarities(rows + 1) - similarities(rows)).abs().max() > 0.01


def test_the_order_of_the_batch_does_not_matter(waves):
    f_s, f_t, order = waves(5, 6), waves(5, 3, phase=1.0), [3, 0, 4, 1, 2]
    torch.testing.assert_close(similarity_loss(f_s[order], f_t[order]), similarity_loss(f_s, f_t))
    assert (similarity_loss(f_s[order], f_t) - similarity_loss(f_s, f_t)).abs() > 1e-3


@pytest.mark.parametrize("constant", [0.0, 1.0])
def test_gradients_are_finite_for_constant_maps(output, teacher, data, batch, constant):
    student = output(constant=constant)
    SP().assemble(student, teacher, data()).loss(student, teacher, batch())["sp"].backward()
    assert student.features[3].grad.isfinite().all()


def test_a_weight_of_zero_leaves_its_term_out(student, teacher, data, batch):
    method = SP(sp=0).assemble(student, teacher, data())
    assert method.loss(student, teacher, batch()).keys() == {"ce"}
    assert not method.needs.features
    assert SP(ce=0).assemble(student, teacher, data()).loss(student, teacher, batch()).keys() == {"sp"}


def test_a_stage_that_does_not_exist_is_the_users_error(student, teacher, data):
    with pytest.raises(UserError, match="expected distinct numbers from 0 to 3"):
        SP(stage=4).assemble(student, teacher, data())
