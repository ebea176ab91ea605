"""A user's own modules: which files count for a run, and which module of a name is imported."""

import os
import sys
from pathlib import Path

import pytest

from kdzoo import registry
from kdzoo.errors import UserError
from kdzoo.own_code import import_module, place, sources
from kdzoo.resolve import resolve

BASE = {"distiller": {"name": "none"}, "student": {"name": "ownnets:plain"}}
FACTORY = "import torch\nfrom ownlayers import WIDTH\ndef plain(num_classes):\n    return WIDTH, num_classes\n"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working folder with a module of networks that imports a module of layers."""
    write(tmp_path / "ownnets.py", FACTORY)
    write(tmp_path / "ownlayers.py", "WIDTH = 8\n")
    write(tmp_path / "unrelated.py", "")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield tmp_path
    for name in [name for name in sys.modules if name.partition(".")[0] in ("ownnets", "ownlayers", "netpackage")]:
        del sys.modules[name]


def write(file: Path, text: str) -> None:
    """Write a file that is newer than any before it, however coarse the clock of the file system."""
    newest = max((other.stat().st_mtime_ns for other in file.parent.glob("*")), default=0)
    file.write_text(text)
    os.utime(file, ns=(newest + 2 * 10**9,) * 2)


@pytest.mark.parametrize("edited", ["ownnets.py", "ownlayers.py"])
def test_an_edited_module_of_networks_is_another_run(folder, edited):
    before = resolve(BASE).settings.identity()
    assert resolve(BASE).settings.identity() == before
    write(folder / edited, (folder / edited).read_text() + "# another\n")
    assert resolve(BASE).settings.identity() != before


def test_a_module_that_it_does_not_import_changes_nothing(folder):
    before = resolve(BASE).settings.identity()
    write(folder / "unrelated.py", "# another\n")
    assert resolve(BASE).settings.identity() == before


def test_modules_that_a_distiller_imports_count_too(folder):
    write(
        folder / "mine.py",
        '"""Mine."""\nfrom ownlayers import WIDTH\nfrom kdzoo import Distiller\nclass Mine(Distiller):\n    ...\n',
    )
    base = {"distiller": {"name": "./mine.py"}, "student": {"name": "resnet8"}}
    before = resolve(base).settings.identity()
    write(folder / "ownlayers.py", "WIDTH = 9\n")
    assert resolve(base).settings.identity() != before


def test_the_teachers_own_module_counts_as_the_students_does(folder):
    base = {"distiller": {"name": "kd"}, "student": {"name": "resnet8"}, "teacher": {"name": "ownnets:plain"}}
    assert set(resolve(base).settings.files) == {"ownnets", "ownlayers"}


@pytest.mark.parametrize("name", ["best", "best.pt", "checkpoint.0100"])
def test_weights_count_by_their_content_whatever_their_file_is_called(folder, name):
    base = {**BASE, "teacher": {"name": "resnet14", "weights": name}}
    write(folder / name, "one")
    before = resolve(base).settings.identity()
    write(folder / name, "two")
    assert resolve(base).settings.identity() != before


def test_weights_in_a_folder_count_by_the_content_of_its_files(folder):
    base = {**BASE, "teacher": {"name": "resnet14", "weights": "mine"}}
    (folder / "mine").mkdir()
    write(folder / "mine" / "model.safetensors", "one")
    before = resolve(base).settings.identity()
    write(folder / "mine" / "model.safetensors", "two")
    assert resolve(base).settings.identity() != before


def test_packages_count_with_what_they_run_before_and_installed_ones_do_not(folder):
    package = folder / "netpackage"
    (package / "parts").mkdir(parents=True)
    write(package / "__init__.py", "")
    write(package / "nets.py", "import timm, os, numpy as np\nfrom .parts import block\nfrom . import nothing\n")
    write(package / "parts" / "__init__.py", "")
    write(package / "parts" / "block.py", "from ... import toofar\n")
    found = sources(["netpackage.nets"])
    assert list(found) == ["netpackage", "netpackage.nets", "netpackage.parts", "netpackage.parts.block"]
    assert sources(["timm.models", "torch", "kdzoo.models", "os", "nowhere"]) == {}


def test_a_module_of_the_working_folder_wins_over_an_installed_one(folder, tmp_path_factory, monkeypatch):
    installed = tmp_path_factory.mktemp("site-packages")
    write(installed / "ownnets.py", "plain = 'installed'\n")
    monkeypatch.syspath_prepend(str(installed))
    import ownnets

    assert ownnets.plain == "installed"
    assert import_module("ownnets").plain(10) == (8, 10)
    (folder / "ownnets.py").unlink()
    assert import_module("ownnets").plain == "installed"


def test_a_file_that_hides_a_compiled_package_in_use_is_refused_by_its_name(folder):
    import torch

    write(folder / "torch.py", "")
    with pytest.raises(
        UserError, match=r"torch\.py hides the package torch, which is in use; give the file another name"
    ):
        import_module("ownnets")
    assert sys.modules["torch"] is torch


@pytest.mark.parametrize("start", [b"\xef\xbb\xbf", b"# -*- coding: latin-1 -*- \xe9\n"])
def test_a_file_in_another_encoding_is_read_as_python_reads_it(folder, start):
    (folder / "ownnets.py").write_bytes(start + FACTORY.encode())
    assert list(sources(["ownnets"])) == ["ownlayers", "ownnets"]


def test_a_module_that_was_edited_is_imported_anew_and_one_that_was_not_is_kept(folder):
    first = import_module("ownnets")
    assert import_module("ownnets") is first
    write(folder / "ownlayers.py", "WIDTH = 16\n")
    assert import_module("ownnets").plain(10) == (16, 10)


@pytest.mark.parametrize("late", [{"one"}, {"two"}, {"one", "two"}, set()], ids=["first", "second", "both", "none"])
def test_two_modules_of_one_name_are_refused_where_one_is_imported_late(folder, late):
    method, module = registry.find("kd").file.read_text(encoding="utf-8"), "_".join(["own", *sorted(late)])
    for name in ("one", "two"):
        (folder / name).mkdir()
        write(folder / name / f"{module}.py", f"NAME = '{name}'\n")
        line = f"def late():\n    import {module}\n" if name in late else f"import {module}\n"
        write(folder / name / "mine.py", f"{method}\n\n{line}")
    registry.load("one/mine.py")
    if late:
        with pytest.raises(
            UserError, match=rf"one.{module}\.py and .*two.{module}\.py are both the module {module}, and"
        ):
            registry.load("two/mine.py")
    else:
        assert sys.modules[registry.load("two/mine.py").__module__].own.NAME == "two"


def test_a_file_that_does_not_parse_is_left_to_its_import(folder):
    write(folder / "ownnets.py", "def plain(:\n")
    assert list(sources(["ownnets"])) == ["ownnets"]
    with pytest.raises(SyntaxError):
        import_module("ownnets")


@pytest.mark.parametrize(
    "call",
    ["cross_entropy(zeros(2, 3), zeros(4))", "Distiller(a=1.0).weigh(a=partial(linear, zeros(2, 3), zeros(4, 5)))"],
)
def test_an_error_is_told_with_the_line_of_the_users_own_code_that_led_to_it(folder, call):
    imports = "from functools import partial\nfrom torch import zeros\nfrom torch.nn.functional import linear\n"
    write(folder / "ownhelpers.py", f"{imports}from kdzoo import Distiller\nfrom kdzoo.losses import *\n{call}\n")
    with pytest.raises((RuntimeError, ValueError)) as caught:
        import_module("ownhelpers")
    assert place(caught.value) == "ownhelpers.py, line 6"


def test_a_method_that_cannot_be_imported_is_told_with_the_line(folder):
    write(folder / "mine.py", "import ownhelpers\n")
    write(folder / "ownhelpers.py", "import json\n\njson.loads('{')\n")
    with pytest.raises(
        UserError, match=r"could not be imported \(JSONDecodeError: .*\) at ownhelpers\.py, line 3; correct"
    ):
        registry.load(str(folder / "mine.py"))
