"""The report of a search: its answer, how far each candidate came, and what is not finished or damaged."""

import json
import re
import shutil
from html import unescape

import pytest

from kdzoo.errors import UserError
from kdzoo.results.plots import draw
from kdzoo.results.recommendation import Recommendation
from kdzoo.results.report.gather import gather
from kdzoo.results.report.page import page
from kdzoo.results.report.style import styles
from kdzoo.store.search import Point, Search

from ..made_runs import candidate
from ..made_runs import search as searched
from ..made_runs import write as finished
from .pages import parsed, traces_of

SCORES = {"dkd": (80.1, 81.0, 80.5), "kd": (72.0, 73.2, 72.5), "none": (70.0, 71.0, 70.4)}


def a_search(out, finalists=tuple(SCORES), **found):
    """A search with the finalists dkd, kd and none; at and sp stopped after the first epoch, and crd failed in it."""
    made = [(candidate(name), SCORES[name], 0.02) for name in finalists]
    stopped = [(candidate("at"), ""), (candidate("sp"), ""), (candidate("crd"), "NaN in the loss")]
    return searched(out, made, stopped, **{"left_out": [("resnet_8", "fbt", "its stages differ")], **found})


def at_work(out):
    """A search that stands after its first rung: trials that are not finished, and no final."""
    trial = finished(out / "search", 50.0, 0)
    trial.result.unlink()
    made = a_search(out)
    shutil.rmtree(out / "final")
    made.finals = []
    for course in made.courses:
        del course.curve[1:]
    made.write(out)
    return trial


def shown(html):
    """The text of the page's sections, each without its tags."""
    body = html.partition("<main>")[2].partition("</main>")[0]
    return [" ".join(re.sub(r"<[^>]*>", " ", part).split()) for part in body.split("<section")[1:]]


@pytest.mark.slow(reason="trains runs and makes their page")
def test_a_page_begins_with_the_answer_of_a_search(tmp_path):
    pytest.importorskip("plotly")
    a_search(tmp_path)
    html = page([tmp_path])
    first, second, *_ = map(unescape, shown(html))
    assert "Search: vit_s → resnet_8" in first
    for sentence in Recommendation.read(tmp_path).sentences():
        assert sentence in first
    assert "method top-1 best minus it 95 % interval p (Holm) verdict cost dkd 80.53 ± 0.45 best 1.00 kd 72.57" in first
    assert "(2) fbt, resnet_8: its stages differ crd, resnet_8: failed: NaN in the loss" in first
    assert "dkd is 8.0 points above kd" in second  # the finalists' runs, as of any other folder


def test_the_rungs_are_curves_that_end_where_a_candidate_stopped(tmp_path):
    graph = pytest.importorskip("plotly.graph_objects")
    a_search(tmp_path)
    _, data = parsed(page([tmp_path]))
    figure = data["figures"]["search-0"]
    graph.Figure(figure["traces"], figure["layout"])
    lines = {trace["meta"]["method"]: trace for trace in figure["traces"]}
    assert list(lines) == ["at", "sp", "dkd", "kd", "none"]  # those in front are drawn last
    assert [lines[name]["x"] for name in lines] == [[1], [1], [1, 2], [1, 2], [1, 2]]
    assert lines["dkd"]["y"] == [10.0, 30.0]
    assert lines["dkd"]["customdata"] == [", NLL 2.500", ", NLL 1.500"]
    looks = styles(list(SCORES), "kd")
    assert all(lines[name]["line"]["color"] == looks[name]["color"] for name in SCORES)
    assert [name for name in lines if lines[name]["showlegend"]] == list(SCORES)
    assert lines["at"]["line"]["color"] == looks["kd"]["color"]
    assert "stopped after epoch 1, place 4 of 6" in lines["at"]["hovertemplate"]
    assert "stopped after epoch 1, place 5 of 6" in lines["sp"]["hovertemplate"]
    assert "finalist" in lines["dkd"]["hovertemplate"]
    assert [shape["x0"] for shape in figure["layout"]["shapes"]] == [1, 2]


def test_a_candidate_that_failed_on_its_way_says_why_at_its_line(tmp_path):
    pytest.importorskip("plotly")
    made = a_search(tmp_path)
    made.courses[-1].curve = [Point(1, 5.0, 20.0, 3.0)]
    made.write(tmp_path)
    _, data = parsed(page([tmp_path]))
    line = next(trace for trace in data["figures"]["search-0"]["traces"] if trace["meta"]["method"] == "crd")
    assert "<br>failed: NaN in the loss<br>" in line["hovertemplate"]


def test_one_that_failed_in_a_later_rung_keeps_its_place_in_an_earlier_one(tmp_path):
    pytest.importorskip("plotly")
    made = a_search(tmp_path)
    made.courses[-1].curve, made.courses[-1].stopped = [Point(1, 90.0, 99.0, 0.1)], 2
    made.write(tmp_path)
    _, data = parsed(page([tmp_path]))
    said = {trace["meta"]["method"]: trace["hovertemplate"] for trace in data["figures"]["search-0"]["traces"]}
    assert "failed: NaN in the loss" in said["crd"]
    assert "stopped after epoch 1, place 5 of 6" in said["at"]
    assert "stopped after epoch 1, place 6 of 6" in said["sp"]


def test_a_search_for_several_students_shows_each_by_choice(tmp_path):
    pytest.importorskip("plotly")
    students = ("resnet_8", "resnet_14")
    searched(tmp_path, [(candidate(name, one), SCORES[name], 0.02) for one in students for name in ("kd", "none")])
    html = page([tmp_path])
    _, data = parsed(html)
    [choice] = data["figures"]["search-0"]["selects"]
    assert choice["options"] == [f"vit_s → {one}" for one in students]
    assert "Search: vit_s → resnet_8, resnet_14" in shown(html)[0]


def test_what_a_search_trained_on_a_part_of_the_images_is_no_result_and_is_not_missed(tmp_path):
    out = tmp_path / "found"
    a_search(out)
    waiting = finished(out / "search", 50.0, 0)
    waiting.result.unlink()
    finished(out / "search", 99.0, 1)  # a rung may be as long as the recipe
    begun = finished(out / "final", 50.0, 9)
    begun.result.unlink()
    found = gather([tmp_path])
    assert sorted(found.runs["seed"].unique()) == [1, 2, 3]
    assert 99.0 not in set(found.runs["top1"])
    assert found.notes == [f"left out, since not finished: {begun.path.name}"]
    (out / "search.json").rename(out / "other.json")  # the control: without a search they are runs as any others
    found = gather([tmp_path])
    assert 99.0 in set(found.runs["top1"])
    assert waiting.path.name in found.notes[0]


def test_a_search_at_work_is_shown_before_any_run_is_finished(tmp_path):
    graph = pytest.importorskip("plotly.graph_objects")
    trial = at_work(tmp_path)
    html = page([tmp_path], "dkd")
    first = shown(html)[0]
    assert "The search is not finished: its candidates have reached epoch 1 of 2." in first
    assert "Finalists" not in first
    assert trial.path.name not in html
    assert "no finished run yet" in html
    _, data = parsed(html)
    [(name, figure)] = data["figures"].items()
    assert name == "search-0"
    graph.Figure(figure["traces"], figure["layout"])
    said = {trace["meta"]["method"]: trace["hovertemplate"] for trace in figure["traces"]}
    assert "still in the search" in said["dkd"]
    assert "place 5 of 6" in said["sp"]


def test_a_search_that_has_just_begun_has_no_curves_yet(tmp_path):
    pytest.importorskip("plotly")
    at_work(tmp_path)
    made = Search.read(tmp_path)
    made.courses = []
    made.write(tmp_path)
    html = page([tmp_path])
    assert "have reached epoch 0 of 2." in shown(html)[0]
    assert parsed(html)[1]["figures"] == {}


def test_a_search_whose_finalists_are_at_work_or_all_failed_says_so(tmp_path):
    at_work(tmp_path / "waiting")
    made = Search.read(tmp_path / "waiting")
    made.rungs = [1]
    made.write(tmp_path / "waiting")
    searched(tmp_path / "failed", [(candidate("kd"), "out of memory", 0.02)], teacher_top1=None)
    for folder in (tmp_path / "failed" / "final").iterdir():
        (folder / "result.json").unlink(missing_ok=True)
        (folder / "failed.txt").write_text("out of memory")
    waiting, failed = sorted(gather([tmp_path]).searches, key=lambda one: one.folder.name, reverse=True)
    assert waiting.sentences == ["The search is not finished: its finalists have no results yet."]
    assert failed.sentences == ["every finalist of resnet_8 failed: out of memory"]


@pytest.mark.slow(reason="trains a search and makes its page")
@pytest.mark.parametrize("text", ["", "{", "[]", "[" * 100_000, '{"format": 1}', '{"format": 9}', "\x1b[31m"])
def test_a_damaged_search_is_a_line_and_the_page_is_made(tmp_path, text):
    pytest.importorskip("plotly")
    a_search(tmp_path)
    (tmp_path / "search.json").write_text(text)
    html = page([tmp_path])
    assert "Search:" not in html
    *_, last = map(unescape, shown(html))
    assert "Left out" in last
    assert "search.json" in last
    [line] = gather([tmp_path]).notes
    assert not {"\n", "\x1b"} & set(line)


def test_a_damaged_search_alone_is_one_line(tmp_path):
    (tmp_path / "search.json").write_text("{")
    with pytest.raises(UserError, match=r"no finished run in .*search.json is damaged"):
        gather([tmp_path])


def test_a_damaged_result_of_a_finalist_is_told_and_the_page_is_made(tmp_path):
    pytest.importorskip("plotly")
    made = a_search(tmp_path)
    (tmp_path / "final" / made.finals[0].folder / "result.json").write_text("{")
    first = unescape(shown(page([tmp_path]))[0])
    assert "is damaged" in first
    assert "Finalists" not in first


def test_names_and_reasons_of_a_search_are_text(tmp_path):
    pytest.importorskip("plotly")
    evil = '<a href="https://example.org">%{x}</a></script><img src=x onerror=alert(1)>\x1b\n'
    made = a_search(tmp_path, left_out=[(evil, evil, evil)])
    made.asked["teacher"] = evil
    for number in (0, 3, 5):
        made.candidates[number] = candidate(evil, stage=evil)
    made.courses[5].curve, made.courses[5].reason = [Point(1, 1.0, 1.0, 4.0)], evil
    made.write(tmp_path)
    html = page([tmp_path])
    assert "<img" not in html.partition('id="plotly"')[0]
    assert "\x1b" not in html.partition('id="plotly"')[0]
    tags, data = parsed(html)
    assert not [tag for tag, _ in tags if tag in ("a", "img")]
    text = json.dumps(traces_of(data["figures"]["search-0"]))
    assert "onerror" in text
    assert "<a " not in text
    assert "%{x}</" not in text


def test_a_figure_for_a_paper_needs_finished_runs(tmp_path):
    pytest.importorskip("matplotlib")
    at_work(tmp_path)
    with pytest.raises(UserError, match=r"no finished run in .*: the search there is not finished"):
        draw([tmp_path], tmp_path / "curves.pdf", "curves")
