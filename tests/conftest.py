"""Every test session has its own cache of data and teachers, and runs the same on any number of cores."""

import pytest


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cache")
    patch = pytest.MonkeyPatch()
    patch.setenv("KDZOO_CACHE", str(folder))
    yield folder
    patch.undo()
