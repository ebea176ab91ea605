"""The step that CUDA captures, but for the capture: on tensors that stay in place it gives the bits of plain ones."""

import pytest
import torch
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode

from kdzoo import Distiller, Fidelity, registry
from kdzoo.engine import graphs
from kdzoo.engine.graphs import Graphed
from kdzoo.engine.lane import Lane
from kdzoo.engine.passes import TeacherPasses
from kdzoo.engine.progress import Progress
from kdzoo.engine.training import build, common_loader, train_lanes
from kdzoo.errors import UserError
from kdzoo.losses import cross_entropy
from kdzoo.store.folder import RunFolder

from ..short_runs import settings
from ..zoo import METHODS

TRIED = ["protocol.augmentation.crop=1", "protocol.augmentation.flip=true"]


@pytest.fixture
def captured(monkeypatch):
    """Turns the captured path on; ``record``, what is said and how often it is checked may be set by the test."""

    class Path:
        checked = graphs.CHECKED
        said: list[str] = []  # noqa: RUF012

        @staticmethod
        def record(work, stream):
            return work  # where nothing is asynchronous, doing it again is a replay

    path = Path()
    path.said = []

    def steps(lane, shared, say):
        precision = lane.run.settings.engine.precision
        return Graphed(shared, lane.device, precision, path.said.append, lambda *work: path.record(*work), path.checked)

    monkeypatch.setattr(graphs, "steps", steps)
    return path


def students(outcomes):
    return [load_file(outcome.folder / "student.safetensors") for outcome in outcomes]


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def trained(out, names, dataset, teacher, *more):
    runs = [settings(out, name, *TRIED, *more) for name in names]
    return train_lanes(runs, dataset, teacher, Progress(quiet=True))


AGAIN = pytest.mark.slow(reason="trains what others train too, with one more setting each")


@pytest.mark.slow(reason="trains several runs")
@pytest.mark.parametrize(
    ("names", "more"),
    [
        (["kd", "uhkd", "none"], ["protocol.clip=1", "protocol.schedule=cosine"]),
        (["crd", "mlld"], ["protocol.optimizer=adamw", "protocol.lr=0.001", "protocol.ema=0.9"]),
        pytest.param(["kd", "lfcc"], ["protocol.augmentation.mixup=0.2"], marks=AGAIN),
        pytest.param(["kd", "uhkd"], ["engine.accumulate=2"], marks=AGAIN),
        pytest.param(["logitmse", "freekd"], ["engine.precision=bf16"], marks=AGAIN),
    ],
)
def test_steps_on_tensors_that_stay_in_place_end_with_the_bits_of_plain_ones(
    tmp_path, dataset, teacher, monkeypatch, captured, names, more
):
    still = trained(tmp_path / "still", names, dataset, teacher, *more)
    monkeypatch.undo()
    plain = trained(tmp_path / "plain", names, dataset, teacher, *more)
    for name, one, other in zip(names, students(still), students(plain), strict=True):
        assert same(one, other), name
    assert [outcome.top1 for outcome in still] == [outcome.top1 for outcome in plain]
    assert captured.said == []


@pytest.mark.slow(reason="trains several runs")
def test_the_teacher_still_sees_each_batch_once(tmp_path, dataset, teacher, captured):
    shown, captured.checked = [], 0
    teacher.network.register_forward_hook(lambda _network, images, _output: shown.append(images[0]))
    trained(tmp_path, ["kd", "uhkd", "logitmse"], dataset, teacher)
    assert len(shown) == 2 * (320 // 64)


@pytest.mark.slow(reason="trains several runs")
def test_the_teacher_sees_each_part_of_a_batch_once(tmp_path, dataset, teacher, captured):
    shown, captured.checked = [], 0
    teacher.network.register_forward_hook(lambda _network, images, _output: shown.append(len(images[0])))
    trained(tmp_path, ["kd", "uhkd"], dataset, teacher, "engine.accumulate=4")
    assert shown == [16] * (4 * 2 * (320 // 64))


@pytest.mark.slow(reason="trains several runs")
def test_a_lane_that_cannot_be_captured_goes_on_plainly_and_says_why(tmp_path, dataset, teacher, captured):
    calls = []

    def record(work, stream):
        calls.append(work)
        if len(calls) == 3:  # the teacher, the first lane, the second
            raise RuntimeError("operation not permitted when stream is capturing\nmore")
        return work

    captured.record = record
    beside = trained(tmp_path / "a", ["kd", "uhkd", "none"], dataset, teacher)
    assert len(captured.said) == 1
    assert captured.said[0].startswith("uhkd: ")
    assert captured.said[0].endswith("operation not permitted when stream is capturing")
    captured.record = lambda work, stream: work
    for one, other in zip(
        students(beside), students(trained(tmp_path / "b", ["kd", "uhkd", "none"], dataset, teacher)), strict=True
    ):
        assert same(one, other)


@pytest.mark.slow(reason="trains several runs")
def test_a_teacher_that_cannot_be_captured_leaves_all_lanes_plain(tmp_path, dataset, teacher, captured):
    def record(work, stream):
        raise RuntimeError("no")

    captured.record = record
    outcomes = trained(tmp_path / "a", ["kd", "uhkd"], dataset, teacher)
    assert len(captured.said) == 1
    assert "teacher cannot be a CUDA graph: no" in captured.said[0]
    captured.record = lambda work, stream: work
    for one, other in zip(
        students(outcomes), students(trained(tmp_path / "b", ["kd", "uhkd"], dataset, teacher)), strict=True
    ):
        assert same(one, other)


def nothing(work):
    return lambda: None


def the_first_again(work):
    """Writes what the first call wrote, as a graph would that read memory of the step in which it was captured."""
    calls = []

    def again():
        if not calls:
            calls.append(work())

    return again


def twice(work):
    return lambda: (work(), work())


WRONG = [("nothing", nothing), ("the first alone", the_first_again), ("twice", twice)]


@pytest.mark.slow(reason="trains several runs")
@pytest.mark.parametrize(("title", "wrong"), WRONG)
def test_a_lane_whose_graph_is_wrong_ends_with_the_bits_of_plain_steps(
    tmp_path, dataset, teacher, captured, title, wrong
):
    calls = []

    def record(work, stream):
        calls.append(work)
        return wrong(work) if len(calls) == 2 else work  # the teacher, then the first lane

    captured.record = record
    beside = trained(tmp_path / "a", ["kd", "uhkd"], dataset, teacher)
    assert [line.split(": ")[0] for line in captured.said] == ["kd"]
    assert captured.said[0].endswith("differ from those of a plain step")
    captured.record, captured.said[:] = lambda work, stream: work, []
    for one, other in zip(
        students(beside), students(trained(tmp_path / "b", ["kd", "uhkd"], dataset, teacher)), strict=True
    ):
        assert same(one, other)
    assert captured.said == []


@pytest.mark.slow(reason="trains several runs")
def test_a_teacher_whose_graph_is_wrong_leaves_all_lanes_plain(tmp_path, dataset, teacher, captured):
    calls = []

    def record(work, stream):
        calls.append(work)
        return the_first_again(work) if len(calls) == 1 else work

    captured.record = record
    outcomes = trained(tmp_path / "a", ["kd", "uhkd"], dataset, teacher)
    assert captured.said == ["all steps run kernel by kernel, as the teacher as a CUDA graph gives other outputs"]
    captured.record = lambda work, stream: work
    for one, other in zip(
        students(outcomes), students(trained(tmp_path / "b", ["kd", "uhkd"], dataset, teacher)), strict=True
    ):
        assert same(one, other)


@pytest.mark.slow(reason="trains several runs")
def test_without_checks_a_wrong_graph_is_not_noticed(tmp_path, dataset, teacher, captured):
    captured.checked, captured.record = 0, lambda work, stream: nothing(work)
    [wrong] = trained(tmp_path / "a", ["kd"], dataset, teacher)
    captured.record = lambda work, stream: work
    [right] = trained(tmp_path / "b", ["kd"], dataset, teacher)
    assert not same(*students([wrong, right]))


@pytest.mark.slow(reason="trains several runs")
def test_a_lane_that_fails_in_a_captured_step_stops_alone(tmp_path, dataset, teacher, captured):
    runs = [settings(tmp_path, "kd", *TRIED), settings(tmp_path, "kd", *TRIED, "distiller.kd=1e300")]
    good, bad = train_lanes(runs, dataset, teacher, Progress(quiet=True))
    assert "'kd' is not finite at step 0" in str(bad)
    [alone] = trained(tmp_path / "alone", ["kd"], dataset, teacher)
    assert same(*students([good, alone]))


@pytest.mark.slow(reason="trains several runs")
def test_muon_is_not_captured(tmp_path, dataset, teacher, captured):
    run = settings(tmp_path, "kd", "protocol.optimizer=muon", "protocol.lr=0.001", student="vit_pico")
    train_lanes([run], dataset, teacher, Progress(quiet=True))
    assert captured.said[0].endswith("Muon takes its learning rate from the host")


class Supervised(Distiller):
    """Cross-entropy with something of its own."""

    paper, fidelity = "none", Fidelity.EXACT

    def __init__(self, *, ce: float = 1.0):
        super().__init__(ce=ce)
        self.calls = 0
        self.register_buffer("level", torch.zeros(()))

    def loss(self, student, teacher, batch):
        self.change(student)
        return {"ce": cross_entropy(student.logits, batch.targets) + 0 * self.level}

    def change(self, student):
        self.level.lerp_(student.logits.detach().mean(), 0.1)


class Counting(Supervised):
    def change(self, student):
        self.calls += 1


class Rebinding(Supervised):
    def change(self, student):
        self.level = self.level + 1


@pytest.mark.parametrize(("kind", "said"), [(Supervised, None), (Counting, "calls"), (Rebinding, "level")])
def test_what_a_replay_would_leave_out_is_noticed(tmp_path, dataset, teacher, captured, monkeypatch, kind, said):
    monkeypatch.setattr(registry, "load", lambda name: kind)
    [outcome] = train_lanes([settings(tmp_path, "kd")], dataset, teacher, Progress(quiet=True))
    assert not isinstance(outcome, UserError)
    assert [line.split(": ")[-1] for line in captured.said] == (
        [f"it gives 'distiller.{said}' another value in Python"] if said else []
    )


class HostReads(TorchDispatchMode):
    """Notes what makes the host wait for a device, or sends it numbers of the host's."""

    WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2", "unique_dim", "lift_fresh")

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, operation, types, arguments=(), keywords=None):
        name = operation.overloadpacket.__name__
        if name in self.WAITING:
            self.found.append(name)
        if name == "index" and any(i is not None and i.dtype == torch.bool for i in arguments[1]):
            self.found.append("index by a mask")
        return operation(*arguments, **(keywords or {}))


def lane_of(run, dataset, teacher, folder):
    distillation = build(run, dataset, teacher).train()
    return Lane(run, distillation, RunFolder(folder), torch.device("cpu"), 5)


@pytest.mark.parametrize("name", METHODS)
def test_the_devices_part_of_a_step_asks_for_no_number(tmp_path, dataset, teacher, name):
    run = settings(tmp_path, name, "protocol.clip=1")
    shared = TeacherPasses(teacher.network)
    lane = lane_of(run, dataset, shared, tmp_path)
    batches = common_loader(run.settings, [lane.distillation], dataset).batches()
    for step in range(2):
        shared.forget()
        lane.step(next(batches), step)
    shared.forget()
    lane.begin(2)
    batch = next(batches)
    with HostReads() as reads:
        lane.advance(batch)
    assert reads.found == []


def test_a_read_would_be_found():
    with HostReads() as reads:
        float(torch.ones(3).sum())
        torch.ones(3)[torch.ones(3) > 0]
        torch.tensor(1.0)
    assert {"_local_scalar_dense", "index by a mask", "lift_fresh"} <= set(reads.found)
