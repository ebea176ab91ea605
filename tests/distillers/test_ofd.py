"""Partial distances of maps before their ReLU, and the margins of the teacher's."""

import numpy as np
import pytest
import torch
from kdzoo.distillers.ofd import OFD, partial_distance
from torch.nn import functional as F

from kdzoo import toys
from kdzoo.errors import UserError
from kdzoo.outputs import EVERYTHING


def reference(student, teacher, margin):
    """The paper's cases, number by number."""
    targets = np.maximum(teacher, margin[:, None, None])
    pairs = zip(student.ravel(), targets.ravel(), strict=True)
    return sum(0.0 if s <= t <= 0 else (s - t) ** 2 for s, t in pairs) / len(student)


def test_a_stage_is_the_partial_distance(waves):
    f_s, f_t = waves(3, 4, 5, 2, dtype=torch.float64), waves(3, 4, 5, 2, phase=1.0, dtype=torch.float64)
    margin = -waves(4, dtype=torch.float64).abs() / 2
    found = partial_distance(f_s, f_t, margin).item()
    assert found == pytest.approx(reference(f_s.numpy(), f_t.numpy(), margin.numpy()), rel=1e-9)
    # distillation_loss of clovaai/overhaul-distillation@76344a8, CIFAR-100/distiller.py, over the 3 images
    assert found == pytest.approx(22.460235533722926, rel=1e-9)
    assert partial_distance(f_s, f_t, margin * 0).item() != pytest.approx(found, rel=1e-2)


def test_only_numbers_that_both_rectify_cost_nothing():
    teacher, margin = torch.tensor([-3.0, -1, -3, 2]).view(1, 4, 1, 1), torch.tensor([-2.0, -2, -2, -2])
    student = torch.tensor([-5.0, -1.5, -0.5, 1]).view(1, 4, 1, 1).requires_grad_()
    partial_distance(student, teacher, margin).backward()
    assert student.grad.flatten().tolist() == [0, 0, 2 * (-0.5 + 2), 2 * (1 - 2)]


def prepared(**keywords):
    together = toys.distillation(OFD, keywords)
    return together, [toys.batch_of(seed) for seed in (101, 102)]


def test_margins_are_the_mean_of_the_negative_numbers_of_each_channel():
    together, batches = prepared(stages=(0, 2))
    for stage in (0, 2):
        maps = torch.cat([together.teacher(batch.images, EVERYTHING).preactivations[stage] for batch in batches])
        channels = maps.detach().double().transpose(0, 1).flatten(1).numpy()
        expected = [np.mean(values[values < 0]) if (values < 0).any() else 0 for values in channels]
        found = together.distiller.get_buffer(f"margin{stage}")
        np.testing.assert_allclose(found.numpy(), expected, rtol=1e-5)
        assert (found < 0).any()


def test_the_term_doubles_from_stage_to_stage_on_common_grids(student, teacher, data, batch):
    method = OFD(ofd=0.5, stages=(1, 2, 3)).assemble(student, teacher, data()).eval()
    expected = 0.0
    for stage, side, weight in ((1, 6, 0.25), (2, 4, 0.5), (3, 2, 1.0)):
        margin = -torch.arange(1, 6) / 4
        method.get_buffer(f"margin{stage}").copy_(margin)
        f_s, f_t = (F.adaptive_avg_pool2d(o.preactivations[stage], side) for o in (student, teacher))
        f_s = method.connectors[(1, 2, 3).index(stage)](f_s)
        f_s, f_t = (f.detach().double().numpy() for f in (f_s, f_t))
        expected += 0.5 * weight * reference(f_s, f_t, margin.numpy())
    assert method.loss(student, teacher, batch())["ofd"].item() == pytest.approx(expected, rel=1e-5)


def test_what_was_not_measured_is_not_taken_for_a_margin(student, teacher, data, batch):
    method = OFD().assemble(student, teacher, data())
    assert method.loss(student, teacher, batch())["ofd"].isnan()


def test_networks_that_hide_their_preactivations_are_refused(student, teacher, data):
    for pair in ((student._replace(preactivations=()), teacher), (student, teacher._replace(preactivations=()))):
        with pytest.raises(UserError, match=r"let its stages end in torch\.nn\.ReLU"):
            OFD().assemble(*pair, data())
    OFD().assemble(student, teacher, data())


def test_a_weight_of_zero_leaves_its_term_and_its_modules_out(student, teacher, data, batch):
    method = OFD(ofd=0).assemble(student, teacher, data())
    assert method.loss(student, teacher, batch()).keys() == {"ce"}
    assert not list(method.parameters())
    assert not method.needs.preactivations
    assert OFD(ce=0).assemble(student, teacher, data()).loss(student, teacher, batch()).keys() == {"ofd"}
