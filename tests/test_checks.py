"""The conformance suite: every installed distiller passes it, and each check notices what it is for."""

import os
import sys
from functools import partial
from typing import ClassVar

import pytest
import torch
from torch import nn

import kdzoo
from kdzoo import Distiller, toys
from kdzoo.checks import CHECKS, Outcome
from kdzoo.errors import UserError
from kdzoo.registry import load

from . import broken
from .zoo import METHODS

BY_NAME = {check.__name__: check for check in CHECKS}
BROKEN = [value for value in vars(broken).values() if isinstance(value, type) and getattr(value, "fails", "")]

SLOW_TO_LEARN = "trains a student for 120 steps with each method"
SLOW = {
    "check_compiles": pytest.mark.slow(reason="torch.compile takes seconds for each method"),
    "check_learns": pytest.mark.slow(reason=SLOW_TO_LEARN),
}


def marked(value, name):
    """The value as a parameter, marked where the check of this name is slow."""
    return pytest.param(value, marks=[SLOW[name]] if name in SLOW else [])


MARKED = [marked(check, name) for name, check in BY_NAME.items()]


@pytest.mark.parametrize("check", MARKED, ids=BY_NAME)
@pytest.mark.parametrize("name", METHODS)
def test_every_installed_distiller_conforms(name, check):
    distiller = load(name)
    reason = getattr(distiller, "expected_failures", {}).get(check.__name__)
    if reason is None:
        check(distiller)
    else:
        with pytest.raises(AssertionError):
            check(distiller)


@pytest.mark.parametrize("check", MARKED, ids=BY_NAME)
def test_a_sound_distiller_passes(check):
    check(broken.Sound)


@pytest.mark.parametrize(
    "distiller", [marked(one, one.fails) for one in BROKEN], ids=[distiller.__name__ for distiller in BROKEN]
)
def test_a_broken_promise_is_noticed(distiller):
    with pytest.raises(AssertionError, match=r"^expected .+; got .+; .+$") as failure:
        BY_NAME[distiller.fails](distiller)
    assert "\n" not in str(failure.value)


class Wide(broken.Sound):
    """A method that says with which settings it learns on toys."""

    toy_settings: ClassVar[dict[str, object]] = {"width": 3}
    widths: ClassVar[list[int]] = []

    def __init__(self, *, ce: float = 1.0, hint: float = 1.0, width: int = 1000):
        super().__init__(ce=ce, hint=hint)
        self.widths.append(width)


@pytest.mark.slow(reason=SLOW_TO_LEARN)
def test_a_method_learns_with_its_toy_settings_and_is_else_checked_as_it_is():
    Wide.widths.clear()
    BY_NAME["check_terms"](Wide)
    assert set(Wide.widths) == {1000}
    Wide.widths.clear()
    BY_NAME["check_learns"](Wide)
    assert set(Wide.widths) == {3}
    Wide.widths.clear()
    BY_NAME["check_learns"](partial(Wide, width=5))
    assert set(Wide.widths) == {5}


@pytest.mark.parametrize(
    "distiller",
    [distiller for distiller in BROKEN if distiller.fails not in ("check_documented", "check_needs")],
    ids=lambda distiller: distiller.__name__,
)
def test_a_broken_promise_is_no_crash_that_every_check_would_notice(distiller):
    terms = toys.distillation(distiller)(toys.batch_of())
    assert all(term.isfinite().all() for term in terms.values())


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (lambda: sys.exit(0), "got SystemExit: 0"),
        (lambda: next(iter(())), "got StopIteration"),
        (lambda: torch.set_default_dtype(torch.float64), "got .*float64|changed torch's default dtype"),
        (lambda: os.chdir(os.sep), "changed the working folder"),
    ],
)
def test_a_method_that_leaves_or_changes_the_process_fails_a_check(harm, said):
    class Leaving(broken.Sound):
        def changed(self, term, student, teacher, batch):
            harm()
            return term

    here = os.getcwd()
    with pytest.raises(AssertionError, match=said):
        BY_NAME["check_terms"](Leaving)
    assert (torch.get_default_dtype(), os.getcwd()) == (torch.float32, here)


def test_an_error_of_a_method_is_told_with_its_file_and_line():
    class Careless(broken.Sound):
        def changed(self, term, student, teacher, batch):
            raise IndexError("beyond the end")

    line = Careless.changed.__code__.co_firstlineno + 1
    with pytest.raises(AssertionError, match=rf"got IndexError: beyond the end; look at test_checks\.py, line {line}$"):
        BY_NAME["check_terms"](Careless)


def test_work_outside_of_the_terms_that_needs_modules_is_told_when_they_are_not_made():
    class Eager(broken.Sound):
        def loss(self, student, teacher, batch):
            self.centre.lerp_(teacher.features[-1].mean((0, 2, 3)), 0.1)
            return super().loss(student, teacher, batch)

    said = r"no work of 'hint' at a weight of 0, for which build\(\) may not have been called; got AttributeError"
    with pytest.raises(AssertionError, match=said):
        BY_NAME["check_weights"](Eager)


def test_terms_that_teach_nothing_where_there_are_no_labels_are_said_to():
    class Detached(broken.Sound):
        def changed(self, term, student, teacher, batch):
            return term.detach()

    said = "expected a loss with a gradient for a batch without labels; got none; .* without detach"
    with pytest.raises(AssertionError, match=said):
        BY_NAME["check_without_labels"](Detached)


@pytest.mark.slow(reason="torch.compile takes seconds")
def test_what_cannot_be_compiled_is_told_with_its_file_and_line():
    class Seeding(broken.Sound):
        def changed(self, term, student, teacher, batch):
            torch.manual_seed(0)
            return term

    line = Seeding.changed.__code__.co_firstlineno + 1
    with pytest.raises(AssertionError, match=rf"look at test_checks\.py, line {line}$"):
        BY_NAME["check_compiles"](Seeding)


def test_a_layer_that_is_made_by_the_first_loss_is_named_where_a_state_is_loaded():
    class Late(broken.Sound):
        def changed(self, term, student, teacher, batch):
            if not hasattr(self, "late"):
                self.late = nn.Linear(1, 1)
            return term + 0 * self.late.weight.sum()

    with pytest.raises(
        AssertionError, match=r"Distillation: Unexpected key\(s\) in state_dict: .*distiller\.late\.weight"
    ):
        BY_NAME["check_state"](Late)


@pytest.mark.parametrize(
    ("check", "change", "said"),
    [
        ("check_terms", torch.detach, "expected a gradient of 'hint'; got none; compute it from the student's outputs"),
        (
            "check_needs",
            lambda term: term.expand(4),
            r"expected a scalar 'hint' for .*; got \(4,\); take the mean over the batch",
        ),
    ],
    ids=["detached", "rows"],
)
def test_a_term_that_teaches_nothing_or_is_no_scalar_fails_with_what_to_write(check, change, said):
    class Changed(broken.Sound):
        def changed(self, term, student, teacher, batch):
            return change(term)

    with pytest.raises(AssertionError, match=said):
        BY_NAME[check](Changed)


def test_every_check_has_a_distiller_that_fails_it():
    assert {distiller.fails for distiller in BROKEN} == set(BY_NAME)


@pytest.mark.slow(reason="runs every check")
def test_results_come_in_the_order_of_the_checks():
    results = kdzoo.check(broken.Sound)
    assert [result.name for result in results] == list(BY_NAME)
    assert {result.outcome for result in results} == {Outcome.PASSED}


@pytest.fixture
def two_checks(monkeypatch):
    two = [BY_NAME["check_terms"], BY_NAME["check_learns"]]
    monkeypatch.setattr("kdzoo.checks.running.CHECKS", two)
    return [check.__name__ for check in two]


def test_an_expected_failure_is_none(two_checks):
    outcomes = {result.name: result.outcome for result in kdzoo.check(broken.ExpectedToFail)}
    assert outcomes.pop("check_learns") == Outcome.EXPECTED_FAILURE
    assert outcomes == {"check_terms": Outcome.PASSED}


def test_an_expected_failure_that_passes_is_a_failure(two_checks):
    results = kdzoo.check(broken.Sound, expected_failures={"check_terms": "no more"}, on_fail=None)
    failed = [result for result in results if result.outcome is Outcome.FAILED]
    assert [result.name for result in failed] == ["check_terms"]
    assert "take check_terms out" in failed[0].message


def test_an_expected_failure_of_no_check_is_an_error():
    with pytest.raises(UserError, match="did you mean check_terms"):
        kdzoo.check(broken.Sound, expected_failures={"check_term": "misspelled"})


def test_the_first_failure_is_raised_with_the_names_of_distiller_and_check():
    with pytest.raises(AssertionError, match=r"^StrangeName, check_terms: expected a keyword"):
        kdzoo.check(broken.StrangeName)


def test_all_checks_run_where_a_failure_is_not_to_be_raised(two_checks):
    results = kdzoo.check(broken.StrangeName, on_fail=None)
    assert [result.name for result in results] == two_checks
    assert "check_terms" in {result.name for result in results if result.outcome is Outcome.FAILED}


@pytest.mark.parametrize("given", [3, None, dict, broken.Sound()], ids=["number", "None", "dict", "instance"])
def test_what_is_no_distillers_class_is_an_error(given):
    with pytest.raises(UserError, match="is no distiller; expected the class of one"):
        kdzoo.check(given)


def test_a_name_of_no_method_is_an_error():
    with pytest.raises(UserError, match="did you mean kd"):
        kdzoo.check("kdd")


def test_a_partial_checks_another_configuration():
    usual: type[Distiller] = broken.HidesAWeight
    weighed = partial(usual, gap=1.0)
    BY_NAME["check_terms"](weighed)
    with pytest.raises(AssertionError, match="twice the gap"):
        BY_NAME["check_weights"](weighed)


def test_checks_leave_the_global_random_state_alone():
    before = torch.get_rng_state()
    BY_NAME["check_learns"](broken.Sound)
    assert torch.equal(torch.get_rng_state(), before)
