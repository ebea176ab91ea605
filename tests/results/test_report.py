"""The report: what is read is checked, what it says follows from the numbers, and no code but its own runs in it."""

import json
import re
import shlex
import sys
import threading
from http.client import HTTPConnection
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pandas as pd
import pytest
import yaml

from kdzoo.cli import main
from kdzoo.errors import StorageError, UserError
from kdzoo.naming import Names
from kdzoo.results import table
from kdzoo.results.report import curves, one_run
from kdzoo.results.report.answer import answer
from kdzoo.results.report.command import command
from kdzoo.results.report.gather import gather
from kdzoo.results.report.page import page, write
from kdzoo.results.report.serve import server
from kdzoo.results.report.style import styles
from kdzoo.store.folder import RunFolder
from kdzoo.store.predictions import Predictions

from ..made_runs import fill, many, runs
from ..made_runs import write as finished
from .pages import parsed, traces_of


def said(found, baseline="kd"):
    return answer(table.summary(found, baseline), table.comparisons(found, baseline), baseline)


def scores(**methods):
    return runs(*[("t", "s", name, seed, top1) for name, values in methods.items() for seed, top1 in enumerate(values)])


def test_the_answer_names_the_best_by_how_much_and_what_cannot_be_told_apart():
    found = scores(kd=(70, 71, 70.5), lfcc=(73.4, 74.5, 73.8), dkd=(70.2, 70.9, 70.6), sp=(60, 61.1, 60.6))
    first, second = said(found)
    row = table.summary(found).set_index("method").loc["lfcc"]
    interval = f"{row.difference_low:.1f} to {row.difference_high:.1f}"
    assert first == f"lfcc is 3.4 points above kd for t → s (95 % interval {interval}, three seeds)."
    assert second == "Cannot be told apart from kd: dkd; below kd: sp."


def test_the_answer_over_pairs_rests_on_all_paired_runs():
    found = runs(
        *[("t", f"s{i}", "kd", seed, 70.0 + i + seed / 10) for i in range(3) for seed in range(2)],
        *[("t", f"s{i}", "at", seed, 72.0 + i + seed / 9) for i in range(3) for seed in range(2)],
    )
    assert said(found)[0].startswith("at is 2.0 points above kd over three pairs (95 % interval 2.0 to 2.0, six paired")


@pytest.mark.parametrize(
    ("found", "second"),
    [
        (scores(kd=(70,), at=(79,)), "No method shares more than one run with kd for t → s: nothing can be concluded."),
        (scores(sp=(70, 71), at=(79, 80)), "There is no run of the baseline kd: nothing is compared."),
        (scores(at=(79, 80)), "There is one method: nothing is compared."),
        (
            runs(("t", "s", "kd", 0, 70.0), ("t", "s", "at", 1, 71.0)),
            "No method shares a pair and a seed with kd: nothing is compared.",
        ),
    ],
)
def test_where_nothing_can_be_concluded_the_answer_says_so(found, second):
    first, last = said(found)
    assert last == second
    assert first.startswith("The highest top-1 is ")
    assert "above" not in first


def test_no_method_is_called_better_that_is_not():
    first, second = said(scores(kd=(70, 71, 72), at=(70.1, 71.3, 71.9), sp=(69, 72, 71)))
    assert first.startswith("No method can be told to be better than kd for t → s: the highest, at, differs by 0.10")
    assert first.endswith("three seeds; p 0.956, corrected for two comparisons).")
    assert second == "Cannot be told apart from kd: at, sp."


def test_an_interval_without_zero_is_no_verdict_and_its_corrected_p_says_so():
    kd, at, sp = (70, 71, 72, 70, 72), (70.1, 71.3, 72.6, 70.1, 72.4), (69, 72, 71, 71, 71)
    first, second = said(scores(kd=kd, at=at))
    assert first.startswith("at is 0.30 points above kd for t → s (95 % interval 0.04 to 0.56, five seeds).")
    first, second = said(scores(kd=kd, at=at, sp=sp))
    assert "interval 0.04 to 0.56, five seeds; p 0.068, corrected for two comparisons" in first
    assert second == "Cannot be told apart from kd: at, sp."


OVERRIDES = [
    [],
    ["distiller.temperature=2.5", "protocol.lr=0.001", "data.limit=100", "seed=3"],
    ["protocol.name=crd", "protocol.epochs=12", "student.options={drop_path_rate: 0.1}", "student.pretrained=true"],
    ["protocol.milestones=[3, 4]", "protocol.augmentation.crop=2", "teacher.epochs=7", "teacher.mean=[0.1, 0.2, 0.3]"],
    ["data.name=bands", "data.options={low: 1}", "teacher.name=null", "engine.accumulate=2", "protocol.min_lr=1e-05"],
    ["teacher.others=[{name: resnet20, epochs: 3, mean: [0.5]}]", "teacher.combine=learned", "teacher.features=turns"],
    ["teacher.others=[{name: resnet20, weights: it's mine.pth}]", "protocol.teacher_view=plain"],
]


class Made(Exception):
    """The run that a command would train."""


def made_by(words, monkeypatch):
    def stop(run, fresh):
        raise Made(run)

    monkeypatch.setattr("kdzoo.experiments.run.execute", stop)
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(Made) as caught:
        main()
    return caught.value.args[0].settings


@pytest.mark.parametrize("overrides", OVERRIDES)
def test_the_command_of_a_run_makes_the_very_same_run(tmp_path, monkeypatch, overrides):
    folder = finished(tmp_path, 80.0, 0, *overrides)
    words = shlex.split(command(folder.read_config()))
    assert made_by(words, monkeypatch).identity() == folder.run().settings.identity()
    other = made_by([*words, "distiller.ce=0.123"], monkeypatch)
    assert other.identity() != folder.run().settings.identity()
    if not overrides:
        assert len(words) < 16  # defaults are left out


def test_the_command_of_a_run_with_a_method_of_ones_own_says_all_its_keywords_and_imports_nothing(
    tmp_path, monkeypatch
):
    file, marker = tmp_path / "mine.py", tmp_path / "marker"
    file.write_text('from kdzoo.distillers.kd import KD\n\n\nclass Mine(KD):\n    """Mine."""\n')
    folder = finished(tmp_path / "runs", 80.0, 0, distiller=str(file))
    good, identity = file.read_text(), folder.run(trust_code=True).settings.identity()
    file.write_text(f"import pathlib\npathlib.Path({str(marker)!r}).touch()\n")
    words = shlex.split(command(folder.read_config()))
    gather([tmp_path / "runs"])
    assert not marker.exists()
    assert "distiller.temperature=4.0" in words
    file.write_text(good)
    assert made_by(words, monkeypatch).identity() == identity


def predicted(labels, student, teacher):
    none = np.zeros(0, np.int64)
    arrays = (np.array(each) for each in (labels, student))
    return Predictions(*arrays, np.ones(len(labels)), np.array(teacher), none, np.zeros((0, 8, 8, 3), np.uint8), ())


def test_confusions_are_those_that_the_student_has_and_the_teacher_has_not():
    found = predicted(
        labels=[0, 0, 0, 0, 1, 1, 2, 2],
        student=[1, 1, 1, 0, 0, 1, 0, 0],
        teacher=[1, 0, 0, 0, 0, 1, 0, 2],
    )
    assert one_run.confusions(found, 3) == [(0, 1, 3, 1), (2, 0, 2, 1)]
    assert one_run.by_class(found.labels, found.student, 4) == [25.0, 50.0, 0.0, None]


@pytest.fixture(scope="module")
def html(tmp_path_factory):
    pytest.importorskip("plotly")
    root = tmp_path_factory.mktemp("runs")
    many(root, ["none", "kd", "dkd"], students=[f"resnet{n}" for n in (8, 14, 20, 32, 44)], seeds=2)
    return page([root])


def test_a_page_names_no_address_but_its_own(html):
    tags, _ = parsed(html)
    for tag, attributes in tags:
        assert not {"src", "href", "action", "srcset"} & attributes.keys(), tag
        assert tag not in ("link", "iframe", "object", "embed", "base")
    own = html.partition('id="plotly"')[0]
    assert "http" not in own.replace("http-equiv", "")


def test_only_scripts_of_known_content_may_run(html):
    tags, _ = parsed(html)
    [policy] = [attributes["content"] for tag, attributes in tags if tag == "meta" and "http-equiv" in attributes]
    assert "default-src 'none'" in policy
    assert "unsafe-inline" not in policy.partition("script-src")[2]
    assert len(re.findall(r"'sha256-[\w+/]{43}='", policy)) == 2


def test_plotly_takes_every_figure_as_it_is(html):
    graph = pytest.importorskip("plotly.graph_objects")
    _, data = parsed(html)
    assert {name.partition("-")[0] for name in data["figures"]} == {"forest", "ranks", "cost", "curves"}
    for figure in data["figures"].values():
        graph.Figure(figure["traces"], figure["layout"])
        for choices in figure["layouts"].values():
            for layout in choices.values():
                graph.Figure([], layout)
    with pytest.raises(ValueError, match="nonsense"):
        graph.Figure([], {"nonsense": 1})


def test_every_choice_of_a_figure_shows_something(html):
    _, data = parsed(html)
    for figure in data["figures"].values():
        for select in figure["selects"]:
            for option in select["options"]:
                assert any(trace["meta"][select["name"]] == option for trace in figure["traces"])


@pytest.mark.slow(reason="trains runs and makes their page")
def test_a_page_of_runs_of_other_data_has_sections_that_are_never_averaged(tmp_path):
    pytest.importorskip("plotly")
    many(tmp_path, ["none", "kd"], seeds=2)
    for distiller, top1 in (("none", 20.0), ("kd", 30.0)):
        for seed in range(2):
            name = ["data.name=bands", f"seed={seed}"]
            finished(tmp_path, top1 * (1 + seed / 100), seed, *name, distiller=distiller, data="bands")
    html = page([tmp_path])
    assert html.count('<section class="data"') == 2
    _, data = parsed(html)
    shown = [trace for name, figure in data["figures"].items() if "forest" in name for trace in figure["traces"]]
    assert len(shown) == 2
    assert "kd is 10.1 points above none for vit_s → resnet_8" in page([tmp_path], "none")


def test_curves_are_thinned_out_and_keep_their_ends():
    history = [{"epoch": i + 1, "top1": float(i), "loss": {"ce": 1.0}} for i in range(1000)]
    row = {"method": "kd", "teacher": "-", "student": "s", "seed": 0, "teacher_top1": float("nan")}

    class One:
        pair = "s"

    one = One()
    one.row, one.history = row, history
    drawn = curves.curves([(0, one)], styles(["kd"], "kd"))
    top1 = next(trace for trace in drawn["traces"] if trace["meta"]["what"] == curves.ACCURACY)
    assert len(top1["x"]) == curves.POINTS
    assert (top1["x"][0], top1["x"][-1]) == (1, 1000)
    assert top1["x"] == sorted(set(top1["x"]))


def test_names_are_text_for_plotly_and_html(tmp_path):
    pytest.importorskip("plotly")
    evil = '<a href="https://example.org">%{x}</a></script><img src=x onerror=alert(1)>'
    folder = finished(tmp_path, 80.0, 0, names=Names(evil, evil, evil, evil, evil, False))
    fill(folder, [evil, "dog", "cat"], 80.0)
    finished(tmp_path, 81.0, 0, distiller="none")
    html = page([tmp_path])
    assert "<img" not in html.partition('id="plotly"')[0]
    tags, data = parsed(html)
    assert not [tag for tag, _ in tags if tag in ("a", "img")]
    drawn = json.dumps(data["figures"])
    assert "onerror" in drawn
    assert "<a " not in json.dumps([trace for figure in data["figures"].values() for trace in [traces_of(figure)]])


def damaged(name, content):
    return lambda folder: getattr(folder, name).write_text(content)


@pytest.mark.parametrize(
    ("harm", "line"),
    [
        (lambda folder: folder.predictions.unlink(), "no predictions.safetensors, as in runs of older versions"),
        (lambda folder: folder.predictions.write_bytes(b"x"), "predictions.safetensors cannot be read"),
        (lambda folder: folder.history.unlink(), "has no metrics.jsonl: no learning curves"),
        (damaged("history", '{"epoch": 1}'), "metrics.jsonl is damaged: no learning curves"),
        (damaged("history", "[" * 100_000), "metrics.jsonl is damaged"),
        (lambda folder: folder.classes.unlink(), "no classes.txt"),
        (damaged("config", "a: 1"), "another version of kdzoo"),
        (lambda folder: folder.config.unlink(), "config.yaml"),
        (lambda folder: (folder.path / "spectrum.csv").write_text("a,b\n1,2"), "is no table of kdzoo spectrum"),
    ],
)
def test_what_a_run_lacks_is_a_line_and_the_rest_is_shown(tmp_path, harm, line):
    folders = many(tmp_path, ["none", "kd"], seeds=1)
    assert all(not one.notes for one in gather([tmp_path]).kept)
    harm(folders[1])
    found = gather([tmp_path])
    assert len(found.runs) == 2
    notes = [note for one in found.kept for note in one.notes]
    assert any(line in note for note in notes)
    assert all("\n" not in note for note in notes)


def test_unfinished_and_damaged_runs_are_named_and_left_out(tmp_path):
    folders = many(tmp_path, ["none", "kd", "dkd", "at"], seeds=1)
    folders[2].result.unlink()
    folders[3].result.write_text("{")
    found = gather([tmp_path])
    assert sorted(found.runs["method"]) == ["kd", "none"]
    assert any(folders[3].path.name in note and "is damaged" in note for note in found.notes)
    assert f"left out, since not finished: {folders[2].path.name}" in found.notes


def test_what_a_kill_left_of_a_run_that_was_to_be_set_aside_is_no_run(tmp_path, monkeypatch):
    [folder, _] = many(tmp_path, ["none", "kd"], seeds=1)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", Mock(side_effect=KeyboardInterrupt))  # in place of a kill
        with pytest.raises(KeyboardInterrupt):
            folder.set_aside()
    assert sorted(gather([tmp_path]).runs["method"]) == ["kd", "none"]
    assert not any("not finished" in note for note in gather([tmp_path]).notes)
    folder.set_aside()
    folder.open(folder.run())
    assert f"left out, since not finished: {folder.path.name}" in gather([tmp_path]).notes


@pytest.mark.parametrize("words", ["table", "report --out out.html", "plot --out out.svg"])
def test_every_command_that_leaves_runs_out_says_so_in_the_terminal(tmp_path, monkeypatch, capsys, words):
    pytest.importorskip("plotly")
    pytest.importorskip("matplotlib")
    folders = many(tmp_path / "runs", ["none", "kd", "dkd", "at"], seeds=2)
    folders[0].result.write_text("{")
    for folder in folders[2:4]:
        folder.result.unlink()
    folders[3].failure.write_text("the loss is not finite")
    strange = folders[0].path.rename(folders[0].path.with_name("\x1b[31m"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["kdzoo", *words.split(), "runs"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0
    lines = capsys.readouterr().err.splitlines()
    assert any(strange.name.replace("\x1b", r"\x1b") in line and "is damaged" in line for line in lines)
    assert lines[-2:] == [
        f"left out, since failed: {folders[3].path.name}",
        f"left out, since not finished: {folders[2].path.name}",
    ]


def test_where_no_run_is_finished_the_line_says_which_have_begun(tmp_path, monkeypatch, capsys):
    folder = finished(tmp_path, 80.0, 0)
    folder.result.unlink()
    with pytest.raises(UserError, match=rf"no finished run in .*{folder.path.name}"):
        gather([tmp_path])
    monkeypatch.setattr(sys, "argv", ["kdzoo", "table", str(tmp_path)])
    with pytest.raises(SystemExit):
        main()
    assert f"(left out, since not finished: {folder.path.name})" in capsys.readouterr().err


def test_a_student_alone_is_no_pair_beside_its_teachers(tmp_path):
    many(tmp_path, ["kd", "dkd"], students=["resnet8", "resnet14"], seeds=1)
    finished(tmp_path, 70.0, 0, "teacher.name=null", "student.name=resnet8", distiller="none")
    assert "5 runs, 3 methods, 2 pairs, 1 seed" in page([tmp_path])


def test_a_run_that_is_given_twice_counts_once(tmp_path):
    folder = finished(tmp_path, 80.0, 0)
    assert len(gather([tmp_path, folder.path, tmp_path / "."]).runs) == 1


def test_the_baseline_is_kd_or_none_where_there_is_no_kd(tmp_path):
    finished(tmp_path, 80.0, 0, distiller="none")
    finished(tmp_path, 80.0, 0, distiller="at")
    assert gather([tmp_path]).baseline == "none"
    finished(tmp_path, 80.0, 0)
    assert gather([tmp_path]).baseline == "kd"
    assert gather([tmp_path], "at").baseline == "at"
    with pytest.raises(UserError, match="unknown baseline 'ta'; did you mean at"):
        gather([tmp_path], "ta")


def test_spectra_of_a_run_are_shown_by_band(tmp_path):
    folder = finished(tmp_path, 80.0, 0)
    rows = [(name, "stage 1", "8x8", what, "0-1", 0.5) for name in ("teacher", "s") for what in ("energy", "cka")]
    text = pd.DataFrame(rows, columns=["network", "stage", "grid", "measure", "band", "value"]).to_csv(index=False)
    (folder.path / "spectrum.csv").write_text(text)
    [kept] = gather([tmp_path]).kept
    shown = one_run.Panes([kept], "kd").all()["runs"][0]["spectrum"]
    assert shown.keys() == {"traces", "layout", "selects", "layouts"}
    assert [(trace["name"], trace["meta"]["what"][:5]) for trace in shown["traces"]] == [
        ("teacher", "share"),
        ("s", "share"),
        ("s", "agree"),
    ]


def test_pictures_of_many_runs_never_fill_the_page(tmp_path, monkeypatch):
    many(tmp_path, ["none", "kd"], seeds=2)
    kept = gather([tmp_path]).kept
    assert all(pane["mistakes"] for pane in one_run.Panes(kept, "kd").all()["runs"])
    monkeypatch.setattr(one_run, "PICTURES", 6000)
    panes = one_run.Panes(kept, "kd").all()["runs"]
    assert ["mistakes" in pane for pane in panes] == [True, True, False, False]
    assert "too many pictures" in panes[-1]["notes"][0]


@pytest.fixture
def kdzoo(capsys, monkeypatch):
    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["kdzoo", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        told = capsys.readouterr()
        return ended.value.code, told.out, told.err

    return call


def test_the_command_writes_one_file_and_says_where(tmp_path, kdzoo):
    pytest.importorskip("plotly")
    many(tmp_path / "runs", ["none", "kd"], seeds=2)
    out = tmp_path / "deep" / "page.html"
    code, told, _ = kdzoo("report", tmp_path / "runs", "--out", out)
    assert code == 0
    assert told.startswith(f"wrote {out} (")
    assert [file.name for file in out.parent.iterdir()] == ["page.html"]
    assert out.stat().st_size < 3e6


@pytest.mark.parametrize("name", ["page.pdf", "page"])
def test_another_format_than_html_is_refused(tmp_path, kdzoo, name):
    code, _, err = kdzoo("report", tmp_path, "--out", tmp_path / name)
    assert code == 2
    assert (
        err
        == f"error: --out {tmp_path / name}: expected a file that ends with .html; kdzoo plot writes png, pdf and svg\n"
    )
    assert not (tmp_path / name).exists()


@pytest.mark.parametrize("name", ["plotly.offline", "jinja2"])
def test_a_missing_library_is_one_line_and_no_file(tmp_path, kdzoo, monkeypatch, name):
    pytest.importorskip("plotly")
    finished(tmp_path / "runs", 80.0, 0)
    monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr("kdzoo.results.report.page._plotly", page.__globals__["_plotly"].__wrapped__)
    code, _, err = kdzoo("report", tmp_path / "runs", "--out", tmp_path / "page.html")
    assert (code, err) == (
        2,
        f"error: kdzoo report needs {name.partition('.')[0]}: pip install 'kdzoo[report]'\n",
    )
    assert not (tmp_path / "page.html").exists()


def test_a_folder_that_cannot_be_written_is_one_line_and_no_file(tmp_path):
    pytest.importorskip("plotly")
    finished(tmp_path / "runs", 80.0, 0)
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="cannot be written"):
        write([tmp_path / "runs"], tmp_path / "file" / "page.html")


def asked(port, path="/", host=None):
    connection = HTTPConnection("127.0.0.1", port, timeout=10)
    connection.request("GET", path, headers={} if host is None else {"Host": host})
    answer = connection.getresponse()
    text = answer.read().decode()
    connection.close()
    return answer.status, text


def test_the_page_is_served_to_this_machine_alone_and_made_anew():
    pages = iter(["first", "second"])
    with server(lambda: next(pages)) as opened:
        thread = threading.Thread(target=opened.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        address, port = opened.server_address
        assert address == "127.0.0.1"
        assert asked(port, host="elsewhere.example") == (403, "expected http://127.0.0.1")
        assert asked(port, "/etc/passwd")[0] == 404
        assert [asked(port), asked(port)] == [(200, "first"), (200, "second")]
        with pytest.raises(UserError, match=f"port {port} cannot be opened"):
            server(lambda: "", port)
        opened.shutdown()
        thread.join()


def test_an_error_of_the_page_is_told_to_the_browser():
    def fails():
        raise UserError("no finished run in b\udcff")

    with server(fails) as opened:
        thread = threading.Thread(target=opened.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        assert asked(opened.server_port) == (500, r"no finished run in b\udcff")
        opened.shutdown()
        thread.join()


def test_reading_a_run_runs_none_of_the_code_that_it_names(tmp_path, monkeypatch):
    pytest.importorskip("plotly")
    folder, marker = finished(tmp_path / "runs", 80.0, 0), tmp_path / "marker"
    evil = tmp_path / "evil.py"
    evil.write_text(f"import pathlib\npathlib.Path({str(marker)!r}).touch()\n")
    monkeypatch.syspath_prepend(tmp_path)
    config = yaml.safe_load(folder.config.read_text())
    config["distiller"]["name"] = config["data"]["name"] = str(evil)
    config["student"]["name"] = config["teacher"]["name"] = "evil:make"
    folder.config.write_text(yaml.safe_dump(config))
    assert "evil" in page([tmp_path / "runs"])
    assert RunFolder(folder.path).read_result() is not None
    assert not marker.exists()
    exec(evil.read_text())  # an import would have been seen
    assert marker.exists()
