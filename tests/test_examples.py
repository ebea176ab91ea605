"""Every public name has an example in its docstring, and the example runs and prints what it says."""

import doctest
import inspect
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import kdzoo
from kdzoo.checks import Outcome
from kdzoo.distiller import Distiller

PUBLIC = [name for name in kdzoo.__all__ if not inspect.ismodule(getattr(kdzoo, name))]
QUICK = ["protocol.epochs=1", "data.limit=128", "teacher.epochs=1", "teacher.allow_weak=true"]


def cnn(width):
    """A bare network of four stages, from images of 32 pixels to 10 logits."""
    widths = (3, width, width, width, width)
    stages = [nn.Sequential(nn.Conv2d(a, b, 3, 2, 1), nn.ReLU()) for a, b in pairwise(widths)]
    return nn.Sequential(*stages, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10))


def names():
    """What examples may use without saying where it is from."""
    torch.manual_seed(0)
    loader = [(torch.rand(4, 3, 32, 32), torch.tensor([1, 2, 3, 4]))] * 2
    given = {
        "np": np,
        "torch": torch,
        "F": nn.functional,
        "Path": Path,
        "kdzoo": kdzoo,
        "Outcome": Outcome,
        "quick": QUICK,
    }
    public = {name: getattr(kdzoo, name) for name in kdzoo.__all__}
    return {**public, **given, "Distiller": Distiller, "cnn": cnn(8), "wider_cnn": cnn(12), "loader": loader}


def examples_of(value):
    return doctest.DocTestParser().get_doctest(inspect.getdoc(value) or "", names(), value.__name__, None, 0)


def outcome_of(test):
    said = []
    runner = doctest.DocTestRunner(verbose=False, optionflags=doctest.ELLIPSIS)
    return runner.run(test, out=said.append), "".join(said)


SLOW = {
    "Recommendation": "a whole search",
    "recommend": "a whole search",
    "check": "runs every check",
    "bench": "trains several runs",
}
NAMES = [pytest.param(name, marks=pytest.mark.slow(reason=SLOW[name]) if name in SLOW else ()) for name in PUBLIC]


@pytest.mark.parametrize("name", NAMES)
def test_the_example_of_a_public_name_prints_what_it_says(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    test = examples_of(getattr(kdzoo, name))
    assert test.examples, f"kdzoo.{name} has no example"
    results, said = outcome_of(test)
    assert results.failed == 0, said


def test_an_example_that_prints_something_else_is_noticed():
    def wrong():
        """
        >>> 1 + 1
        3
        """

    results, _ = outcome_of(examples_of(wrong))
    assert results.failed == 1


def test_a_notebook_completes_the_public_names():
    code = "import kdzoo, sys; print(*dir(kdzoo)); print('torch' in sys.modules)"
    completed, torch_is_there = subprocess.check_output([sys.executable, "-c", code], text=True).splitlines()
    assert set(PUBLIC) <= set(completed.split())
    assert torch_is_there == "False"  # names alone import nothing heavy


IMPORTS = """
import sys
import torch, timm, torchvision  # which take long, and once is enough

for name in sys.argv[1:]:
    for known in [known for known in sys.modules if known.partition(".")[0] == "kdzoo"]:
        del sys.modules[known]
    exec(f"from kdzoo import {name}; import kdzoo.{name}; print({name} is kdzoo.{name}, type({name}).__name__)")
"""


@pytest.mark.slow(reason="starts processes, each of which imports torch")
def test_submodules_stay_importable():
    names = ["checks", "data", "distillation", "engine", "models", "registry", "results"]
    said = subprocess.check_output([sys.executable, "-c", IMPORTS, *names], text=True)
    assert said.splitlines() == ["True module"] * len(names)
