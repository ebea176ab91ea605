"""The documents keep their word: every python block runs, every picture is there, every method and suite exists."""

import re
from pathlib import Path

import pytest
import torch

from kdzoo import registry
from kdzoo.data import open_dataset
from kdzoo.experiments import suites

DOCS = sorted((Path(__file__).parents[1] / "docs").glob("*.md"))
MADE = {"api/index.md"}  # pages that docs/pages.py makes of the code
BLOCKS = [
    pytest.param(block, id=f"{file.stem}-{number}")
    for file in DOCS
    for number, block in enumerate(re.findall(r"```python\n(.*?)```", file.read_text(encoding="utf-8"), re.DOTALL))
]


@pytest.mark.parametrize("block", BLOCKS)
def test_every_python_block_runs_by_itself(block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    exec(block, {})


def test_there_are_blocks_to_run():
    assert len(BLOCKS) >= 9


def headings(file):
    return {
        re.sub(r"[^a-z0-9 _-]", "", line.lstrip("# ").lower()).replace(" ", "-")
        for line in file.read_text(encoding="utf-8").splitlines()
        if line.startswith("#")
    }


def broken_links(text, folder, own):
    """Links to files that are not there, or to headings that they do not have; ``own`` are those of the text."""
    broken = []
    for target in re.findall(r"\]\(([^)]+)\)", text):
        path, _, anchor = target.partition("#")
        if "://" not in target and path not in MADE:
            file = folder / path
            is_there = file.is_file() if path else True
            if not is_there or (anchor and anchor not in (headings(file) if path else own)):
                broken.append(target)
    return broken


@pytest.mark.parametrize("file", DOCS, ids=lambda file: file.stem)
def test_every_picture_and_every_link_within_the_documents_is_there(file):
    assert broken_links(file.read_text(encoding="utf-8"), file.parent, headings(file)) == []


def test_a_broken_link_is_noticed():
    text = "[a](nowhere.md) [b](#nowhere) [c](methods.md#nowhere) [d](methods.md#methods) [e](#here)"
    assert broken_links(text, DOCS[0].parent, {"here"}) == ["nowhere.md", "#nowhere", "methods.md#nowhere"]


def test_every_frequency_method_is_explained_and_reconstructions_are_called_so():
    text = (DOCS[0].parent / "frequency.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)` \|", text.partition("## Four identities")[0], re.MULTILINE)
    assert {"uhkd", "figkd", "lfcc", "spectralkd", "famkd", "ufdkd", "freekd", "wkd", "dctat", "fourierkd"} <= set(rows)
    assert set(rows) <= set(registry.names())
    for name in rows:
        if registry.find(name).fidelity == "reconstructed":
            assert re.search(rf"\*\*[^*]*{name}[^*]*are reconstructions\*\*", text, re.IGNORECASE)


@pytest.mark.parametrize("name", ["bands", "controls"])
@pytest.mark.slow(reason="builds every network of every shipped suite")
def test_the_suites_on_frequency_ask_only_for_what_there_is(name):
    runs = suites.load(name).runs
    assert runs
    options = {str(data.options): data for data in (run.settings.data for run in runs) if data.name == "bands"}
    for data in options.values():
        assert open_dataset(data.name, options={**data.options, "train": 1, "test": 1}).spec.num_classes == 8


def test_every_method_that_another_library_has_is_here():
    text = (DOCS[0].parent / "methods.md").read_text(encoding="utf-8").partition("## Coming from another library")[2]
    named = set(re.findall("`([a-z0-9]+)`", text))
    assert len(named) > 20
    assert named <= set(registry.names())
