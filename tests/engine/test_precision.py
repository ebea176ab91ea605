"""The precision that ``auto`` means on a processor: bf16 only where it is clearly faster, and the same ever after."""

import itertools
import math

import pytest
import torch

from kdzoo.engine.device import find_precision
from kdzoo.engine.precision import bf16_is_faster, training_work
from kdzoo.errors import UserError

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("KDZOO_CACHE", str(tmp_path))
    return tmp_path


@pytest.fixture
def with_bf16(monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True}, raising=False)


def times_as_fast(ratio):
    """A timer by which bf16 takes this part of float32's time."""
    return lambda dtype: 1.0 if dtype == torch.bfloat16 else ratio


def never(dtype):
    raise AssertionError("measured, though the answer was known")


@pytest.mark.parametrize(("ratio", "faster"), [(0.5, False), (1.0, False), (1.1, False), (1.5, True), (3.0, True)])
def test_bf16_must_win_clearly(ratio, faster):
    assert bf16_is_faster(times_as_fast(ratio)) is faster


@pytest.mark.parametrize("ratio", [1.0, 2.0])
def test_an_answer_is_kept_whatever_a_later_measurement_would_say(ratio):
    first = bf16_is_faster(times_as_fast(ratio))
    assert bf16_is_faster(times_as_fast(1 / ratio)) is first
    assert bf16_is_faster(never) is first


@pytest.mark.parametrize("ratio", [0.8, 2.0])
def test_a_noisy_moment_decides_nothing(ratio):
    disturbed = itertools.count()

    def timer(dtype):
        return times_as_fast(ratio)(dtype) * (100 if next(disturbed) % 7 == 5 else 1)

    assert bf16_is_faster(timer) is (ratio > 1)


def test_a_machine_that_slows_down_meanwhile_decides_nothing():
    steps = itertools.count()
    assert bf16_is_faster(lambda dtype: times_as_fast(2.0)(dtype) * 1.05 ** next(steps))


@pytest.mark.parametrize("ratio", [1.0, 2.0])
def test_another_version_of_torch_or_another_processor_is_measured_anew(ratio, monkeypatch):
    bf16_is_faster(times_as_fast(1.0))
    monkeypatch.setattr(torch, "__version__", "99.0")
    assert bf16_is_faster(times_as_fast(ratio)) is (ratio > 1)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"another": True}, raising=False)
    assert bf16_is_faster(times_as_fast(2.0))


def test_a_damaged_answer_is_measured_again(own_cache):
    bf16_is_faster(times_as_fast(2.0))
    [file] = own_cache.rglob("*.json")
    file.write_text("{")
    assert bf16_is_faster(times_as_fast(2.0))
    assert bf16_is_faster(never)


def test_a_cache_that_cannot_be_written_is_an_error_since_the_next_run_might_differ(own_cache, monkeypatch):
    (own_cache / "file").write_text("")
    monkeypatch.setenv("KDZOO_CACHE", str(own_cache / "file"))
    with pytest.raises(UserError, match="set KDZOO_CACHE to another folder, or engine"):
        bf16_is_faster(times_as_fast(2.0))


@pytest.mark.parametrize(("ratio", "precision"), [(1.0, "float32"), (2.0, "bf16")])
def test_auto_follows_the_measurement_where_the_processor_has_bf16(ratio, precision, with_bf16):
    bf16_is_faster(times_as_fast(ratio))
    assert find_precision("auto", CPU) == precision


def test_a_processor_without_bf16_computes_in_float32_unmeasured(own_cache, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict, raising=False)
    assert find_precision("auto", CPU) == "float32"
    assert not list(own_cache.iterdir())


@pytest.mark.parametrize("name", ["float32", "bf16"])
def test_a_precision_that_is_named_is_taken_unmeasured(name, own_cache, with_bf16):
    assert find_precision(name, CPU) == name
    assert not list(own_cache.iterdir())


def test_the_real_work_runs_in_both_and_leaves_the_threads_alone():
    threads = torch.get_num_threads()
    assert all(math.isfinite(training_work(dtype)) for dtype in (torch.float32, torch.bfloat16))
    assert torch.get_num_threads() == threads
