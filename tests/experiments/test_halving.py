"""Successive halving: how many candidates are trained for how long, and which budget pays that."""

import math
from dataclasses import replace

import pytest

from kdzoo.engine.memory import Cost
from kdzoo.errors import UserError
from kdzoo.experiments import halving
from kdzoo.experiments.estimate import GroupCost, LaneCost
from kdzoo.experiments.halving import Prices


@pytest.mark.parametrize(
    ("candidates", "expected"), [(1, [1]), (3, [3]), (4, [4, 3]), (7, [7, 4, 3]), (40, [40, 20, 10, 5, 3])]
)
def test_the_worse_half_stops_until_three_are_left(candidates, expected):
    assert halving.counts(candidates) == expected
    assert [halving.left(candidates, rung) for rung in range(len(expected) + 2)] == [*expected, 3, 3][
        : len(expected)
    ] + [expected[-1]] * 2


@pytest.mark.parametrize("candidates", [1, 2, 4, 9, 40, 216])
@pytest.mark.parametrize("epochs", [8, 9, 30, 240])
def test_rungs_rise_and_end_at_three_quarters_of_a_training(candidates, epochs):
    rungs = halving.rungs(candidates, epochs)
    assert rungs == sorted(set(rungs))
    assert len(rungs) == len(halving.counts(candidates)) - 1
    assert all(1 <= epoch <= epochs for epoch in rungs)
    if rungs and epochs >= 2 ** len(rungs):
        assert rungs[-1] == math.ceil(0.75 * epochs)
        assert rungs[0] == math.ceil(1.5 * epochs / 2 ** len(rungs))


def test_the_shortest_training_has_room_for_every_rung():
    for candidates in (1, 5, 40, 216):
        fewest = halving.fewest_epochs(candidates)
        assert all(epoch < fewest for epoch in halving.rungs(candidates, fewest))
        assert fewest == 1 or halving.rungs(candidates, fewest - 1)[-1:] >= [fewest - 1]


def test_epochs_are_counted_rung_by_rung():
    # 7 candidates, 8 epochs: all for 3, 4 for 3 more; then 3 and 2 references with 3 seeds for 8.
    assert halving.rungs(7, 8) == [3, 6]
    assert halving.epochs_of([7], 2, 8) == (7 * 3 + 4 * 3, 3 * 8 * 5)
    # A second student with 3 candidates is down to its finalists from the first rung on, and trains all the same; its
    # references are among these.
    assert halving.epochs_of([7, 3], 2, 8) == (7 * 3 + 4 * 3 + 3 * 6, 3 * 8 * (5 + 3))


def test_more_seeds_make_the_finalists_dearer_alone():
    search, final = halving.epochs_of([40], 2, 32)
    assert halving.epochs_of([40], 2, 32, seeds=6) == (search, 2 * final)
    budget = f"{search + final}epochs"
    assert halving.longest(budget, [40], 2, 100, DEAR) == 32
    assert halving.longest(budget, [40], 2, 100, DEAR, seeds=6) < 32


@pytest.mark.parametrize(
    ("given", "advice"),
    [
        ({"seeds": 6}, "raise --budget, name fewer --methods, lower --settings, or lower --seeds"),
        ({"seeds": 3}, "raise --budget, name fewer --methods, or lower --settings"),
        ({"seeds": 3, "settings": 1}, "raise --budget or name fewer --methods"),
    ],
)
def test_only_what_can_be_lowered_is_advised(given, advice):
    with pytest.raises(UserError, match=f"epochs; {advice}$"):
        halving.longest("10epochs", [40], 2, 100, DEAR, **given)


@pytest.mark.parametrize("candidates", [1, 3, 4, 5, 6])
def test_no_more_finalists_are_counted_than_there_are_candidates(candidates):
    assert halving.epochs_of([candidates], 2, 8)[1] == 3 * 8 * min(candidates, 5)


def test_a_search_costs_less_than_a_third_of_training_everything_with_as_many_seeds():
    for candidates in (40, 72, 216):
        whole = halving.SEEDS * candidates * 64
        assert sum(halving.epochs_of([candidates], 2, 64)) < 0.3 * whole


@pytest.mark.parametrize(
    ("budget", "expected"),
    [("4h", (14400, "time")), ("1.5 h", (5400, "time")), ("90min", (5400, "time")), ("90m", (5400, "time")),
     ("30s", (30, "time")), ("2d", (172800, "time")), ("600epochs", (600, "epochs")), ("1 epoch", (1, "epochs"))],
)  # fmt: skip
def test_a_budget_is_a_time_or_a_number_of_epochs(budget, expected):
    assert halving.parsed(budget) == expected


@pytest.mark.parametrize(
    "budget", ["4", "h", "-4h", "4 weeks", "0h", "0epochs", "1e3h", "4h30", "nanh", "4epoch s", "4epochsx"]
)
def test_any_other_budget_is_one_line(budget):
    with pytest.raises(UserError, match="expected a time, such as 4h or 90min, or epochs, such as 600epochs"):
        halving.parsed(budget)


DEAR = Prices(once=1e9, search=1e9, final=1e9)  # where no time is asked about


def test_without_a_budget_trainings_are_as_long_as_the_recipe():
    assert halving.longest("", [40], 2, 30, DEAR) == 30


def test_a_budget_of_epochs_buys_the_longest_search_that_it_pays():
    for budget in (300, 444, 900):
        epochs = halving.longest(f"{budget}epochs", [40], 2, 100, DEAR)
        assert sum(halving.epochs_of([40], 2, epochs)) <= budget < sum(halving.epochs_of([40], 2, epochs + 1))


def test_a_budget_of_time_counts_what_is_paid_once():
    def priced(once):
        return halving.longest("1h", [40], 2, 100, Prices(once=once, search=2.0, final=5.0))

    assert priced(0) > priced(1800) >= 5


def test_a_budget_that_cannot_pay_the_shortest_search_says_what_would():
    least = sum(halving.epochs_of([40], 2, halving.fewest_epochs(40)))
    with pytest.raises(UserError, match=rf"a budget of 10epochs cannot pay the shortest search.*about {least} epochs"):
        halving.longest("10epochs", [40], 2, 100, DEAR)
    with pytest.raises(
        UserError, match=r"a budget of 10s cannot pay the shortest search, of 40 candidates: it takes about"
    ):
        halving.longest("10s", [40], 2, 100, Prices(0.0, 2.0, 5.0))
    assert halving.longest(f"{least}epochs", [40], 2, 100, DEAR) == halving.fewest_epochs(40)


def test_a_recipe_that_is_too_short_for_the_rungs_is_one_line():
    with pytest.raises(UserError, match="epochs: 4, too few to halve 40 candidates until 3 are left; set --epochs 5"):
        halving.longest("", [40], 2, 4, DEAR)


def test_prices_count_phases_of_the_candidates_that_take_part_and_what_is_shared_once_for_each_pack():
    def lane(phase):
        return LaneCost(step=2.0, test=10.0, memory=Cost(1, 1), phase=phase)

    cost = GroupCost(4.0, 0.0, 5, 4, 4, {0: lane(0), 1: lane(60)}, {}, 0, math.inf)
    alone, again = Prices.of(cost, [lane(0)] * 4, 100.0), Prices.of(cost, [lane(3), *[lane(0)] * 3], 100.0)
    assert alone.once == 200.0
    assert again.once == 200.0 + 3 * 5 * (2.0 + 4.0)
    assert alone.search == again.search == pytest.approx(5 * (2.0 + 4.0 / 4) + 10.0)
    tight = Prices.of(replace(cost, room=3.0), [lane(0)] * 4, 100.0)  # two lanes side by side, so two packs
    assert tight.search == pytest.approx(5 * (2.0 + 2 * 4.0 / 4) + 10.0)
