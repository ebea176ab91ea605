"""Every test session has its own cache of data and teachers, and runs the same on any number of cores."""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported: tests run side by side, one core each

import pytest


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cache")
    patch = pytest.MonkeyPatch()
    patch.setenv("KDZOO_CACHE", str(folder))
    yield folder
    patch.undo()
