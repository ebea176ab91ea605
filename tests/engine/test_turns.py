"""Several teachers that show their features by turns: each has modules of the method for itself."""

from functools import partial

import pytest
import torch
from safetensors.torch import load_file

from kdzoo import Batch, models, registry, toys
from kdzoo.distillation import Distillation
from kdzoo.distiller import DataSpec
from kdzoo.engine.lane import Lane
from kdzoo.engine.passes import Teacher
from kdzoo.engine.progress import Progress
from kdzoo.engine.training import train_lanes
from kdzoo.engine.turns import Turns
from kdzoo.errors import UserError
from kdzoo.models import Ensemble

from ..short_runs import interrupted_at, settings
from ..zoo import METHODS

STEPS = 320 // 64
SHIPPING = ("norm", "sfakd", "simkd")  # the student with modules that were trained beside one teacher


def networks(dataset, *names):
    torch.manual_seed(0)
    made = [models.create(name, dataset.spec).eval().requires_grad_(False) for name in names]
    return [network.to(memory_format=torch.channels_last) for network in made]  # as teachers are obtained


@pytest.fixture
def pair(dataset):
    """Two teachers of other widths, by turns."""
    return Teacher(Ensemble(networks(dataset, "resnet14", "resnet8x4"), turns=True), 10.0, each=(10.0, 10.0))


def train(out, method, dataset, teacher, *also):
    return train_lanes([settings(out, method, *also)], dataset, teacher, Progress(quiet=True))[0]


def student(outcome):
    return load_file(outcome.folder / "student.safetensors")


def same(some, others):
    return all(torch.equal(some[name], others[name]) for name in others)


def weights(lane):
    return [[p.detach().clone() for p in copy.parameters()] for copy in lane.distillation.distiller.copies]


@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "muon"])
def test_each_copy_of_a_method_learns_in_its_own_turns_alone(tmp_path, dataset, pair, monkeypatch, optimizer):
    advance, changed = Lane.step, []

    def noted(lane, batch, step):
        before = weights(lane)
        advance(lane, batch, step)
        now = weights(lane)
        changed.append([not all(map(torch.equal, a, b)) for a, b in zip(before, now, strict=True)])

    monkeypatch.setattr(Lane, "step", noted)
    train(tmp_path, "fitnet", dataset, pair, f"protocol.optimizer={optimizer}", "protocol.muon_every=1")
    assert changed == [[True, False], [False, True]] * STEPS  # two epochs of five steps


def test_all_parts_of_a_batch_are_of_one_turn(tmp_path, dataset, pair, monkeypatch):
    shown, forward = [], Turns.forward
    monkeypatch.setattr(
        Turns, "forward", lambda self, *given: shown.append(given[1].network.shown) or forward(self, *given)
    )
    train(tmp_path, "fitnet", dataset, pair, "engine.accumulate=2")
    assert shown == [0, 0, 1, 1] * STEPS


def test_a_phase_before_training_is_of_each_teacher_alone(dataset, pair):
    network = pair.network
    method = Turns(registry.load("nd"), network)
    batches = [toys.batch_of()._replace(images=torch.rand(8, 3, 8, 8), labels=torch.arange(8))]
    Distillation(networks(dataset, "resnet8")[0], network, method, data=dataset.spec).prepare(batches)
    for copy, one in zip(method.copies, network.each, strict=True):
        alone = registry.load("nd")()
        Distillation(networks(dataset, "resnet8")[0], one, alone, data=dataset.spec).prepare(batches)
        assert torch.equal(copy.directions, alone.directions)


@pytest.mark.slow(reason="trains several runs")
@pytest.mark.parametrize("method", ["fitnet", "nd"])
def test_an_interrupted_run_ends_with_the_bits_of_one_that_was_not(tmp_path, dataset, pair, method):
    with interrupted_at(STEPS + 2):
        train(tmp_path / "a", method, dataset, pair, "engine.checkpoint_seconds=0")
    resumed, whole = (student(train(tmp_path / name, method, dataset, pair)) for name in ("a", "b"))
    assert same(resumed, whole)


@pytest.mark.slow(reason="trains several runs")
def test_lanes_take_the_same_turns_as_a_run_alone(tmp_path, dataset, pair):
    names = ("fitnet", "kd", "none")
    outcomes = train_lanes([settings(tmp_path / "a", name) for name in names], dataset, pair, Progress(quiet=True))
    for name, beside in zip(names, outcomes, strict=True):
        assert same(student(beside), student(train(tmp_path / "b", name, dataset, pair)))


@pytest.mark.slow(reason="trains several runs")
def test_turns_change_what_a_method_of_features_learns_and_nothing_of_a_method_of_logits(tmp_path, dataset, pair):
    still = Teacher(Ensemble(pair.network.each), 10.0)
    for method, differs in (("fitnet", True), ("kd", False)):
        one, other = (student(train(tmp_path / name, method, dataset, t)) for name, t in (("a", pair), ("b", still)))
        assert same(one, other) != differs


@pytest.mark.parametrize("method", SHIPPING)
def test_a_method_that_ships_modules_is_one_line_before_training(tmp_path, dataset, pair, method):
    failure = train(tmp_path, method, dataset, pair)
    assert isinstance(failure, UserError)
    assert "ships modules that belong to one teacher; name it with teacher.features" in str(failure)
    assert "\n" not in str(failure)


@pytest.mark.parametrize("turns", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_learns_from_several_teachers(method, turns):
    torch.manual_seed(0)
    spec = DataSpec("fake", 4, tuple("abcd"), 16, torch.arange(4), superclasses=(0, 0, 1, 1))
    teachers = [models.create(name, spec).eval().requires_grad_(False) for name in ("resnet14", "resnet8x4")]
    teacher, make = Ensemble(teachers, turns=turns), partial(registry.load(method))
    takes = turns and make().needs.teacher
    if takes and method in SHIPPING:
        with pytest.raises(UserError, match="ships modules"):
            Turns(make, teacher)
        return
    distiller = Turns(make, teacher) if takes else make()
    batch = toys.batch_of()
    small = torch.nn.functional.interpolate
    batch = batch._replace(
        images=small(batch.images, (16, 16)),
        views={name: small(v.flatten(0, -4), (16, 16)).unflatten(0, v.shape[:-3]) for name, v in batch.views.items()},
    )
    spec = spec._replace(labels=torch.arange(64) % 4)
    distillation = Distillation(models.create("resnet8", spec), teacher, distiller, data=spec).train()
    distillation.prepare([batch])
    for step in range(2):
        teacher.take_turn(step)
        terms = distillation(batch)
        sum(terms.values()).backward()
        assert all(term.isfinite() for term in terms.values())
        if takes and list(distiller.copies[0].parameters()):
            reached = [any(p.grad is not None for p in copy.parameters()) for copy in distiller.copies]
            assert reached[step] or not any(p.requires_grad for p in distiller.copies[step].parameters())


def test_by_turns_too_a_method_learns_without_labels(dataset, pair):
    torch.manual_seed(0)
    network, spec = models.create("resnet8", dataset.spec), dataset.spec
    turns = Turns(partial(registry.load("fitnet")), pair.network)
    together = Distillation(network, pair.network, turns, data=spec, labelled=False)
    assert together.left_out == ["ce"]
    images = torch.rand(4, 3, spec.image_size, spec.image_size)
    for turn in range(2):
        pair.network.take_turn(turn)
        assert together(Batch.of(images)).keys() == {"hint"}


def test_errors_name_the_method_and_not_its_turns(dataset, pair):
    turns, student = Turns(partial(registry.load("fcfd")), pair.network), models.create("test_vit", dataset.spec)
    assert student.inseparable
    with pytest.raises(UserError, match="FCFD calls the student's stages one by one"):
        Distillation(student, pair.network, turns, data=dataset.spec)
