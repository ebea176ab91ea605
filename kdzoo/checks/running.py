"""The conformance suite's runner: collects the checks, runs them on one distiller, and reports the results."""

from collections.abc import Callable, Iterator, Mapping
from enum import StrEnum
from functools import wraps
from typing import Literal, NamedTuple

import torch

from kdzoo import registry, toys
from kdzoo.checks.expect import promising
from kdzoo.distiller import Distiller
from kdzoo.errors import UserError, unknown
from kdzoo.process_state import unchanged
from kdzoo.randomness import seed_torch

Check = Callable[[type[Distiller]], None]

CHECKS: list[Check] = []  # in the order of their declaration; ``promise`` fills it


def promise(check: Check) -> Check:
    """Add a check to the suite, with its own random state and failures of one line."""

    @wraps(check)
    def run(distiller: type[Distiller]) -> None:
        with torch.random.fork_rng(devices=[]), promising(f"that {_first_line(check)}"), unchanged("it"):
            seed_torch(0)
            check(distiller)

    CHECKS.append(run)
    return run


def _first_line(check: Check) -> str:
    line = (check.__doc__ or check.__name__).splitlines()[0].rstrip(".")
    return line[0].lower() + line[1:]


class Outcome(StrEnum):
    """The outcome of a check."""

    PASSED = "passed"
    FAILED = "failed"
    EXPECTED_FAILURE = "expected failure"


class CheckResult(NamedTuple):
    """The result of one check of one distiller; ``message`` is empty if it passed.

    Example:
        >>> CheckResult("check_terms", Outcome.PASSED).outcome == "passed"
        True
    """

    name: str
    outcome: Outcome
    message: str = ""


def check(
    distiller: type[Distiller] | str,
    *,
    expected_failures: Mapping[str, str] = {},
    on_fail: Literal["raise"] | None = "raise",
) -> list[CheckResult]:
    """Check that a method keeps the promises of a distiller, as scikit-learn's ``check_estimator`` does for estimators.

    Args:
        distiller: the class, a ``functools.partial`` of it to check another configuration, a method's name, or the path
            of a file that holds one.
        expected_failures: reasons by name of check, added to the distiller's own ``expected_failures``.
        on_fail: "raise" to stop at the first check that fails and is not expected to; None to run all in any case.

    Returns:
        The result of every check.

    Raises:
        AssertionError: a check fails, in one line: what was expected, what happened, what to do.
        UserError: an unknown method, or an expected failure that names no check.

    Example:
        >>> {result.outcome.value for result in kdzoo.check("kd")}
        {'passed'}
    """
    kind = registry.load(distiller) if isinstance(distiller, str) else distiller
    found = []
    for result in results(kind, expected_failures):
        found.append(result)
        if on_fail == "raise" and result.outcome is Outcome.FAILED:
            raise AssertionError(f"{toys.class_of(kind).__name__}, {result.name}: {result.message}")
    return found


def results(kind: type[Distiller], expected_failures: Mapping[str, str] = {}) -> Iterator[CheckResult]:
    """Yield the result of each check of a class as soon as it is known; all else is as for ``check``."""
    if not (isinstance(toys.class_of(kind), type) and issubclass(toys.class_of(kind), Distiller)):
        raise UserError(f"{kind!r} is no distiller; expected the class of one, a method's name, or the path of a file")
    reasons = {**getattr(toys.class_of(kind), "expected_failures", {}), **expected_failures}
    known = {check.__name__: check for check in CHECKS}
    for name in reasons.keys() - known.keys():
        raise unknown("check", name, known)
    for name, run in known.items():
        yield _result(name, run, kind, reasons.get(name))


def _result(name: str, check: Check, distiller: type[Distiller], reason: str | None) -> CheckResult:
    try:
        check(distiller)
    except AssertionError as error:
        if reason is None:
            return CheckResult(name, Outcome.FAILED, str(error))
        return CheckResult(name, Outcome.EXPECTED_FAILURE, f"{reason} ({error})")
    if reason is None:
        return CheckResult(name, Outcome.PASSED)
    text = f"expected to fail ({reason}), but it passed; take {name} out of expected_failures"
    return CheckResult(name, Outcome.FAILED, text)
