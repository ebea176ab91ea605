"""Hints from a middle map."""

import numpy as np
import pytest
import torch
from kdzoo.distillers.fitnet import FitNet

from kdzoo.errors import UserError


@pytest.mark.parametrize("relu", [False, True])
def test_the_connector_is_a_1x1_convolution_and_batch_norm_on_the_smaller_grid(student, teacher, data, batch, relu):
    method = FitNet(stage=2, relu=relu).assemble(student, teacher, data())  # 4 x 4 under 7 x 7
    f_s, f_t = (o.features[2].detach().double() for o in (student, teacher))
    pooled = torch.nn.functional.adaptive_avg_pool2d(f_t, 4).numpy()
    weight = method.connector[0].weight.detach().double()[:, :, 0, 0].numpy()
    mixed = np.einsum("oc,bchw->bohw", weight, f_s.numpy())
    mean, variance = mixed.mean((0, 2, 3), keepdims=True), mixed.var((0, 2, 3), keepdims=True)
    seen = (mixed - mean) / np.sqrt(variance + 1e-5)
    if relu:
        seen = np.maximum(seen, 0)
    term = method.loss(student, teacher, batch())["hint"].item()
    assert term == pytest.approx(100 * np.mean((seen - pooled) ** 2), rel=1e-5)


def test_only_the_stage_that_was_asked_for_is_matched(student, teacher, data, batch):
    FitNet(ce=0, stage=1).assemble(student, teacher, data()).loss(student, teacher, batch())["hint"].backward()
    assert [f.grad is not None for f in student.features] == [False, True, False, False]


def test_training_brings_the_connector_to_the_teachers_map(student, teacher, data, batch):
    method = FitNet(ce=0, hint=1.0).assemble(student, student, data())
    optimizer = torch.optim.Adam(method.parameters(), lr=0.05)
    values = []
    for _ in range(60):
        optimizer.zero_grad()
        term = method.loss(student, student, batch())["hint"]
        term.backward()
        optimizer.step()
        values.append(term.item())
    assert values[-1] < 0.2 * values[0]  # the map itself is within reach


def test_a_weight_of_zero_leaves_its_term_and_its_modules_out(student, teacher, data, batch):
    method = FitNet(hint=0).assemble(student, teacher, data())
    assert method.loss(student, teacher, batch()).keys() == {"ce"}
    assert not list(method.parameters())
    assert not method.needs.features
    method = FitNet(ce=0).assemble(student, teacher, data())
    assert method.needs.features
    assert method.loss(student, teacher, batch()).keys() == {"hint"}


def test_a_stage_that_does_not_exist_is_the_users_error(student, teacher, data):
    with pytest.raises(UserError, match="expected distinct numbers from 0 to 3"):
        FitNet(stage=4).assemble(student, teacher, data())
