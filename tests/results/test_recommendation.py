"""What a search answers: its sentences follow from the numbers, and its file makes the run that it names."""

import io
import math
from dataclasses import replace
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
import yaml
from rich.console import Console
from scipy import stats

from kdzoo.commands.options import show_rich
from kdzoo.commands.training import read_settings
from kdzoo.errors import UserError
from kdzoo.resolve import resolve
from kdzoo.results.recommendation import Recommendation
from kdzoo.results.recommendation_screen import front, plan, screen, table

from ..made_runs import candidate, search

NONE, KD, DKD = (70.0, 71.0, 70.4), (72.0, 73.2, 72.5), (80.1, 81.0, 80.5)


def read(out, *finalists, **found):
    """The answer of a search with these finalists: a method's name or a candidate, its top-1 by seed, and its cost."""
    made = [(candidate(one) if isinstance(one, str) else one, *rest) for one, *rest in finalists]
    search(out, made, **found)
    return Recommendation.read(out)


def interval(ours, others):
    """The mean of paired differences and its 95 % interval, computed from Student's formula."""
    differences = np.subtract(ours, others)
    half = stats.t.ppf(0.975, len(differences) - 1) * stats.sem(differences)
    return differences.mean(), differences.mean() - half, differences.mean() + half


def corrected_of(raw):
    """Holm's correction of p-values by name: the least is multiplied by their number, the next by one less."""
    corrected, least = {}, 0.0
    for rank, name in enumerate(sorted(raw, key=raw.get)):
        least = corrected[name] = max(least, min(1.0, raw[name] * (len(raw) - rank)))
    return corrected


def gain(ours, others, name, rivals):
    """What the answer says against one of its rivals, given all of them."""
    points, low, high = interval(ours, others)
    p = corrected_of({rival: stats.ttest_rel(ours, rival).pvalue for rival in rivals})[others]
    return f"{points:+.2f} points against {name} (95 % interval {low:+.2f} to {high:+.2f}, corrected p {p:.2g})"


def test_a_clear_winner_is_named_with_what_it_gains(tmp_path):
    found = read(tmp_path, ("none", NONE, 0.01), ("dkd", DKD, 0.03), ("kd", KD, 0.02))
    assert found.sentences() == [
        "Train resnet_8 with dkd: 80.53 % on the test images, mean of 3 seeds; "
        f"{gain(DKD, KD, 'kd', [NONE, KD])}, "
        f"{gain(DKD, NONE, 'the student trained without a teacher', [NONE, KD])}.",
        "It is better than each of the other 2 finalists beyond chance (p < 0.05).",
    ]
    assert [row["verdict"] for row in found.rows()] == ["best", "worse", "worse"]
    assert [row["cost"] for row in found.rows()] == [1.0, pytest.approx(2 / 3), pytest.approx(1 / 3)]


def test_ties_are_named_together_with_the_cheapest_of_them(tmp_path):
    near = (80.0, 81.2, 80.3)
    found = read(tmp_path, ("dkd", DKD, 0.0300), ("at", near, 0.0300), ("sp", near, 0.0288), ("none", NONE, 0.01))
    first, second = found.sentences()
    assert first.startswith("Train resnet_8 with dkd: ")
    assert second == "sp and at cannot be told apart from dkd; sp costs 4 % less to train than dkd."
    assert [row["verdict"] for row in found.rows()] == ["best", *["cannot be told apart"] * 2, "worse"]


def test_of_finalists_that_are_equal_but_for_rounding_the_cheaper_is_taken(tmp_path):
    low, *_, high = sorted(permutations((70.1, 70.2, 70.3)), key=np.mean)
    assert 0 < np.mean(high) - np.mean(low) < 1e-13
    found = read(tmp_path, ("kd", high, 0.02), ("dkd", low, 0.01), ("none", (60.0, 61.0, 60.5), 0.03))
    assert found.sentences()[0].startswith("Train resnet_8 with dkd: 70.20 %")


def test_what_the_best_one_is_not_better_than_may_differ_from_each_other(tmp_path):
    steady, below = (80.0, 81.2, 80.3), (78.0, 79.2, 78.4)
    found = read(tmp_path, ("dkd", (79.9, 84.0, 79.9), 0.02), ("kd", steady, 0.02), ("none", below, 0.02))
    assert stats.ttest_rel(steady, below).pvalue < 0.01  # which the answer must not deny: it compares with dkd alone
    assert found.sentences()[1] == "kd and none cannot be told apart from dkd."


def test_a_tie_that_costs_as_much_is_not_called_cheaper(tmp_path):
    found = read(tmp_path, ("dkd", DKD, 0.03), ("kd", (80.0, 81.2, 80.3), 0.03), ("none", NONE, 0.02))
    assert found.sentences()[1] == "kd cannot be told apart from dkd."


def test_where_no_method_helps_the_answer_is_to_train_without_a_teacher(tmp_path):
    found = read(tmp_path, ("none", DKD, 0.01), ("kd", KD, 0.02))
    first, second = found.sentences()
    assert first == (
        f"Train resnet_8 without a teacher: 80.53 % on the test images, mean of 3 seeds; {gain(DKD, KD, 'kd', [KD])}."
    )
    assert second == "It is better than the other finalist beyond chance (p < 0.05)."


def test_a_method_that_ships_more_than_the_student_is_said_to_where_it_may_be_chosen(tmp_path):
    near, low = (80.0, 81.2, 80.3), (60.0, 61.0, 60.4)
    found = read(tmp_path, ("dkd", DKD, 0.03), ("at", near, 0.03), ("sp", low, 0.03), ("none", NONE, 0.01))
    answer = found.answers[0]
    sizes = {"dkd": 1200, "at": 1000, "sp": 9000, "none": 1000}
    answer.finalists[:] = [
        replace(one, results=tuple(replace(each, parameters=sizes[one.candidate.title]) for each in one.results))
        for one in answer.finalists
    ]
    assert found.sentences()[2:] == ["What dkd ships has 1,200 parameters; resnet_8 alone has 1,000."]
    answer.finalists[-2] = replace(answer.finalists[-2], reason="its maps are odd")
    answer.finalists[-1] = replace(answer.finalists[-1], reason="it was stopped")
    assert not any("ships" in sentence for sentence in found.sentences())  # nothing tells the student's own size


def test_in_a_file_no_cell_is_folded_and_on_a_terminal_no_line_is_longer_than_it(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("COLUMNS", raising=False)
    monkeypatch.setenv("TERM", "dumb")
    found = read(tmp_path, ("dkd", DKD, 0.03), ("kd", (80.0, 81.2, 80.3), 0.03), ("none", NONE, 0.02))
    show_rich(table(found))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(found.rows()) + 5  # a title, a head and three rules
    assert any("80.53 ± 0.45" in line and "best" in line for line in lines)
    assert any("cannot be told apart" in line for line in lines)
    monkeypatch.setenv("COLUMNS", "70")
    show_rich(table(found))
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 70
    assert not any("cannot be told apart" in line for line in lines)


def test_a_teacher_below_the_student_alone_is_said_to_be_weak(tmp_path):
    found = read(tmp_path / "weak", ("kd", DKD, 0.02), ("none", NONE, 0.01), teacher_top1=60.0)
    assert found.sentences()[2:] == [
        "The teacher reaches 60.00 % and the student without it 70.47 %: look for a better teacher first."
    ]
    sound = read(tmp_path / "sound", ("kd", DKD, 0.02), ("none", NONE, 0.01), teacher_top1=90.0)
    assert len(sound.sentences()) == 2
    assert np.mean([81.1] * 6) > 81.1
    equal = read(tmp_path / "equal", ("kd", [90.0] * 6, 0.02), ("none", [81.1] * 6, 0.01), teacher_top1=81.1)
    assert len(equal.sentences()) == 2


def test_nothing_is_said_of_a_teacher_that_was_never_measured(tmp_path):
    found = read(tmp_path, ("none", NONE, 0.01), ("kd", "out of memory", 0.02), teacher_top1=None)
    assert not any("teacher reaches" in sentence for sentence in found.sentences())


def test_a_failed_finalist_stands_last_with_its_reason_and_is_no_tie(tmp_path):
    found = read(tmp_path, ("dkd", "NaN in the loss", 0.03), ("kd", KD, 0.02), ("none", NONE, 0.01))
    [answer] = found.answers
    assert [one.candidate.method for one in answer.finalists] == ["kd", "none", "dkd"]
    assert answer.ties == []
    assert found.sentences()[1] == "It is better than the other finalist beyond chance (p < 0.05)."
    row = found.rows()[-1]
    assert row["verdict"] == "failed: NaN in the loss"
    assert math.isnan(row["top1"])
    assert "failed: NaN in the loss" in drawn(found)
    assert "nan" not in drawn(found).replace("NaN in the loss", "")


def test_a_reason_that_is_a_sentence_keeps_its_one_full_stop(tmp_path):
    found = read(tmp_path, ("dkd", "Out of luck.", 0.03), ("kd", KD, 0.02), ("none", NONE, 0.01))
    assert found.sentences()[-1] == "dkd failed: Out of luck."


def test_a_finalist_without_any_other_is_compared_with_none(tmp_path):
    found = read(tmp_path, ("kd", KD, 0.02), ("none", "out of memory", 0.01))
    assert found.sentences() == [
        "Train resnet_8 with kd: 72.57 % on the test images, mean of 3 seeds.",
        "No other finalist has a result to compare it with.",
        "none failed: out of memory.",
    ]


def test_where_every_finalist_failed_the_reasons_are_the_answer(tmp_path):
    with pytest.raises(UserError, match="every finalist of resnet_8 failed: out of memory; NaN in the loss"):
        read(tmp_path, ("kd", "out of memory", 0.02), ("none", "NaN in the loss", 0.01))


def test_a_search_without_finalists_is_not_finished(tmp_path):
    search(tmp_path, [], [(candidate("kd"), "")])
    with pytest.raises(UserError, match="is not finished"):
        Recommendation.read(tmp_path)


@pytest.mark.parametrize("seed", range(3))
def test_numbers_are_those_of_a_paired_t_test_and_holms_procedure(tmp_path, seed):
    chance = np.random.default_rng(seed)
    names = ["none", "kd", "dkd", "at"]
    scores = {name: tuple(np.round(75 + i + chance.normal(size=3), 2).tolist()) for i, name in enumerate(names)}
    rows = read(tmp_path, *[(name, scores[name], 0.01) for name in names]).rows()
    order = sorted(names, key=lambda name: -np.mean(scores[name]))
    assert [row["method"] for row in rows] == order
    best = scores[order[0]]
    raw = {name: stats.ttest_rel(best, scores[name]).pvalue for name in order[1:]}
    corrected = corrected_of(raw)
    assert (rows[0]["top1"], rows[0]["std"]) == pytest.approx((np.mean(best), np.std(best, ddof=1)))
    for row in rows[1:]:
        name = row["method"]
        assert (row["behind"], row["low"], row["high"]) == pytest.approx(interval(best, scores[name]))
        assert row["p"] == pytest.approx(corrected[name])
        assert row["verdict"] == ("worse" if corrected[name] < 0.05 else "cannot be told apart")


def two(out, latency=None):
    """A search for two students: the larger one is better by more than its time."""
    small, large = "resnet_8", "resnet_14"
    made = [
        (candidate("kd", small), KD, 0.02),
        (candidate("none", small), NONE, 0.01),
        (candidate("kd", large), DKD, 0.04),
        (candidate("none", large), KD, 0.03),
    ]
    search(out, made, parameters=10**5)
    found = Recommendation.read(out)
    return found if latency is None else timed(found, latency)


def timed(found, latency):
    """The same answer of students of these latencies."""
    for answer in found.answers:
        answer.finalists[:] = [
            replace(one, results=tuple(replace(each, latency_1=latency[answer.student]) for each in one.results))
            for one in answer.finalists
        ]
    return found


def test_each_student_has_an_answer_and_a_file(tmp_path):
    found = two(tmp_path)
    assert [answer.student for answer in found.answers] == ["resnet_8", "resnet_14"]
    assert [sentence.partition(":")[0] for sentence in found.sentences()[::2]] == [
        "Train resnet_8 with kd",
        "Train resnet_14 with kd",
    ]
    files = found.write()
    assert [file.name for file in files] == ["recommended-1-resnet_8.yaml", "recommended-2-resnet_14.yaml"]
    said = screen(found, files)
    assert all(f"kdzoo run --config {file}" in said for file in files)


def test_the_front_holds_the_students_that_no_other_beats_in_both(tmp_path):
    found = two(tmp_path, {"resnet_8": 1.0, "resnet_14": 2.5})
    assert front(found) == [
        "No other student is both faster and at least as accurate as: resnet_8 (72.57 %, 1 ms), "
        "resnet_14 (80.53 %, 2.5 ms)."
    ]
    timed(found, {"resnet_8": 2.0, "resnet_14": 1.0})
    assert front(found) == ["No other student is both faster and at least as accurate as: resnet_14 (80.53 %, 1 ms)."]
    assert screen(found, []).splitlines()[4:6] == [*front(found), ""]


def test_of_students_that_are_equal_but_for_rounding_the_faster_one_is_in_front(tmp_path):
    low, *_, high = sorted(permutations((71.1, 70.2, 70.3)), key=np.mean)
    assert 0 < np.mean(high) - np.mean(low) < 1e-13
    search(tmp_path, [(candidate("kd", "resnet_8"), low, 0.02), (candidate("kd", "resnet_14"), high, 0.02)])
    found = timed(Recommendation.read(tmp_path), {"resnet_8": 1.0, "resnet_14": 2.5})
    assert front(found) == ["No other student is both faster and at least as accurate as: resnet_8 (70.53 %, 1 ms)."]


def test_without_a_latency_no_front_is_said(tmp_path):
    found = two(tmp_path)
    assert front(found) == []
    assert "both faster" not in screen(found, [])


@pytest.mark.parametrize("one", [candidate("kd", kd=2.7), candidate("dkd")])
def test_the_recommended_file_makes_the_run_of_the_best_method(tmp_path, one):
    asked = {
        "teacher": "vit_s",
        "teachers": ["vit_s"],
        "students": ["resnet_8"],
        "data": {"name": "digits"},
        "protocol": {"name": "quick", "epochs": 7},
        "weights": [],
        "overrides": ["protocol.lr=0.01", "data.limit=100"],
    }
    (tmp_path / "mine.pth").touch()
    asked["weights"] = [str(tmp_path / "mine.pth")]
    found = read(tmp_path / "out", (one, DKD, 0.02), ("none", NONE, 0.01), asked=asked)
    [file] = found.write()
    assert file.name == "recommended.yaml"
    assert file.read_text().startswith(f"# {found.sentences()[0]}\n")
    wanted = {
        "distiller": {"name": one.method, **one.keywords},
        "teacher": {"name": "vit_s", "weights": asked["weights"][0]},
        "student": {"name": "resnet_8"},
        "data": {"name": "digits", "limit": 100},
        "protocol": {"name": "quick", "epochs": 7, "lr": 0.01},
    }
    assert yaml.safe_load(file.read_text()) == wanted
    settings = resolve(read_settings(file), []).settings
    assert settings.identity() == resolve(wanted, []).settings.identity()
    assert settings.identity() != resolve({**wanted, "protocol": {"name": "quick"}}, []).settings.identity()


def test_the_recommended_file_of_a_student_without_a_teacher_trains_no_teacher(tmp_path):
    found = read(tmp_path, ("none", DKD, 0.01), ("kd", KD, 0.02))
    found.search.asked["overrides"] = ["teacher.epochs=2", "data.limit=100"]
    [file] = found.write()
    settings = resolve(read_settings(file), []).settings
    assert (settings.distiller.name, settings.teacher.name, settings.data.limit) == ("none", None, 100)


EVIL = "kd\x1b[31m\nseed: 5\u202e"


@pytest.mark.parametrize(
    ("protocol", "epochs"),
    [({"name": "quick"}, 8), ({"name": "quick", "epochs": 4}, 8), ({"name": "quick", "epochs": 30}, 30)],
)
def test_the_recommended_file_trains_no_shorter_than_the_finalists_were(protocol, epochs, tmp_path):
    found = read(tmp_path, ("kd", KD, 0.02), ("none", NONE, 0.01))
    found.search.asked["protocol"], found.search.epochs = protocol, 8
    [file] = found.write()
    assert resolve(read_settings(file), []).settings.protocol.epochs == epochs


def drawn(found, width=200):
    console = Console(file=io.StringIO(), width=width, force_terminal=False)
    console.print(table(found))
    return console.file.getvalue()


def test_a_narrow_terminal_loses_no_digit(tmp_path):
    found = read(tmp_path, ("dkd", DKD, 0.03), ("kd", KD, 0.02), ("none", NONE, 0.01))
    narrow = drawn(found, 40)
    assert "…" not in narrow
    assert sorted(filter(str.isdigit, narrow)) == sorted(filter(str.isdigit, drawn(found)))


def test_the_table_shows_the_p_that_its_verdicts_follow_from(tmp_path):
    near, far = (79.0, 80.4, 79.4), (74.0, 77.0, 75.5)
    found = read(tmp_path, ("dkd", DKD, 0.03), ("kd", near, 0.02), ("at", far, 0.02), ("none", (72, 80.9, 80), 0.01))
    rows = {row["method"]: row for row in found.rows()}
    undecided = rows["kd"]
    assert undecided["low"] > 0  # the interval alone would say otherwise
    assert undecided["verdict"] == "cannot be told apart"
    lines = [line for line in drawn(found).splitlines() if "│" in line]
    for line, row in zip(lines, found.rows(), strict=True):
        assert (f" {row['p']:.3f} " in line) == (row["method"] != "dkd"), line
    assert "p (Holm)" in drawn(found)
    assert "Worse means that p (Holm), of a paired t-test corrected" in screen(found, [])


def test_commands_name_a_folder_that_begins_with_a_dash_as_no_option(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = read(Path("-mine"), ("kd", KD, 0.02), ("none", NONE, 0.01))
    assert screen(found, found.write()).endswith("\n  kdzoo report ./-mine")


def renamed(found, name):
    """The same answer of a method of this name."""
    for answer in found.answers:
        answer.finalists[0] = replace(answer.finalists[0], candidate=candidate(name))
    found.search.candidates[0] = candidate(name)
    return found


def test_no_name_commands_a_terminal_or_adds_a_setting(tmp_path):
    left_out = [("resnet_8", EVIL, f"no feature {EVIL}")]
    found = renamed(read(tmp_path, ("kd", DKD, 0.02), ("none", NONE, 0.01), left_out=left_out), EVIL)
    assert any("\x1b" in sentence for sentence in found.sentences())  # the control: nothing else takes it out
    [file] = found.write()
    for text in (drawn(found), screen(found, [file]), plan(found.search)):
        assert r"kd\x1b[31m\nseed: 5\u202e" in text
        assert not {"\x1b", "\u202e"} & set(text)
    assert "seed" not in yaml.safe_load(file.read_text())


def test_the_plan_says_what_each_rung_trains_and_what_does_not_fit(tmp_path):
    left_out = [("resnet_8", "crd", "its feature maps differ in size")]
    finalists = [(candidate("kd"), KD, 0.02), (candidate("kd", kd=2.7), KD, 0.02), (candidate("none"), NONE, 0.01)]
    stopped = [(candidate(name), "") for name in ("dkd", "at", "sp")]
    lines = plan(search(tmp_path, finalists, stopped, left_out=left_out, rungs=[2])).splitlines()
    assert "vit_s -> resnet_8: kd (2 settings), none, dkd, at, sp" in lines
    assert "epochs 1 to 2: 6 candidates" in lines
    # Six candidates halve once, after epoch 3 of 4. A reference may be a finalist anyway, which is not known before.
    assert f"with 3 seeds: at most {6 * 3 + 5 * 3 * 4} epochs in all" in lines[0]
    assert "then 3 finalists, with none and kd beside them, for 4 epochs with seeds 1, 2, 3" in lines
    assert lines[-2:] == ["These do not fit:", "  resnet_8, crd: its feature maps differ in size"]


def test_a_plan_in_which_all_candidates_are_finalists_promises_no_others_beside_them(tmp_path):
    finalists = [("kd", KD, 0.02), ("none", NONE, 0.01), ("dkd", DKD, 0.03)]
    found = read(tmp_path, *finalists, rungs=[])
    assert plan(found.search).splitlines()[-1] == "then 3 finalists for 4 epochs with seeds 1, 2, 3"
