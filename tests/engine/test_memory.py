"""Groups are as large as memory holds: what lanes take is counted, and what does not fit waits or is tried again."""

import errno
import gc
import resource
import weakref
from dataclasses import replace
from types import SimpleNamespace

import psutil
import pytest
import torch

from kdzoo import models
from kdzoo.data import Loader
from kdzoo.engine import loop, memory
from kdzoo.engine.memory import Cost, packed, together
from kdzoo.engine.progress import Progress
from kdzoo.engine.training import train_lanes
from kdzoo.errors import OutOfMemory, UserError, is_shortage
from kdzoo.experiments import estimate, suites, work
from kdzoo.experiments.bench import bench
from kdzoo.experiments.estimate import packs, stepped
from kdzoo.models import Network
from kdzoo.store.folder import RunFolder

from ..short_runs import settings

ON = ["protocol.epochs=1", "data.limit=128", "engine.device=cpu", "engine.precision=float32"]


def suite(folder):
    file = folder / "mine.yaml"
    file.write_text("pairs: [[resnet14, resnet8]]\ndistillers: [none, kd, logitmse, dist, {name: kd, temperature: 1}]")
    return suites.load(str(file), overrides=[*ON, "teacher.epochs=8", "teacher.allow_weak=true"])


def test_lanes_take_turns_so_only_one_step_counts_beside_what_all_keep():
    assert together([Cost(10, 5), Cost(20, 50), Cost(30, 7)]) == 60 + 50
    assert together([]) == 0


@pytest.mark.parametrize(
    ("room", "expected"),
    [(1000, [[0, 1, 2, 3]]), (45, [[0, 1, 2], [3]]), (35, [[0, 1], [2], [3]]), (0, [[0], [1], [2], [3]])],
)
def test_as_many_lanes_side_by_side_as_memory_holds_and_at_least_one(room, expected):
    assert packed([Cost(10, 5), Cost(10, 10), Cost(10, 15), Cost(10, 60)], room) == expected


def test_what_a_lane_keeps_is_its_weights_and_the_optimisers(tmp_path, dataset):
    run = settings(tmp_path, "none", "protocol.name=crd", "protocol.epochs=1")
    [(_, lane, batch)] = stepped([run], dataset, None, {})
    cost = memory.weigh(lane, batch)
    weights = sum(p.nbytes for p in lane.trained.parameters())
    assert 2 * weights < cost.kept < 2.2 * weights  # with momentum
    assert not list(tmp_path.iterdir())


def test_a_step_on_larger_batches_takes_more(tmp_path, dataset, teacher):
    costs = []
    for size in (32, 64):
        run = settings(tmp_path, "kd", f"protocol.batch_size={size}")
        [(_, lane, batch)] = stepped([run], dataset, teacher.network, {})
        costs.append(memory.weigh(lane, batch))
    assert costs[0].kept == costs[1].kept
    assert 1.5 < costs[1].passing / costs[0].passing < 2


def test_there_is_memory_and_it_is_counted_in_bytes():
    assert 2**24 < memory.free(torch.device("cpu")) < 2**46


def test_a_share_of_the_device_is_of_all_of_it(monkeypatch):
    monkeypatch.setattr(memory.psutil, "virtual_memory", lambda: SimpleNamespace(available=600, total=1000))
    monkeypatch.setattr(memory, "container", lambda: (float("inf"), 0))
    assert [memory.free(torch.device("cpu"), share) for share in (1.0, 0.5, 0.25)] == [600, 500, 250]


@pytest.mark.parametrize(
    ("folder", "names", "limit", "expected"),
    [
        ("", ("memory.max", "memory.current", "inactive_file"), "700", (500, 350)),
        ("", ("memory.max", "memory.current", "inactive_file"), "max", (600, 500)),
        ("memory", ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"), "700", (500, 350)),
        ("memory", ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"), f"{2**63}", (600, 500)),
        ("", ("memory.max", "memory.current", "renamed"), "700", (600, 500)),
    ],
)
def test_a_container_has_what_its_limit_leaves(tmp_path, monkeypatch, folder, names, limit, expected):
    monkeypatch.setattr(memory.psutil, "virtual_memory", lambda: SimpleNamespace(available=600, total=1000))
    monkeypatch.setattr(memory, "CGROUPS", tmp_path)
    (tmp_path / folder).mkdir(exist_ok=True)
    (tmp_path / folder / names[0]).write_text(f"{limit}\n")
    (tmp_path / folder / names[1]).write_text("300\n")
    (tmp_path / folder / "memory.stat").write_text(f"cache 150\n{names[2]} 100\n")
    assert tuple(memory.free(torch.device("cpu"), share) for share in (1.0, 0.5)) == expected


def test_tensors_are_counted_wherever_they_lie():
    assert memory.bytes_of({"a": [torch.zeros(3), {"b": torch.zeros(2, dtype=torch.int64)}], "c": 5, "d": None}) == 28


def test_a_group_is_split_by_what_is_free_and_says_so(tmp_path, dataset, teacher, monkeypatch, capsys):
    runs = [settings(tmp_path, name) for name in ("none", "kd", "logitmse")]
    assert packs(runs, dataset, teacher, Progress()) == [runs]
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(memory, "free", lambda device, share: 0)
    assert packs(runs, dataset, teacher, Progress()) == [[run] for run in runs]
    assert "memory does not hold all 3 runs side by side: 3 parts" in capsys.readouterr().err


@pytest.mark.parametrize(("crop", "parts"), [(1, 1), (0, 2)])  # images that are never changed are shown to it once
def test_answers_of_the_teacher_that_are_kept_take_room_too(tmp_path, dataset, teacher, monkeypatch, crop, parts):
    more = ["protocol.epochs=2", f"protocol.augmentation.crop={crop}"]
    runs = [settings(tmp_path, name, *more) for name in ("none", "kd")]
    costs = [Cost(0, 0), Cost(2**20, 0)]
    monkeypatch.setattr(memory, "weigh", lambda lane, batch: costs[lane.run.settings.distiller.name == "kd"])
    monkeypatch.setattr(memory, "free", lambda device, share: (2**20 + 1) / memory.ROOM)
    assert len(packs(runs, dataset, teacher, Progress(quiet=True))) == parts
    whole = estimate.cost_of(runs, dataset, teacher.network)
    assert len(whole.packs(range(2))) == parts


def test_where_a_number_of_lanes_is_asked_for_nothing_is_weighed(tmp_path, dataset, teacher, monkeypatch):
    monkeypatch.setattr(memory, "weigh", None)
    runs = [settings(tmp_path, name, "engine.lanes=3") for name in ("none", "kd", "logitmse")]
    assert packs(runs, dataset, teacher, Progress(quiet=True)) == [runs]


def test_a_run_that_cannot_be_built_is_left_for_training_to_report(tmp_path, dataset, teacher):
    runs = [settings(tmp_path, "lfcc", "distiller.stages=[7]"), settings(tmp_path, "kd")]
    assert packs(runs, dataset, teacher, Progress(quiet=True)) == [runs]


def test_a_run_that_is_too_large_by_itself_stands_alone(tmp_path, dataset, teacher, monkeypatch):
    runs = [settings(tmp_path, name) for name in ("none", "kd", "logitmse")]
    step = estimate.Lane.step

    def full(lane, batch, number):
        if lane.run.settings.distiller.name == "kd":
            raise torch.OutOfMemoryError("CUDA out of memory")
        step(lane, batch, number)

    monkeypatch.setattr(estimate.Lane, "step", full)
    assert packs(runs, dataset, teacher, Progress(quiet=True)) == [runs[:1], runs[1:2], runs[2:]]


@pytest.mark.slow(reason="trains ten runs")
def test_the_division_does_not_change_any_result(tmp_path):
    whole, split = tmp_path / "whole", tmp_path / "split"
    bench(suite(tmp_path), whole, quiet=True)
    divided = suite(tmp_path)
    divided = replace(divided, runs=tuple(run.within(engine={"lanes": 2}) for run in divided.runs))
    bench(divided, split, quiet=True)
    results = [
        sorted((f.parent.name, f.read_bytes()) for f in out.glob("*/student.safetensors")) for out in (whole, split)
    ]
    assert results[0] == results[1]
    assert len(results[0]) == 5


@pytest.mark.slow(reason="trains several runs")
def test_runs_that_memory_did_not_hold_are_tried_again_half_as_many_at_a_time(tmp_path, monkeypatch):
    tried = []

    def train(runs, *rest):
        tried.append([run.settings.distiller.name for run in runs])
        fitting = train_lanes(runs[:2], *rest)
        return [*fitting, *(OutOfMemory("out of memory") for _ in runs[2:])]

    monkeypatch.setattr(work, "train_lanes", train)
    report = bench(suite(tmp_path), tmp_path / "runs", quiet=True)
    assert len(report.finished) == 5
    assert [len(names) for names in tried] == [5, 2, 1]
    assert not report.failed


@pytest.mark.slow(reason="trains several runs")
def test_nothing_of_a_try_that_did_not_fit_is_left_at_the_next(tmp_path, monkeypatch):
    class Cycle:
        def __init__(self):
            self.itself = self

    left = []

    def train(runs, *rest):
        assert not any(cycle() for cycle in left)
        left.append(weakref.ref(Cycle()))
        assert left[-1]() is not None
        return [OutOfMemory("out of memory") for _ in runs]

    monkeypatch.setattr(work, "train_lanes", train)
    runs = [settings(tmp_path, name) for name in ("none", "kd")]
    for run in runs:
        RunFolder.of(run).path.mkdir()
    gc.disable()
    try:
        work.train_together(runs, None, None, Progress(quiet=True))
    finally:
        gc.enable()
    assert len(left) == 3


def test_a_process_with_a_limit_keeps_a_reserve_for_libraries(monkeypatch):
    monkeypatch.setattr(memory, "RESERVE", 2**60)
    memory.check_reserve()
    monkeypatch.setattr(memory, "process_limit", lambda: 2.0**40)
    with pytest.raises(RuntimeError) as error:
        memory.check_reserve()
    assert is_shortage(error.value)


@pytest.mark.slow(reason="trains several runs")
def test_a_run_that_does_not_fit_alone_has_failed(tmp_path, monkeypatch):
    def train(runs, *rest):
        full = [run.settings.distiller.name == "dist" for run in runs]
        return [
            OutOfMemory("out of memory") if bad else train_lanes([r], *rest)[0]
            for r, bad in zip(runs, full, strict=True)
        ]

    monkeypatch.setattr(work, "train_lanes", train)
    report = bench(suite(tmp_path), tmp_path / "runs", quiet=True)
    assert len(report.finished) == 4
    assert list(report.failed.values()) == ["out of memory"]


def test_a_student_that_does_not_even_fit_in_memory_is_out_of_memory(tmp_path, dataset, teacher, monkeypatch):
    build = models.create

    def full(name, *rest, **options):
        if name == "resnet20":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return build(name, *rest, **options)

    monkeypatch.setattr(models, "create", full)
    runs = [settings(tmp_path, "kd", "student.name=resnet20"), settings(tmp_path, "kd")]
    bad, good = train_lanes(runs, dataset, teacher, Progress(quiet=True))
    assert isinstance(bad, OutOfMemory)
    assert good.epochs == 2


def test_a_full_memory_is_told_from_a_bug():
    run = settings("runs", "kd")
    full = torch.OutOfMemoryError("CUDA out of memory")
    assert "batches of 64 on cpu" in str(memory.out_of_memory(full, run))
    assert memory.out_of_memory(RuntimeError("a bug"), run) is None


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:117] data. DefaultCPUAllocator: not enough memory"),
        RuntimeError("std::bad_alloc"),
        RuntimeError("could not create a primitive"),
        RuntimeError("can't start new thread"),
        RuntimeError("unable to mmap 4194384 bytes from file <x.safetensors>: Cannot allocate memory (12)"),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
        ImportError("libtorch_cpu.so: failed to map segment from shared object"),
    ],
)
def test_every_library_has_its_words_for_a_full_memory(error):
    assert is_shortage(error)
    damaged = UserError("the file is damaged")
    damaged.__cause__ = error
    said = "out of memory while building resnet8; give this process more, or lower --batch-size"
    with pytest.raises(OutOfMemory, match=said), Progress(quiet=True).doing("building resnet8"):
        raise damaged


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
        OSError(errno.ENOENT, "No such file"),
        UserError("2 runs failed (kd-0: out of memory with batches of 64); --retry tries again"),
    ],
)
def test_other_errors_stay_what_they_are(error):
    assert not is_shortage(error)
    with pytest.raises(type(error)) as raised, Progress(quiet=True).doing("opening digits"):
        raise error
    assert raised.value is error


@pytest.mark.slow(reason="trains five runs in several groups")
def test_memory_that_lacks_for_what_lanes_share_sends_all_of_them_into_smaller_groups(tmp_path, monkeypatch):
    batches, together = Loader.batches, []

    def drawn(loader, *given):
        if len(together) > 2:
            raise RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 99 bytes")
        return batches(loader, *given)

    def train(lanes, *rest):
        together[:] = lanes
        return train_loop(lanes, *rest)

    train_loop = loop.train
    monkeypatch.setattr(loop, "train", train)
    monkeypatch.setattr(Loader, "batches", drawn)
    report = bench(suite(tmp_path), tmp_path / "runs", quiet=True)
    assert (len(report.finished), report.failed) == (5, {})
    assert len(together) <= 2


def test_where_memory_does_not_hold_what_is_measured_each_run_is_tried_alone(tmp_path, dataset, teacher, monkeypatch):
    def full(lane, batch):
        raise MemoryError

    monkeypatch.setattr(memory, "weigh", full)
    runs = [settings(tmp_path, name) for name in ("none", "kd")]
    assert packs(runs, dataset, teacher, Progress(quiet=True)) == [runs[:1], runs[1:]]


def test_the_limit_of_a_process_counts_as_its_memory(monkeypatch):
    monkeypatch.setattr(memory, "give_back_memory", lambda: None)  # what tests before left is no part of this one
    before = resource.getrlimit(resource.RLIMIT_AS)
    try:
        resource.setrlimit(resource.RLIMIT_AS, (psutil.Process().memory_info().vms + 2**28, before[1]))
        assert 0 < memory.free(torch.device("cpu")) <= 2**28
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
    assert memory.free(torch.device("cpu")) > 2**28


def test_a_network_for_which_memory_lacks_is_not_made_at_another_size(dataset, monkeypatch):
    tried, error = [], RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 99 bytes")

    def shapes(network):
        tried.append(network.image_size)
        raise error

    monkeypatch.setattr(Network, "shapes", shapes)
    with pytest.raises(RuntimeError, match="not enough memory"):
        models.create("test_resnet", dataset.spec)
    assert len(tried) == 1
    error = RuntimeError("Kernel size can't be greater than actual input size")
    tried.clear()
    with pytest.raises(UserError, match="cannot read images of 8 pixels"):
        models.create("test_resnet", dataset.spec)
    assert len(tried) > 1
