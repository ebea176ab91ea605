"""A run imports what it uses and no more, as imports take most of the time to its first step."""

import gc
import subprocess
import sys

import pytest

from kdzoo import registry
from kdzoo.commands.options import loading
from kdzoo.engine.progress import Progress
from kdzoo.files import cache_folder
from kdzoo.imports import never_searched, not_searched

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


def test_what_a_command_loads_is_never_searched_for_garbage():
    never_searched.cache_clear()  # a command of another test may have been the first
    frozen = gc.get_freeze_count()
    stays = [[]]
    with Progress(quiet=True) as progress, loading(progress) as rename:
        assert not gc.isenabled()
        stays.append([stays])
        rename("reading")
    assert gc.isenabled()
    assert gc.get_freeze_count() > frozen
    assert not any(each is stays for each in gc.get_objects())
    left = [[]]
    with Progress(quiet=True) as progress, loading(progress):
        left.append([left])
    assert any(each is left for each in gc.get_objects())


@pytest.mark.parametrize("enabled", [True, False])
def test_imports_leave_the_search_for_garbage_as_it_was_even_where_they_fail(enabled):
    before = gc.isenabled()
    (gc.enable if enabled else gc.disable)()
    try:
        with pytest.raises(ModuleNotFoundError), not_searched():
            import missing_package  # type: ignore[import-not-found]  # noqa: F401
        assert gc.isenabled() is enabled
    finally:
        (gc.enable if before else gc.disable)()
