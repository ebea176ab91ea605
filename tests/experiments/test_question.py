"""A question is checked when it is asked: what makes no sense is one line, before anything is read or trained."""

from dataclasses import replace
from pathlib import Path

import pytest

import kdzoo
from kdzoo.errors import UserError
from kdzoo.experiments.question import Question

QUESTION = Question(("resnet14",), ("resnet8",))


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"students": ()}, "no student is named"),
        ({"teachers": ()}, "no teacher is named"),
        ({"teachers": ("resnet14", "")}, "no teacher is named"),
        ({"students": ("resnet8", "resnet8")}, "expected each name once"),
        ({"settings": 0}, "--settings 0: expected a whole number from 1 to 9"),
        ({"settings": 2.5}, "--settings 2.5: expected a whole number from 1 to 9"),
        ({"settings": "3"}, "--settings 3: expected a whole number from 1 to 9"),
        ({"seeds": 2}, "--seeds 2: expected a whole number from 3 to 100"),
        ({"seed": -1}, "--seed -1: expected a whole number from 0"),
        ({"seed": None}, "--seed None: expected a whole number from 0"),
        ({"protocol": {"name": "quick", "epochs": 0}}, "--epochs 0: expected a whole number from 1"),
        ({"protocol": {"name": "quick", "epochs": 2.5}}, "--epochs 2.5: expected a whole number from 1"),
        ({"budget": "soon"}, "expected a time, such as 4h"),
        ({"budget": 4}, "--budget 4: expected a time, such as 4h"),
        ({"budget": None}, "--budget None: expected a time, such as 4h"),
        ({"overrides": "data.limit=160"}, "overrides is of type str; expected a list"),
        ({"overrides": None}, "overrides is of type NoneType; expected a list"),
        ({"overrides": ("data.select=0.5",)}, "data.select is decided by the search itself"),
        ({"overrides": ("engine.stop_after=2",)}, "engine.stop_after is decided by the search itself"),
        ({"overrides": ("distiller.temperature=2",)}, "distiller.temperature is decided by the search itself"),
        ({"overrides": ("seed=2",)}, "seed is decided by the search itself"),
        ({"overrides": ("data={select: 0.5}",)}, "data.select is decided by the search itself"),
        ({"overrides": ("distiller=dkd",)}, "distiller is decided by the search itself"),
        ({"overrides": ("teacher.name=resnet8",)}, "teacher.name=resnet8: give it as --teacher instead"),
        ({"overrides": ("data=cifar100",)}, "data=cifar100: give it as --data instead"),
        ({"overrides": ("protocol.epochs=9",)}, "protocol.epochs=9: give it as --epochs instead"),
        ({"overrides": ("output.ship=best",)}, "chooses an epoch on the test images"),
    ],
)
def test_a_question_that_makes_no_sense_is_one_line(changed, said):
    with pytest.raises(UserError, match=said):
        replace(QUESTION, **changed)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"methods": None}, "methods is of type NoneType"),
        ({"methods": [3]}, "methods is of type list"),
        ({"methods": "dkdd"}, "unknown distiller 'dkdd'; did you mean dkd"),
        ({"data": 3}, "data is of type int"),
        ({"protocol": None}, "protocol is of type NoneType"),
        ({"weights": 3}, "weights is of type int"),
        ({"weights": Path("none.pth")}, "none.pth"),
        ({"seeds": 2}, "--seeds 2"),
        ({"out": 3}, "3 is of type int; expected a path"),
        ({"out": "x" * 256}, "can be no path"),
    ],
)
def test_an_argument_of_another_type_is_one_line(changed, said, tmp_path):
    with pytest.raises(UserError, match=said):
        kdzoo.recommend("resnet14", "resnet8", **{"out": tmp_path, "quiet": True, **changed})
