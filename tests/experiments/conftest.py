"""Small suites that several tests train or read."""

import pytest

from kdzoo.experiments import suites

from ..small_suites import QUICK, SUITE


@pytest.fixture
def suite(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text(SUITE)
    return suites.load(str(file), overrides=QUICK)


@pytest.fixture
def two(tmp_path):
    """A suite of two runs, of which one is of a method's file."""
    method, file = tmp_path / "mine.py", tmp_path / "two.yaml"
    method.write_text("from kdzoo.distillers.none import NoDistillation\n\nclass Mine(NoDistillation):\n    pass\n")
    text = "{data: {name: digits, limit: 64}, protocol: {name: quick, epochs: 1}, pairs: [[null, resnet8]], "
    file.write_text(text + f"distillers: [none, {method}]}}")
    return suites.load(str(file), overrides=QUICK)
