"""README and the list of methods keep their word: the list is the registry's, the examples run."""

import re
from pathlib import Path

import pandas as pd
import pytest
import torch
from torch import nn

import kdzoo
from kdzoo import registry
from kdzoo.results.catalogue import listing

ROOT = Path(__file__).parents[1]
README, METHODS = ((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "docs/methods.md"))
EXAMPLES = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def test_the_table_of_methods_is_the_registrys():
    _, _, rest = METHODS.partition("<!-- methods: kdzoo list distillers --format markdown -->\n")
    table, _, _ = rest.partition("<!-- end of methods -->")
    assert table.strip() == listing("distillers", "markdown")


@pytest.mark.slow(reason="runs every check")
def test_the_example_of_a_method_keeps_every_promise(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(EXAMPLES[1])
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
    before = [p.clone() for p in (*teacher.parameters(), *student.parameters())]
    images, labels = torch.rand(4, 3, 32, 32), torch.tensor([0, 1, 2, 3])
    exec(EXAMPLES[0], {"student": student, "teacher": teacher, "loader": [(images, labels)] * 2})
    same = [torch.equal(a, b) for a, b in zip(before, (*teacher.parameters(), *student.parameters()), strict=True)]
    assert all(same[: len(same) // 2])
    assert not any(same[len(same) // 2 :])
    assert Path("student.pt").is_file()


def test_the_table_on_the_first_screen_is_one_that_was_measured():
    [results] = [f for f in (ROOT / "benchmarks/results").glob("cifar100-small-*.csv") if "by-seed" not in f.name]
    measured = pd.read_csv(results).query("student == 'resnet8'").set_index("method")
    shown = re.findall(
        r"^\| ([\w =()]+) \| ([\d.]+) ± ([\d.]+) \| ([-+\d.]*) ?\|.*\| ([\w ]+) \|$", README, re.MULTILINE
    )
    assert len(shown) == 5
    assert {row[-1] for row in shown} >= {"better", "not told apart"}
    for method, mean, std, difference, verdict in shown:
        row = measured.loc[method]
        assert (f"{row['top1_mean']:.2f}", f"{row['top1_std']:.2f}", row["verdict"]) == (mean, std, verdict)
        assert difference == ("" if pd.isna(row["difference"]) else f"{row['difference']:+.2f}")


@pytest.mark.parametrize("name", ["uhkd", "figkd", "lfcc"])
def test_reconstructions_are_called_so(name):
    assert registry.find(name).fidelity == "reconstructed"
