"""N copies of the teacher's map inside a linear transform of the student's."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from kdzoo.distillers.norm import Norm, n_to_one_loss, scaled_logits
from scipy.special import log_softmax
from torch import nn
from torch.nn import functional as F

from kdzoo import Batch, Distillation, Output, Show
from kdzoo.errors import UserError


class Net(nn.Module):
    """Four convolutions and a classifier of the last map's mean."""

    def __init__(self, width, stride=1):
        super().__init__()
        widths = (3, 4, 5, 6, width)
        self.layers = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1) for a, b in pairwise(widths))
        self.classifier, self.stride = nn.Linear(width, 10), stride

    def classify(self, means):
        return self.classifier(means)

    def forward(self, images, show=None):
        maps = []
        for layer in self.layers:
            images = F.relu(layer(images))
            maps.append(images)
        last = F.avg_pool2d(images, self.stride)
        embedding = last.mean((2, 3))
        return Output(self.classifier(embedding), embedding, (*maps[:3], last), final=last)


@pytest.fixture
def pair(waves, data):
    """A student of width 4, its teacher of width 6, and a batch."""

    def build(s_stride=1, t_stride=1, **keywords):
        torch.manual_seed(0)
        images = waves(6, 3, 8, 8)
        batch = Batch.of(images, torch.arange(6), 10, progress=0.5)
        student, teacher = Net(4, s_stride), Net(6, t_stride)
        shapes = [network(images) for network in (student, teacher)]
        return Distillation(student, teacher, Norm(**keywords).assemble(*shapes, data())), batch

    return build


def numbers(tensor):
    return tensor.detach().double().numpy()


def normal(maps, norm):
    mean, variance = maps.mean((0, 2, 3), keepdims=True), maps.var((0, 2, 3), keepdims=True)
    return (maps - mean) / np.sqrt(variance + norm.eps)


def transformed(method, maps):
    """The wide map, and what the student's classifier sees, in numpy."""
    (widen, one), (narrow, two) = method.widen, method.narrow
    wide = normal(np.einsum("oi,bihw->bohw", numbers(widen.weight)[:, :, 0, 0], maps), one)
    return wide, maps + normal(np.einsum("oi,bihw->bohw", numbers(narrow.weight)[:, :, 0, 0], wide), two)


def bent(logits):
    return 2.5 * (logits - logits.mean(1, keepdims=True)) / np.sqrt(logits.var(1, keepdims=True) + 1e-7)


def test_the_terms_are_those_of_the_transformed_student(pair):
    together, batch = pair(norm=3.0, kd=0.5, copies=4)
    student, teacher = (network(batch.images) for network in (together.student, together.teacher))
    wide, seen = transformed(together.distiller, numbers(student.final))
    expected = sum(np.mean((wide[:, 6 * n : 6 * n + 6] - numbers(teacher.final)) ** 2) for n in range(4))
    terms = together(batch)
    assert terms["norm"].item() == pytest.approx(3 * expected, rel=1e-5)
    logits = seen.mean((2, 3)) @ numbers(together.student.classifier.weight).T
    logits = logits + numbers(together.student.classifier.bias)
    ce = -log_softmax(bent(logits), axis=1)[range(6), range(6)].mean()
    assert terms["ce"].item() == pytest.approx(0.1 * ce, rel=1e-4)
    s, t = (log_softmax(bent(z) / 4, axis=1) for z in (logits, numbers(teacher.logits)))
    assert terms["kd"].item() == pytest.approx(0.5 * 16 * (np.exp(t) * (t - s)).sum(1).mean(), rel=1e-4)
    plain = -log_softmax(bent(numbers(student.logits)), axis=1)[range(6), range(6)].mean()
    assert ce != pytest.approx(plain, rel=1e-3)


def test_the_loss_is_what_the_authors_code_gives(waves):
    student, teacher = waves(4, 24, 4, 4, dtype=torch.float64), waves(4, 3, 8, 8, phase=1.0, dtype=torch.float64)
    found = n_to_one_loss(student, F.adaptive_max_pool2d(teacher, 4)).item()
    assert found == pytest.approx(20.75735222215392, rel=1e-9)  # OSVAI/NORM@c6dfc39, helper/loops.py
    assert n_to_one_loss(student, F.adaptive_avg_pool2d(teacher, 4)).item() != pytest.approx(found, rel=1e-2)


@pytest.mark.parametrize(("s_stride", "t_stride"), [(1, 2), (2, 1), (1, 8)])
def test_the_finer_map_is_pooled_the_teachers_by_its_largest(pair, s_stride, t_stride):
    together, batch = pair(s_stride, t_stride, copies=2)
    student, teacher = (network(batch.images).final for network in (together.student, together.teacher))
    wide, _ = transformed(together.distiller, numbers(student))
    side = min(student.shape[2], teacher.shape[2])
    target = numbers(F.adaptive_max_pool2d(teacher, side))
    wide = F.adaptive_avg_pool2d(torch.from_numpy(wide), side).numpy()
    expected = sum(np.mean((wide[:, 6 * n : 6 * n + 6] - target) ** 2) for n in range(2))
    assert together(batch)["norm"].item() == pytest.approx(expected, rel=1e-4)


def test_the_factor_follows_the_authors_epochs(pair):
    together, batch = pair()
    at = {p: together(batch._replace(progress=torch.tensor(p / 240)))["norm"].item() for p in (0, 9.9, 10, 19, 20)}
    at |= {
        p: together(batch._replace(progress=torch.tensor(p / 240)))["norm"].item() for p in (179, 180, 209, 210, 239)
    }
    shares = [value / at[20] for value in at.values()]
    assert shares == pytest.approx([0.1, 0.1, 0.5, 0.5, 1, 1, 0.5, 0.5, 0.1, 0.1], rel=1e-5)


@pytest.mark.parametrize("scale", [2.5, 0.0])
def test_what_ships_is_the_trained_student_with_one_more_layer(pair, scale):
    together, batch = pair(scale=scale, copies=3)
    optimizer = torch.optim.SGD([p for p in together.parameters() if p.requires_grad], lr=0.1)
    for _ in range(5):  # so that norms have weights and statistics
        optimizer.zero_grad()
        sum(together(batch).values()).backward()
        optimizer.step()
    method, student = together.distiller.eval(), together.student
    maps = student(batch.images).final
    logits = student.classify((maps + method.narrow(method.widen(maps))).mean((2, 3)))
    expected = scaled_logits(logits, scale)
    shipped = together.deploy()
    torch.testing.assert_close(shipped(batch.images).logits, expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(
        shipped(batch.images).logits, scaled_logits(student(batch.images).logits, scale), atol=0.01
    )
    added = sum(p.numel() for p in shipped.parameters()) - sum(p.numel() for p in student.parameters())
    assert added == 4 * 4 + 4
    seen = shipped(batch.images, Show(features=True))
    assert [f.shape[1] for f in seen.features] == [4, 5, 6, 4]


def test_shipping_keeps_modes_and_changes_nothing_in_training(pair):
    together, _ = pair()
    before = {name: value.clone() for name, value in together.state_dict().items()}
    assert together.train().deploy().training
    assert together.distiller.widen.training
    assert all(torch.equal(value, before[name]) for name, value in together.state_dict().items())
    assert not together.eval().deploy().training


def test_logits_have_a_fixed_spread(waves):
    scaled = scaled_logits(waves(4, 10), 2.5)
    torch.testing.assert_close(scaled.mean(1), torch.zeros(4), atol=1e-6, rtol=0)
    torch.testing.assert_close(scaled.std(1, correction=0), torch.full((4,), 2.5))
    torch.testing.assert_close(scaled_logits(5 * waves(4, 10) - 3, 2.5), scaled)
    assert torch.equal(scaled_logits(waves(4, 10), 0.0), waves(4, 10))


def test_two_classes_are_the_users_error_where_logits_are_normalised(student, teacher, data):
    with pytest.raises(UserError, match="at least 3"):
        Norm().assemble(student, teacher, data(2))
    outputs = [o._replace(final=o.features[-1]) for o in (student, teacher)]
    assert Norm(scale=0.0).assemble(*outputs, data(2)).widen[0].weight.shape == (40, 10, 1, 1)


def test_a_student_that_averages_no_map_is_the_users_error_in_one_line(student, teacher, data):
    with pytest.raises(UserError, match="this student has none") as error:
        Norm().assemble(student, teacher, data())
    assert "\n" not in str(error.value)


def test_a_weight_of_zero_leaves_the_student_as_it_is(pair):
    together, batch = pair(norm=0, kd=1.0)
    assert together(batch).keys() == {"ce", "kd"}
    assert not list(together.distiller.parameters())
    assert together.deploy() is together.student
    assert not together.distiller.needs.final


@pytest.mark.parametrize(("keywords", "message"), [({"copies": 0}, "copies=0"), ({"scale": -1.0}, "scale=-1")])
def test_a_bad_keyword_is_the_users_error(keywords, message):
    with pytest.raises(UserError, match=message):
        Norm(**keywords)
