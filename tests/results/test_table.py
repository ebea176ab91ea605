"""Tables: seeds are averaged, variants told apart, nothing compared that differs in data or protocol."""

import json
import re
import statistics

import pandas as pd
import pytest
import yaml
from scipy import stats

import kdzoo
from kdzoo import registry
from kdzoo.errors import UserError
from kdzoo.results import layout, table
from kdzoo.store.folder import RunFolder, find_runs

from ..made_runs import runs, varied, write


def one(found, **where):
    for name, value in where.items():
        found = found[found[name] == value]
    assert len(found) == 1
    return found.iloc[0]


@pytest.fixture
def found(tmp_path):
    return varied(tmp_path)


def test_seeds_are_averaged_with_the_deviation_of_a_sample(found):
    row = one(table.summary(found), method="kd", protocol="quick")
    assert row.seeds == 3
    assert row.top1_mean == pytest.approx(82)
    assert row.top1_std == pytest.approx(statistics.stdev([80, 81, 85]))
    assert (row.top1_low, row.top1_high) == pytest.approx(
        stats.t.interval(0.95, 2, loc=82, scale=stats.sem([80, 81, 85]))
    )
    assert row.best_top1_mean == pytest.approx(83)


def test_a_run_below_several_of_the_folders_counts_once(tmp_path, found, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folders = [tmp_path, tmp_path.relative_to(tmp_path), *(path for path in tmp_path.iterdir() if path.is_dir())]
    again = table.rows(find_runs(folders))
    assert len(again) == len(found)
    assert table.repeated(again) == 0


def test_runs_that_are_linked_to_are_found_and_count_once(tmp_path, found):
    links = tmp_path / "links"
    links.mkdir()
    (links / "all").symlink_to(tmp_path)  # in which the links lie themselves
    run = RunFolder(find_runs([tmp_path])[0].path)
    (links / "one").symlink_to(run.path)
    assert len(table.rows(find_runs([links]))) == len(found)
    run.result.unlink()
    with pytest.warns(UserWarning, match=f"left out, since not finished: {run.path.name}"):
        assert kdzoo.table(links)["seeds"].sum() == len(found) - 1


def test_what_differs_is_another_row_and_says_how(found):
    summary = table.summary(found)
    assert set(summary.method) == {"kd", "kd (temperature=1.0)", "none"}
    assert any("epochs=1" in protocol for protocol in summary.protocol)
    assert len(summary) == 4


@pytest.mark.parametrize(
    ("override", "column", "name"),
    [
        ("protocol.epochs=1", "protocol", "quick (epochs=1)"),  # and not the warm-up that it shortens
        ("protocol.augmentation.crop=2", "protocol", "quick (augmentation.crop=2)"),  # and not what stays as it is
        ("protocol.warmup=2", "protocol", "quick (warmup=2.0)"),
        ("data={name: bands, options: {low: 1, high: 0}}", "data", "bands (high=0.0)"),
        ("teacher.pretrained=true", "teacher", "vit_s (pretrained=True)"),
        ("teacher.weights=/some/where/theirs.pt", "teacher", "vit_s (weights=theirs.pt)"),
        ("teacher.protocol=quick", "teacher", "vit_s"),
        ("teacher.allow_weak=true", "teacher", "vit_s"),
        ("student.pretrained=true", "student", "resnet_8 (pretrained=True)"),
        ("data.limit=50", "data", "digits (50 images)"),
        ("protocol.image_size=32", "protocol", "quick (image_size=32)"),
    ],
)
def test_settings_of_teacher_student_and_data_tell_rows_apart(tmp_path, override, column, name):
    write(tmp_path, 80.0, 0, override)
    assert table.rows(find_runs([tmp_path]))[column].item() == name


def test_a_preset_is_the_default_on_its_pair_and_is_said(tmp_path):
    pair = {"data": "cifar100", "protocol": "crd", "teacher": "resnet56", "student": "resnet20", "distiller": "dkd"}
    names = [f"{key}.name={value}" for key, value in pair.items()]
    write(tmp_path, 70.0, 0, *names, **pair)
    write(tmp_path, 70.0, 0, *names, "distiller.beta=8", **pair)
    found = table.rows(find_runs([tmp_path]))
    assert set(found.method) == {"dkd", "dkd (beta=8.0)"}
    said = layout.render(found, "markdown")
    assert "the keywords that the field uses for each pair (presets): dkd." in said
    assert "71.97" in said


def test_results_of_older_versions_still_load(tmp_path):
    folder = write(tmp_path, 80.0, 0)
    values = json.loads(folder.result.read_text())
    for name in ("parameters", "extra_parameters", "peak_memory"):
        del values[name]
    folder.result.write_text(json.dumps(values))
    assert folder.read_result().parameters is None
    assert "parameters" not in layout.render(table.rows([folder]), "markdown")


def test_what_a_method_costs_stands_beside_what_it_brings(tmp_path):
    write(tmp_path, 80.0, 0, parameters=1234567, extra_parameters=89, peak_memory=3 * 2**20, seconds=61.0)
    markdown = layout.render(table.rows(find_runs([tmp_path])), "markdown")
    assert "| 61 | 100 | 1,234,567 | 89 | 3 |" in markdown


def test_what_a_student_costs_stands_beside_what_it_reaches(tmp_path):
    cost = {"flops": 557_000_000, "file_bytes": 44_800_000, "latency_1": 3.214, "latency_64": 41.0}
    write(tmp_path, 80.0, 0, **cost)
    found = table.rows(find_runs([tmp_path]))
    markdown = layout.render(found, "markdown")
    assert "| ms for 1, 64 | GFLOPs | MB |" in markdown
    assert "| 3.21, 41 | 0.557 | 44.8 |" in markdown
    assert "latency of a batch of 1 and of 64 images in float32" in markdown
    summary = table.summary(found).iloc[0]
    assert {name: summary[name] for name in cost} == cost


def test_differences_are_paired_over_the_seeds_that_both_have():
    found = runs(
        *[("t", "s", "kd", seed, top1) for seed, top1 in enumerate((70.0, 72.0, 71.0, 99.0))],
        *[("t", "s", "at", seed, top1) for seed, top1 in enumerate((70.4, 72.9, 71.5))],
        ("t", "s", "at", 7, 10.0),
    )
    row = one(table.summary(found), method="at")
    expected = stats.ttest_rel([70.4, 72.9, 71.5], [70, 72, 71])
    assert (row.seeds, row.compared) == (4, 3)
    assert row.difference == pytest.approx(0.6)
    assert row.p == row.p_holm == pytest.approx(expected.pvalue)
    assert row.difference_low == pytest.approx(expected.confidence_interval().low)
    assert row.verdict == "not told apart"


def test_methods_of_a_pair_are_corrected_by_their_number():
    found = runs(
        *[("t", "s", "kd", seed, top1) for seed, top1 in enumerate((70.0, 72.0, 71.0))],
        *[("t", "s", "at", seed, top1) for seed, top1 in enumerate((73.0, 75.1, 74.1))],
        *[("t", "s", "sp", seed, top1) for seed, top1 in enumerate((70.0, 72.5, 70.5))],
        *[("t", "s2", name, seed, 70.0 + seed) for name in ("kd", "at") for seed in range(3)],
    )
    summary = table.summary(found)
    at, sp = (one(summary, method=name, student="s") for name in ("at", "sp"))
    assert at.p_holm == pytest.approx(2 * at.p)
    assert (at.verdict, sp.verdict) == ("better", "not told apart")
    assert one(summary, method="kd", student="s").verdict == "baseline"
    equal = one(summary, method="at", student="s2")
    assert (equal.difference, equal.p_holm, equal.verdict) == (0, 1, "not told apart")


def test_over_pairs_all_seeds_and_pairs_that_both_have_are_compared():
    ours = {("a", 0): 71.0, ("a", 1): 72.1, ("b", 0): 61.3}
    theirs = {("a", 0): 70.0, ("a", 1): 71.0, ("b", 0): 60.1, ("c", 0): 50.0}
    found = runs(
        *[("t", student, "kd", seed, top1) for (student, seed), top1 in theirs.items()],
        *[("t", student, "at", seed, top1) for (student, seed), top1 in ours.items()],
    )
    row = one(table.comparisons(found), method="at")
    assert (row.compared, row.pairs) == (3, 2)
    assert row.p == pytest.approx(stats.ttest_rel([71, 72.1, 61.3], [70, 71, 60.1]).pvalue)


def test_another_baseline_may_be_chosen_and_a_wrong_one_is_an_error():
    found = runs(("t", "s", "kd", 0, 70.0), ("t", "s", "at", 0, 71.0))
    assert one(table.summary(found, "at"), method="kd").difference == -1
    with pytest.raises(UserError, match="unknown baseline 'ta'"):
        table.check_baseline(found, "ta")


def test_without_the_baseline_nothing_is_compared():
    found = runs(("t", "s", "sp", 0, 70.0), ("t", "s", "at", 1, 71.0))
    assert set(table.summary(found).verdict) == {""}
    assert "No run of the baseline kd" in layout.render(found, "markdown")


@pytest.mark.parametrize("style", ["markdown", "latex", "html"])
def test_a_table_says_that_images_held_out_stand_for_test_images(style):
    said = layout.render(runs(("t", "s", "kd", 0, 70.0)), style)
    assert "all test images; with data.val, these are training images that were held out" in said


@pytest.mark.parametrize("pivot", [False, True])
@pytest.mark.parametrize("style", ["markdown", "latex", "html"])
def test_one_seed_of_one_pair_concludes_nothing(style, pivot):
    found = runs(("t", "s", "kd", 0, 70.0), ("t", "s", "at", 0, 79.0))
    said = layout.render(found, style, pivot=pivot)
    assert "One seed and one pair: nothing can be concluded" in said
    assert "no test (n = 1)" in said
    assert "±" not in said.replace("mean ± standard", "")


def test_one_seed_of_several_pairs_concludes_nothing_about_a_pair_and_something_over_them():
    found = runs(
        *[("t", f"s{i}", "kd", 0, 70.0 + i) for i in range(4)],
        *[("t", f"s{i}", "at", 0, 71.0 + i * 1.01) for i in range(4)],
    )
    assert "nothing can be concluded" in layout.render(found, "markdown")
    pivoted = layout.render(found, "markdown", pivot=True)
    assert "nothing can be concluded" not in pivoted
    assert "better" in pivoted


@pytest.mark.parametrize("other", [{"data": "cifar10"}, {"protocol": "quick"}])
def test_other_data_and_protocols_are_never_compared_nor_ranked_together(other):
    scores = [("t", f"s{i}", "kd", 0, 70.0 + i) for i in range(3)], [("t", f"s{i}", "at", 0, 90.0) for i in range(3)]
    found = pd.concat([runs(*scores[0]), runs(*scores[1], **other)])
    for compared in (table.summary(found), table.comparisons(found)):
        assert not compared.compared.any()
    assert table.comparisons(found)["rank"].isna().all()
    assert layout.render(found, "markdown").count("### ") == 2
    assert "**" not in layout.render(found, "markdown")  # nobody is best of one


def test_a_student_trained_alone_is_compared_beside_every_teacher_of_it():
    found = runs(
        *[(teacher, "s", "kd", seed, 70.0 + seed) for teacher in ("t1", "t2") for seed in range(2)],
        *[("-", "s", "none", seed, 68.0 + seed) for seed in range(2)],
        ("-", "other", "none", 0, 50.0),
    )
    summary = table.summary(found)
    assert set(summary[summary.method == "none"].teacher) == {"t1", "t2", "-"}


@pytest.mark.parametrize("baseline", ["none", "kd"])
def test_over_pairs_the_run_of_a_student_trained_alone_counts_once_however_many_teachers_its_student_has(baseline):
    kd = {("t1", 0): 70.0, ("t2", 0): 72.0, ("t1", 1): 71.0, ("t2", 1): 71.5}
    found = runs(
        *[(teacher, "s", "kd", seed, top1) for (teacher, seed), top1 in kd.items()],
        *[(teacher, "s", "at", seed, top1 + 1) for (teacher, seed), top1 in kd.items()],
        *[("-", "s", "none", seed, 68.0 + seed) for seed in range(2)],
    )
    pooled = table.comparisons(found, baseline)
    row = one(pooled, method="kd" if baseline == "none" else "none")
    assert row.compared == 2
    assert row.p == pytest.approx(stats.ttest_rel([71, 71.25], [68, 69]).pvalue)
    assert one(pooled, method="at").compared == (2 if baseline == "none" else 4)


def test_a_repeated_seed_counts_once_and_is_said_to():
    found = runs(("t", "s", "kd", 0, 70.0), ("t", "s", "kd", 0, 72.0), ("t", "s", "kd", 1, 74.0))
    row = one(table.summary(found), method="kd")
    assert (row.seeds, row.top1_mean) == (2, 72.5)
    assert "1 run beside another of the same row and seed" in layout.render(found, "markdown")


def test_runs_of_two_machines_are_said_to_be():
    found = pd.concat([runs(("t", "s", "kd", 0, 70.0)), runs(("t", "s", "at", 0, 70.0), device="gpu")])
    assert "more than one device (cpu, gpu): times are not comparable" in layout.render(found, "markdown")


def test_ranks_are_over_the_pairs_that_all_ranked_methods_have():
    found = runs(
        *[("t", f"s{i}", name, 0, 70.0 + better) for i in range(3) for better, name in enumerate(("kd", "at"))],
        ("t", "s0", "sp", 0, 99.0),
        ("t", "s9", "kd", 0, 70.0),
    )
    average = table.comparisons(found).set_index("method")["rank"]
    assert (average["at"], average["kd"]) == (1, 2)
    assert pd.isna(average["sp"])
    assert "Not ranked, since runs are missing: sp." in layout.render(found, "markdown", pivot=True)


def test_reading_results_runs_no_code_that_a_folder_names(tmp_path, monkeypatch):
    folder, marker = write(tmp_path / "runs", 80.0, 0), tmp_path / "marker"
    evil = tmp_path / "evil.py"
    evil.write_text(f"import pathlib\npathlib.Path({str(marker)!r}).touch()\n")
    monkeypatch.syspath_prepend(tmp_path)
    config = yaml.safe_load(folder.config.read_text())
    config["distiller"]["name"] = config["data"]["name"] = str(evil)
    config["student"]["name"] = config["teacher"]["name"] = "evil:make"
    folder.config.write_text(yaml.safe_dump(config))
    found = kdzoo.table(tmp_path / "runs", baseline="kd")
    assert found["method"].tolist() == ["kd"]
    assert not marker.exists()
    with pytest.raises(UserError):
        registry.load(str(evil))
    assert marker.exists()  # an import would have been seen


def test_from_python_a_table_warns_of_runs_without_a_result(tmp_path):
    write(tmp_path, 80.0, 0)
    waiting = [write(tmp_path, 80.0, seed) for seed in (1, 2)]
    for folder in waiting:
        folder.result.unlink()
    waiting[1].failure.write_text("the loss is not finite")
    with pytest.warns(UserWarning, match="left out, since") as told:
        assert kdzoo.table(tmp_path)["top1_mean"].tolist() == [80.0]
    assert [str(one.message) for one in told] == [
        f"left out, since failed: {waiting[1].path.name}",
        f"left out, since not finished: {waiting[0].path.name}",
    ]


METHOD = "from kdzoo.distillers.kd import KD\n\nclass Mine(KD):\n    pass\n"


def test_seeds_of_an_edited_file_are_not_averaged_with_those_of_before(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(METHOD)
    write(tmp_path, 80.0, 0, distiller=str(file))
    write(tmp_path, 82.0, 1, distiller=str(file))
    assert kdzoo.table(tmp_path, baseline=str(file))["top1_mean"].tolist() == [81.0]
    file.write_text(METHOD + "# edited")
    write(tmp_path, 60.0, 2, distiller=str(file))
    found = table.summary(table.rows(find_runs([tmp_path])))
    assert sorted(zip(found["seeds"], found["top1_mean"], strict=True)) == [(1, 60.0), (2, 81.0)]
    assert all(re.fullmatch(rf"{file} \[[0-9a-f]{{6}}\]", name) for name in found["method"])


def test_seeds_of_an_edited_recipe_are_not_averaged_with_those_of_before(tmp_path):
    recipe = tmp_path / "mine.yaml"
    for seed, rate in enumerate((0.1, 0.2)):
        recipe.write_text(f"{{epochs: 3, lr: {rate}}}")
        write(tmp_path / "runs", 70.0 + seed, seed, f"protocol.name={recipe}")
    found = table.rows(find_runs([tmp_path]))
    assert found.protocol.nunique() == 2
    assert all(re.fullmatch(rf"{recipe} \[[0-9a-f]{{6}}\]", name) for name in found.protocol)
