"""The teacher's classifier on the student's projected map."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from kdzoo.distillers.simkd import SimKD
from torch import nn
from torch.nn import functional as F

from kdzoo import Batch, Distillation, Output
from kdzoo.errors import UserError


class Net(nn.Module):
    """Four convolutions and a classifier of the last map's mean, or of what ``embed`` makes of that."""

    def __init__(self, width, activation=F.relu, embed=None, bias=True):
        super().__init__()
        widths = (3, 4, 5, 6, width)
        self.layers = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1) for a, b in pairwise(widths))
        self.activation, self.embed = activation, embed
        self.classifier = nn.Linear(width, 10, bias=bias)

    def forward(self, images, show=None):
        maps = []
        for layer in self.layers:
            images = self.activation(layer(images))
            maps.append(images)
        embedding = images.mean((2, 3))
        embedding = embedding if self.embed is None else self.embed(embedding)
        return Output(self.classifier(embedding), embedding, tuple(maps))


@pytest.fixture
def pair(waves, data):
    """A prepared student of width 4, on a grid twice as fine, and its teacher; and a batch."""

    def build(teacher, **keywords):
        images = waves(6, 3, 8, 8)
        batch = Batch.of(images, torch.arange(6), 10)
        student, coarse = Net(4), Coarse(teacher)
        shapes = [network(images) for network in (student, coarse)]
        together = Distillation(student, coarse, SimKD(**keywords).assemble(*shapes, data()))
        together.prepare([batch])
        return together, batch

    return build


class Coarse(nn.Module):
    """A teacher at half the resolution."""

    def __init__(self, network):
        super().__init__()
        self.network, self.classifier = network, network.classifier

    def forward(self, images, show=None):
        return self.network(F.avg_pool2d(images, 2))


def numbers(tensor):
    return tensor.detach().double().numpy()


def projected(method, student, images):
    """P of the student's map in training, in plain numpy but for the 3x3 convolution."""
    maps = F.avg_pool2d(student(images).features[3], 2).double()
    for layer in method.projector.layers:
        if isinstance(layer, nn.Conv2d):
            maps = F.conv2d(maps, layer.weight.detach().double(), padding=layer.padding)
        elif isinstance(layer, nn.BatchNorm2d):
            mean, variance = maps.mean((0, 2, 3), keepdim=True), maps.var((0, 2, 3), correction=0, keepdim=True)
            maps = (maps - mean) / (variance + layer.eps).sqrt()
        else:
            maps = maps.clamp(min=0)
    return numbers(maps)


def test_last_maps_are_matched_and_rectified_as_the_teachers_are(pair):
    together, batch = pair(Net(6), simkd=2.0)
    seen = np.maximum(projected(together.distiller, together.student, batch.images), 0)
    target = numbers(together.teacher(batch.images).features[3])
    assert together(batch)["simkd"].item() == pytest.approx(2 * np.mean((seen - target) ** 2), rel=1e-4)


def test_a_teacher_with_negative_numbers_is_matched_without_a_relu(pair):
    together, batch = pair(Net(6, activation=torch.tanh))
    seen = projected(together.distiller, together.student, batch.images)
    target = numbers(together.teacher(batch.images).features[3])
    assert together(batch)["simkd"].item() == pytest.approx(np.mean((seen - target) ** 2), rel=1e-4)
    assert target.min() < 0


@pytest.mark.parametrize("embed", [lambda mean: mean + 1, lambda mean: F.layer_norm(mean, (6,))])
def test_an_embedding_that_is_not_the_maps_mean_is_matched_itself(pair, embed):
    together, batch = pair(Net(6, embed=embed))
    target = numbers(together.teacher(batch.images).embedding)
    seen = projected(together.distiller, together.student, batch.images)
    if target.min() >= 0:
        seen = np.maximum(seen, 0)
    expected = np.mean((seen.mean((2, 3)) - target) ** 2)
    assert together(batch)["simkd"].item() == pytest.approx(expected, rel=1e-4)


def test_an_embedding_of_another_width_is_matched_itself(pair):
    teacher = Net(6, embed=lambda mean: torch.cat([mean, -mean], dim=1))
    teacher.classifier = nn.Linear(12, 10)
    together, batch = pair(teacher)
    expected = projected(together.distiller, together.student, batch.images).mean((2, 3))
    target = numbers(together.teacher(batch.images).embedding)
    assert together(batch)["simkd"].item() == pytest.approx(np.mean((expected - target) ** 2), rel=1e-4)
    assert together.deploy()(batch.images).logits.shape == (6, 10)


@pytest.mark.parametrize("bias", [True, False])
def test_what_ships_classifies_the_mean_of_the_projection_as_the_teacher_would(pair, bias):
    teacher = Net(6, bias=bias)
    together, batch = pair(teacher)
    shipped = together.deploy()
    seen = shipped(batch.images)
    embedding = np.maximum(projected(together.distiller, together.student, batch.images), 0).mean((2, 3))
    expected = embedding @ numbers(teacher.classifier.weight).T
    if bias:
        expected = expected + numbers(teacher.classifier.bias)
    np.testing.assert_allclose(numbers(seen.logits), expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(numbers(seen.embedding), embedding, rtol=1e-4, atol=1e-5)
    own = together.student(batch.images).logits
    assert not torch.allclose(seen.logits, own, atol=0.01)


def test_the_head_is_the_teachers_own_before_and_after_training_and_a_copy(pair):
    teacher = Net(6)
    together, batch = pair(teacher)
    head = together.distiller.head
    trained = [p for p in together.parameters() if p.requires_grad]
    assert not any(p is own for p in trained for own in head.parameters())
    optimizer = torch.optim.SGD(trained, lr=0.1)
    before = together.student.layers[0].weight.clone()
    together(batch)["simkd"].backward()
    optimizer.step()
    assert torch.equal(head.weight, teacher.classifier.weight)
    assert head.weight is not teacher.classifier.weight
    assert not torch.equal(together.student.layers[0].weight, before)
    assert all(p.grad is None for p in teacher.parameters())


def test_state_restores_the_head_and_what_was_seen_of_the_teacher(pair, data):
    together, batch = pair(Net(6))
    shapes = [network(batch.images) for network in (together.student, together.teacher)]
    fresh = SimKD().assemble(*shapes, data())
    assert fresh.deploy(together.student)(batch.images).logits.isnan().all()  # no network's classifier
    fresh.load_state_dict(together.distiller.state_dict())
    logits = [method.deploy(together.student)(batch.images).logits for method in (together.distiller, fresh)]
    assert torch.equal(*logits)
    assert fresh.pooled
    assert fresh.projector.rectified


def test_shipping_keeps_the_students_mode(pair):
    together, _ = pair(Net(6))
    assert together.train().deploy().training
    assert not together.eval().deploy().training


def test_a_teacher_without_a_linear_classifier_is_the_users_error(pair):
    teacher = Net(6)
    teacher.classifier = nn.Sequential(nn.Linear(6, 10), nn.Tanh())
    with pytest.raises(UserError, match="linear classifier"):
        pair(teacher)


@pytest.mark.parametrize("factor", [0, 6])
def test_a_bottleneck_without_a_channel_is_the_users_error(student, teacher, data, factor):
    with pytest.raises(UserError, match=f"factor={factor}"):
        SimKD(factor=factor).assemble(student, teacher, data())  # of a teacher of width 5


def test_a_weight_of_zero_leaves_its_term_out_and_ships_the_student_as_it_is(pair):
    together, batch = pair(Net(6), simkd=0)
    assert together(batch) == {}
    assert together.deploy() is together.student
