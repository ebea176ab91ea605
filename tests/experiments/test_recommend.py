"""A search ranks candidates on a part of the training images, trains finalists anew, and can be continued."""

import json
from dataclasses import replace
from functools import partial

import pytest
import torch
import yaml
from safetensors.torch import load_file

import kdzoo
from kdzoo import DataSpec
from kdzoo.cli import main
from kdzoo.commands.training import read_settings
from kdzoo.engine.memory import Cost
from kdzoo.engine.progress import Progress
from kdzoo.errors import UserError
from kdzoo.experiments import recommend, work
from kdzoo.experiments.bench import Report
from kdzoo.experiments.estimate import GroupCost, LaneCost, by_turns
from kdzoo.experiments.halving import Prices, epochs_of
from kdzoo.experiments.question import Question
from kdzoo.experiments.recommend import AVERAGE, Trainer, search, tried
from kdzoo.experiments.workers import Local
from kdzoo.models import create
from kdzoo.quantities import duration
from kdzoo.resolve import read_protocol
from kdzoo.results.recommendation import Recommendation
from kdzoo.store.folder import RunFolder, find_runs
from kdzoo.store.search import FILE, Search, ranked

PLAIN = ("engine.device=cpu", "engine.precision=float32", "data.limit=160", "protocol.batch_size=32")
PLAIN += ("teacher.epochs=1", "teacher.allow_weak=true", "engine.lanes=99")
MINE = DataSpec("mine", 10, (), 8, torch.zeros(0, dtype=torch.int64))
WHOLE_SEARCH = pytest.mark.slow(reason="trains a whole search")
METHODS = ("dkd", "dist", "sp", "at")
QUESTION = Question(
    ("resnet14",), ("resnet8",), METHODS, 1, "", protocol={"name": "quick", "epochs": 3}, overrides=PLAIN
)

FAILING = """
from kdzoo import Distiller, Fidelity, Needs
from kdzoo.errors import UserError
from kdzoo.losses import cross_entropy


class Failing(Distiller):
    paper, fidelity = "none", Fidelity.EXACT
    needs = Needs(features=False)

    def __init__(self, *, ce: float = 1.0, mine: float = 1.0, when: str = "later"):
        super().__init__(ce=ce, mine=mine)
        self.when = when

    def build(self, student, teacher, data):
        if self.when == "built":
            raise UserError("this pair is not for it")

    def loss(self, student, teacher, batch):
        zero = 0 * student.logits.sum()
        late = (batch.progress >= 0.25).float()
        return self.weigh(
            ce=lambda: cross_entropy(student.logits, batch.targets),
            mine=lambda: zero + torch_nan(late),
        )


def torch_nan(late):
    return late * float("nan") if late else late
"""


@pytest.fixture(scope="module")
def groups():
    """The sizes of the groups that the search of ``found`` trained, in their order."""
    return []


@pytest.fixture(scope="module")
def found(tmp_path_factory, groups):
    """The folder of a search."""
    train = work.train_lanes

    def counting(runs, *given):
        groups.append(len(runs))
        return train(runs, *given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(work, "train_lanes", counting)
        return search(QUESTION, tmp_path_factory.mktemp("search") / "out", quiet=True)


def histories(out):
    return {path.parent.name: path.read_text() for path in sorted(out.glob("search/*/metrics.jsonl"))}


def accuracies(out):
    """What each run of the search found, without its speed."""
    return {
        name: [(record["epoch"], record["top1"], record["loss"]) for record in map(json.loads, text.splitlines())]
        for name, text in histories(out).items()
    }


def decay_of(run):
    """Of the average of weights that a run keeps."""
    return yaml.safe_load((run / "config.yaml").read_text())["protocol"]["ema"]


def weights(out):
    return {file.parent.name: load_file(file) for file in out.glob("final/*/student.safetensors")}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[n][k], other[n][k]) for n in one for k in one[n])


@WHOLE_SEARCH
def test_the_worse_half_stops_at_each_rung_and_the_best_are_finalists(found):
    made = Search.read(found)
    assert [one.title for one in made.candidates] == ["none", "kd", "logitmse", *METHODS]
    assert (made.rungs, made.seeds) == ([1, 2], [1, 2, 3])
    stopped = [course.stopped for course in made.courses]
    assert sorted(stopped, key=str) == [1, 1, 1, 2, None, None, None]
    assert [len(course.curve) for course in made.courses] == [epoch or 2 for epoch in stopped]
    for epoch in made.rungs:
        there = [n for n in range(7) if (stopped[n] or 9) >= epoch]
        order = ranked(made, there, epoch)
        left = [n for n in there if stopped[n] != epoch]
        assert set(order[: len(left)]) == set(left)
        least = max(made.courses[n].at(epoch).nll for n in left)
        assert all(made.courses[n].at(epoch).nll >= least for n in set(there) - set(left))


@WHOLE_SEARCH
def test_candidates_are_ranked_on_images_that_nobody_is_measured_on_in_the_end(found):
    for path in found.glob("search/*/config.yaml"):
        data = yaml.safe_load(path.read_text())["data"]
        assert (data["select"], data["val"]) == (recommend.SHARE, 0.0)
    for folder in find_runs([found / "final"]):
        assert folder.read_config()["data"]["select"] == 0
        measured = [record["epoch"] for record in folder.read_history() if record["top1"] is not None]
        assert measured == [3]  # once
    assert not list(found.glob("search/*/result.json"))


@WHOLE_SEARCH
def test_finalists_and_references_are_trained_anew_on_three_other_seeds(found):
    made = Search.read(found)
    finalists = {n for n, course in enumerate(made.courses) if course.stopped is None} | {0, 1}
    assert {(one.candidate, one.seed) for one in made.finals} == {(n, seed) for n in finalists for seed in (1, 2, 3)}
    assert {decay_of(path) for stage in ("search", "final") for path in found.glob(f"{stage}/*/")} == {0.97}
    for one in made.finals:
        settings = made.run(found, one).run().settings
        assert (settings.distiller.name, settings.seed) == (made.candidates[one.candidate].method, one.seed)


@WHOLE_SEARCH
def test_the_same_question_again_trains_nothing(found, monkeypatch):
    before = (found / FILE).read_text(), histories(found)
    monkeypatch.setattr(work, "train_lanes", lambda *given: pytest.fail("it trained"))
    assert search(QUESTION, found, quiet=True) == found
    assert ((found / FILE).read_text(), histories(found)) == before


@WHOLE_SEARCH
def test_a_dry_run_of_a_search_that_has_begun_says_what_the_search_does(found, monkeypatch):
    monkeypatch.setattr(recommend, "measure", lambda *given: pytest.fail("it planned anew"))
    assert tried(QUESTION, found, quiet=True) == Search.read(found)
    with pytest.raises(UserError, match="holds the answer to another question"):
        tried(replace(QUESTION, budget="900epochs"), found, quiet=True)


@WHOLE_SEARCH
@pytest.mark.parametrize(
    "changed",
    [
        {"overrides": (*PLAIN, "engine.threads=1", "engine.checkpoint_seconds=60")},
        {"overrides": PLAIN[::-1]},
        {"data": {"name": "digits", "root": "elsewhere"}},
    ],
)
def test_a_search_may_continue_in_another_place(found, changed, monkeypatch):
    monkeypatch.setattr(work, "train_lanes", lambda *given: pytest.fail("it trained"))
    question = replace(QUESTION, **changed)
    assert search(question, found, quiet=True) == found
    asked = Search.read(found).asked
    assert (asked["data"], asked["overrides"]) == (question.data, list(question.overrides))
    search(QUESTION, found, quiet=True)  # back where the tests that follow expect it


@WHOLE_SEARCH
@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"data": {"name": "bands"}}, "(data, runs changed)"),
        ({"seed": 5}, "(seed, runs changed)"),
        ({"settings": 2}, "(settings changed)"),
        ({"methods": ("dkd",)}, "(methods changed)"),
        ({"overrides": (*PLAIN, "protocol.lr=0.02")}, "(overrides, runs changed)"),
        ({"students": ("resnet14",)}, "(students, runs changed)"),
    ],
)
def test_another_question_in_the_same_folder_is_one_line(found, changed, said):
    with pytest.raises(UserError, match="holds the answer to another question") as caught:
        search(replace(QUESTION, **changed), found, quiet=True)
    assert said in str(caught.value)


def test_weights_that_changed_are_another_question(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Trainer, "train", lambda *given: iter(()))
    monkeypatch.setattr(recommend, "ranked", lambda made, some, epoch: some)
    question = replace(QUESTION, methods=("kd",), weights=("mine.pth",))
    for seed in range(2):
        torch.manual_seed(seed)
        torch.save(create("resnet14", MINE).body.state_dict(), "mine.pth")
        if not seed:
            search(question, "out", quiet=True)
    with pytest.raises(UserError, match=r"another question \(the images, or a file that the runs use, changed\)"):
        search(question, "out", quiet=True)


@WHOLE_SEARCH
def test_a_mistyped_method_is_told_of_before_the_question_is_compared(found):
    with pytest.raises(UserError, match="unknown distiller 'dkdd'; did you mean dkd"):
        search(replace(QUESTION, methods=("dkdd",)), found, quiet=True)


@WHOLE_SEARCH
def test_a_folder_holds_a_search_or_a_suite_and_not_both(found, tmp_path):
    suite = tmp_path / "mine.yaml"
    suite.write_text("{pairs: [[resnet14, resnet8]], distillers: [none]}")
    with pytest.raises(UserError, match=r"holds the suite 'recommend', not 'mine'; choose another --out"):
        kdzoo.bench(suite, found, overrides=PLAIN, quiet=True)
    (tmp_path / "suite.json").write_text('{"name": "mine"}')
    with pytest.raises(UserError, match=r"holds the suite 'mine', not 'recommend'; choose another --out"):
        search(QUESTION, tmp_path, quiet=True)
    assert not (tmp_path / "suites").exists()


@WHOLE_SEARCH
def test_a_search_that_is_stopped_anywhere_ends_as_one_that_never_was(found, tmp_path, monkeypatch):
    train, calls = work.train_lanes, []

    def stopping(*given):
        calls.append(given)
        if len(calls) in (2, 4, 6):
            raise KeyboardInterrupt
        return train(*given)

    monkeypatch.setattr(work, "train_lanes", stopping)
    interrupted = 0
    while True:
        try:
            search(QUESTION, tmp_path, quiet=True)
            break
        except KeyboardInterrupt:
            interrupted += 1
    assert interrupted == 3
    assert accuracies(tmp_path) == accuracies(found)
    assert same(weights(tmp_path), weights(found))
    one, other = Search.read(tmp_path), Search.read(found)
    assert (one.courses, one.finals) == (other.courses, other.finals)


@WHOLE_SEARCH
def test_groups_shrink_from_rung_to_rung(found, groups):
    finalists = len(Search.read(found).finals) // 3
    assert groups == [7, 4, *[finalists] * 3]


@pytest.mark.slow(reason="starts processes, each of which imports torch and trains")
def test_several_processes_share_a_search_and_find_the_same(found, tmp_path):
    question = replace(QUESTION, overrides=(*PLAIN, "engine.lanes=5"))
    search(question, tmp_path, Local(jobs=2), quiet=True)
    assert same(weights(tmp_path), weights(found))
    assert Search.read(tmp_path).courses == Search.read(found).courses


@pytest.fixture
def failing(tmp_path):
    file = tmp_path / "failing.py"
    file.write_text(FAILING)
    return file


@pytest.mark.slow(reason="trains several runs")
def test_a_method_that_fails_drops_out_with_its_reason_and_stops_no_other(failing, tmp_path, monkeypatch):
    train, finalists = Trainer.train, []

    def no_finals(self, made, stage, chosen, overrides):
        if stage != "final":
            return train(self, made, stage, chosen, overrides)
        finalists.extend(made.candidates[number].method for number in chosen["resnet8"])
        return iter(())

    monkeypatch.setattr(Trainer, "train", no_finals)
    question = replace(QUESTION, methods=("dkd", str(failing)))
    made = Search.read(search(question, tmp_path / "out", quiet=True))
    reasons = {one.method: course.reason for one, course in zip(made.candidates, made.courses, strict=True)}
    assert "'mine' is not finite" in reasons.pop(str(failing))
    assert set(reasons.values()) == {""}
    assert len(finalists) >= 3
    assert str(failing) not in finalists


@WHOLE_SEARCH
def test_a_failure_in_a_later_rung_does_not_change_who_came_through_an_earlier_one(failing, tmp_path, monkeypatch):
    failing.write_text(FAILING.replace("0.25", "0.34"))  # in the second rung
    question = replace(QUESTION, methods=(*METHODS, str(failing)))
    made = Search.read(search(question, tmp_path / "out", quiet=True))
    late = [one.method for one in made.candidates].index(str(failing))
    assert (len(made.courses[late].curve), made.courses[late].stopped) == (1, 2)
    assert "is not finite" in made.courses[late].reason
    before = (tmp_path / "out" / FILE).read_text()
    monkeypatch.setattr(work, "train_lanes", lambda *given: pytest.fail("it trained"))
    search(question, tmp_path / "out", quiet=True)
    assert (tmp_path / "out" / FILE).read_text() == before


@pytest.mark.slow(reason="trains a teacher and measures candidates")
def test_a_method_that_does_not_fit_is_left_out_with_its_reason(failing, tmp_path):
    failing.write_text(FAILING.replace('"later"', '"built"'))
    made = tried(replace(QUESTION, methods=("dkd", str(failing)), settings=3), quiet=True)
    assert made.left_out == [("resnet8", str(failing), "this pair is not for it")]
    assert {one.method for one in made.candidates} == {"none", "kd", "logitmse", "dkd"}


@pytest.mark.slow(reason="trains a teacher and measures candidates")
def test_a_method_whose_file_changed_is_another_question_since_the_plan_was_made_with_the_old_one(
    failing, tmp_path, monkeypatch
):
    failing.write_text(FAILING.replace('"later"', '"built"'))
    monkeypatch.setattr(Trainer, "train", lambda *given: iter(()))
    monkeypatch.setattr(recommend, "ranked", lambda made, some, epoch: some)
    question, out = replace(QUESTION, methods=(str(failing),)), tmp_path / "out"
    search(question, out, quiet=True)
    search(question, out, quiet=True)
    failing.write_text(FAILING)
    with pytest.raises(UserError, match=r"another question \(files changed\)"):
        search(question, out, quiet=True)


def test_a_search_says_why_a_method_is_left_out_also_when_it_continues(failing, tmp_path, monkeypatch, capsys):
    failing.write_text(FAILING.replace('"later"', '"built"'))
    monkeypatch.setattr(Trainer, "train", lambda *given: iter(()))
    monkeypatch.setattr(recommend, "ranked", lambda made, some, epoch: some)
    for _ in range(2):
        search(replace(QUESTION, methods=(str(failing),)), tmp_path / "out")
        said = capsys.readouterr().err
        assert "3 candidates (1 more does not fit)" in said
        assert f"{failing} is left out for resnet8: this pair is not for it" in said


@pytest.mark.slow(reason="trains several runs")
def test_a_plan_leaves_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made = tried(QUESTION, quiet=True)
    assert (len(made.candidates), made.rungs) == (7, [1, 2])
    assert len(made.costs) == 7
    assert min(made.costs) > 0
    assert not list(tmp_path.iterdir())


def test_the_cost_of_a_method_without_a_teacher_holds_no_pass_of_it(monkeypatch):
    lane = LaneCost(step=2.0, test=1.0, memory=Cost(1, 1))
    cost = GroupCost(5.0, 0.0, 5, 4, 4, dict.fromkeys(range(7), lane), {}, 0, 1.0, teacher=4.0)
    monkeypatch.setattr(recommend, "measure", lambda *given: (cost, {}))
    assert tried(QUESTION, quiet=True).costs == [3.0, *[7.0] * 6]


def test_a_student_that_no_method_fits_is_named_with_its_own_reason(monkeypatch):
    lane = LaneCost(step=2.0, test=1.0, memory=Cost(1, 1))

    def measured(runs, *given):
        names = [run.settings.student.name for run in runs]
        failed = {0: UserError("that is another"), **{i: UserError("its maps are odd") for i in range(7, 14)}}
        assert names == ["resnet14"] * 7 + ["resnet8"] * 7
        return GroupCost(5.0, 0.0, 5, 4, 4, {i: lane for i in range(14) if i not in failed}, failed, 0, 1.0), {}

    monkeypatch.setattr(recommend, "measure", measured)
    with pytest.raises(UserError, match=r"^no method fits resnet14 -> resnet8: its maps are odd$"):
        tried(replace(QUESTION, students=("resnet14", "resnet8")), quiet=True)


@WHOLE_SEARCH
def test_several_students_are_each_given_an_answer(tmp_path):
    students = ("resnet8", "resnet14")
    found = kdzoo.recommend(
        "resnet14",
        students,
        methods=["dkd"],
        settings=1,
        out=tmp_path,
        quiet=True,
        overrides=(*PLAIN, "protocol.ema=0"),
        budget="70epochs",
    )
    assert {decay_of(path) for path in tmp_path.glob("search/*/")} == {AVERAGE}
    assert {decay_of(path) for path in tmp_path.glob("final/*/")} == {0.0}  # the recipe as it was asked for
    assert found.search.epochs == 2
    assert [answer.student for answer in found.answers] == list(students)
    assert {one.candidate.student for one in found.answers[1].finalists} == {"resnet14"}
    assert sorted(file.name for file in tmp_path.glob("*.yaml")) == [
        "recommended-1-resnet8.yaml",
        "recommended-2-resnet14.yaml",
    ]


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"budget": "3epochs"}, "a budget of 3epochs cannot pay the shortest search"),
        ({"budget": "1s"}, "a budget of 1s cannot pay the shortest search"),
        ({"protocol": {"name": "quick", "epochs": 2}}, "epochs: 2, too few to halve 7 candidates until 3 are left"),
        ({"teachers": ("resnett14",)}, "unknown model 'resnett14'; did you mean resnet14"),
        ({"methods": ("dkdd",)}, "unknown distiller 'dkdd'; did you mean dkd"),
        ({"overrides": (*PLAIN, "protocol.lrr=1")}, "did you mean protocol.lr"),
    ],
)
@pytest.mark.slow(reason="trains a teacher and measures candidates")
def test_a_question_that_cannot_be_answered_is_one_line_and_leaves_no_plan(changed, said, tmp_path):
    with pytest.raises(UserError, match=said):
        search(replace(QUESTION, **changed), tmp_path, quiet=True)
    assert not (tmp_path / FILE).exists()


DATA = """
import numpy as np
from kdzoo import ImageSet


class Mine(ImageSet):
    def load(self, root):
        pixels = np.random.default_rng(0).integers(0, 255, (60, 8, 8, 3), dtype=np.uint8)
        labels = LABELS
        return CLASSES, (pixels, labels), (pixels[:20], labels[:20])
"""


@pytest.mark.parametrize(
    ("classes", "labels", "said"),
    [
        ("('cat',)", "np.zeros(60, dtype=np.int64)", "have one class"),
        ("('cat', 'dog')", "(np.arange(60) == 0).astype(np.int64)", "none of dog; add images of this class"),
    ],
)
def test_data_that_methods_cannot_be_ranked_on_are_one_line(classes, labels, said, tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(DATA.replace("CLASSES", classes).replace("LABELS", labels))
    question = replace(QUESTION, data={"name": str(file)}, overrides=tuple(key for key in PLAIN if "limit" not in key))
    with pytest.raises(UserError) as caught:
        search(question, tmp_path / "out", quiet=True)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("classes", "fill", "said"),
    [(7, None, r"fc.weight is \(7, 64\), expected \(10, 64\)"), (10, 0.0, "near the chance of 10.00 %")],
)
@pytest.mark.parametrize("plan", [tried, partial(search, quiet=True)])
def test_weights_that_are_no_teacher_are_one_line_before_anything_is_measured(
    plan, classes, fill, said, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(recommend, "measure", lambda *given: pytest.fail("methods were measured"))
    made = create("resnet14", MINE._replace(num_classes=classes)).body.state_dict()
    torch.save(made if fill is None else {key: value * 0 + fill for key, value in made.items()}, "mine.pth")
    strict = tuple(key for key in PLAIN if "teacher" not in key)
    with pytest.raises(UserError, match=said):
        plan(replace(QUESTION, weights=("mine.pth",), overrides=strict))


def command(monkeypatch, capsys, *words):
    monkeypatch.setattr("sys.argv", ["kdzoo", *map(str, words)])
    with pytest.raises(SystemExit) as ended:
        main()
    said = capsys.readouterr()
    return ended.value.code, said.out, said.err


ASKED = ["--teacher", "resnet14", "--students", "resnet8", "--methods", ",".join(METHODS), "--settings", "1",
         "--epochs", "3", *PLAIN]  # fmt: skip


@WHOLE_SEARCH
def test_the_command_answers_and_kdzoo_run_takes_the_answer(found, tmp_path, monkeypatch, capsys):
    code, out, _ = command(monkeypatch, capsys, "recommend", *ASKED, "--out", found)
    assert code == 0
    said = Recommendation.read(found).sentences()
    assert " ".join(said) in " ".join(out.split())
    assert f"kdzoo run --config {found / 'recommended.yaml'}" in out
    config = found / "recommended.yaml"
    code, out, err = command(
        monkeypatch, capsys, "run", "--config", config, "--out", tmp_path, "--seed", 7, "--epochs", 1
    )
    assert (code, err[-300:] if code else "") == (0, "")
    [folder] = find_runs([tmp_path])
    settings = RunFolder(folder.path).run().settings
    best = Recommendation.read(found).answers[0].best.candidate
    assert (settings.distiller.name, settings.seed, settings.data.limit) == (best.method, 7, 160)


@pytest.mark.slow(reason="measures every method")
@pytest.mark.parametrize(("given", "most"), [({}, 6), ({"epochs": 9}, 9)])
def test_a_recipe_that_is_shorter_than_its_search_is_made_as_long_as_that_needs(given, most):
    question = replace(QUESTION, settings=9, protocol={"name": "quick"} | given)
    made = tried(question, quiet=True)
    assert (len(made.candidates), read_protocol("quick").epochs) == (55, 5)
    assert (made.epochs, made.rungs[-1] < most) == (most, True)


@pytest.mark.slow(reason="trains a teacher and measures candidates")
def test_epochs_that_were_asked_for_and_are_too_few_are_refused():
    with pytest.raises(
        UserError, match="epochs: 5, too few to halve 55 candidates until 3 are left; set --epochs 6 or"
    ):
        tried(replace(QUESTION, settings=9, protocol={"name": "quick", "epochs": 5}), quiet=True)


@pytest.mark.slow(reason="trains several runs")
def test_the_dry_run_says_what_it_would_do(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(recommend.Prices, "of", lambda *_: Prices(once=100.0, search=2.0, final=5.0))
    code, out, _ = command(monkeypatch, capsys, "recommend", *ASKED, "--seeds", "4", "--dry-run")
    assert code == 0
    assert "7 candidates; the worse half stops after epochs 1, 2" in out
    search, final = epochs_of([7], 2, 3, seeds=4)
    assert "for 3 epochs with 4 seeds" in out
    assert f"{search + final} epochs in all" in out
    assert f"expected to take about {duration(100 + 2 * search + 5 * final)}" in out
    assert "epochs 1 to 1: 7 candidates" in out
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["run", "--config", "missing.yaml"], "no file missing.yaml"),
        (["run", "--student", "resnet8"], "no distiller is named"),
        (["run", "--distiller", "none"], "no student is named"),
        (["recommend", "--teacher", "resnet14", "--students", ","], "no student is named"),
        (["recommend", "--teacher", "resnet14", "--students", "resnet8", "--methods", ""], "no method is named; leave"),
        (["recommend", *ASKED, "--budget", "never"], "--budget never: expected a time"),
        (["recommend", *ASKED, "--budget", ""], "the budget is empty; leave --budget out"),
    ],
)
def test_mistakes_on_the_command_line_are_one_line(words, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    code, _, err = command(monkeypatch, capsys, *words)
    assert code == 2
    assert said in err.splitlines()[-1]


@pytest.mark.parametrize("text", ["distiller: kd", "distiller.name: kd", "pairs: [[resnet14, resnet8]]", "kd"])
def test_a_file_that_holds_no_settings_by_section_is_one_line(text, tmp_path, monkeypatch, capsys):
    (tmp_path / "mine.yaml").write_text(text)
    words = ["run", "--config", tmp_path / "mine.yaml", "--student", "resnet8", "distiller.kd=1"]
    code, _, err = command(monkeypatch, capsys, *words)
    assert (code, "expected settings by section" in err.splitlines()[-1]) == (2, True)


@pytest.mark.parametrize(
    "damage",
    [
        lambda plan: plan.pop("candidates"),
        lambda plan: plan["candidates"][0].pop("method"),
        lambda plan: plan.update(costs=[1]),
        lambda plan: plan.update(courses=[3]),
        lambda plan: plan.update(finals=[{"candidate": 99, "seed": 1, "folder": "x"}]),
        lambda plan: plan.update(left_out=[[1]]),
        lambda plan: plan.update(more=1),
    ],
)
def test_a_damaged_plan_is_one_line(damage, found, tmp_path):
    plan = json.loads((found / FILE).read_text())
    damage(plan)
    (tmp_path / FILE).write_text(json.dumps(plan))
    with pytest.raises(UserError, match="is damaged"):
        Search.read(tmp_path)


def test_a_plan_of_another_version_and_none_are_one_line(tmp_path):
    with pytest.raises(UserError, match="holds no search"):
        Search.read(tmp_path)
    (tmp_path / FILE).write_text('{"format": 99}')
    with pytest.raises(UserError, match="another version"):
        Search.read(tmp_path)


@WHOLE_SEARCH
def test_a_plan_names_no_folder_outside_of_its_own(found):
    made = Search.read(found)
    outside = replace(made.finals[0], folder="../../elsewhere")
    assert made.run(found, outside).path == found / "final" / "elsewhere"


@pytest.mark.slow(reason="trains several runs")
def test_a_method_with_a_longer_phase_before_training_than_training_itself_is_left_out():
    made = tried(replace(QUESTION, methods=("sskd", "ofd")), quiet=True)
    assert made.left_out == [
        (
            "resnet8",
            "sskd",
            "its phase before training takes 60 epochs, and a training 3; it is tried with --epochs 60 or more",
        )
    ]
    assert "ofd" in {one.method for one in made.candidates}


@WHOLE_SEARCH
def test_costs_of_finalists_are_those_of_steps_by_turns(found):
    made = Search.read(found)
    finalists = {one.candidate for one in made.finals}
    runs = {n: made.run(found, one).run() for one in made.finals if (n := one.candidate) in finalists}
    least = by_turns([run.within(output={"root": str(found / "final")}) for run in runs.values()], Progress(quiet=True))
    assert len(least) == len(finalists)
    assert all(0 < seconds < 10 for seconds in least.values())


@WHOLE_SEARCH
def test_of_processes_that_share_a_search_one_compares_costs_and_the_others_take_them(found, monkeypatch):
    late = Search.read(found)
    late.finals, late.costs = [], [0.5] * len(late.costs)  # as read before the first process ended
    before = (found / FILE).read_text()
    monkeypatch.setattr(recommend, "planned", lambda *given: late)
    monkeypatch.setattr(recommend, "compare_costs", lambda *given: pytest.fail("it compared costs again"))
    search(QUESTION, found, quiet=True)
    assert (found / FILE).read_text() == before


@WHOLE_SEARCH
def test_costs_are_compared_again_where_what_failed_is_tried_again(found, monkeypatch):
    compared = []
    monkeypatch.setattr(recommend, "compare_costs", lambda made, runs, quiet: compared.extend(runs))
    search(QUESTION, found, quiet=True, retry=True)
    assert set(compared) == {one.candidate for one in Search.read(found).finals}


@WHOLE_SEARCH
def test_a_search_that_others_are_at_work_on_says_so_though_candidates_failed(found, tmp_path, monkeypatch):
    report = Report(elsewhere=[tmp_path / "one"], failed={tmp_path / "two": "the loss term 'kd' is not finite"})
    monkeypatch.setattr(recommend, "bench", lambda *given, **named: report)
    with pytest.raises(UserError, match="other processes are still at work on 1 run; the same command continues"):
        search(QUESTION, found, quiet=True)


@WHOLE_SEARCH
def test_what_failed_is_tried_again_where_that_is_asked_for(failing, tmp_path, monkeypatch):
    monkeypatch.setattr(recommend, "REFERENCES", ())
    question = replace(QUESTION, methods=(str(failing),))
    question = replace(question, overrides=(*PLAIN, "data.limit=64"))
    train = work.train_lanes
    full = UserError("out of luck")
    monkeypatch.setattr(work, "train_lanes", lambda runs, *given: [full for _ in runs])
    with pytest.raises(UserError, match="no method is left for resnet8: out of luck; --retry tries again"):
        search(question, tmp_path / "out", quiet=True)
    monkeypatch.setattr(work, "train_lanes", train)
    with pytest.raises(UserError, match="no method is left"):
        search(question, tmp_path / "out", quiet=True)
    made = Search.read(search(question, tmp_path / "out", quiet=True, retry=True))
    assert made.finals


def test_a_file_of_settings_gives_way_to_another_name_on_the_command_line(tmp_path):
    file = tmp_path / "recommended.yaml"
    file.write_text("distiller: {name: dkd, alpha: 2.0}\nstudent: {name: resnet8}\n")
    assert read_settings(file, {"distiller": {"name": "none"}}) == {"student": {"name": "resnet8"}}
    assert read_settings(file, {"distiller": {"name": "dkd"}, "seed": 3}) == read_settings(file)
