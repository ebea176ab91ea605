"""The teacher's classifier on the student's embedding."""

import numpy as np
import pytest
import torch
from kdzoo.distillers.srrl import SRRL
from torch import nn

from kdzoo import Distillation, toys
from kdzoo.errors import UserError


@pytest.fixture
def prepared(student, teacher, data):
    """A method that holds a classifier of the teacher's; its ReLU may be on."""

    def build(rectified=False, **keywords):
        method = SRRL(**keywords).assemble(student, teacher, data()).eval()
        nn.init.normal_(method.classifier.weight)
        nn.init.normal_(method.classifier.bias)
        method.rectified.fill_(rectified)
        return method

    return build


@pytest.mark.parametrize("rectified", [False, True])
def test_the_terms_match_embedding_and_logits(prepared, student, teacher, batch, rectified):
    method = prepared(rectified, mean=2.0, regression=3.0, kd=1.0)
    maps = method.connector(student.features[3]).detach().double().numpy()
    embedding = (np.maximum(maps, 0) if rectified else maps).mean(axis=(2, 3))
    weight, bias = (p.detach().double().numpy() for p in method.classifier.parameters())
    terms = method.loss(student, teacher, batch())
    assert terms.keys() == {"ce", "kd", "mean", "regression"}
    expected = 2 * np.mean((embedding - teacher.embedding.detach().numpy()) ** 2)
    assert terms["mean"].item() == pytest.approx(expected, rel=1e-5)
    expected = 3 * np.mean((embedding @ weight.T + bias - teacher.logits.detach().numpy()) ** 2)
    assert terms["regression"].item() == pytest.approx(expected, rel=1e-5)


def test_the_first_term_is_the_authors(waves):
    f_s, f_t = waves(3, 4, 5, 2, dtype=torch.float64), waves(3, 4, 5, 2, phase=1.0, dtype=torch.float64)
    # statm_loss of jingyang2017/KD_SRRL@d2e802f, distiller_zoo/AIN.py: the error of the maps' means
    found = nn.functional.mse_loss(f_s.mean(dim=(2, 3)), f_t.mean(dim=(2, 3))).item()
    assert found == pytest.approx(0.07822530472210927, rel=1e-9)


def test_the_classifier_is_the_teachers_and_stays_so():
    together = toys.distillation(SRRL)
    for name in ("weight", "bias"):
        kept, given = (getattr(c, name) for c in (together.distiller.classifier, together.teacher.classifier))
        assert torch.equal(kept, given)
        assert not kept.requires_grad
    toys.total(together(toys.batch_of())).backward()
    assert together.distiller.classifier.weight.grad is None
    assert together.student.stages[3][0].weight.grad.any()


@pytest.mark.parametrize("shift", [0.0, 10.0])
def test_a_relu_ends_the_connector_where_the_teachers_embedding_has_no_negative_number(shift):
    teacher = toys.Toy(toys.TEACHER)
    if shift:
        with torch.no_grad():
            teacher.stages[3][1].bias.add_(shift)
    together = toys.distillation(SRRL, teacher=teacher)
    assert bool(together.distiller.rectified) is bool(shift)


def test_a_teacher_without_a_linear_classifier_is_refused():
    teacher = toys.Toy(toys.TEACHER)
    teacher.classifier = nn.Sequential(teacher.classifier)
    together = Distillation(toys.Toy(toys.STUDENT), teacher, SRRL(), data=toys.data())
    with pytest.raises(UserError, match="linear classifier"):
        together.prepare([toys.batch_of()])


def test_a_weight_of_zero_leaves_its_term_and_its_modules_out(student, teacher, data, batch):
    method = SRRL(mean=0, regression=0).assemble(student, teacher, data())
    assert method.loss(student, teacher, batch()).keys() == {"ce"}
    assert not list(method.parameters())
    assert not method.needs.features
    assert SRRL(ce=0, mean=0).assemble(student, teacher, data()).loss(student, teacher, batch()).keys() == {
        "regression"
    }
