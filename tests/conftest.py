"""Every test session has its own cache of data and teachers, and runs the same on any number of cores."""

import gc
import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported: tests run side by side, one core each

import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from unittest.mock import patch

import pytest
import torch

from kdzoo import models
from kdzoo.data import Dataset, open_dataset
from kdzoo.engine.passes import Teacher
from kdzoo.experiments import suites
from kdzoo.experiments.suites import Suite


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        for mark in item.iter_markers("slow"):
            if not mark.kwargs.get("reason"):
                raise pytest.UsageError(f"{item.nodeid} is marked slow without a reason")


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("KDZOO_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="session", autouse=True)
def hurried():
    """A student's latency is measured by one pass after the first, so that runs of tests end sooner."""
    with patch.multiple("kdzoo.engine.cost", FEWEST=1, SECONDS=0.0):
        yield


@pytest.fixture(scope="module", autouse=True)
def little_garbage():
    """What was there before a module is not searched for garbage, which each group of runs does, and the rest seldom.

    torch's compiler makes so many small objects that a search after every 700 takes a seventh of its time, and those
    that it keeps take a whole search half a second.
    """
    usual = gc.get_threshold()
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, *usual[1:])
    yield
    gc.set_threshold(*usual)


def pytest_fixture_setup(fixturedef):
    """What a fixture draws hangs on its name alone, and no test draws the same after it."""
    torch.manual_seed(zlib.crc32(fixturedef.argname.encode()))


def pytest_runtest_call():
    """No test hangs on what others drew before it."""
    torch.manual_seed(0)


COUNTED = Path(__file__).with_name("counted.py")
STEPS = 4  # of a run


@pytest.fixture(scope="module")
def dataset() -> Dataset:
    return open_dataset("digits", limit=320)


def untrained_teacher(dataset: Dataset) -> Teacher:
    torch.manual_seed(0)
    return Teacher(models.create("resnet14", dataset.spec).eval().requires_grad_(False), top1=10.0)


@pytest.fixture
def teacher(dataset) -> Teacher:
    return untrained_teacher(dataset)


@pytest.fixture
def never_waits() -> Callable[[], AbstractContextManager[None]]:
    """A context in which it is an error that the host waits for the GPU."""

    @contextmanager
    def context() -> Iterator[None]:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Synchronization debug mode is a prototype")
            torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")

    return context


@pytest.fixture
def counted(tmp_path) -> Callable[[int], Suite]:
    """Makes the suite, for so many seeds, each a group of two runs; none steps just to be weighed."""
    file = tmp_path / "counted.yaml"
    file.write_text(
        "{data: {name: digits, limit: 256}, protocol: {name: quick, epochs: 1, batch_size: 64}, "
        "pairs: [[resnet14, resnet8]], "
        f"distillers: [kd, {{name: {COUNTED}, folder: {tmp_path}}}], teacher: {{epochs: 1, allow_weak: true}}}}"
    )
    overrides = ["engine.precision=float32", "engine.device=cpu", "engine.checkpoint_seconds=0", "engine.lanes=2"]
    return lambda seeds: suites.load(str(file), seeds=seeds, overrides=overrides)


@pytest.fixture
def no_step_is_missing_or_done_twice(tmp_path) -> Callable[[int], bool]:
    """Whether that holds for a suite of so many seeds."""

    def holds(seeds: int) -> bool:
        lines = (tmp_path / "steps.txt").read_text().splitlines()
        return len(lines) == len(set(lines)) == seeds * STEPS

    return holds
