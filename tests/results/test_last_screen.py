"""The last screen of a run: what it found, where it lies, and what to do next, on consoles of any width."""

import io
import shlex
import sys
from pathlib import Path

import pytest
from PIL import Image

from kdzoo.cli import main
from kdzoo.engine.progress import plain_console
from kdzoo.errors import UserError
from kdzoo.results.last_screen import next_steps, result_table

from ..made_runs import write


def result(root, *overrides, top1=90.0, **more):
    return write(root, top1, 0, *overrides, **more).read_result()


def table(found, width=80):
    console = plain_console(file=io.StringIO(), width=width)
    console.print(result_table(found), markup=False)
    return console.file.getvalue()


@pytest.fixture
def screen(monkeypatch, capsys):
    """What the command prints on the standard output for a run that is finished."""

    def call(found, *arguments):
        monkeypatch.setattr("kdzoo.experiments.run.execute", lambda settings, fresh: found)
        monkeypatch.setattr(sys, "argv", ["kdzoo", "run", "--distiller", "kd", "--student", "resnet8", *arguments])
        with pytest.raises(SystemExit) as end:
            main()
        assert not end.value.code
        return capsys.readouterr().out

    return call


@pytest.mark.parametrize("columns", ["40", "80"])
def test_the_path_is_one_line_however_narrow_the_console_is(tmp_path, monkeypatch, screen, columns):
    monkeypatch.setenv("COLUMNS", columns)
    root = tmp_path / ("long-" * 12)
    found = result(root)
    lines = screen(found).splitlines()
    assert f"  {found.folder}" in lines
    assert max(len(line) for line in lines if "│" in line) <= int(columns)


def test_the_command_for_the_student_alone_reads_the_same_data(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("ant", "bee"):
        (tmp_path / "tree" / name).mkdir(parents=True)
        for number in range(4):
            Image.new("RGB", (8, 8)).save(tmp_path / "tree" / name / f"{number}.png")
    found = result(tmp_path / "runs", "data.name=folder:tree", "data.val=0.5", data="folder:tree")
    [line] = [line for line in next_steps(found).splitlines() if "--distiller none" in line]
    assert "data.val=0.5" in line
    assert "fingerprint" not in line


def test_a_path_inside_the_working_folder_starts_there(tmp_path, monkeypatch):
    found = result(tmp_path / "runs")
    assert f"\n  {found.folder}\n" in next_steps(found)
    monkeypatch.chdir(tmp_path)
    assert f"\n  {Path('runs') / found.folder.name}\n" in next_steps(found)
    assert next_steps(found).endswith("\n  kdzoo table runs")


def test_a_path_that_begins_with_a_dash_is_no_option_of_the_next_command(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    said = next_steps(result(tmp_path / "-runs")).splitlines()
    assert any(line.startswith("  ./-runs/") for line in said)
    assert said[-1] == "  kdzoo table ./-runs"


def test_what_looks_like_markup_is_printed_as_it_is(tmp_path, screen):
    found = result(tmp_path / "[/]" / ":car:", student="a[/]b")
    said = screen(found)
    assert f"  {found.folder}" in said.splitlines()
    assert "a[/]b" in said


def test_the_table_says_what_the_student_reaches_without_a_teacher(tmp_path):
    found = result(tmp_path)
    assert "without a teacher" not in table(found)
    assert "kdzoo run --distiller none" in next_steps(found)
    result(tmp_path, "teacher.name=null", distiller="none", top1=87.5)
    [line] = [line for line in table(found).splitlines() if "without a teacher" in line]
    assert "87.50 %" in line
    assert "--distiller none" not in next_steps(found)


@pytest.mark.parametrize("other", ["protocol.epochs=3", "data.limit=128", "seed=1", "student.name=resnet8"])
def test_a_run_without_a_teacher_that_differs_in_more_is_not_taken(tmp_path, other):
    found = result(tmp_path)
    result(tmp_path, "teacher.name=null", other, distiller="none", top1=87.5)
    assert "without a teacher" not in table(found)


def test_a_damaged_neighbour_hides_nothing(tmp_path):
    found = result(tmp_path)
    for overrides, damaged in ((["data.limit=128"], "config"), ([], "result")):
        getattr(write(tmp_path, 1.0, 0, *overrides, distiller="none"), damaged).write_text("{")
    assert "90.00 %" in table(found)
    assert "kdzoo run --distiller none" in next_steps(found)


def test_a_run_without_a_teacher_has_no_such_step(tmp_path):
    found = result(tmp_path, "teacher.name=null", distiller="none", teacher=None, teacher_top1=None)
    assert "without a teacher" not in table(found) + next_steps(found)


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["protocol.epochs=7"],
        ["protocol.lr=0.125", "protocol.milestones=[1, 2]", "protocol.augmentation.flip=true", "data.limit=128"],
        ["data.root=/other place", "protocol.augmentation.resized_crop=null", "student.pretrained=true"],
    ],
)
def test_the_command_without_a_teacher_is_the_same_training(tmp_path, monkeypatch, overrides):
    folder = write(tmp_path / "runs", 90.0, 0, *overrides)
    [command] = [line for line in next_steps(folder.read_result()).splitlines() if "--distiller none" in line]
    seen = []

    def execute(run, fresh):
        seen.append(run)
        raise UserError("far enough")

    monkeypatch.setattr("kdzoo.experiments.run.execute", execute)
    monkeypatch.setattr(sys, "argv", shlex.split(command))
    with pytest.raises(SystemExit):
        main()
    [(settings, place)] = seen
    assert (settings.distiller.name, settings.teacher.name) == ("none", None)
    assert place.output.root == str(tmp_path / "runs")
    plain, wanted = settings.plain(), folder.run().settings.plain()
    assert [plain[part] for part in ("student", "data", "protocol", "seed")] == [
        wanted[part] for part in ("student", "data", "protocol", "seed")
    ]


def test_the_commands_to_run_next_are_named(tmp_path):
    lines = next_steps(result(tmp_path)).splitlines()
    assert "  kdzoo bench digits-short" in lines
    assert f"  kdzoo table {tmp_path}" in lines
    assert "  kdzoo list suites" not in lines
    assert "  kdzoo list suites" in next_steps(result(tmp_path, data="folder:flowers")).splitlines()
