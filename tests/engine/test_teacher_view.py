"""What the teacher sees is a setting of the recipe: methods, phases, micro-batches and kept logits follow it."""

import pytest
import torch
from safetensors.torch import load_file

from kdzoo.distillation import Distillation
from kdzoo.distiller import Batch, Distiller, Fidelity
from kdzoo.engine.progress import Progress
from kdzoo.engine.training import train_lanes
from kdzoo.losses import cross_entropy

from ..short_runs import interrupted_at, settings

STEPS = 320 // 64
FLIP = "protocol.augmentation.flip=true"
WEAK = (FLIP, "protocol.augmentation.crop=1", "protocol.teacher_view=weak")


@pytest.fixture
def train(tmp_path, dataset, teacher, monkeypatch):
    """Train a method in a folder of this name: the student's weights."""
    monkeypatch.setenv("KDZOO_CACHE", str(tmp_path / "cache"))

    def train(name, method, *also):
        [outcome] = train_lanes([settings(tmp_path / name, method, *also)], dataset, teacher, Progress(quiet=True))
        return load_file(outcome.folder / "student.safetensors")

    return train


@pytest.fixture
def shown(teacher):
    """The images of each pass of the teacher."""
    images = []
    teacher.network.register_forward_hook(lambda _network, given, _output: images.append(given[0].clone()))
    return images


def views(dataset, *also):
    """The weak views of all steps, as methods are given them."""
    protocol = settings("unused", "kd", *also).settings.protocol
    return [batch.views["weak"] for batch in dataset.loader(protocol, seed=0, views=("weak",)).batches()]


def same(some, others):
    return all(torch.equal(some[name], others[name]) for name in others)


@pytest.mark.parametrize("parts", [1, 2])
def test_the_teacher_sees_the_view_that_was_asked_for_and_the_student_its_own(train, dataset, shown, parts):
    train("a", "kd", *WEAK, f"engine.accumulate={parts}")
    expected = [rows for view in views(dataset, *WEAK) for rows in view.chunk(parts)]
    assert len(shown) == len(expected) == 2 * STEPS * parts
    assert all(torch.equal(seen, view) for seen, view in zip(shown, expected, strict=True))


def test_a_phase_before_training_is_shown_the_same_view(train, dataset, shown):
    train("a", "nd", *WEAK)
    expected = views(dataset, *WEAK)
    assert len(shown) == len(expected) + STEPS  # an epoch of the phase comes first
    assert all(torch.equal(seen, view) for seen, view in zip(shown, expected[:STEPS] + expected, strict=True))


@pytest.mark.slow(reason="trains several runs")
def test_students_differ_by_what_their_teacher_sees(train):
    students = [train(view, "kd", *WEAK[:2], f"protocol.teacher_view={view}") for view in ("same", "weak", "strong")]
    assert not same(students[0], students[1])
    assert not same(students[1], students[2])
    assert same(train("plain", "kd", *WEAK[:2], "protocol.teacher_view=plain"), students[0])  # nothing else changes


@pytest.mark.slow(reason="trains several runs")
@pytest.mark.parametrize("method", ["tfkd", "none"])
def test_a_method_without_a_teacher_is_the_same_under_every_view(train, method):
    assert same(train("a", method, *WEAK[:2]), train("b", method, *WEAK))


@pytest.mark.slow(reason="trains several runs")
@pytest.mark.parametrize("method", ["kd", "nd", "crld"])
def test_an_interrupted_run_ends_with_the_bits_of_one_that_was_not(train, method):
    with interrupted_at(STEPS + 2):
        train("a", method, *WEAK, "engine.checkpoint_seconds=0")
    assert same(train("a", method, *WEAK), train("b", method, *WEAK))


@pytest.mark.slow(reason="trains several runs")
def test_kept_logits_are_those_of_the_teachers_pictures(train, shown):
    keep = "teacher.keep=logits"
    keeping = train("a", "kd", *WEAK, keep)
    assert len(shown) == 2 * STEPS
    shown.clear()
    assert same(train("b", "kd", *WEAK, keep), keeping)
    assert shown == []
    near, far = train("c", "kd", *WEAK), train("d", "kd", *WEAK[:2], keep)
    assert len(shown) == 2 * 2 * STEPS  # another view's logits are not read
    distances = [sum((keeping[key] - other[key]).abs().sum() for key in keeping) for other in (near, far)]
    assert distances[0] < 0.1 * distances[1]


class Shy(Distiller):
    """Without a teacher; its phase remembers the pictures that the student saw."""

    paper, fidelity = "none", Fidelity.EXACT

    def __init__(self, *, ce: float = 1.0):
        super().__init__(ce=ce)
        self.needs = type(self.needs)(teacher=False, features=False)

    def prepare(self, student, teacher, batches):
        self.seen = [student(batch.images).logits for batch in batches]

    def loss(self, student, teacher, batch):
        return self.weigh(ce=lambda: cross_entropy(student.logits, batch.targets))


def test_the_student_never_sees_the_teachers_pictures(teacher):
    network = teacher.network
    batch = Batch.of(torch.rand(4, 3, 8, 8), torch.arange(4), 10)._replace(teacher_images=torch.rand(4, 3, 8, 8))
    shy = Shy()
    distillation = Distillation(network, None, shy, num_classes=10, image_size=8).eval()
    distillation.prepare([batch])
    assert torch.equal(shy.seen[0], network(batch.images).logits)
    expected = cross_entropy(network(batch.images).logits, batch.targets)
    assert torch.equal(distillation(batch)["ce"], expected)
