"""Numbers of things, durations and bytes in words."""

import pytest

from kdzoo.quantities import counted, duration, short, size


@pytest.mark.parametrize(
    ("number", "thing", "said"),
    [
        (0, "run", "0 runs"),
        (1, "run", "1 run"),
        (2, "epoch", "2 epochs"),
        (1, "class", "1 class"),
        (12000, "class", "12,000 classes"),
    ],
)
def test_one_thing_is_not_many(number, thing, said):
    assert counted(number, thing) == said


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(0.2, "0 s"), (99.4, "99 s"), (99.5, "2 min"), (5999, "1 h 40 min"), (7500, "2 h 05 min"), (273600, "3 d 04 h")],
)
def test_a_duration_has_the_unit_of_its_size(seconds, said):
    assert duration(seconds) == said


def test_bytes_are_mebibytes_until_a_gibibyte():
    assert [size(2**29), size(3 * 2**29)] == ["512 MiB", "1.5 GiB"]


@pytest.mark.parametrize(
    ("number", "said"),
    [(0.31847, "0.318"), (25.1, "25.1"), (999.4, "999"), (999.6, "1000"), (7820.3, "7820"), (0, "0")],
)
def test_a_number_has_three_digits_and_no_exponent_where_it_is_large(number, said):
    assert short(number) == said
