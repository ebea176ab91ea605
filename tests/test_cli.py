"""The command line: quick to start, one line and exit code 2 for the user's mistakes."""

import json
import math
import os
import re
import subprocess
import sys
from io import BytesIO, TextIOWrapper

import click
import pytest
from PIL import Image

from kdzoo import __version__
from kdzoo.checks import CheckResult, Outcome
from kdzoo.cli import COMMANDS, main, open_streams
from kdzoo.engine.progress import Progress
from kdzoo.experiments import suites
from kdzoo.experiments.predictions import Prediction
from kdzoo.store.folder import RunFolder
from kdzoo.store.lock import RunLock

from .made_runs import many
from .misbehaving import write_method

TINY = ["--student", "resnet8", "protocol.epochs=1", "data.limit=128"]


@pytest.fixture
def kdzoo(capsys, monkeypatch):
    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["kdzoo", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit:
            main()
        said = capsys.readouterr()
        return exit.value.code, said.out, said.err

    return call


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["run", "--distiler", "kd"], "No such option"),
        (["run", "--distiller", "kdd", "--student", "resnet8"], "unknown distiller 'kdd'; did you mean kd"),
        (["show", "kdd"], "unknown method or network 'kdd'; did you mean kd"),
        (["show", "resnet8x5"], "unknown method or network 'resnet8x5'; did you mean resnet8x4"),
        (["show", "nix"], "unknown method or network 'nix'; known: ab, abkd, aimv2"),
        (
            ["run", "--distiller", "none", "--student", "resnet81"],
            "unknown model 'resnet81'; did you mean resnet8",
        ),
        (
            ["run", "--distiller", "none", *TINY, "--data", "digit"],
            "unknown data 'digit'; did you mean digits",
        ),
        (
            ["run", "--distiller", "none", *TINY, "--protocol", "quik"],
            "unknown protocol 'quik'; did you mean quick",
        ),
        (["run", "--distiller", "none", *TINY, "protocol.epoch=1"], "unknown setting 'protocol.epoch'"),
        (["run", "--distiller", "none", *TINY, "--device", "tpu9"], "device"),
        (["run", "--distiller", "none", *TINY, "--data", "folder:/nowhere"], "/nowhere"),
        (["run", "--distiller", "none", "--student", "nowhere:net"], "model 'nowhere:net'"),
        (["table", "/nowhere"], "no folder /nowhere"),
        (["plot", ".", "--out", "c.svg", "--cost", "flops"], "--cost belongs to --kind cost, and the kind is forest"),
        (["eval", "/nowhere"], "/nowhere is no run"),
        (["show", "uhkdd"], "uhkdd"),
        (["list", "things"], "things"),
        (["nonsense"], "nonsense"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(kdzoo, tmp_path, arguments, said):
    if arguments[0] == "run":
        arguments = [*arguments, f"output.root={tmp_path}"]
    code, _, err = kdzoo(*arguments)
    assert code == 2
    assert said in err
    assert err.startswith("error: ")
    assert err.strip().count("\n") == 0
    assert "Traceback" not in err
    assert not [*tmp_path.rglob("config.yaml")]  # no run has begun


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(5, "Input/output error", "runs/kd"), "error: runs/kd: Input/output error"),
        (MemoryError(), "error: out of memory while running kdzoo table; give this process more, or lower "),
    ],
)
def test_a_disk_or_a_memory_that_fails_is_one_line_too(kdzoo, tmp_path, monkeypatch, error, said):
    def fail(paths):
        raise error

    monkeypatch.setattr("kdzoo.store.folder.find_runs", fail)
    code, _, err = kdzoo("table", tmp_path)
    assert code == 2
    assert err.startswith(said)
    assert err.count("\n") == 1
    monkeypatch.setattr("kdzoo.store.folder.find_runs", {}.__getitem__)
    monkeypatch.setattr(sys, "argv", ["kdzoo", "table", str(tmp_path)])
    with pytest.raises(TypeError):  # a bug is no user's mistake, and has its traceback
        main()


@pytest.mark.parametrize(
    "arguments",
    [
        ["eval", ""],
        ["predict", "run", ""],
        ["export", "run", "--format", "timm", "--out", ""],
        ["table", "runs", ""],
        ["run", "--out", ""],
    ],
)
def test_an_empty_path_is_no_working_folder(kdzoo, arguments):
    code, _, err = kdzoo(*arguments)
    assert (code, err.count("\n")) == (2, 1)
    assert "the path is empty; the working folder is '.'" in err


@pytest.mark.parametrize("option", ["--out", "--data", "--teacher-weights"])
def test_a_path_that_is_no_text_is_refused_before_anything_is_trained(kdzoo, option):
    code, _, err = kdzoo("run", "--distiller", "kd", "--teacher", "resnet14", "--student", "resnet8", option, "b\udcfc")
    assert (code, err.count("\n")) == (2, 1)
    assert "b\\udcfc is no text in UTF-8; rename that path" in err


@pytest.mark.slow(reason="starts processes, each of which imports torch and trains")
@pytest.mark.parametrize("closed", ["2>&-", "<&- >&- 2>&-"])
def test_a_run_whose_streams_are_closed_is_finished(closed, tmp_path):
    words = [sys.executable, "-m", "kdzoo.cli", "run", "--distiller", "none", *TINY, "--out", str(tmp_path)]
    subprocess.run(["sh", "-c", f'"$@" {closed}', "sh", *words], check=True)
    [run] = tmp_path.iterdir()
    assert RunFolder(run).read_result() is not None


def test_the_package_runs_as_a_script_does():
    ended = subprocess.run([sys.executable, "-m", "kdzoo", "--version"], capture_output=True, text=True, check=True)
    assert ended.stdout == f"kdzoo, version {__version__}\n"


def test_a_reader_that_has_read_enough_ends_the_command_without_a_word():
    reader, writer = os.pipe()
    os.close(reader)
    ended = subprocess.run(
        [sys.executable, "-m", "kdzoo.cli", "list", "suites"], stdout=writer, stderr=subprocess.PIPE, check=False
    )
    os.close(writer)
    assert (ended.returncode, ended.stderr) == (1, b"")


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (BrokenPipeError(32, "Broken pipe"), "a connection to another process or machine broke"),
        (SystemExit(1), "exit(1)"),
    ],
)
def test_what_else_breaks_or_exits_is_one_line(kdzoo, tmp_path, monkeypatch, error, said):
    def find_runs(paths):
        raise error

    monkeypatch.setattr("kdzoo.store.folder.find_runs", find_runs)
    code, _, err = kdzoo("table", tmp_path)
    assert (code, err.count("\n")) == (2, 1)
    assert said in err


def test_no_line_commands_the_terminal(kdzoo, tmp_path):
    code, _, err = kdzoo("table", tmp_path / "\x1b[2J\x07")
    assert code == 2
    assert r"\x1b[2J\x07; expected a run or a folder of runs" in err
    assert err[:-1].isprintable()


@pytest.mark.parametrize(
    ("encoding", "text", "printed"),
    [
        (
            "cp1252",
            "vit_s → resnet18: 70.1 ± 0.2 † π \udcff",
            b"vit_s -> resnet18: 70.1 \xb1 0.2 \x86 \\u03c0 \\udcff\n",
        ),
        ("ascii", "a → b ± c† ‡ é…", b"a -> b +/- c(1) (2) \\xe9...\n"),
        ("utf-8", "a → b ± \udcff", "a → b ± \\udcff\n".encode()),
    ],
)
def test_characters_that_an_encoding_lacks_are_replaced_by_others(monkeypatch, encoding, text, printed):
    stream = TextIOWrapper(BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, "stdout", stream)
    open_streams()
    print(text, flush=True)
    assert stream.buffer.getvalue() == printed


@pytest.mark.parametrize(
    ("style", "encoding", "pair"),
    [
        ("markdown", "cp1252", "vit_s -> resnet_8"),
        ("html", "utf-8", "vit_s → resnet_8"),
        ("csv", "utf-8", "vit_s → resnet_8"),
        ("latex", "utf-8", r"vit\_s $\rightarrow$ resnet\_8"),
    ],
)
def test_a_table_can_be_printed_in_any_encoding_and_a_file_is_in_its_own(
    kdzoo, tmp_path, monkeypatch, style, encoding, pair
):
    many(tmp_path, ["none", "kd"], seeds=1)
    stream = TextIOWrapper(BytesIO(), encoding="cp1252")
    monkeypatch.setattr(sys, "stdout", stream)
    code, _, _ = kdzoo("table", tmp_path, "--pivot", "--format", style)
    stream.flush()
    assert code == 0
    assert pair in stream.buffer.getvalue().decode(encoding)


def test_a_probability_that_is_no_number_is_null_in_json(kdzoo, tmp_path, monkeypatch):
    found = Prediction("a.png", ("x", "y"), (math.nan, 0.25))
    monkeypatch.setattr("kdzoo.experiments.predictions.predict", lambda *_, **__: iter([found]))
    _, out, _ = kdzoo("predict", tmp_path, "a.png", "--format", "json")
    classes = [{"class": "x", "probability": None}, {"class": "y", "probability": 0.25}]
    assert json.loads(out, parse_constant=pytest.fail) == [{"image": "a.png", "classes": classes}]


@pytest.mark.skipif(os.name != "posix", reason="pipes of POSIX")
def test_settings_may_come_by_a_pipe_which_is_read_once(kdzoo):
    reader, writer = os.pipe()
    os.write(writer, b"distiller: {name: none}\nstudent: {name: resnet81}\n")
    os.close(writer)
    code, _, err = kdzoo("run", "--config", f"/dev/fd/{reader}")
    os.close(reader)
    assert code == 2
    assert "unknown model 'resnet81'" in err


@pytest.mark.skipif(os.name != "posix", reason="pipes and devices of POSIX")
def test_an_output_replaces_no_pipe_and_no_device(kdzoo, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(os.devnull)
    for name in ("pipe", "link"):
        code, _, err = kdzoo("report", tmp_path, "--out", tmp_path / name)
        assert code == 2
        assert f"{tmp_path / name} is a device or a pipe; name a file to write" in err
    assert sorted(os.listdir(tmp_path)) == ["link", "pipe"]


def test_a_file_is_no_folder_of_runs(kdzoo, tmp_path):
    (tmp_path / "result.json").write_text("{}")
    code, _, err = kdzoo("table", tmp_path / "result.json")
    assert (code, err) == (2, f"error: no folder {tmp_path / 'result.json'}; expected a run or a folder of runs\n")


def test_a_working_folder_that_was_removed_is_one_line(kdzoo, tmp_path, monkeypatch):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    code, _, err = kdzoo("list", "suites")
    assert (code, err.count("\n")) == (2, 1)
    assert err.startswith("error: the working folder was removed; change to another one")
    monkeypatch.chdir(tmp_path)
    assert kdzoo("list", "suites")[0] == 0


def test_a_folder_of_compiled_code_that_cannot_be_made_is_one_line(kdzoo, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "file"))
    code, _, err = kdzoo("list", "suites")
    assert (code, err.count("\n")) == (2, 1)
    assert "torch's compiler can make no such folder" in err
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "new"))
    assert kdzoo("list", "suites")[0] == 0


def test_debug_shows_where_it_went_wrong(monkeypatch):
    from kdzoo.errors import UserError

    monkeypatch.setattr(sys, "argv", ["kdzoo", "eval", "/nowhere", "--debug"])
    with pytest.raises(UserError):
        main()


def test_a_run_prints_its_table_and_can_be_tabulated_and_measured_again(kdzoo, tmp_path):
    code, out, _ = kdzoo("run", "--distiller", "none", *TINY, "--out", tmp_path)
    assert code == 0
    assert "student top-1, last epoch" in out
    folder = next(tmp_path.iterdir())
    top1 = json.loads((folder / "result.json").read_text())["top1"]
    assert f"{top1:.2f} %" in out
    code, out, _ = kdzoo("eval", folder)
    assert (code, f"top-1 {top1:.2f} %" in out) == (0, True)
    whole = (folder / "result.json").read_text()
    (folder / "result.json").write_text(json.dumps({**json.loads(whole), "top1": 77.7}))
    code, out, err = kdzoo("eval", folder)
    assert (code, f"top-1 {top1:.2f} %" in out) == (0, True)
    assert "result.json says top-1 77.70 %" in " ".join(err.split())
    (folder / "result.json").write_text(whole)
    code, out, err = kdzoo("eval", folder)
    assert (code, "result.json says" in err) == (0, False)
    code, out, _ = kdzoo("table", tmp_path)
    assert (code, f"| {top1:.2f} |" in out) == (0, True)
    code, _, err = kdzoo("run", "--distiller", "none", *TINY, "--out", tmp_path)
    assert (code, "finished before" in err) == (0, True)
    code, _, err = kdzoo("run", "--distiller", "none", *TINY, "--out", tmp_path, "--fresh")
    assert (code, "finished before" in err) == (0, False)


OPTIONS = [
    pytest.param(option, id=f"{command.name} {option.opts[0]}")
    for command in COMMANDS
    for option in command.params
    if isinstance(option, click.Option)
]


@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_says_what_it_is_for_and_what_it_is_where_none_is_given(option):
    assert option.help
    assert option.is_flag or not isinstance(option.default, str | int | float) or "(default: " in option.help


def test_nothing_heavy_is_imported_for_help_and_lists():
    for command in (["--help"], ["run", "--help"], ["list", "distillers"]):
        code = (
            f"import sys; sys.argv = ['kdzoo', *{command!r}]\nfrom kdzoo.cli import main\ntry: main()\n"
            "except SystemExit as end: assert not end.code\n"
            "assert not {'torch', 'timm', 'pandas', 'numpy', 'omegaconf'} & set(sys.modules)"
        )
        subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_a_command_is_told_in_a_whole_sentence(kdzoo):
    _, out, _ = kdzoo("--help")
    told = out.partition("Commands:\n")[2].splitlines()
    assert len(told) == len(COMMANDS)
    assert all(re.fullmatch(r"  \w+ +[A-Z].*\w\.", line) for line in told)


def test_show_explains_methods_and_networks(kdzoo):
    _, out, _ = kdzoo("show", "uhkd")
    assert "arXiv" in out
    assert "reconstructed" in out
    assert "spectrum" in out
    _, out, _ = kdzoo("show", "resnet20", "--data", "cifar100")
    assert "64 x 8 x 8" in out


def test_show_writes_types_as_they_are_though_a_file_postpones_them(kdzoo, tmp_path):
    shown = []
    for file, first in (("one.py", ""), ("two.py", "from __future__ import annotations\n")):
        (tmp_path / file).write_text(
            f"{first}from kdzoo import Distiller, Fidelity\n"
            "class Mine(Distiller):\n    'Mine.'\n    paper, fidelity = 'arXiv:1', Fidelity.EXACT\n"
            "    def __init__(self, *, kd: float = 1.0, bands: list[int] | None = None):\n"
            "        super().__init__(kd=kd)\n"
        )
        code, out, _ = kdzoo("show", tmp_path / file)
        assert code == 0
        shown.append([line for line in out.splitlines() if re.search(r"\b(kd|bands)\b", line)])
    assert shown[0] == shown[1]
    assert re.search(r"kd +\W float +\W 1\.0", "\n".join(shown[1]))


@pytest.mark.parametrize("name", ["no fidelity", "an unknown fidelity", "no weights", "needs of another type"])
def test_show_says_in_one_line_why_a_method_cannot_be_explained(kdzoo, tmp_path, name):
    file = write_method(tmp_path, 0, name)
    code, out, err = kdzoo("show", file)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert f"{file} cannot be explained" in err
    assert f"'kdzoo check {file}' says what to correct" in err


def test_check_tells_what_a_method_breaks(kdzoo, tmp_path):
    file = tmp_path / "broken.py"
    file.write_text("from kdzoo import Distiller\nclass Broken(Distiller):\n    pass\n")
    code, out, err = kdzoo("check", file)
    assert code == 2
    assert "failed " in out
    assert "fails" in err


def test_check_says_how_far_it_is_where_it_takes_long(kdzoo, monkeypatch):
    def done(_kind):
        for number in range(3):
            views[0].tick()
            yield CheckResult(f"check_{number}", Outcome.PASSED)

    views = []
    monkeypatch.setattr("kdzoo.checks.running.results", done)
    monkeypatch.setattr("kdzoo.engine.progress.FIRST", 0.0)
    monkeypatch.setattr("kdzoo.engine.progress.EVERY", 0.0)
    monkeypatch.setattr(Progress, "__enter__", lambda view: views.append(view) or view)
    code, out, err = kdzoo("check", "kd")
    assert (code, len(out.splitlines())) == (0, 3)
    assert re.findall(r"checking kd(?:, \d of)?", err) == ["checking kd", "checking kd, 1 of", "checking kd, 2 of"]


def test_an_error_that_many_checks_meet_is_told_once(kdzoo, tmp_path):
    _, out, _ = kdzoo("check", write_method(tmp_path, 0, "an error when it is built"))
    assert out.count("IndexError: misbuilt") == 1
    assert len(re.findall(r"^failed +check_\w+: the same error as in check_\w+$", out, re.M)) > 10


@pytest.mark.parametrize("kind", ["distillers", "models", "data", "protocols", "suites", "settings"])
def test_lists(kdzoo, kind):
    code, out, _ = kdzoo("list", kind)
    assert code == 0
    assert out.strip()


def test_data_are_looked_at_and_damaged_ones_are_an_error(kdzoo, tmp_path):
    for split in ("train", "test"):
        for name in ("ant", "bee"):
            (tmp_path / split / name).mkdir(parents=True)
            Image.new("RGB", (8, 8)).save(tmp_path / split / name / "1.png")
    code, out, _ = kdzoo("data", f"folder:{tmp_path}")
    assert code == 0
    assert "2 classes, 2 training and 2 test images" in out
    (tmp_path / "train" / "ant" / "2.png").write_text("not a picture")
    code, out, err = kdzoo("data", f"folder:{tmp_path}", "data.skip_damaged=true")
    assert code == 0
    assert "left out in training: the 1 damaged images" in out
    code, out, err = kdzoo("data", f"folder:{tmp_path}", "data.alpha=black")
    assert code == 2
    assert "train/ant/2.png" in out
    assert "damaged images: 1; replace or remove them, or train with data.skip_damaged=true" in err


@pytest.mark.parametrize("place", ["import", "load"])
def test_code_that_ends_the_process_is_an_error_whatever_code_it_ends_with(kdzoo, tmp_path, place):
    exit = "raise SystemExit(0)"
    file = tmp_path / "data.py"
    file.write_text(
        exit
        if place == "import"
        else f"from kdzoo import ImageSet\nclass Mine(ImageSet):\n    def load(self, root):\n        {exit}\n"
    )
    code, _, err = kdzoo("run", "--distiller", "none", *TINY, "--data", file, "--out", tmp_path / "runs")
    assert code == 2
    assert err.splitlines()[-1].startswith("error: ")
    assert "exit" in err.lower()


def test_runs_that_another_process_holds_are_named_and_have_an_exit_code(kdzoo, tmp_path):
    suite = tmp_path / "one.yaml"
    suite.write_text("{data: {name: digits, limit: 64}, pairs: [[null, resnet8]], distillers: [none]}")
    arguments = ["bench", suite, "--out", tmp_path / "runs", "engine.device=cpu", "engine.precision=float32"]
    [run] = suites.load(str(suite), overrides=arguments[-2:]).runs
    folder = RunFolder.of(run.within(output={"root": str(tmp_path / "runs")})).path
    with RunLock(folder) as lock:
        code, _, err = kdzoo(*arguments)
        assert code == 3
        assert f"not finished: other processes are at work on 1 run ({folder.name}: {lock.who()})" in err


def test_a_method_beside_the_script_takes_no_name_of_kdzoos(tmp_path):
    (tmp_path / "distillers.py").write_text("raise RuntimeError('imported')")
    code = "from kdzoo import registry; print(registry.find('kd').module)"
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, capture_output=True, text=True)
    assert run.stdout == "kdzoo.distillers.kd\n"
