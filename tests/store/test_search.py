"""What a search left on disk: it is read back as it was written, and what is damaged is refused in one line."""

import json

import pytest

from kdzoo.errors import UserError
from kdzoo.store.search import FILE, Course, Point, Search, ranked

from ..made_runs import candidate, search


@pytest.fixture
def out(tmp_path):
    finalists = [(candidate("kd"), (80.0, 81.0, 82.0), 0.02), (candidate("dkd", dkd=3.0), (79.0, 80.0, 81.0), 0.03)]
    search(tmp_path, finalists, [(candidate("at"), ""), (candidate("sp"), "NaN in the loss")])
    return tmp_path


def test_a_search_is_read_back_as_it_was_written(out):
    found = Search.read(out)
    before = (out / FILE).read_text()
    found.write(out)
    assert (out / FILE).read_text() == before
    assert [one.title for one in found.candidates] == ["kd", "dkd (dkd=3.0)", "at", "sp"]
    assert found.courses[0].at(2) == Point(2, 30.0, 70.0, 1.5)


def at_first(*measured):
    """Courses of one epoch; the last failed."""
    return [Course([Point(1, *one)], reason="out of memory" * (one is measured[-1])) for one in measured]


def test_candidates_are_ordered_by_likelihood_and_those_that_failed_are_left_out(out):
    found = Search.read(out)
    found.courses = at_first((60.0, 80.0, 1.5), (50.0, 90.0, 1.4), (40.0, 70.0, 1.2), (99.0, 99.0, 0.1))
    assert ranked(found, range(4), 1) == [2, 1, 0]
    assert ranked(found, [0, 3], 1) == [0]


def test_candidates_without_a_classifier_are_ordered_by_top1_then_top5(out):
    found = Search.read(out)
    found.courses = at_first((50.0, 80.0), (50.0, 90.0), (60.0, 70.0), (99.0, 99.0))
    assert ranked(found, range(4), 1) == [2, 1, 0]
    assert ranked(found, [0, 3], 1) == [0]


def test_a_folder_without_a_search_is_named(tmp_path):
    with pytest.raises(UserError, match="holds no search"):
        Search.read(tmp_path)


HARMS = [
    (("candidates", []), "lists differ in length"),
    (("courses", [{}]), "damaged"),
    (("costs", [1, 2]), "lists differ in length"),
    (("costs", [0, 1, 1, 1]), "a cost is no time"),
    (("costs", ["inf", 1, 1, 1]), "a cost is no time"),
    (("seconds", "inf"), "expected to take is no time"),
    (("seconds", None), "damaged"),
    (("asked", {}), "names no teacher"),
    (("asked", []), "damaged"),
    (("epochs", "4"), "an epoch is none"),
    (("epochs", 10**9), "an epoch is none"),
    (("rungs", [0]), "an epoch is none"),
    (("courses", 0, "curve", [[2, 1, 1, 1]]), "a curve lacks an epoch"),
    (("courses", 0, "curve", [[1, 101, 1, 1]]), "an accuracy is no percentage"),
    (("courses", 0, "curve", [[1, "nan", 1, 1]]), "an accuracy is no percentage"),
    (("courses", 0, "curve", [[1, 1, 1, -1]]), "a likelihood is none"),
    (("courses", 0, "curve", [[1, 1, 1, "nan"]]), "a likelihood is none"),
    (("courses", 0, "curve", [[1, 1, 1]]), "damaged"),
    (("courses", 0, "curve", [[1, 10**400, 1, 1]]), "damaged"),
    (("courses", 0, "curve", []), "a curve is too short"),
    (("courses", 2, "curve", []), "a curve is too short"),
    (("courses", 2, "stopped", "1"), "damaged"),
    (("finals", 0, "candidate", 9), "a finalist is no candidate"),
    (("finals", 0, "candidate", 2), "finalists differ in their seeds"),
    (("finals", 0, "seed", 10), "finalists differ in their seeds"),
    (("candidates", 0, "student", 3), "a candidate has no name"),
    (("courses", 0, "stopped", 0), "after an epoch that is no rung"),
    (("courses", 0, "stopped", 3), "after an epoch that is no rung"),
    (("seeds", 3), "a seed is none"),
    (("seeds", ["1"]), "a seed is none"),
    (("asked", "data", "digits"), "names no data"),
    (("asked", "protocol", None), "names no protocol"),
    (("asked", "protocol", {"epochs": 4}), "names no protocol"),
    (("asked", "overrides", 3), "names no overrides"),
    (("asked", "overrides", [3]), "names no overrides"),
    (("more", 1), "damaged"),
]


@pytest.mark.parametrize(("harm", "line"), HARMS)
def test_a_damaged_search_is_refused_in_one_line(out, harm, line):
    values = json.loads((out / FILE).read_text())
    *path, key, value = harm
    place = values
    for step in path:
        place = place[step]
    place[key] = value
    (out / FILE).write_text(json.dumps(values))
    with pytest.raises(UserError, match=line) as caught:
        Search.read(out)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"format": 2}', "[" * 100_000, '{"format": 1, "epochs": 1e400}'])
def test_a_file_that_is_no_search_is_refused(tmp_path, text):
    (tmp_path / FILE).write_text(text)
    with pytest.raises(UserError):
        Search.read(tmp_path)


def test_an_epoch_beyond_all_numbers_is_refused(out):
    text = (out / FILE).read_text()
    (out / FILE).write_text(text.replace("30.0", "1e400", 1))
    with pytest.raises(UserError, match="no percentage"):
        Search.read(out)
    (out / FILE).write_text(text.replace('"candidate": 0', '"candidate": 1e400', 1))
    with pytest.raises(UserError, match="damaged"):
        Search.read(out)
