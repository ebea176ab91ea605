"""Statistics against scipy's own tests, numbers worked by hand, and what the definitions promise."""

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from kdzoo.results import statistics

OURS = [80.1, 82.4, 79.9, 81.7, 80.6]
THEIRS = [79.0, 82.0, 79.5, 80.1, 80.9]


def test_the_interval_of_a_mean_is_scipys():
    found = statistics.mean(OURS)
    expected = stats.t.interval(0.95, 4, loc=np.mean(OURS), scale=stats.sem(OURS))
    assert (found.low, found.high) == pytest.approx(expected)
    assert (found.n, found.mean, found.std) == (5, pytest.approx(80.94), pytest.approx(np.std(OURS, ddof=1)))


def test_the_interval_of_two_values_is_the_one_of_the_tables():
    # t of 0.975 at one degree of freedom is 12.706; s / sqrt(2) of 0 and 2 is 1.
    found = statistics.mean([0.0, 2.0])
    assert (found.low, found.high) == (pytest.approx(1 - 12.7062, abs=1e-4), pytest.approx(1 + 12.7062, abs=1e-4))


def test_one_value_has_a_mean_and_nothing_else():
    found = statistics.mean([80.0])
    assert (found.n, found.mean) == (1, 80.0)
    assert all(map(math.isnan, found[2:]))
    assert math.isnan(statistics.mean([]).mean)


def test_paired_differences_are_scipys_paired_t_test():
    found = statistics.paired(OURS, THEIRS)
    expected = stats.ttest_rel(OURS, THEIRS)
    interval = expected.confidence_interval(0.95)
    assert found.p == pytest.approx(expected.pvalue)
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high))
    assert found.mean == pytest.approx(np.mean(OURS) - np.mean(THEIRS))


def test_pairing_finds_what_an_unpaired_test_misses():
    seeds = np.array([60.0, 65, 70, 75, 80])
    ours = seeds + np.array([0.9, 1.0, 1.1, 1.0, 1.0])
    assert statistics.paired(ours, seeds).p < 0.001
    assert stats.ttest_ind(ours, seeds).pvalue > 0.5


def test_exchanging_the_two_changes_the_sign_and_not_p():
    there, back = statistics.paired(OURS, THEIRS), statistics.paired(THEIRS, OURS)
    assert (back.mean, back.low, back.p) == (-there.mean, -there.high, there.p)


@pytest.mark.parametrize(("n", "p"), [(2, 0.5), (3, 0.25), (6, 0.03125)])
@pytest.mark.parametrize("sign", [1, -1])
def test_equal_differences_have_the_p_of_the_sign_test(n, p, sign):
    base = np.linspace(70.1, 80.3, n)  # sums and differences of these are not exact
    found = statistics.paired(base + sign * 0.7, base)
    assert found.p == p == pytest.approx(stats.binomtest(n, n, 0.5).pvalue)
    assert found.mean == found.low == found.high == pytest.approx(sign * 0.7)


def test_no_difference_at_all_has_p_one():
    assert statistics.paired(OURS, OURS)[1:] == (0, 0, 0, 1)


def test_one_pair_of_values_cannot_be_tested():
    found = statistics.paired([81.0], [80.0])
    assert found.mean == 1
    assert math.isnan(found.p)
    assert statistics.verdict(found, found.p) == "no test (n = 1)"


def test_holm_by_hand():
    # Sorted: .01 x 4 = .04, .02 x 3 = .06, .03 x 2 = .06, .04 x 1 = .04, which the one before lifts to .06.
    assert statistics.holm([0.04, 0.01, 0.03, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])


def test_holm_stops_at_one_and_leaves_a_single_p_alone():
    assert statistics.holm([0.6, 0.9]) == [1.0, 1.0]
    assert statistics.holm([0.04]) == [0.04]
    assert statistics.holm([]) == []


def test_a_test_that_could_not_be_made_does_not_count_for_holm():
    corrected = statistics.holm([0.01, math.nan, 0.02])
    assert corrected[0] == pytest.approx(0.02)
    assert math.isnan(corrected[1])
    assert corrected[2] == pytest.approx(0.02)


@pytest.mark.parametrize(
    ("mean", "p", "said"), [(1, 0.049, "better"), (-1, 0.049, "worse"), (1, 0.05, "not told apart")]
)
def test_what_may_be_said_depends_on_the_corrected_p(mean, p, said):
    assert statistics.verdict(statistics.Difference(3, mean, 0, 0, 0.001), p) == said


def test_ranks_are_averages_and_ties_share_theirs():
    # First pair: 1, 2.5, 2.5, 4. Second pair: 3, 1, 2, 4.
    ranks = statistics.average_ranks([[9, 7, 7, 1], [5, 8, 6, 4]])
    assert list(ranks) == [2, 1.75, 2.25, 4]


def test_means_that_differ_by_rounding_alone_are_tied():
    assert list(statistics.average_ranks([[0.1 + 0.2, 0.3]])) == [1.5, 1.5]


def test_ranks_add_up_and_do_not_know_the_unit():
    scores = np.random.default_rng(0).normal(size=(7, 5))
    ranks = statistics.average_ranks(scores)
    assert ranks.sum() == pytest.approx(15)
    assert statistics.average_ranks(scores * 3 + 100) == pytest.approx(ranks)


@pytest.mark.parametrize(("methods", "q"), [(2, 1.960), (3, 2.343), (4, 2.569), (5, 2.728), (10, 3.164)])
def test_the_critical_difference_is_of_demsars_table(methods, q):
    expected = q * math.sqrt(methods * (methods + 1) / (6 * 14))
    assert statistics.critical_difference(methods, 14) == pytest.approx(expected, rel=5e-4)


def test_cliques_are_the_widest_spans_within_the_critical_difference():
    assert statistics.cliques([1.0, 1.5, 2.4, 3.2, 5.0], 1.5) == [(1.0, 2.4), (2.4, 3.2)]
    assert statistics.cliques([1.0, 5.0, 5.0], 1.5) == [(5.0, 5.0)]


def test_every_two_methods_share_a_clique_exactly_if_they_lie_within_it():
    ranks = [1.0, 1.5, 2.4, 3.2, 5.0]
    spans = statistics.cliques(ranks, 1.5)
    for a, b in itertools.combinations(ranks, 2):
        assert (abs(a - b) <= 1.5) == any(low <= a and b <= high for low, high in spans)
