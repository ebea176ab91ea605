"""The README keeps its word: its table is the registry's, its examples run."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn

import kdzoo
from kdzoo import registry
from kdzoo.results.show import listing

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def test_the_table_of_methods_is_the_registrys():
    _, _, rest = README.partition("<!-- methods: kdzoo list distillers --format markdown -->\n")
    table, _, _ = rest.partition("<!-- end of methods -->")
    assert table.strip() == listing("distillers", "markdown")


def test_the_example_of_a_method_keeps_every_promise(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(EXAMPLES[0])
    kdzoo.check(str(file))


def test_the_example_of_ones_own_loop_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    student, teacher = (
        nn.Sequential(
            *[nn.Sequential(nn.Conv2d(3 if i == 0 else 8, 8, 3, 2, 1), nn.ReLU()) for i in range(4)],
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(8, 10),
        )
        for _ in range(2)
    )
    before = [[p.clone() for p in network.parameters()] for network in (student, teacher)]
    images, labels = torch.rand(4, 3, 32, 32), torch.tensor([0, 1, 2, 3])
    names = {"my_network": student, "my_trained_network": teacher, "my_loader": [(images, labels)] * 2}
    exec(EXAMPLES[1], names)
    changed = [
        [not torch.equal(a, b) for a, b in zip(earlier, network.parameters(), strict=True)]
        for earlier, network in zip(before, (student, teacher), strict=True)
    ]
    assert all(changed[0])
    assert not any(changed[1])
    assert torch.load("student.pt").keys() == student.state_dict().keys()


@pytest.mark.parametrize("name", ["uhkd", "figkd", "lfcc"])
def test_reconstructions_are_called_so(name):
    assert registry.find(name).fidelity == "reconstructed"
