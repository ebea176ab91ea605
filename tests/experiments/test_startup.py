"""A run imports what it uses and no more, as imports take most of the time to its first step."""

import subprocess
import sys

import pytest

from kdzoo import registry
from kdzoo.files import cache_folder

HEAVY = ("matplotlib", "pandas", "ray", "scipy", "sklearn", "tensorboard")
RUN = f"""
import sys
import kdzoo, kdzoo.files
def imported(): return sorted({{name.partition(".")[0] for name in sys.modules}} & set({HEAVY!r}))
kdzoo.run("none", "resnet8", overrides=["protocol.epochs=1", "data.limit=64", "engine.device=cpu"], quiet=True)
print(imported())
(kdzoo.files.cache_folder() / "data" / "digits.npz").unlink()
kdzoo.data.open_dataset("digits")
print("sklearn" in imported())
"""


@pytest.mark.slow(reason="starts a process that trains")
def test_a_run_on_digits_imports_no_library_that_it_has_no_use_for(tmp_path):
    registry.data_sets.load("digits")().load(tmp_path)  # from now on in the cache
    assert (cache_folder() / "data" / "digits.npz").is_file()
    said = subprocess.check_output([sys.executable, "-c", RUN], cwd=tmp_path, text=True, stderr=subprocess.PIPE)
    assert said.splitlines() == ["[]", "True"]
