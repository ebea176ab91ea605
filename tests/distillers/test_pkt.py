"""Probabilities of being neighbours."""

import numpy as np
import pytest
import torch
from kdzoo.distillers.pkt import PKT, neighbour_divergence, neighbour_probabilities
from scipy.special import rel_entr


def probabilities(rows):
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    similarity = (1 + unit @ unit.T) / 2
    return similarity / similarity.sum(axis=1, keepdims=True)


def test_the_loss_is_the_mean_over_b_squared_of_the_divergence(waves):
    e_s, e_t = waves(6, 4, dtype=torch.float64), waves(6, 9, phase=1.0, dtype=torch.float64)
    p_s, p_t = probabilities(e_s.numpy()), probabilities(e_t.numpy())
    torch.testing.assert_close(neighbour_probabilities(e_s), torch.from_numpy(p_s), rtol=1e-9, atol=0)
    expected = np.mean(p_t * np.log((p_t + 1e-7) / (p_s + 1e-7)))  # the authors' guard within the logarithm
    assert neighbour_divergence(e_s, e_t).item() == pytest.approx(expected, rel=1e-9)
    assert neighbour_divergence(e_s, e_t).item() == pytest.approx(rel_entr(p_t, p_s).mean(), rel=1e-3)


def test_the_term_carries_its_weight(student, teacher, data, batch):
    p_s, p_t = (probabilities(o.embedding.detach().double().numpy()) for o in (student, teacher))
    term = PKT(pkt=10.0).assemble(student, teacher, data()).loss(student, teacher, batch())["pkt"]
    assert term.item() == pytest.approx(10 * rel_entr(p_t, p_s).mean(), rel=1e-3)


def test_probabilities_are_blind_to_the_length_of_embeddings_and_to_rotation_and_not_to_shift(waves):
    rows = waves(6, 4, dtype=torch.float64)
    lengths = torch.arange(1.0, 7.0, dtype=torch.float64)[:, None]
    rotation, _ = torch.linalg.qr(waves(4, 4, phase=2.0, dtype=torch.float64))
    torch.testing.assert_close(neighbour_probabilities(lengths * rows @ rotation), neighbour_probabilities(rows))
    assert (neighbour_probabilities(rows + 1) - neighbour_probabilities(rows)).abs().max() > 0.01


def test_a_student_with_the_teachers_neighbours_has_nothing_to_learn_and_any_other_has(waves):
    rows = waves(6, 4)
    assert neighbour_divergence(2 * rows, rows).abs() < 1e-7
    assert neighbour_divergence(rows.roll(1, 0), rows) > 1e-3


@pytest.mark.parametrize("phase", range(20))
def test_opposite_embeddings_are_finite_however_their_cosine_is_rounded(waves, phase):
    rows = waves(1, 10_000, phase=phase)
    rows = torch.cat([rows, -rows]).requires_grad_()
    loss = neighbour_divergence(rows, waves(2, 5, phase=1.0))
    loss.backward()
    assert loss.isfinite()
    assert rows.grad.isfinite().all()


@pytest.mark.parametrize("constant", [0.0, 1.0])
def test_gradients_are_finite_for_constant_embeddings(output, teacher, data, batch, constant):
    student = output(constant=constant)
    PKT().assemble(student, teacher, data()).loss(student, teacher, batch())["pkt"].backward()
    assert student.embedding.grad.isfinite().all()


def test_a_weight_of_zero_leaves_its_term_out(student, teacher, data, batch):
    assert PKT(pkt=0).assemble(student, teacher, data()).loss(student, teacher, batch()).keys() == {"ce"}
    assert PKT(ce=0).assemble(student, teacher, data()).loss(student, teacher, batch()).keys() == {"pkt"}
    assert not PKT.needs.features
