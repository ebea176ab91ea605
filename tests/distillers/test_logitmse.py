"""Matching of centred logits."""

import numpy as np
import pytest
from kdzoo.distillers.kd import KD
from kdzoo.distillers.logitmse import LogitMSE


def test_the_term_is_the_mean_variance_of_the_difference(student, teacher, data, batch):
    difference = (student.logits - teacher.logits).detach().double().numpy()
    terms = LogitMSE(mse=0.3).assemble(student, teacher, data()).loss(student, teacher, batch())
    assert terms["mse"].item() == pytest.approx(0.3 * np.var(difference, axis=1).mean(), rel=1e-5)


def test_a_constant_in_a_row_is_not_seen_and_a_change_of_one_class_is(student, teacher, data, batch, waves):
    method = LogitMSE().assemble(student, teacher, data())

    def term(logits):
        return method.loss(student._replace(logits=logits), teacher, batch())["mse"].item()

    assert term(student.logits + waves(6, 1)) == pytest.approx(term(student.logits), rel=1e-4)
    assert term(student.logits * (1 + waves(10))) != pytest.approx(term(student.logits), rel=1e-2)


def test_it_is_twice_the_limit_of_kd_at_high_temperature(student, teacher, data, batch):
    mse = LogitMSE().assemble(student, teacher, data()).loss(student, teacher, batch())["mse"].item()
    for temperature, near in ((200.0, True), (1.0, False)):
        method = KD(kd=2.0, temperature=temperature)
        term = method.loss(student, teacher, batch())["kd"].item()
        assert (term == pytest.approx(mse, rel=0.03)) is near


def test_a_weight_of_zero_leaves_its_term_out(student, teacher, data, batch):
    assert LogitMSE(ce=0).assemble(student, teacher, data()).loss(student, teacher, batch()).keys() == {"mse"}
    assert LogitMSE(mse=0).assemble(student, teacher, data()).loss(student, teacher, batch()).keys() == {"ce"}
