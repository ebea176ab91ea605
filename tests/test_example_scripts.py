"""The four examples run as a reader would run them, in seconds."""

from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture
def example(tmp_path, monkeypatch):
    """Imports an example by its name, in an empty working folder with a cache of its teachers."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KDZOO_CACHE", str(tmp_path / "cache"))
    monkeypatch.syspath_prepend(EXAMPLES)
    return lambda name: __import__(name)


@pytest.mark.slow(reason="trains several runs")
def test_a_loop_of_ones_own_trains_a_student(example):
    assert example("own_loop").main(epochs=4) > 30  # of ten classes; chance is 10


@pytest.mark.slow(reason="trains several students, as users would")
def test_a_method_of_ones_own_keeps_every_promise_and_trains(example):
    assert len(example("own_method").main(epochs=1)) == 2


@pytest.mark.slow(reason="trains several students, as users would")
def test_three_methods_are_compared_with_a_verdict_each(example):
    table = example("compare").main(epochs=1)
    assert set(table["method"]) == {"none", "kd", "dist"}
    assert table["verdict"].astype(bool).all()


@pytest.mark.slow(reason="trains several runs")
def test_ones_own_pictures_and_network_make_a_run(example):
    result = example("own_data").main(images=32, epochs=1)
    assert result.student == "own_data:small"
    assert (result.folder / "student.safetensors").is_file()


def test_there_are_no_other_examples():
    assert {file.stem for file in EXAMPLES.glob("*.py")} == {"own_loop", "own_method", "compare", "own_data"}
