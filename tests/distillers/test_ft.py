"""Factors: their loss, their layers, and the auto-encoder that is trained before."""

import numpy as np
import pytest
import torch
from kdzoo.distillers.ft import FT, factor_loss, layers
from torch import nn
from torch.nn import functional as F

from kdzoo import toys
from kdzoo.errors import UserError
from kdzoo.phase import fit


def unit(maps, form):
    rows = ((maps**2).mean(axis=1) if form == "spatial" else maps).reshape(len(maps), -1)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


@pytest.mark.parametrize("form", ["flat", "spatial"])
def test_the_loss_is_the_mean_absolute_difference_of_normalised_factors(waves, form):
    f_s, f_t = waves(3, 4, 5, 2, dtype=torch.float64), waves(3, 4, 5, 2, phase=1.0, dtype=torch.float64)
    expected = np.mean(np.abs(unit(f_s.numpy(), form) - unit(f_t.numpy(), form)))
    assert factor_loss(f_s, f_t, form).item() == pytest.approx(expected, rel=1e-9)


def test_the_loss_is_that_of_the_authors_code(waves):
    maps = {phase: waves(3, 4, 5, 2, phase=phase, dtype=torch.float64) for phase in (0.0, 1.0)}
    # L1Loss of FT, Jangho-Kim/Factor-Transfer-pytorch@19cce26, utils.py and train_student.py
    assert factor_loss(maps[0.0], maps[1.0], "flat").item() == pytest.approx(0.10728375376545825, rel=1e-9)
    fine, coarse = waves(3, 4, 6, 6, dtype=torch.float64), waves(3, 5, 3, 3, phase=1.0, dtype=torch.float64)
    # FactorTransfer of HobbitLong/RepDistiller@b84f547, distiller_zoo/FT.py
    found = factor_loss(F.avg_pool2d(fine, 2), coarse, "spatial")
    assert found.item() == pytest.approx(0.19362000202067092, rel=1e-9)


def test_paraphraser_and_translator_are_the_authors(waves):
    code, decode = layers((4, 4, 2, 2)).double(), layers((2, 2, 4, 4), back=True).double()
    translate = layers((6, 6, 2, 2)).double()
    for module in (nn.Sequential(code, decode), translate):
        for i, parameter in enumerate(module.parameters()):
            parameter.data.copy_(0.2 * waves(*parameter.shape, phase=0.3 * i, dtype=torch.float64))
    x, y = waves(3, 4, 5, 5, dtype=torch.float64), waves(3, 6, 5, 5, phase=1.0, dtype=torch.float64)
    # Models/FeatureProjection.py of Jangho-Kim/Factor-Transfer-pytorch@19cce26, with these parameters
    assert factor_loss(translate(y), code(x), "flat").item() == pytest.approx(0.0857582022654359, rel=1e-9)
    assert F.l1_loss(decode(code(x)), x).item() == pytest.approx(0.8407829562683008, rel=1e-9)


def test_factors_are_compared_up_to_their_length(waves):
    f_s, f_t = waves(3, 4, 5, 2), waves(3, 4, 5, 2, phase=1.0)
    expected = factor_loss(f_s, f_t, "flat")
    torch.testing.assert_close(factor_loss(3 * f_s, f_t / 2, "flat"), expected)
    assert factor_loss(f_s, -f_t, "flat") != expected
    assert factor_loss(f_s, -f_t, "spatial") == factor_loss(f_s, f_t, "spatial")


def test_the_term_compares_factors_on_the_common_grid(student, teacher, data, batch):
    method = FT(ft=10.0, rate=0.4, stage=1).assemble(student, teacher, data())
    s, t = method.translate(student.features[1]), method.paraphrase(teacher.features[1])
    assert s.shape[1] == t.shape[1] == 2
    expected = 10 * factor_loss(s, F.adaptive_avg_pool2d(t, 6), "flat").item()
    assert method.loss(student, teacher, batch())["ft"].item() == pytest.approx(expected, rel=1e-5)


def test_the_auto_encoder_learns_to_restore_the_teachers_map(monkeypatch):
    errors = []

    def watched(parameters, loss, batches, **keywords):
        errors.append(loss(next(iter(batches))).item())
        fit(parameters, loss, batches, **keywords)
        errors.append(loss(next(iter(batches))).item())

    monkeypatch.setattr("kdzoo.distillers.ft.fit", watched)
    together = toys.distillation(FT, {"epochs": 40, "stage": 1}, prepared=False)
    student = [parameter.clone() for parameter in together.student.parameters()]
    together.prepare([toys.batch_of(seed, size=16) for seed in range(2)])
    assert errors[1] < 0.8 * errors[0]
    assert all(torch.equal(a, b) for a, b in zip(student, together.student.parameters(), strict=True))
    assert not any(parameter.requires_grad for parameter in together.distiller.paraphrase.parameters())


def test_the_paraphraser_is_saved_and_not_trained(student, teacher, data, batch):
    method = FT(ce=0).assemble(student, teacher, data())
    method.loss(student, teacher, batch())["ft"].backward()
    assert all(parameter.grad is None for parameter in method.paraphrase.parameters())
    assert all(parameter.grad.abs().sum() > 0 for parameter in method.translate.parameters())
    assert {name.split(".")[0] for name in method.state_dict()} == {"translate", "paraphrase"}


def test_a_weight_of_zero_leaves_its_term_and_its_modules_out(student, teacher, data, batch):
    method = FT(ft=0).assemble(student, teacher, data())
    assert method.loss(student, teacher, batch()).keys() == {"ce"}
    assert not list(method.parameters())
    assert not method.needs.features


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"rate": 0.0}, "rate=0"),
        ({"form": "flap"}, "did you mean flat"),
        ({"epochs": 0}, "epochs"),
        ({"stage": 4}, "stage"),
    ],
)
def test_values_without_a_meaning_are_refused(student, teacher, data, wrong, message):
    with pytest.raises(UserError, match=message):
        FT(**wrong).assemble(student, teacher, data())
