"""The conformance suite: checks that any distiller, yours or ours, keeps its promises.

Each check takes a distiller's class, or a ``functools.partial`` of one to check another configuration, and
raises an ``AssertionError`` of one line: what was expected, what happened, what to do. All of them run on the
CPU with toy networks, in seconds. ``promises.py`` holds them. Under pytest::

    @pytest.mark.parametrize("check", CHECKS)
    def test_conformance(check):
        check(MyDistiller)

A distiller that cannot keep a promise says so in a class attribute, ``expected_failures = {"check_learns":
"why"}``; a check listed there that passes is a failure too, so the list stays true.
A method that is made for far larger networks or data sets than the toys, with wide layers or thousands of negatives,
gives smaller numbers to learn with in ``toy_settings = {"width": 64}``; all other checks take it as it is.
"""

from kdzoo.checks import promises  # noqa: F401  each check joins the suite where it is declared
from kdzoo.checks.expect import LEAST_AGREEMENT, LEAST_FALL, Learning, learning, relative_gap
from kdzoo.checks.running import CHECKS, Check, CheckResult, Outcome, check

__all__ = [
    "CHECKS",
    "LEAST_AGREEMENT",
    "LEAST_FALL",
    "Check",
    "CheckResult",
    "Learning",
    "Outcome",
    "check",
    "learning",
    "relative_gap",
]
