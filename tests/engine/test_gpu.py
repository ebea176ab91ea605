"""On a GPU: steps are graphs, wait for nothing, and give what plain steps give."""

import pytest
import torch
from safetensors.torch import load_file

from kdzoo import Distiller, Fidelity, models, precision, registry
from kdzoo.data import open_dataset
from kdzoo.engine import graphs
from kdzoo.engine.device import resolve_auto
from kdzoo.engine.lane import Lane
from kdzoo.engine.passes import Teacher, TeacherPasses
from kdzoo.engine.progress import Progress
from kdzoo.engine.training import build, train_lanes
from kdzoo.errors import UserError
from kdzoo.experiments.run import evaluate_run
from kdzoo.losses import cross_entropy
from kdzoo.models import cast_weights
from kdzoo.store.folder import RunFolder

from .. import short_runs

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and torch sees none here"),
]

ON_GPU = ["protocol.epochs=3", "data.limit=640", "engine.device=cuda", "engine.precision=auto"]


def settings(out, distiller, *more, **networks):
    return resolve_auto(short_runs.settings(out, distiller, *ON_GPU, *more, **networks))


@pytest.fixture(scope="module")
def dataset():
    return open_dataset("digits", limit=640, device="cuda")


@pytest.fixture
def teacher(dataset):
    torch.manual_seed(0)
    network = models.create("resnet14", dataset.spec).cuda().to(memory_format=torch.channels_last)
    return Teacher(network.eval().requires_grad_(False), top1=10.0)


class Said(Progress):
    """Keeps what is said."""

    def __init__(self):
        super().__init__(quiet=True)
        self.lines = []

    def say(self, text):
        self.lines.append(text)


def train(out, names, dataset, teacher, *more, **networks):
    """The trained students by name, with their first epochs' losses, and what was said."""
    progress = Said()
    runs = [settings(out, name, *more, **networks) for name in names]
    outcomes = train_lanes(runs, dataset, teacher, progress)
    assert not any(isinstance(outcome, UserError) for outcome in outcomes), outcomes
    weights = {n: load_file(o.folder / "student.safetensors") for n, o in zip(names, outcomes, strict=True)}
    losses = {
        n: [sum(epoch["loss"].values()) for epoch in RunFolder(o.folder).read_history()]
        for n, o in zip(names, outcomes, strict=True)
    }
    return weights, losses, [line for line in progress.lines if "CUDA graph" in line]


def distance(one, other):
    """The greatest difference of any two weights."""
    return max((one[key].double() - other[key].double()).abs().max().item() for key in one)


def spread(one, other):
    """The root mean square of all differences; Adam moves weights whose gradient is nearly 0 either way."""
    squares = torch.cat([(one[key].double() - other[key].double()).flatten().square() for key in one])
    return squares.mean().sqrt().item()


def captured(monkeypatch):
    """Counts captures."""
    counted, record = [], graphs.cuda_graph

    def count(work, stream):
        counted.append(work)
        return record(work, stream)

    monkeypatch.setattr(graphs, "cuda_graph", count)
    return counted


@pytest.mark.parametrize("precision", ["float32", "tf32", "bf16"])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_graphs_and_plain_steps_agree_within_the_spread_of_plain_ones(
    tmp_path, dataset, teacher, monkeypatch, precision, optimizer
):
    more = [f"engine.precision={precision}", f"protocol.optimizer={optimizer}", "protocol.lr=0.005", "protocol.clip=1"]
    counted = captured(monkeypatch)
    names = ["kd", "uhkd"]
    one, _, said = train(tmp_path / "graph", names, dataset, teacher, *more)
    assert len(counted) == 3, "the teacher and two lanes"
    assert said == []
    first, _, _ = train(tmp_path / "first", names, dataset, teacher, *more, "engine.graph=off")
    second, _, _ = train(tmp_path / "second", names, dataset, teacher, *more, "engine.graph=off")
    assert len(counted) == 3
    for name in names:
        assert spread(one[name], first[name]) <= 10 * spread(first[name], second[name]) + 1e-3


def test_dropout_in_a_graph_draws_what_a_plain_step_draws_for_every_lane(tmp_path, dataset, teacher, monkeypatch):
    class Noisy(Distiller):
        """The loss is a sum of draws, so it tells one draw from another."""

        paper, fidelity = "none", Fidelity.EXACT

        def __init__(self, *, ce: float = 1.0):
            super().__init__(ce=ce)

        def loss(self, student, teacher, batch):
            kept = torch.nn.functional.dropout(torch.ones(1000, device=student.logits.device), 0.5)
            return {
                "ce": cross_entropy(student.logits, batch.targets),
                # A term that reaches no trained weight is refused.
                "draws": kept[::3].sum() + torch.rand_like(kept)[0] + 0 * student.logits.sum(),
            }

    monkeypatch.setattr(registry, "load", lambda name: Noisy)
    seen = {}
    for mode in ("on", "off"):
        runs = [settings(tmp_path / mode, n, f"engine.graph={mode}") for n in ("kd", "uhkd")]
        for outcome in train_lanes(runs, dataset, teacher, Said()):
            draws = [epoch["loss"]["draws"] for epoch in RunFolder(outcome.folder).read_history()]
            seen.setdefault(mode, []).append(draws)
    assert len(set(seen["on"][0])) == 3, "each epoch draws anew"
    assert seen["on"] == [seen["on"][0]] * 2 == seen["off"]


@pytest.mark.parametrize("name", ["kd", "uhkd", "crd", "lfcc", "ofa"])
def test_a_step_waits_for_nothing(tmp_path, dataset, teacher, name, never_waits):
    run = settings(tmp_path, name, "protocol.clip=1", "protocol.ema=0.9")
    shared = TeacherPasses(teacher.network)
    lane = Lane(run, build(run, dataset, shared).train(), RunFolder(tmp_path), torch.device("cuda"), 10)
    batches = dataset.loader(run.settings.protocol, seed=0).batches()
    for step in range(3):
        shared.forget()
        lane.step(next(batches), step)
    with never_waits():
        for step in range(3, 6):
            batch = next(batches)  # within one epoch, so that no new order is fetched
            shared.forget()
            lane.step(batch, step)
    assert lane.meter.read()


def test_batches_come_without_waiting(dataset, never_waits):
    augmentation = {"crop": 1, "flip": True, "jitter": 0.2, "erasing": 0.5, "mixup": 0.2, "cutmix": 1.0}
    more = [f"protocol.augmentation.{key}={value}" for key, value in augmentation.items()]
    run = settings("unused", "kd", *more)
    batches = dataset.loader(run.settings.protocol, seed=0, views=("weak", "rotations")).batches()
    next(batches)  # fetches the order of the epoch
    with never_waits():
        drawn = [next(batches) for _ in range(5)]
    assert all(batch.images.is_cuda for batch in drawn)


def test_an_average_follows_captured_steps(tmp_path, dataset, teacher):
    more = ["protocol.ema=0.9", "engine.precision=float32", "protocol.lr=0.005"]
    one, _, said = train(tmp_path / "graph", ["kd"], dataset, teacher, *more)
    other, _, _ = train(tmp_path / "plain", ["kd"], dataset, teacher, *more, "engine.graph=off")
    assert said == []
    assert distance(one["kd"], other["kd"]) < 1e-2


def test_a_lane_that_fails_leaves_the_others_captured_steps_alone(tmp_path, dataset, teacher):
    runs = [settings(tmp_path, "kd"), settings(tmp_path, "kd", "distiller.kd=1.0e+39"), settings(tmp_path, "none")]
    good, bad, other = train_lanes(runs, dataset, teacher, Said())
    assert "'kd' is not finite at step 0" in str(bad)
    assert good.epochs == other.epochs == 3


def test_a_run_that_goes_on_is_captured_anew(tmp_path, dataset, teacher, monkeypatch):
    more = ["engine.checkpoint_seconds=0", "engine.precision=float32", "protocol.lr=0.005"]
    whole, _, _ = train(tmp_path / "whole", ["crd"], dataset, teacher, *more)
    advance, left = Lane.begin, [12]

    def cut(self, step):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        advance(self, step)

    monkeypatch.setattr(Lane, "begin", cut)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "cut", ["crd"], dataset, teacher, *more)
    monkeypatch.setattr(Lane, "begin", advance)
    resumed, _, _ = train(tmp_path / "cut", ["crd"], dataset, teacher, *more)
    assert distance(whole["crd"], resumed["crd"]) < 1e-2


class Reading(Distiller):
    """Asks for the loss in every step."""

    paper, fidelity = "none", Fidelity.EXACT

    def __init__(self, *, ce: float = 1.0):
        super().__init__(ce=ce)

    def loss(self, student, teacher, batch):
        loss = cross_entropy(student.logits, batch.targets)
        return {"ce": loss * (1.0 if loss.item() > 0 else 2.0)}


class Drawing(Reading):
    """Draws on the host."""

    def loss(self, student, teacher, batch):
        return {"ce": cross_entropy(student.logits, batch.targets) * float(torch.rand(()) < 2)}


@pytest.mark.parametrize(("kind", "reason"), [(Reading, "reads the device at"), (Drawing, "draws random numbers")])
def test_a_method_that_needs_the_host_runs_plainly_beside_the_others(
    tmp_path, dataset, teacher, monkeypatch, kind, reason
):
    load = registry.load
    monkeypatch.setattr(registry, "load", lambda name: kind if name == "none" else load(name))
    runs = [settings(tmp_path, "kd"), settings(tmp_path, "none"), settings(tmp_path, "uhkd")]
    progress = Said()
    outcomes = train_lanes(runs, dataset, teacher, progress)
    assert [outcome.epochs for outcome in outcomes] == [3, 3, 3]
    said = [line for line in progress.lines if "CUDA graph" in line]
    assert len(said) == 1
    assert reason in said[0]


def test_a_capture_that_breaks_leaves_a_run_that_works(tmp_path, dataset, teacher, monkeypatch):
    record, calls = graphs.cuda_graph, []

    def breaking(work, stream):
        calls.append(work)

        def broken():
            work()
            torch.cuda.synchronize()  # which no capture may contain

        return record(broken if len(calls) == 2 else work, stream)

    monkeypatch.setattr(graphs, "cuda_graph", breaking)
    _, losses, said = train(tmp_path, ["kd", "uhkd"], dataset, teacher)
    assert len(said) == 1
    assert said[0].startswith("kd: ")
    assert losses["kd"][-1] < losses["kd"][0]


def test_switches_go_together_with_graphs(tmp_path, dataset, teacher):
    for name, more in {
        "parts": ["engine.accumulate=2"],
        "mixed": ["protocol.augmentation.mixup=0.2"],
        "views": [],
        "again": ["engine.checkpoint_activations=true"],
        "muon": ["protocol.optimizer=muon", "protocol.lr=0.001"],
    }.items():
        method = "mlld" if name == "views" else "kd"
        student = "vit_tiny_patch16_224" if name in ("again", "muon") else "resnet8"
        _, losses, said = train(tmp_path / name, [method], dataset, teacher, *more, student=student)
        assert bool(said) == (name in ("again", "muon")), said
        assert losses[method][-1] < losses[method][0]


def test_a_compiled_run_agrees_with_a_plain_one(tmp_path, dataset, teacher):
    more = ["engine.precision=float32", "protocol.lr=0.005"]
    _, compiled, _ = train(tmp_path / "compiled", ["kd"], dataset, teacher, *more, "engine.compile=true")
    _, plain, _ = train(tmp_path / "plain", ["kd"], dataset, teacher, *more, "engine.graph=off")
    assert compiled["kd"] == pytest.approx(plain["kd"], rel=2e-2)


@pytest.mark.parametrize("name", ["resnet8x4", "vit_tiny_patch16_224", "swin_pico_patch4_window7_224", "test_convnext"])
def test_a_cast_teacher_has_the_bits_of_autocast(dataset, name):
    network = models.create(name, dataset.spec).cuda().to(memory_format=torch.channels_last)
    assert cast_weights(network.eval().requires_grad_(False), torch.bfloat16) is not network


def test_losses_take_no_tf32(tmp_path, dataset, teacher, monkeypatch):
    seen = []

    class Looking(Reading):
        def loss(self, student, teacher, batch):
            seen.append(precision.current())
            return {"ce": cross_entropy(student.logits, batch.targets)}

    monkeypatch.setattr(registry, "load", lambda name: Looking)
    inside = []
    teacher.network.register_forward_pre_hook(lambda *_: inside.append(precision.current()))
    before = precision.current()
    train(tmp_path, ["kd"], dataset, teacher, "engine.precision=tf32", "engine.graph=off", "protocol.epochs=1")
    assert set(seen) == {precision.IEEE}
    assert precision.TF32 in inside
    assert precision.current() == before


def test_what_ships_measures_the_same_again(tmp_path, dataset, teacher):
    [outcome] = train_lanes([settings(tmp_path, "kd")], dataset, teacher, Said())
    top1, _ = evaluate_run(outcome.folder)
    assert top1 == pytest.approx(outcome.top1, abs=0.5)
