"""Flows between stages, and the phase in which the student learns them."""

import numpy as np
import pytest
import torch
from kdzoo.distillers.fsp import FSP, Flow
from torch import nn
from torch.nn import functional as F

from kdzoo import Output, toys
from kdzoo.errors import UserError


def flow(first, second):
    grids = [maps.shape[2:] for maps in (first, second)]
    size = [min(sides) for sides in zip(*grids, strict=True)]
    a, b = (F.adaptive_avg_pool2d(maps.detach().double(), size).numpy() for maps in (first, second))
    return np.einsum("bchw,bdhw->bcd", a, b) / np.prod(size)


@pytest.mark.parametrize("grid", [(5, 2), (3, 4), (1, 1)])
def test_a_flow_is_the_mean_product_of_channels(waves, grid):
    first, second = waves(3, 4, 5, 2), waves(3, 6, *grid, phase=1.0)
    np.testing.assert_allclose(Flow(first, second)(first, second).numpy(), flow(first, second), rtol=1e-4, atol=1e-6)


def test_the_loss_is_that_of_the_reference_code(waves):
    def shown(phase):
        maps = [(4, 6), (5, 3), (6, 3)]
        shift = (0.0, 0.5, 0.7)
        features = [
            waves(3, c, n, n, phase=phase + s, dtype=torch.float64) for (c, n), s in zip(maps, shift, strict=True)
        ]
        return Output(torch.zeros(3, 4), torch.zeros(3, 6), (*features, torch.zeros(3, 6, 1, 1)))

    student, teacher = shown(0.0), shown(1.0)
    method = FSP(stages=(0, 1, 2)).assemble(student, teacher, toys.data())
    # FSP of HobbitLong/RepDistiller@b84f547, distiller_zoo/FSP.py
    expected = 0.03052192493511132 + 0.14155418498774158
    assert method.error(student, teacher, [nn.Identity()] * 3).item() == pytest.approx(expected, rel=1e-9)


def test_the_loss_sums_the_errors_of_flows_on_each_networks_grids(student, teacher, data):
    method = FSP(stages=(0, 1, 3)).assemble(student, teacher, data())
    projectors = [nn.Conv2d(a, 5, 1, bias=False) for a in (4, 6, 10)]
    s_maps = [project(student.features[l]) for project, l in zip(projectors, (0, 1, 3), strict=True)]
    t_maps = [teacher.features[l] for l in (0, 1, 3)]
    expected = sum(np.mean((flow(*s_maps[i : i + 2]) - flow(*t_maps[i : i + 2])) ** 2) for i in (0, 1))
    assert method.error(student, teacher, projectors).item() == pytest.approx(expected, rel=1e-5)


def test_flows_are_blind_to_the_order_of_positions_and_to_nothing_else(waves):
    first, second = waves(3, 4, 5, 2), waves(3, 6, 5, 2, phase=1.0)
    compare = Flow(first, second)
    expected = compare(first, second)
    torch.testing.assert_close(compare(first.flip(2), second.flip(2)), expected)
    assert (compare(first.flip(2), second) - expected).abs().max() > 0.01


def test_the_phase_before_training_brings_flows_closer_and_leaves_the_classifier_alone():
    together = toys.distillation(
        FSP, {"epochs": 20, "lr": 0.1, "fsp": 10.0}, prepared=False, teacher=toys.Toy(toys.STUDENT)
    )
    batch = toys.batch_of(5, size=16)

    def error():
        outputs = [network(batch.images, together.distiller.needs.show("student")) for network in (student, teacher)]
        return together.distiller.error(*outputs, [nn.Identity()] * 4).item()

    student, teacher = together.student, together.teacher
    before = error(), student.classifier.weight.clone()
    together.prepare([toys.batch_of(seed, size=16) for seed in range(4)])
    assert error() < 0.5 * before[0]
    assert torch.equal(student.classifier.weight, before[1])


def test_a_weight_of_zero_leaves_the_phase_out():
    together = toys.distillation(FSP, {"fsp": 0.0}, prepared=False)
    before = [parameter.clone() for parameter in together.student.parameters()]
    together.prepare([toys.batch_of()])
    assert all(torch.equal(a, b) for a, b in zip(before, together.student.parameters(), strict=True))


def test_training_itself_reads_logits_alone(student, teacher, data, batch):
    method = FSP(kd=1.0).assemble(student, teacher, data())
    assert method.loss(student, teacher, batch()).keys() == {"ce", "kd"}
    assert not list(method.parameters())


@pytest.mark.parametrize("wrong", [{"epochs": 0}, {"lr": 0.0}, {"stages": (0, 4)}, {"stages": (2,)}])
def test_values_without_a_meaning_are_refused(student, teacher, data, wrong):
    with pytest.raises(UserError, match="expected"):
        FSP(**wrong).assemble(student, teacher, data())
