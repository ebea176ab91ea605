"""A few cases of the torture bench, the same ones each time; and what it takes for a fault."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from .cases import Fault, Torture, check_end, found
from .harm import Harm

AT_OPERATIONS = [f"--kind={kind}" for kind in ("killed", "full", "EIO", "removed", "renamed", "clock")]


@pytest.mark.slow(reason="imports torch, and trains again and again, harmed at many moments")
@pytest.mark.parametrize(("subject", "first", "cases"), [("run", 101, 3), ("bench", 200, 1)])
def test_what_is_harmed_ends_in_one_line_and_then_as_if_nothing_had_happened(tmp_path, subject, first, cases):
    command = ["-m", "tests.torture", f"--subject={subject}", f"--first={first}", f"--cases={cases}", *AT_OPERATIONS]
    ended = subprocess.run(
        [sys.executable, *command],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert len(re.findall(r"^seed .*, then 0 and equal$", ended.stdout, re.MULTILINE)) == cases


def finished(home, name="kd", **changed):
    folder = home / "runs" / name
    folder.mkdir(parents=True)
    texts = {
        "config.yaml": "a: 1",
        "student.safetensors": "weights",
        "predictions.safetensors": "classes",
        "metrics.jsonl": '{"top1": 1, "images_per_second": 5}',
    }
    texts |= {"result.json": '{"top1": 1, "seconds": 9}'} | {
        key.replace("_", "."): text for key, text in changed.items()
    }
    for file, text in texts.items():
        (folder / file).write_text(text)
    return folder


@pytest.fixture
def torture(tmp_path):
    made = Torture(tmp_path)
    made.whole["run"] = found(finished(tmp_path / "whole").parent)
    return made


def test_times_may_differ(torture, tmp_path):
    finished(tmp_path / "here", result_json='{"top1": 1, "seconds": 7}')
    torture.check_finished(tmp_path / "here", "run")
    assert found(tmp_path / "here" / "runs") == torture.whole["run"]


@pytest.mark.parametrize(
    "changed",
    [
        {"student_safetensors": "weightS"},
        {"predictions_safetensors": "classeS"},
        {"result_json": '{"top1": 2, "seconds": 9}'},
    ],
)
def test_a_finished_run_with_other_weights_or_another_result_is_a_fault(torture, tmp_path, changed):
    finished(tmp_path / "here", **changed)
    with pytest.raises(Fault, match="says that it is finished, and its"):
        torture.check_finished(tmp_path / "here", "run")


def test_so_is_one_that_has_lost_a_part_even_where_it_was_moved(torture, tmp_path):
    (finished(tmp_path / "here", "kd-moved-7") / "config.yaml").unlink()
    with pytest.raises(Fault, match=r"and its config\.yaml differs or is missing"):
        torture.check_finished(tmp_path / "here", "run")


@pytest.mark.parametrize(
    ("end", "said", "kind"),
    [
        (2, "Traceback (most recent call last):\nValueError", "EIO"),
        (1, "error: a", "EIO"),
        (2, "no reason", "EIO"),
        (-11, "", "EIO"),
        (-9, "", "term"),
    ],
)
def test_so_are_tracebacks_and_ends_without_a_reason(tmp_path, end, said, kind):
    (tmp_path / "said-0").write_text(said)
    with pytest.raises(Fault):
        check_end(tmp_path, end, Harm(kind, 1))


@pytest.mark.parametrize(("end", "said", "kind"), [(2, "error: full", "full"), (-9, "", "killed"), (143, "", "term")])
def test_so_is_no_end_that_a_harm_explains(tmp_path, end, said, kind):
    (tmp_path / "said-0").write_text(said)
    check_end(tmp_path, end, Harm(kind, 1))


def test_a_seed_draws_the_same_case_each_time(torture):
    torture.operations["run"] = 100
    kinds = ("killed", "term", "memory")
    cases = [[torture.drawn(seed, kinds, ("run",)) for seed in range(20)] for _ in range(2)]
    assert cases[0] == cases[1]
    assert len(set(map(str, cases[0]))) == 20
