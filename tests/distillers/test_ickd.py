"""Correlations between channels."""

import numpy as np
import pytest
import torch
from kdzoo.distillers.ickd import ICKD, correlation_loss, correlations

from kdzoo.errors import UserError


def reference(student, teacher):
    grams = []
    for maps in (student, teacher):
        rows = maps.reshape(*maps.shape[:2], -1)
        gram = np.einsum("bcn,bdn->bcd", rows, rows)
        grams.append(gram / np.linalg.norm(gram, axis=2, keepdims=True))
    return np.sum((grams[0] - grams[1]) ** 2) / np.prod(student.shape[:2])


def test_the_loss_is_the_squared_distance_of_normalised_correlations(waves):
    f_s, f_t = waves(3, 4, 5, 2, dtype=torch.float64), waves(3, 4, 3, 3, phase=1.0, dtype=torch.float64)
    found = correlation_loss(f_s, f_t).item()
    assert found == pytest.approx(reference(f_s.numpy(), f_t.numpy()), rel=1e-9)
    # ICKDLoss.batch_loss of ADLab-AutoDrive/ICKD@403b8d3, Cifar100/distiller_zoo/ICKD.py, without its embedding
    assert found == pytest.approx(1.1724188714584154, rel=1e-9)


def test_correlations_are_blind_to_scale_and_order_of_positions_and_to_nothing_else(waves):
    maps = waves(3, 4, 5, 2)
    expected = correlations(maps)
    for other in (3 * maps, -maps, maps.flip(2), maps.repeat(1, 1, 2, 1)):
        torch.testing.assert_close(correlations(other), expected)
    assert (correlations(maps.flip(1)) - expected).abs().max() > 0.01


def test_the_term_embeds_the_students_map(student, teacher, data, batch):
    method = ICKD(ickd=2.0, stage=1).assemble(student, teacher, data()).eval()
    maps = [o.detach().double().numpy() for o in (method.embed(student.features[1]), teacher.features[1])]
    terms = method.loss(student, teacher, batch())
    assert terms.keys() == {"ce", "kd", "ickd"}
    assert terms["ickd"].item() == pytest.approx(2 * reference(*maps), rel=1e-5)


@pytest.mark.parametrize("constant", [0.0, 1.0])
def test_gradients_are_finite_for_constant_maps(output, teacher, data, batch, constant):
    student = output(constant=constant)
    method = ICKD().assemble(student, teacher, data())
    method.loss(student, teacher, batch())["ickd"].backward()
    assert student.features[3].grad.isfinite().all()


def test_a_weight_of_zero_leaves_its_term_and_its_modules_out(student, teacher, data, batch):
    method = ICKD(ickd=0, kd=0).assemble(student, teacher, data())
    assert method.loss(student, teacher, batch()).keys() == {"ce"}
    assert not list(method.parameters())


def test_a_stage_that_is_not_there_is_the_users_error(student, teacher, data):
    with pytest.raises(UserError, match="stages"):
        ICKD(stage=4).assemble(student, teacher, data())
