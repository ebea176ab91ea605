"""Code that a run names runs only where it is the user's own, as it was, or trusted in so many words."""

import json
import shutil

import pytest

import kdzoo
from kdzoo.errors import UserError
from kdzoo.experiments import spectrum
from kdzoo.experiments.run import Here, evaluate_run

from ..made_runs import write

METHOD = '''"""A method."""

from pathlib import Path

from kdzoo.distillers.kd import KD

Path("{marker}").touch()


class Mine(KD):
    pass
'''


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A folder with a method of one's own and a run by it, and the file that the method makes when it is imported."""
    folder, marker = tmp_path / "project", tmp_path / "marker"
    folder.mkdir()
    (folder / "mine.py").write_text(METHOD.format(marker=marker))
    monkeypatch.chdir(folder)
    run = write(folder / "runs", 80.0, 0, distiller="./mine.py")
    marker.unlink()
    return folder, run, marker


def test_ones_own_code_that_is_as_it_was_needs_no_option(project):
    _, run, marker = project
    assert run.run().settings.distiller.name == "./mine.py"
    assert marker.exists()


def test_code_that_was_edited_since_is_refused(project):
    folder, run, marker = project
    with (folder / "mine.py").open("a") as file:
        file.write("# edited\n")
    with pytest.raises(UserError, match=r"names code that would run here: \./mine\.py\. .* pass --trust-code"):
        run.run()
    assert not marker.exists()
    run.run(trust_code=True)
    assert marker.exists()


@pytest.mark.parametrize("read", [evaluate_run, lambda path: spectrum.of_runs([path])])
def test_what_one_was_sent_runs_nothing(project, tmp_path, monkeypatch, read):
    folder, run, marker = project
    sent = tmp_path / "sent"
    shutil.copytree(folder, sent)
    there = sent / "runs" / run.path.name
    environment = json.loads((there / "environment.json").read_text())
    (there / "environment.json").write_text(json.dumps({**environment, "folder": str(sent)}))
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    with pytest.raises(UserError, match="--trust-code"):
        read(there)
    assert kdzoo.table(sent, "./mine.py")["top1_mean"].tolist() == [80.0]
    assert not marker.exists()
    with pytest.raises(UserError):  # it has no student, which is seen after the code is run
        evaluate_run(there, Here(trust_code=True))
    assert marker.exists()


def test_code_inside_of_a_run_is_no_ones_own(project, monkeypatch):
    _, run, marker = project
    shutil.copy("mine.py", run.path / "mine.py")
    monkeypatch.chdir(run.path)
    with pytest.raises(UserError, match="--trust-code"):
        run.run()
    assert not marker.exists()


@pytest.mark.parametrize("name", ["os:abort", "evil:make", "subprocess:call"])
@pytest.mark.parametrize("role", ["student", "teacher"])
def test_a_network_that_is_any_function_of_any_module_is_refused(project, name, role, tmp_path, monkeypatch):
    _, run, marker = project
    (tmp_path / "evil.py").write_text(f"import pathlib\npathlib.Path({str(marker)!r}).touch()\n")
    monkeypatch.syspath_prepend(tmp_path)
    run.config.write_text(run.config.read_text().replace("resnet_8" if role == "student" else "vit_s", name))
    with pytest.raises(UserError, match=f"names code that would run here: {name}"):
        run.run()
    assert not marker.exists()


def test_networks_of_libraries_are_no_code_of_the_runs(project):
    _, run, _ = project
    run.config.write_text(run.config.read_text().replace("resnet_8", "torchvision:resnet18"))
    assert run.run().settings.student.name == "torchvision:resnet18"


DATA = """
import numpy as np
from pathlib import Path
from kdzoo import ImageSet

Path("{marker}").touch()


class Tests(ImageSet):
    def load(self, root):
        images, labels = np.zeros((20, 8, 8), np.uint8), np.arange(20) % 10
        return [str(digit) for digit in range(10)], (images, labels), None
"""


def test_code_of_the_data_that_are_measured_on_is_code_of_the_run(tmp_path, monkeypatch):
    folder, marker = tmp_path / "project", tmp_path / "marker"
    folder.mkdir()
    (folder / "held_out.py").write_text(DATA.format(marker=marker))
    monkeypatch.chdir(folder)
    run = write(folder / "runs", 80.0, 0, "data.test=./held_out.py")
    assert marker.exists()  # the control
    marker.unlink()
    assert "./held_out.py" in run.run().settings.files
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    with pytest.raises(UserError, match=r"names code that would run here: \./held_out\.py"):
        evaluate_run(run.path)
    assert not marker.exists()
