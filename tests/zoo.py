"""All methods of the zoo as parameters of tests; most are slow, and the first few stand for them in the quick tests."""

import pytest

from kdzoo import registry

FIRST = ("kd", "crd", "simkd", "uhkd", "figkd", "lfcc")  # plain, with memory, shipped otherwise, and the three
SLOW = pytest.mark.slow(reason="the same for every method")
METHODS = [pytest.param(name, marks=[] if name in FIRST else [SLOW]) for name in registry.names()]
