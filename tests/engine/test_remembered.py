"""Where every epoch shows the teacher the same images it is asked once for each, and nothing but rounding changes."""

import io
from unittest.mock import patch

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from kdzoo import models
from kdzoo.data import open_dataset
from kdzoo.engine import remembered
from kdzoo.engine.passes import Teacher
from kdzoo.engine.progress import Progress, plain_console
from kdzoo.engine.remembered import Stored
from kdzoo.engine.training import train_lanes
from kdzoo.outputs import Output

from ..short_runs import distance, interrupted_at, same, settings

pytestmark = pytest.mark.slow(reason="trains runs whose teacher is asked once, and in each step")
STEPS = 320 // 64  # of an epoch
STILL = "protocol.augmentation.crop=0"
CHECKED = 2  # passes of a batch in its step, which tell whether the teacher answers as before
FIXED, DRAWN = STEPS + CHECKED, 2 * STEPS  # passes in two epochs


@pytest.fixture
def shown(teacher):
    """The images of each pass of the teacher."""
    shown = []
    teacher.network.register_forward_hook(lambda _network, images, _output: shown.append(images[0]))
    return shown


@pytest.fixture
def train(tmp_path, dataset, teacher):
    """Trains these methods side by side, in a folder of this name: their students' weights, and what was said."""

    def train(name, *methods, also=(STILL,), teacher=teacher, dataset=dataset):
        console = plain_console(file=io.StringIO(), width=1000)
        runs = [settings(tmp_path / name, method, *also) for method in methods]
        results = train_lanes(runs, dataset, teacher, Progress(console=console))
        return [load_file(result.folder / "student.safetensors") for result in results], console.file.getvalue()

    return train


def test_the_teacher_sees_each_image_once_however_many_methods_and_epochs_there_are(train, shown):
    train("a", "kd", "uhkd", "none")
    assert len(shown) == FIXED
    train("b", "kd", also=[STILL, "protocol.epochs=4"])
    assert len(shown) == 2 * FIXED


@pytest.mark.parametrize(
    ("also", "passes"),
    [
        (["protocol.augmentation.crop=1"], DRAWN),
        ([STILL, "protocol.augmentation.flip=true"], DRAWN),
        ([STILL, "protocol.augmentation.jitter=0.1"], DRAWN),
        ([STILL, "protocol.augmentation.erasing=0.1"], DRAWN),
        ([STILL, "protocol.augmentation.mixup=0.5"], DRAWN),
        ([STILL, "protocol.augmentation.rand_augment=rand-m9"], DRAWN),
        ([STILL, "protocol.augmentation.jitter=0.1", "protocol.teacher_view=plain"], FIXED),
        ([STILL, "protocol.augmentation.erasing=0.1", "protocol.teacher_view=plain"], FIXED),
        ([STILL, "protocol.augmentation.mixup=0.5", "protocol.teacher_view=plain"], DRAWN),
        ([STILL, "protocol.teacher_view=strong"], DRAWN),
        ([STILL, "engine.accumulate=2"], 2 * DRAWN),
        ([STILL, "protocol.epochs=1"], STEPS),
    ],
)
def test_it_is_asked_in_each_step_where_it_sees_other_images_each_time(train, shown, also, passes):
    train("a", "kd", also=also)
    assert len(shown) == passes


def test_images_that_are_streamed_are_shown_in_each_step(train, shown, dataset, monkeypatch):
    monkeypatch.setattr(dataset, "train_pixels", None)
    train("a", "kd")
    assert len(shown) == DRAWN


def test_what_a_method_shows_it_beside_the_batch_is_asked_in_the_step(train, shown):
    train("a", "kd", "mlld")  # which reads two views too
    assert len(shown) == FIXED + 2 * DRAWN
    shown.clear()
    train("b", "mlld")
    assert len(shown) == FIXED + 2 * DRAWN


def test_more_than_memory_may_hold_is_asked_in_each_step(train, shown, teacher, dataset, monkeypatch):
    everything = remembered.bytes_of(teacher.network, dataset.loader(settings("a", "kd").settings.protocol, seed=0))
    monkeypatch.setattr(remembered, "MOST", everything - 1)
    train("a", "kd")
    assert len(shown) == DRAWN
    monkeypatch.setattr(remembered, "MOST", everything)
    train("b", "kd")
    assert len(shown) == DRAWN + FIXED


@pytest.mark.parametrize("method", ["kd", "uhkd", "sdd", "ofd", "crd", "fitnet"])
def test_students_are_those_of_a_teacher_that_is_asked_in_each_step_but_for_rounding(train, shown, method, monkeypatch):
    [found], _ = train("a", method)
    [other], _ = train("b", method, also=[STILL, "seed=1"])
    monkeypatch.setattr(remembered, "MOST", 0)
    shown.clear()
    [asked], _ = train("c", method)
    assert len(shown) >= DRAWN
    assert distance(found, asked) < 0.02
    assert distance(other, asked) > 0.2  # as two seeds are


def test_a_run_alone_has_the_bits_of_one_beside_others_and_of_one_that_was_interrupted(train):
    [alone], _ = train("a", "kd")
    [viewing], _ = train("d", "mlld")
    beside = train("b", "uhkd", "kd", "ofd", "mlld")[0]
    with interrupted_at(STEPS + 2):
        train("c", "kd", also=[STILL, "engine.checkpoint_seconds=0"])
    [continued], said = train("c", "kd", also=[STILL, "engine.checkpoint_seconds=0"])
    assert f"resumed at step {STEPS + 2}" in said
    assert same(beside[1], alone)
    assert same(beside[3], viewing)
    assert same(continued, alone)


class Uncertain(nn.Module):
    """A teacher whose answers hang on the other images of a batch."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, images):
        return self.network(images).logits - images.mean()


def test_a_teacher_that_answers_otherwise_beside_other_images_is_asked_in_each_step(train, teacher):
    shown = []
    network = models.wrap(Uncertain(teacher.network), image_size=8, num_classes=10, name="mine")
    network.register_forward_hook(lambda _network, images, _output: shown.append(images[0]))
    _, said = train("a", "kd", teacher=Teacher(network.eval().requires_grad_(False), top1=10.0))
    assert "teacher mine is asked in each step, as its answers depend on the other images of a batch" in said
    assert len(shown) == FIXED + DRAWN


def test_a_teacher_that_draws_random_numbers_is_asked_in_each_step_with_the_same_bits_when_continued(train, teacher):
    teacher.network.classifier.register_forward_pre_hook(lambda _layer, given: nn.functional.dropout(given[0], 0.01))
    also = [STILL, "engine.checkpoint_seconds=0"]
    [alone], said = train("a", "kd", also=also)
    assert "teacher resnet14 is asked in each step, as it draws random numbers" in said
    with interrupted_at(STEPS + 2):
        train("b", "kd", also=also)
    [continued], _ = train("b", "kd", also=also)
    assert same(continued, alone)


class Alternating(Uncertain):
    """A teacher that answers every other time as if images were darker."""

    calls = 0

    def forward(self, images):
        self.calls += 1
        return self.network(images * (1 - self.calls % 2 / 2)).logits


class Noisy(Uncertain):
    """A teacher that adds noise from a generator apart."""

    def __init__(self, network):
        super().__init__(network)
        self.generator = torch.Generator().manual_seed(0)

    def forward(self, images):
        return self.network(images + torch.rand(images.shape, generator=self.generator)).logits


@pytest.mark.parametrize("kind", [Alternating, Noisy])
def test_a_teacher_that_answers_the_same_images_differently_each_time_is_asked_in_each_step(train, teacher, kind):
    shown = []
    network = models.wrap(kind(teacher.network), image_size=8, num_classes=10, name="mine")
    network.register_forward_hook(lambda _network, images, _output: shown.append(images[0]))
    _, said = train("a", "kd", teacher=Teacher(network.eval().requires_grad_(False), top1=10.0))
    assert "teacher mine is asked in each step, as it answers the same images differently each time" in said
    assert len(shown) == DRAWN


class Choosy(Uncertain):
    """A teacher that refuses a batch as small as what is left over from batches of 64."""

    def forward(self, images):
        if len(images) == 300 % 64:
            raise ValueError("batches of 64, please")
        return self.network(images).logits


def test_a_teacher_that_refuses_the_last_few_images_is_asked_in_each_step(train, teacher):
    network = models.wrap(Choosy(teacher.network), image_size=8, num_classes=10, name="mine")
    images = open_dataset("digits", limit=300)
    [found], said = train("a", "kd", teacher=Teacher(network.eval().requires_grad_(False), top1=10.0), dataset=images)
    assert "teacher mine is asked in each step, as it fails on all images beforehand: batches of 64, please" in said
    [plain], _ = train("b", "kd", dataset=images)
    assert distance(found, plain) < 0.02


def test_a_run_whose_steps_are_done_asks_nothing(train, shown):
    with pytest.raises(KeyboardInterrupt), patch("kdzoo.engine.training.finish", side_effect=KeyboardInterrupt):
        train("a", "kd", also=[STILL, "engine.checkpoint_seconds=0"])
    shown.clear()
    train("a", "kd", also=[STILL, "engine.checkpoint_seconds=0"])
    assert shown == []


def test_where_all_that_read_a_teacher_failed_before_training_nothing_is_asked(tmp_path, dataset, teacher, shown):
    runs = [settings(tmp_path, method, STILL) for method in ("ab", "none")]
    with patch("kdzoo.distillers.ab.AB.prepare", side_effect=ZeroDivisionError):
        failed, result = train_lanes(runs, dataset, teacher, Progress(quiet=True))
    assert "before training" in str(failed)
    assert result.folder.is_dir()
    assert shown == []


def test_code_is_compiled_for_the_student_alone(train, monkeypatch):
    made = []

    class Noted:
        def __init__(self, network, images, show, grad):
            made.append(network.name)
            self.code = network

        def __call__(self, images, show):
            return self.code(images, show)

    monkeypatch.setattr("kdzoo.engine.compiling.Compiled", Noted)
    train("a", "kd", also=[STILL, "engine.compile=on"])
    assert made == ["resnet8"]
    train("b", "kd", "mlld", also=[STILL, "engine.compile=on"])  # which asks for more than is known
    assert made == ["resnet8", "resnet14", "resnet8", "resnet8"]


@pytest.mark.parametrize(
    "batch",
    [
        torch.rand(5, 3),
        torch.rand(5, 3, 4, 2),
        torch.rand(5, 3, 4, 2).contiguous(memory_format=torch.channels_last),
        torch.rand(5, 9, 3)[:, 1:].mT.unflatten(2, (4, 2)),  # the map of tokens behind one of a class
        torch.rand(5, 3, 1, 1).bfloat16(),
    ],
)
def test_stored_rows_come_back_with_their_bits_in_their_layout(batch):
    stored = Stored.like(batch[:2], len(batch))
    for start in range(0, len(batch), 2):
        stored.write(batch[start : start + 2], start)
    index = torch.tensor([4, 0, 0, 3])
    found = stored.batch(index)
    assert torch.equal(found, batch[index])
    assert found.dtype == batch.dtype
    assert stored.rows.is_contiguous()
    dims = sorted(range(1, batch.ndim), key=batch.stride, reverse=True)
    assert [found.stride(dim) for dim in dims] == sorted((found.stride(dim) for dim in dims), reverse=True)
    found.zero_()
    assert torch.equal(stored.batch(index), batch[index])


def test_outputs_that_a_network_lacks_stay_absent(teacher):
    outputs = [Output(torch.rand(2, 3), torch.rand(2, 4), final=None)] * 2
    made = remembered.Remembered(remembered.TeacherPasses(teacher.network), outputs, 4, views=False)
    found = made.output(torch.tensor([3]))
    assert torch.equal(found.logits, outputs[1].logits[1:])
    assert found.features == ()
    assert found.final is None
