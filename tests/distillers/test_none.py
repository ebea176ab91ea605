"""The student by itself."""

import pytest
from kdzoo.distillers.none import NoDistillation
from scipy.special import log_softmax


def test_the_loss_is_the_weighted_cross_entropy(student, data, batch):
    logs = log_softmax(student.logits.detach().double().numpy(), axis=1)
    expected = -logs[range(6), batch().labels].mean()
    terms = NoDistillation(ce=0.5).assemble(student, student, data()).loss(student, student, batch())
    assert terms["ce"].item() == pytest.approx(0.5 * expected, rel=1e-5)


def test_it_needs_neither_a_teacher_nor_features():
    assert not NoDistillation.needs.teacher
    assert not NoDistillation.needs.features
