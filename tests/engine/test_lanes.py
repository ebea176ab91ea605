"""Lanes share a teacher pass and a batch, and otherwise know nothing of each other."""

import io
import weakref
from contextlib import nullcontext

import pytest
import torch
from safetensors.torch import load_file

from kdzoo.engine.lane import Epochs, Meter
from kdzoo.engine.measure import evaluate
from kdzoo.engine.passes import TeacherPasses
from kdzoo.engine.progress import Progress, plain_console
from kdzoo.engine.training import say_too_short, train_lanes
from kdzoo.errors import UserError
from kdzoo.outputs import LOGITS, Output, Show
from kdzoo.recipe import Protocol
from kdzoo.store.folder import RunFolder

from ..short_runs import settings


def students(outcomes):
    return [load_file(outcome.folder / "student.safetensors") for outcome in outcomes]


@pytest.mark.slow(reason="trains several runs")
def test_a_lane_ends_with_the_same_bits_as_the_run_alone(tmp_path, dataset, teacher):
    names = ["kd", "lfcc", "none", "reviewkd", "sdd"]  # each needs something else of the teacher
    together = train_lanes([settings(tmp_path / "a", n) for n in names], dataset, teacher, Progress(quiet=True))
    for name, beside in zip(names, students(together), strict=True):
        alone = train_lanes([settings(tmp_path / "b", name)], dataset, teacher, Progress(quiet=True))
        [single] = students(alone)
        assert all(torch.equal(beside[key], single[key]) for key in single), name


@pytest.mark.parametrize(
    ("names", "text"),
    [
        (["kd"], "distilling resnet8 from resnet14 with kd on digits"),
        (["none"], "training resnet8 on digits"),
        (["kd", "lfcc"], "training 2 runs side by side on digits"),
    ],
)
def test_a_training_says_what_it_is_and_each_of_its_slow_steps_has_a_line(
    tmp_path, dataset, teacher, names, text, monkeypatch
):
    now, batches = [0.0], dataset.loader
    console = plain_console(file=io.StringIO(), width=80)
    progress = Progress(console=console, clock=lambda: now[0], ticker=lambda work: nullcontext())

    class Slow:
        """The loader, on a machine where every step takes 20 s."""

        def __init__(self, *arguments, **keywords):
            self.loader = batches(*arguments, **keywords)

        def __getattr__(self, name):
            return getattr(self.loader, name)

        def batches(self, *steps):
            for batch in self.loader.batches(*steps):
                now[0] += 20
                progress.tick()
                yield batch

    monkeypatch.setattr(dataset, "loader", Slow)
    train_lanes([settings(tmp_path, name, "protocol.ema=0") for name in names], dataset, teacher, progress)
    lines = console.file.getvalue().splitlines()
    assert lines[:2] == [f"{text}: 2 epochs of 5 steps", "  still in step 1/10, 20 s so far"]
    assert sum("step" in line for line in lines) == 1 + 2 * (320 // 64)
    assert sum("epoch   2/2" in line for line in lines) == len(names)


@pytest.mark.parametrize(
    ("recipe", "steps", "said"),
    [
        (
            {"ema": 0.97},
            5,
            "after 5 steps 86% of the average, which is the student that is kept, are still the weights",
        ),
        ({"ema": 0.97}, 100, None),
        ({"ema": 0.54}, 5, None),
        ({"warmup": 8, "epochs": 2}, 5, "after 2 epochs the learning rate is at 25% of its height"),
        ({"warmup": 2, "epochs": 2}, 5, None),
    ],
)
def test_what_a_training_is_too_short_for_is_said(recipe, steps, said):
    console = plain_console(file=io.StringIO(), width=80)
    say_too_short(Protocol(**recipe), steps, Progress(console=console))
    assert said in console.file.getvalue() if said else not console.file.getvalue()


def test_a_phase_before_training_keeps_no_more_than_one_batch_of_the_teachers_outputs(dataset, teacher):
    shared, loader = TeacherPasses(teacher.network), dataset.loader(Protocol(batch_size=64), seed=0)
    kept = []
    with torch.no_grad():
        for batch in Epochs(loader, shared):
            kept.append(weakref.ref(shared(batch.images, LOGITS).logits))
    assert len(kept) == 320 // 64
    assert [ref() is not None for ref in kept] == [False] * 4 + [True]


@pytest.mark.slow(reason="trains several runs")
def test_the_teacher_sees_each_batch_once_whatever_the_number_of_lanes(tmp_path, dataset, teacher):
    shown = []
    teacher.network.register_forward_hook(lambda _network, images, _output: shown.append(images[0]))
    runs = [settings(tmp_path, "kd", f"distiller.temperature={t}") for t in (1, 2, 4)]
    train_lanes(runs, dataset, teacher, Progress(quiet=True))
    assert len(shown) == 2 * (320 // 64)


def test_a_lane_that_fails_stops_alone(tmp_path, dataset, teacher):
    runs = [settings(tmp_path, "kd"), settings(tmp_path, "kd", "distiller.kd=1.0e+39"), settings(tmp_path, "none")]
    good, bad, other = train_lanes(runs, dataset, teacher, Progress(quiet=True))
    assert isinstance(bad, UserError)
    assert "'kd' is not finite at step 0" in str(bad)
    assert good.epochs == other.epochs == 2
    assert RunFolder.of(runs[1]).read_result() is None


def test_a_method_that_does_not_fit_fails_before_training_and_alone(tmp_path, dataset, teacher):
    runs = [settings(tmp_path, "lfcc", "distiller.stages=[7]"), settings(tmp_path, "kd")]
    bad, good = train_lanes(runs, dataset, teacher, Progress(quiet=True))
    assert "stages" in str(bad)
    assert good.epochs == 2


class Counter(torch.nn.Module):
    """Counts its passes and notes what each showed."""

    def __init__(self):
        super().__init__()
        self.shown = []

    def forward(self, images, show):
        self.shown.append(show)
        maps = (images,) * 4
        return Output(images, images, maps, maps, images).only(show)


def test_a_shared_pass_is_forgotten_between_steps():
    counter = Counter()
    shared, images = TeacherPasses(counter), torch.rand(2, 3, 4, 4)
    with torch.no_grad():
        shared(images, LOGITS), shared(images, LOGITS), shared(images.clone(), LOGITS)
        assert len(counter.shown) == 2
        shared.forget()
        shared(images, LOGITS)
        assert len(counter.shown) == 3
    shared(images.requires_grad_(), LOGITS), shared(images, LOGITS)  # with a graph, each lane has its own pass
    assert len(counter.shown) == 5


def test_images_that_a_method_wrote_to_since_they_were_shown_are_other_images():
    counter = Counter()
    shared, images = TeacherPasses(counter), torch.rand(2, 3, 4, 4)
    with torch.no_grad():
        first = shared(images, LOGITS).logits.clone()
        second = shared(images.mul_(2), LOGITS).logits
    assert torch.equal(second, 2 * first)
    assert len(counter.shown) == 2


def test_one_pass_shows_what_all_lanes_need_and_each_lane_what_it_needs_itself():
    counter, images = Counter(), torch.rand(2, 3, 4, 4)
    features, final = Show(features=True), Show(features=False, final=True)
    shared = TeacherPasses(counter, features | final)
    with torch.no_grad():
        for show in (LOGITS, features, final):
            output = shared(images, show)
            assert len(output.features) == 4 * show.features
            assert (output.final is None) == (not show.final)
    assert counter.shown == [Show(features=True, final=True)]


def test_a_meter_names_the_first_term_that_went_bad():
    meter = Meter(torch.device("cpu"))
    for step in range(6):
        meter.add({"ce": torch.tensor(1.0), "kd": torch.tensor(float("nan") if step >= 4 else step)}, step)
    with pytest.raises(UserError, match="'kd' is not finite at step 4"):
        meter.read()
    fine = Meter(torch.device("cpu"))
    for step in range(4):
        fine.add({"ce": torch.tensor(float(step))}, step)
    assert fine.read() == {"ce": 1.5}


def test_out_of_memory_says_what_to_lower(tmp_path, dataset, teacher, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("kdzoo.engine.lane.Lane.step", full)
    [outcome] = train_lanes([settings(tmp_path, "kd")], dataset, teacher, Progress(quiet=True))
    assert "out of memory with batches of 64 on cpu; lower --batch-size" in str(outcome)


def test_an_error_of_any_kind_is_told_with_its_place(tmp_path, dataset, teacher, monkeypatch):
    def broken(*_):
        raise RuntimeError("a bug")

    monkeypatch.setattr("kdzoo.engine.lane.Lane.step", broken)
    [outcome] = train_lanes([settings(tmp_path, "kd")], dataset, teacher, Progress(quiet=True))
    assert "distiller 'kd' failed before training: RuntimeError: a bug (test_lanes.py, line" in str(outcome)
    assert isinstance(outcome.__cause__, RuntimeError)  # whose traceback --debug shows


def test_measuring_counts_the_whole_test_set(dataset):
    class Oracle(torch.nn.Module):
        def forward(self, images):
            rank = self.labels[self.seen : self.seen + len(images)]
            self.seen += len(images)
            logits = torch.zeros(len(images), 10).scatter(1, rank[:, None], 1.0)
            logits[::4] = -logits[::4]  # every fourth is ranked last
            return type("Output", (), {"logits": logits})

    oracle = Oracle()
    oracle.seen, oracle.labels = 0, torch.cat([labels for _, labels in dataset.test_batches(256)])
    top1, top5, _ = evaluate(oracle, dataset, "float32", batch_size=100)
    assert top1 == top5 == pytest.approx(75.0)
