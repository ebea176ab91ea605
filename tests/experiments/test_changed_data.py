"""Data that change under one path: what is trained anew, what is shown again, and what is said."""

import io
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import kdzoo
from kdzoo import UserError
from kdzoo.engine import loop
from kdzoo.engine.lane import Lane
from kdzoo.engine.progress import Progress, plain_console
from kdzoo.experiments import suites
from kdzoo.experiments.run import evaluate_run
from kdzoo.resolve import resolve
from kdzoo.results import table
from kdzoo.store.folder import find_runs
from kdzoo.store.result import Result

from .. import made_runs

pytestmark = pytest.mark.slow(reason="trains a run for each state of the data")

TINY = ["protocol.epochs=1", "protocol.batch_size=8", "protocol.augmentation.crop=0", "teacher.epochs=1"]
TINY += ["teacher.allow_weak=true", "engine.device=cpu", "engine.precision=float32"]


def write_tree(root: Path, seed: int = 0) -> Path:
    """Pictures of noise, of two classes."""
    random = np.random.default_rng(seed)
    for split, count in (("train", 8), ("test", 4)):
        for name in ("ant", "bee"):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                noise = random.integers(0, 256, (8, 8, 3), dtype=np.uint8)
                Image.fromarray(noise).save(root / split / name / f"{i}.png")
    return root


def relabel(root: Path) -> None:
    (root / "train" / "ant" / "0.png").rename(root / "train" / "bee" / "0 of ant.png")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the test's own."""
    monkeypatch.setenv("KDZOO_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """What the engine says."""
    out = io.StringIO()
    made = Progress.__init__
    monkeypatch.setattr(
        Progress, "__init__", lambda self, *_, **__: made(self, console=plain_console(file=out, width=1000))
    )
    return out


def distil(root: Path, **options: object) -> Result:
    return kdzoo.run(
        "kd", "resnet8", "resnet14", data=f"folder:{root}", out=root.parent / "runs", overrides=TINY, **options
    )


def teachers(cache: Path) -> set[str]:
    return {path.parent.name for path in cache.glob("teachers/*/result.json")}


@pytest.mark.usefixtures("cache")
def test_an_unchanged_tree_is_shown_again_and_a_changed_one_is_another_run(
    tmp_path: Path, said: io.StringIO, cache: Path
) -> None:
    root = write_tree(tmp_path / "tree")
    first = distil(root)
    assert "finished before" not in said.getvalue()
    assert distil(root) == first
    assert "finished before" in said.getvalue()
    assert "data differ" not in said.getvalue()
    assert len(teachers(cache)) == 1
    relabel(root)
    said.truncate(0)
    other = distil(root)
    assert "finished before" not in said.getvalue()
    assert f"data differ from those of {first.folder}" in said.getvalue()
    assert other.folder != first.folder
    assert len(teachers(cache)) == 2


@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize("changes", [False, True])
def test_an_interrupted_run_is_not_continued_on_other_data(
    tmp_path: Path, said: io.StringIO, monkeypatch: pytest.MonkeyPatch, changes: bool
) -> None:
    root, train = write_tree(tmp_path / "tree"), loop.train

    def interrupt(lanes: list[Lane], *others: Any) -> None:
        if lanes[0].run.settings.teacher.name:  # else it is the teacher
            raise KeyboardInterrupt
        train(lanes, *others)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "train", interrupt)
        with pytest.raises(KeyboardInterrupt):
            distil(root)
    [begun] = (tmp_path / "runs").iterdir()
    if changes:
        relabel(root)
    assert (distil(root).folder == begun) is not changes
    assert (f"data differ from those of {begun}" in said.getvalue()) is changes


def test_two_projects_with_one_name_for_their_data_share_no_teacher(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for project, seed in (("one", 0), ("other", 1), ("copy", 0)):
        write_tree(tmp_path / project / "data", seed)
        monkeypatch.chdir(tmp_path / project)
        distil(Path("data"), quiet=True)
        assert len(teachers(cache)) == {"one": 1, "other": 2, "copy": 2}[project]


def test_measuring_a_run_again_on_other_data_says_so(tmp_path: Path, cache: Path, said: io.StringIO) -> None:
    root = write_tree(tmp_path / "tree")
    result = distil(root)
    evaluate_run(result.folder)
    assert "data differ" not in said.getvalue()
    relabel(root)
    evaluate_run(result.folder)
    assert f"data differ from those of {result.folder}" in said.getvalue()


def test_a_table_needs_no_data_and_mixes_no_other_data_of_one_name(tmp_path: Path) -> None:
    root = write_tree(tmp_path / "tree")
    given = f"data.name=folder:{root}"
    for seed in (0, 1):
        made_runs.write(tmp_path / "runs", 80.0, seed, given)
    assert set(table.rows(find_runs([tmp_path / "runs"]))["data"]) == {f"folder:{root}"}
    relabel(root)
    made_runs.write(tmp_path / "runs", 60.0, 0, given)
    shutil.rmtree(root)
    found = table.summary(table.rows(find_runs([tmp_path / "runs"])), "kd")
    assert sorted(found["top1_mean"]) == [60.0, 80.0]
    assert all(name.startswith(f"folder:{root} [") for name in found["data"])


def test_a_suite_reads_its_data_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mine, suite, loads = tmp_path / "mine.py", tmp_path / "suite.yaml", tmp_path / "loads.txt"
    mine.write_text(
        "import numpy as np\nfrom kdzoo import ImageSet\nclass Mine(ImageSet):\n    def load(self, root):\n"
        f"        with open({str(loads)!r}, 'a') as file: file.write('x')\n"
        "        images = np.zeros((4, 8, 8, 3), np.uint8), [0, 1, 0, 1]\n        return ['a', 'b'], images, images\n"
    )
    suite.write_text(f"{{data: {mine}, pairs: [[resnet14, resnet8]], distillers: [none, kd], seeds: [0, 1, 2]}}")
    runs = suites.load(str(suite)).runs
    assert len(runs) == 6
    assert len({run.settings.data.fingerprint for run in runs}) == 1
    assert loads.read_text() == "x"


def test_a_suite_on_changed_data_trains_other_runs_and_says_so(tmp_path: Path, cache: Path, said: io.StringIO) -> None:
    root, suite = write_tree(tmp_path / "tree"), tmp_path / "suite.yaml"
    suite.write_text(f"{{data: 'folder:{root}', pairs: [[resnet14, resnet8]], distillers: [none, kd]}}")
    one, again = (kdzoo.bench(suite, tmp_path / "runs", overrides=TINY) for _ in range(2))
    assert one.finished == again.finished
    assert "data differ" not in said.getvalue()
    relabel(root)
    other = kdzoo.bench(suite, tmp_path / "runs", overrides=TINY)
    assert said.getvalue().count("data differ from those of") == 1
    assert not set(one.finished) & set(other.finished)
    assert len(set(kdzoo.table(tmp_path / "runs")["data"])) == 2


def test_the_fingerprint_is_nothing_to_set(tmp_path: Path) -> None:
    base = {"distiller": {"name": "none"}, "student": {"name": "resnet8"}}
    with pytest.raises(UserError, match=r"data\.fingerprint is no setting"):
        resolve(base, ["data.fingerprint=abc"])


def test_data_that_are_not_there_are_missed_when_they_are_opened(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no folder '.*nowhere'"):
        distil(tmp_path / "nowhere", quiet=True)
