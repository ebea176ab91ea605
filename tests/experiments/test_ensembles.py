"""Several teachers from names to a student: trained once each, measured alone and together, kept for later runs."""

import re

import pytest
import torch
from safetensors.torch import load_file

import kdzoo
from kdzoo.errors import UserError
from kdzoo.experiments.question import Question
from kdzoo.experiments.recommend import tried
from kdzoo.experiments.run import evaluate_run
from kdzoo.naming import names_of
from kdzoo.results.last_screen import next_steps, result_table
from kdzoo.store import predictions
from kdzoo.store.folder import RunFolder

pytestmark = pytest.mark.slow(reason="trains several teachers")

SHORT = ["protocol.epochs=1", "data.limit=320", "teacher.epochs=1", "teacher.allow_weak=true", "engine.device=cpu"]
SHORT += ["engine.precision=float32", "protocol.batch_size=64"]
SECOND = "teacher.others=[{name: resnet14, seed: 1}]"
BOTH = ("resnet14", "resnet20")


@pytest.fixture(scope="module", autouse=True)
def teachers(tmp_path_factory):
    """The cache of these tests alone, in which nothing is trained yet."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setenv("KDZOO_CACHE", str(folder))
        yield folder / "teachers"


def distil(out, teacher, *more, method="kd", **options):
    overrides = [*SHORT, *more]
    return kdzoo.run(method, "resnet8", teacher, out=out, overrides=overrides, **{"quiet": True} | options)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return distil(tmp_path_factory.mktemp("runs"), BOTH)


def student(result):
    return load_file(result.folder / "student.safetensors")


def same(some, others):
    return all(torch.equal(some[name], others[name]) for name in others)


def test_a_result_names_all_teachers_and_what_they_reach_alone_and_together(finished, tmp_path):
    assert finished.teacher == "resnet14+resnet20"
    assert len(finished.teachers_top1) == 2
    alone = [distil(tmp_path, name).teacher_top1 for name in BOTH]
    assert list(finished.teachers_top1) == alone
    found = predictions.read(finished.folder / "predictions.safetensors", 10)
    assert 100 * float((found.teacher == found.labels).mean()) == pytest.approx(finished.teacher_top1)
    read = RunFolder(finished.folder).read_result()
    assert (read.teachers_top1, read.names.teacher) == (finished.teachers_top1, names_of(run_of(finished)).teacher)
    assert evaluate_run(finished.folder) == (finished.top1, finished.top5)
    [row] = kdzoo.table(finished.folder.parent, "kd").to_dict("records")
    assert row["teacher"] == "resnet14 (epochs=1) + resnet20 (epochs=1)"


def run_of(result):
    return RunFolder(result.folder).run().settings


def test_the_last_screen_shows_each_teacher(finished):
    rows = [list(column.cells) for column in result_table(finished).columns]
    shown = dict(zip(*rows, strict=True))
    assert shown["teacher top-1"] == f"{finished.teacher_top1:.2f} %"
    assert [shown[f"teacher {n} alone"] for n in (1, 2)] == [f"{top1:.2f} %" for top1 in finished.teachers_top1]
    assert "resnet20" not in next_steps(finished).partition("without a teacher")[2].partition("\n")[2].split("\n")[0]


def test_each_teacher_is_trained_once_for_all_runs_that_name_it(finished, tmp_path, teachers, capsys):
    before = sorted(teachers.iterdir())
    distil(tmp_path, BOTH, "teacher.combine=logits")
    distil(tmp_path, BOTH[::-1])
    distil(tmp_path, "resnet20")
    assert sorted(teachers.iterdir()) == before
    assert {path.name.split("-")[1] for path in before} >= set(BOTH)
    distil(tmp_path, "resnet14", "teacher.others=[{name: resnet14, seed: 7}]", quiet=False)
    [another] = set(teachers.iterdir()) - set(before)  # another seed is another teacher
    assert "-resnet14-" in another.name
    said = " ".join(capsys.readouterr().err.split())
    assert said.count("is not trained yet: training it once") == 1
    assert re.search(r"2 teachers together: top-1 [\d.]+ % on digits", said)


def test_learned_weights_are_said_and_those_of_a_strong_teacher_are_larger(tmp_path, capsys):
    others = "teacher.others=[{name: resnet14, lr: 1e-9}]"  # which learns nothing
    strong = "teacher.epochs=6"
    result = distil(tmp_path, "resnet14", others, strong, "teacher.combine=learned", quiet=False)
    said = " ".join(capsys.readouterr().err.split())
    knows, guesses = map(
        float, re.search(r"learned weights of the teachers: \w+ ([\d.]+), \w+ ([\d.]+)", said).groups()
    )
    assert knows > 0.9 > 0.1 > guesses
    assert result.teacher_top1 == pytest.approx(result.teachers_top1[0], abs=3)


def test_a_teacher_twice_is_the_teacher(tmp_path):
    once, twice = (distil(tmp_path, names, "teacher.combine=logits") for names in ("resnet14", ("resnet14",) * 2))
    assert twice.teacher_top1 == once.teacher_top1
    assert twice.teachers_top1 == (once.teacher_top1,) * 2
    assert same(student(twice), student(once))  # the mean of two equal logits has their bits
    assert not same(student(distil(tmp_path, "resnet14", SECOND, "teacher.combine=logits")), student(once))


@pytest.mark.parametrize("method", ["simkd", "norm"])
def test_a_method_that_ships_modules_learns_from_a_named_teacher_and_not_by_turns(tmp_path, teachers, method):
    before = sorted(teachers.glob("*"))  # none at all where this test is the first
    new = "teacher.others=[{name: resnet8x4}]"
    with pytest.raises(UserError, match=r"ships modules that belong to one teacher; name it with teacher\.features"):
        distil(tmp_path, "resnet14", new, "teacher.features=turns", method=method)
    assert sorted(teachers.glob("*")) == before  # none was trained for it
    found = distil(tmp_path, BOTH, "teacher.features=resnet20", method=method)
    assert evaluate_run(found.folder) == (found.top1, found.top5)


def test_teachers_may_read_images_of_different_sizes(tmp_path, finished):
    wide = "teacher.others=[{name: resnet20, image_size: 16, mean: [0.5], std: [0.25]}]"
    assert distil(tmp_path, "resnet14", wide, method="fitnet").teachers_top1[0] == finished.teachers_top1[0]


def test_a_weak_teacher_among_several_is_refused_by_its_name(tmp_path):
    with pytest.raises(UserError, match="teacher resnet20 reaches"):
        distil(
            tmp_path, "resnet14", "teacher.others=[{name: resnet20, lr: 1e-9, epochs: 1}]", "teacher.epochs=6",
            "teacher.allow_weak=false",
        )  # fmt: skip


def test_a_method_without_a_teacher_may_be_given_several(tmp_path):
    given = [distil(tmp_path, teacher, method="none") for teacher in (None, BOTH)]
    assert same(*map(student, given))


def test_a_search_may_ask_for_several_teachers(finished):
    own = tuple(key for key in SHORT if not key.startswith("protocol."))
    recipe = {"name": "quick", "epochs": 4, "batch_size": 64}
    question = Question(BOTH, ("resnet8",), ("at",), 1, "", protocol=recipe, overrides=own)
    found = tried(question, quiet=True)
    assert (found.asked["teacher"], found.asked["teachers"]) == ("resnet14+resnet20", list(BOTH))
    assert {one.method for one in found.candidates} == {"at", "kd", "logitmse", "none"}
    assert "resnet14+resnet20" in str(question.folder) or "resnet14-resnet20" in str(question.folder)
