"""What a search tries: every method as it comes, and settings of its main weight around the usual one."""

from pathlib import Path

import pytest

from kdzoo import registry
from kdzoo.errors import UserError
from kdzoo.experiments.candidates import candidates, variants
from kdzoo.resolve import distiller_settings

METHOD = """
from kdzoo import Distiller, Fidelity
from kdzoo.keywords import between


class Mine(Distiller):
    paper, fidelity = "none", Fidelity.EXACT
    SEARCH

    def __init__(self, *, ce: float = 1.0, mine: float = 2.0, share: float = 0.5, size: int = 5,
                 which: list[str] | None = None):
        super().__init__(ce=ce, mine=mine)
        self.share, self.size = between(0.1, 0.8, share=share), size
"""


@pytest.fixture
def method(tmp_path):
    """Write a method with this line in its class; returns its path."""

    def write(line: str = "pass") -> str:
        file = tmp_path / "mine.py"
        file.write_text(METHOD.replace("SEARCH", line))
        return str(file)

    return write


def test_none_kd_and_logitmse_are_always_in_and_nothing_is_in_twice():
    found = candidates("resnet14", ["resnet8"], ["dkd", "kd"], 1, "digits", "quick")
    assert [one.title for one in found] == ["none", "kd", "logitmse", "dkd"]


def test_a_file_that_is_named_by_two_paths_is_one_method(method, monkeypatch):
    file = Path(method())
    monkeypatch.chdir(file.parent)
    found = candidates("resnet14", ["resnet8"], ["mine.py", "./mine.py", str(file)], 1, "digits", "quick")
    assert [one.method for one in found] == ["none", "kd", "logitmse", "mine.py"]


def test_every_student_is_asked_about():
    found = candidates("resnet14", ["resnet8", "resnet14"], ["dkd"], 1, "digits", "quick")
    assert [(one.student, one.method) for one in found] == [
        (student, name) for student in ("resnet8", "resnet14") for name in ("none", "kd", "logitmse", "dkd")
    ]


@pytest.mark.slow(reason="makes every method")
def test_all_installed_methods_are_tried_where_none_is_named_each_with_settings_that_it_takes():
    found = candidates("resnet14", ["resnet8"], [], 3, "digits", "quick")
    assert {one.method for one in found} == set(registry.names())
    assert len(found) == len({one.title for one in found})
    for one in found:
        distiller_settings(one.entry)


def test_an_unknown_method_is_one_line():
    with pytest.raises(UserError, match="unknown distiller 'dkdd'; did you mean dkd"):
        candidates("resnet14", ["resnet8"], ["dkdd"], 2, "digits", "quick")


def test_a_weight_is_tried_from_a_third_to_three_times_its_usual_value(method):
    assert variants(method(), {}, 1) == [{}]
    assert variants(method(), {}, 3) == [{}, {"mine": 0.667}, {"mine": 6.0}]
    assert variants(method(), {"mine": 20.0}, 3) == [{}, {"mine": 6.67}, {"mine": 60.0}]


def test_the_labels_weight_is_not_varied():
    assert variants("none", {}, 5) == [{}]
    assert [list(keywords) for keywords in variants("kd", {}, 3)] == [[], ["kd"], ["kd"]]
    assert all(not {"ce", "kd"} & keywords.keys() for keywords in variants("uhkd", {}, 5))


def test_a_range_that_a_method_declares_takes_the_place_of_its_weight(method):
    assert variants(method('search = {"mine": (1.0, 100.0)}'), {}, 3) == [{}, {"mine": 10.0}, {"mine": 100.0}]


def test_whole_numbers_stay_whole(method):
    assert variants(method('search = {"size": (3, 12)}'), {}, 3) == [{}, {"size": 3}, {"size": 12}]


def test_values_that_a_method_refuses_are_left_out(method):
    assert variants(method('search = {"share": (0.2, 0.99)}'), {}, 3) == [{}, {"share": 0.2}]


@pytest.mark.parametrize("line", ['search = {"mine": (0, 1)}', 'search = {"mine": (2.0, 1.0)}', 'search = {"mine": 3}'])
def test_a_range_that_is_none_is_one_line(method, line):
    with pytest.raises(UserError, match="expected one keyword with two numbers, 0 < low < high"):
        variants(method(line), {}, 3)


@pytest.mark.parametrize(
    "line", ['search = {"mien": (1, 2)}', 'search = {"mine": (1, 2), "share": (1, 2)}', "search = 3"]
)
def test_a_range_of_anything_but_one_keyword_is_one_line(method, line):
    with pytest.raises(UserError, match="expected one keyword with two numbers, 0 < low < high"):
        variants(method(line), {}, 3)


@pytest.mark.parametrize("line", ['search = {"mine": (1, float("inf"))}', 'search = {"which": (1, 2)}'])
def test_a_range_without_an_end_or_of_what_is_no_number_is_one_line(method, line):
    with pytest.raises(UserError, match="expected one keyword with two numbers, 0 < low < high"):
        variants(method(line), {}, 3)


def test_a_method_whose_constructor_fails_is_tried_as_it_comes_so_that_building_it_says_why(method, tmp_path):
    name = method()
    file = tmp_path / "mine.py"
    file.write_text(file.read_text() + '        raise ValueError("no method yet")\n')
    assert variants(name, {}, 3) == [{}]
