"""Statistics of comparisons: means with intervals, paired differences, corrected tests, ranks over pairs.

Everything here is a pure function of numbers; what is compared with what is decided in ``table.py``.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

ALPHA = 0.05
# Differences of accuracies in percent that lie closer than this are equal: what remains is rounding in float64.
EQUAL = 1e-9
DIGITS = 9  # after the point, to which accuracies in percent are rounded before they are ordered
# A critical difference over fewer than these says nothing; Demsar 2006 asks for more than 10 pairs and 5 methods.
ENOUGH_PAIRS, ENOUGH_METHODS = 5, 3


class Mean(NamedTuple):
    """A mean with its deviation and interval, in the unit of the values; NaN where there are too few."""

    n: int
    mean: float
    std: float  # of a sample (n - 1)
    low: float  # of the confidence interval of the mean
    high: float


class Difference(NamedTuple):
    """A paired difference, ours minus the baseline's, in the unit of the values; NaN where there are too few pairs."""

    n: int
    mean: float
    low: float  # of the confidence interval of the mean difference
    high: float
    p: float  # two-sided, uncorrected


def mean(values: ArrayLike, level: float = 1 - ALPHA) -> Mean:
    r"""Compute mean, standard deviation and interval :math:`\bar x \pm t_{n-1} s / \sqrt n` (Student 1908).

    Args:
        values: (n,) numbers; none gives NaN, one gives a mean without deviation or interval.
        level: coverage of the interval.
    """
    x = np.asarray(values, dtype=np.float64)
    if not x.size:
        return Mean(0, math.nan, math.nan, math.nan, math.nan)
    center = float(x.mean())
    if x.size == 1:
        return Mean(1, center, math.nan, math.nan, math.nan)
    std = float(x.std(ddof=1))
    half = float(stats.t.ppf((1 + level) / 2, x.size - 1)) * std / math.sqrt(x.size)
    return Mean(x.size, center, std, center - half, center + half)


def paired(ours: ArrayLike, baseline: ArrayLike) -> Difference:
    """Compute the mean paired difference, its 95 % interval, and the p-value of the two-sided paired t-test.

    Where all differences are equal there is no deviation for a t-test to divide by. Then p is that of the
    two-sided sign test, ``2 ** (1 - n)``, the least that n differences of one sign can give without any
    assumption about their spread; it is 1 where all differences are 0. The interval is then a point.

    Args:
        ours: (n,) numbers.
        baseline: (n,) numbers, the i-th of the same seed and pair as the i-th of ours.
    """
    ours, baseline = (np.asarray(values, dtype=np.float64) for values in (ours, baseline))
    differences = ours - baseline
    n, center = len(differences), float(differences.mean()) if len(differences) else math.nan
    if n < 2:
        return Difference(n, center, math.nan, math.nan, math.nan)
    if np.ptp(differences) <= EQUAL:
        return Difference(n, center, center, center, 1.0 if abs(center) <= EQUAL else 2.0 ** (1 - n))
    test = stats.ttest_rel(ours, baseline)
    interval = test.confidence_interval(1 - ALPHA)
    return Difference(n, center, float(interval.low), float(interval.high), float(test.pvalue))


def holm(ps: Sequence[float]) -> list[float]:
    """Correct p-values for their number by Holm's step-down procedure (Holm 1979), in the order given.

    NaN, the p of a test that could not be made, stays NaN and does not count.
    """
    corrected = [math.nan] * len(ps)
    order = sorted((i for i, p in enumerate(ps) if not math.isnan(p)), key=lambda i: ps[i])
    least = 0.0
    for step, i in enumerate(order):
        least = max(least, min(1.0, (len(order) - step) * ps[i]))
        corrected[i] = least
    return corrected


def verdict(difference: Difference, corrected: float) -> str:
    """Say in a word whether a method differs from the baseline, given its corrected p-value."""
    if math.isnan(corrected):
        return f"no test (n = {difference.n})"
    if corrected >= ALPHA:
        return "not told apart"
    return "better" if difference.mean > 0 else "worse"


def average_ranks(scores: ArrayLike) -> NDArray[np.float64]:
    """Compute each method's mean rank over pairs; 1 is the highest score, ties share the mean of their ranks.

    Args:
        scores: (pairs, methods) numbers, none missing.

    Returns:
        (methods,) ranks between 1 and the number of methods.
    """
    table = np.round(np.asarray(scores, dtype=np.float64), DIGITS)
    ranks: NDArray[np.float64] = stats.rankdata(-table, axis=1)
    return ranks.mean(axis=0)


def critical_difference(methods: int, pairs: int, alpha: float = ALPHA) -> float:
    r"""Compute Nemenyi's critical difference of average ranks, :math:`q_\alpha \sqrt{k (k + 1) / 6 N}`.

    :math:`q_\alpha` is the quantile of the studentised range for k groups and infinite degrees of freedom,
    divided by :math:`\sqrt 2`. Methods whose average ranks lie closer cannot be told apart.

    Source: Demsar 2006, Statistical Comparisons of Classifiers over Multiple Data Sets, section 3.2.2.
    """
    quantile = float(stats.studentized_range.ppf(1 - alpha, methods, np.inf))
    return quantile / math.sqrt(2) * math.sqrt(methods * (methods + 1) / (6 * pairs))


def cliques(ranks: Sequence[float], difference: float) -> list[tuple[float, float]]:
    """Find the widest ranges of ranks within which no two methods can be told apart: (lowest, highest) rank of each."""
    ordered = sorted(ranks)
    spans = [(low, max(r for r in ordered if r - low <= difference)) for low in ordered]
    spans = [(low, high) for low, high in spans if sum(low <= rank <= high for rank in ordered) > 1]
    return [
        span for i, span in enumerate(spans) if not any(low <= span[0] and high >= span[1] for low, high in spans[:i])
    ]
