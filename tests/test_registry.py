"""Methods are found where they are installed and where their file lies, and nowhere else."""

import subprocess
import sys

import pytest

from kdzoo import registry
from kdzoo.errors import UserError


def test_the_zoo_is_found_by_its_entry_point():
    assert {"kd", "none"} <= set(registry.names())
    kd = registry.load("kd")
    assert (kd.__name__, kd.paper) == ("KD", "arXiv:1503.02531")


def test_methods_are_described_without_being_imported():
    code = "import sys; from kdzoo import registry; kd = registry.find('kd'); print(kd.fidelity, kd.paper, kd.summary)"
    code += "; assert 'torch' not in sys.modules and 'kdzoo.distillers.kd' not in sys.modules"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert said.startswith("exact arXiv:1503.02531 Knowledge distillation")


def test_what_is_read_equals_what_is_imported():
    for name, method in registry.methods().items():
        distiller = registry.load(name)
        assert (method.paper, method.fidelity) == (distiller.paper, str(distiller.fidelity))
        assert method.summary


def test_unknown_names_get_the_nearest(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").touch()
    for name, near in (("lfc", "lfcc"), ("mine", r"mine\.py")):
        with pytest.raises(UserError, match=f"unknown distiller '{name}'; did you mean {near}"):
            registry.load(name)


@pytest.mark.parametrize("name", ["../kd", "distillers/kd", "kd\x00", ""])
def test_a_name_is_never_a_path(name):
    with pytest.raises(UserError):
        registry.load(name)


def test_a_file_is_a_method(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text('"""My method."""\nfrom kdzoo import Distiller\nclass Mine(Distiller):\n    paper = "none"\n')
    assert registry.load(str(file)).__name__ == "Mine"
    assert registry.find(str(file)).summary == "My method."
    file.write_text(file.read_text(), encoding="utf-8-sig")  # as editors on Windows save it
    assert registry.find(str(file)).summary == "My method."


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("class Mine: pass", "holds 0 distillers"),
        (
            "from kdzoo import Distiller\nclass A(Distiller): pass\nclass B(Distiller): pass",
            r"holds 2 distillers \(A, B\); expected one subclass",
        ),
        ("import nothing_like_this", "ModuleNotFoundError"),
        ("def broken(:", "SyntaxError"),
    ],
)
def test_a_file_that_holds_no_single_method_says_so(tmp_path, text, said):
    file = tmp_path / "mine.py"
    file.write_text(text)
    with pytest.raises(UserError, match=said):
        registry.load(str(file))


def test_a_missing_file_says_so(tmp_path):
    with pytest.raises(UserError, match="no file"):
        registry.load(str(tmp_path / "gone.py"))
