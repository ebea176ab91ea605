"""One module for anybody's loop: precision, modes and gradients are as promised."""

import copy

import pytest
import torch
from torch import nn

from kdzoo import Batch, DataSpec, Distillation, Distiller, Fidelity, Needs, Output, Seen
from kdzoo.distillation import ask


class Net(nn.Module):
    """A small network with dropout, batch norm and a notebook of the precisions it computed in."""

    def __init__(self, width=4):
        super().__init__()
        self.conv = nn.Conv2d(3, width, 3, padding=1)
        self.norm = nn.BatchNorm2d(width)
        self.head = nn.Linear(width, 5)
        self.seen = []

    def forward(self, images):
        feature = self.norm(self.conv(images)).relu()
        embedding = feature.mean((2, 3))
        logits = self.head(embedding)
        self.seen.append(logits.dtype)
        return Output(logits, embedding, (feature,) * 4)


class Shows(Net):
    """Shows what it is asked for."""

    wants_features, wants_preactivations, wants_final = True, False, False

    def shown(self):
        return self.wants_features, self.wants_preactivations, self.wants_final


class Probe(Distiller):
    """Records what it is shown."""

    paper = "none"
    fidelity = Fidelity.EXACT

    def __init__(self, **needs):
        super().__init__()
        self.needs = Needs(**needs)
        self.connector = nn.Linear(5, 5)
        self.dtypes = []

    def loss(self, student, teacher, batch):
        mapped = self.connector(student.logits)
        self.dtypes.append((student.logits.dtype, teacher.features[0].dtype, mapped.dtype))
        self.teacher_grad = teacher.logits.requires_grad
        return {"match": (mapped - teacher.logits).square().mean()}


@pytest.fixture
def batch():
    return Batch.of(torch.rand(4, 3, 6, 6), torch.tensor([0, 1, 2, 3]), num_classes=5)


def test_networks_run_in_the_callers_precision_and_losses_in_float32(batch):
    student, teacher, probe = Net(), Net(8), Probe()
    distillation = Distillation(student, teacher, probe)
    with torch.autocast("cpu", torch.bfloat16):
        terms = distillation(batch)
    assert student.seen == teacher.seen == [torch.bfloat16]
    assert probe.dtypes == [(torch.float32,) * 3]
    assert terms["match"].dtype == torch.float32
    distillation(batch)
    assert student.seen[-1] == torch.float32


def test_only_student_and_distiller_are_trained(batch):
    student, teacher, probe = Net(), Net(8), Probe()
    distillation = Distillation(student, teacher, probe).train()
    before = copy.deepcopy(teacher.state_dict())
    distillation(batch)["match"].backward()
    assert all(p.grad is not None for p in [*student.parameters(), *probe.parameters()])
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())
    assert all(torch.equal(before[name], value) for name, value in teacher.state_dict().items())
    assert not teacher.training
    assert student.training


def test_the_teachers_graph_is_kept_only_where_it_is_needed(batch):
    images = batch.images.clone().requires_grad_()
    batch = batch._replace(images=images)
    for wanted in (False, True):
        probe = Probe(teacher_grad=wanted)
        Distillation(Net(), Net(), probe)(batch)
        assert probe.teacher_grad == wanted


@pytest.mark.parametrize(
    ("needs", "student_shows", "teacher_shows"),
    [
        ({}, (True, False, False), (True, False, False)),
        ({"features": False}, (False, False, False), (False, False, False)),
        ({"preactivations": ("teacher",)}, (True, False, False), (True, True, False)),
        ({"preactivations": ("student",), "features": False}, (False, True, False), (False, False, False)),
        ({"final": True}, (True, False, True), (True, False, True)),
    ],
)
def test_networks_show_what_the_method_needs_and_no_more(needs, student_shows, teacher_shows):
    student, teacher = Shows(), Shows()
    student.wants_final = teacher.wants_final = True  # as another method may have left them
    Distillation(student, teacher, Probe(**needs))
    assert student.shown() == student_shows
    assert teacher.shown() == teacher_shows


def test_methods_that_share_a_network_are_shown_what_any_of_them_needs():
    teacher = Shows()
    ask(teacher, "teacher", [Needs(features=False), Needs(preactivations=("teacher",)), Needs(final=True)])
    assert teacher.shown() == (True, True, True)


def test_an_output_of_three_fields_is_whole(batch):
    output = Net()(batch.images).float()
    assert (output.preactivations, output.final) == ((), None)


def test_a_part_of_the_final_map_is_classified_as_the_method_sees_the_network():
    class Classifies(Net):
        def classify(self, means):
            return self.head(means)

    means = torch.rand(3, 4)
    assert Seen(Classifies()).classify(means).requires_grad
    assert not Seen(Classifies(), grad=False).classify(means).requires_grad


def test_a_method_without_a_teacher_trains_without_one(batch):
    probe = Probe(teacher=False)
    assert Distillation(Net(), None, probe)(batch)["match"].isfinite()
    with pytest.raises(ValueError, match="needs a teacher"):
        Distillation(Net(), None, Probe())


def test_the_phase_before_training_sees_the_networks_as_training_does(batch):
    class Phased(Probe):
        def prepare(self, student, teacher, batches):
            for batch in batches:
                self.shown = teacher(batch.images).logits

    phased = Phased()
    Distillation(Net(), Net(), phased).prepare([batch])
    assert phased.shown.dtype == torch.float32
    assert not phased.shown.requires_grad


def test_what_ships_is_the_student():
    student = Net()
    assert Distillation(student, Net(), Probe()).deploy() is student


def test_a_batch_from_ones_own_loader_is_complete():
    batch = Batch.of(torch.rand(2, 3, 4, 4), torch.tensor([2, 0]), num_classes=3, progress=0.25)
    assert batch.targets.tolist() == [[0, 0, 1], [1, 0, 0]]
    assert (batch.index.tolist(), float(batch.progress), batch.views, batch.partner) == (
        [0, 1],
        0.25,
        {},
        None,
    )


def test_a_data_spec_has_sensible_defaults():
    assert DataSpec("x", 2, ("a", "b"), 8, torch.zeros(0)).superclasses == ()
