"""Groups train one after the other, or several at a time in processes that may die without harm to the others."""

import os
import signal
import subprocess
import sys
from contextlib import contextmanager

import pytest

import kdzoo
from kdzoo.engine.progress import Progress
from kdzoo.errors import UserError
from kdzoo.experiments import workers
from kdzoo.experiments.bench import bench
from kdzoo.experiments.workers import Local, find, slots
from kdzoo.store.folder import RunFolder


@pytest.mark.slow(reason="starts processes, each of which imports torch and trains")
def test_groups_in_two_processes_do_every_step_once_and_take_no_file_of_the_working_folder_for_pythons(
    counted, tmp_path, no_step_is_missing_or_done_twice, capfd, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "glob.py").write_text("raise RuntimeError('this is not the glob that you look for')")
    report = bench(counted(3), tmp_path / "runs", executor=Local(jobs=2))
    assert (len(report.finished), report.stopped, report.elsewhere) == (6, {}, [])
    assert no_step_is_missing_or_done_twice(3)
    said = capfd.readouterr().err
    assert all(f"[worker {i}] epoch   1/1: top-1" in said for i in (1, 2))
    written = [file.read_text() for file in (tmp_path / "runs").rglob("config.yaml")]
    assert len(written) == 6
    assert all("memory: 0.5" in text for text in written)


@pytest.mark.slow(reason="starts processes, each of which imports torch and trains")
def test_what_a_killed_worker_leaves_is_trained_by_another(counted, tmp_path, no_step_is_missing_or_done_twice):
    (tmp_path / "kill").touch()
    report = bench(counted(3), tmp_path / "runs", quiet=True, executor=Local(jobs=2))
    assert (len(report.finished), report.stopped, report.elsewhere) == (6, {}, [])
    assert no_step_is_missing_or_done_twice(3)


@pytest.mark.slow(reason="starts processes, each of which imports torch and trains")
def test_a_mistake_in_one_process_comes_back_as_one_line(counted, tmp_path):
    suite = counted(2)
    (tmp_path / "runs").mkdir()
    folder = RunFolder.of(suite.runs[0].within(output={"root": str(tmp_path / "runs")})).path
    folder.touch()  # where a folder should be
    report = bench(suite, tmp_path / "runs", quiet=True, executor=Local(jobs=2))
    assert folder in report.stopped
    assert [reason for reason in report.stopped.values() if "cannot be written" not in reason] == []
    assert len(report.finished) == 2


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGINT])
@pytest.mark.slow(reason="starts processes, each of which imports torch and trains")
def test_workers_end_with_their_bench_and_the_same_command_continues(
    counted, tmp_path, no_step_is_missing_or_done_twice, end
):
    code = (
        "import signal, sys; from pathlib import Path\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # also where the tests run in the background
        "from kdzoo.experiments import suites; from kdzoo.experiments.bench import bench\n"
        "from kdzoo.experiments.workers import Local\n"
        "if __name__ == '__main__':\n"
        "    bench(suites.load(sys.argv[1], seeds=2, overrides=sys.argv[3:]), Path(sys.argv[2]), "
        "executor=Local(jobs=2))"
    )
    suite = counted(2)
    overrides = ["engine.precision=float32", "engine.device=cpu", "engine.checkpoint_seconds=0"]
    arguments = [str(tmp_path / "counted.yaml"), str(tmp_path / "runs"), *overrides]
    driver = subprocess.Popen([sys.executable, "-c", code, *arguments], stderr=subprocess.PIPE, text=True)
    assert driver.stderr is not None
    assert any("top-1" in line for line in driver.stderr)  # a process is at work
    os.kill(driver.pid, end)
    driver.stderr.read()  # ends when the last process that could write has ended
    driver.stderr.close()
    assert driver.wait() == -end
    report = bench(suite, tmp_path / "runs", quiet=True, wait=True)
    assert len(report.finished) == 4
    assert no_step_is_missing_or_done_twice(2)


@pytest.mark.parametrize(
    ("device", "gpus", "jobs", "expected"),
    [
        ("cpu", 0, None, ["cpu"]),
        ("cpu", 0, 2, ["cpu", "cpu"]),
        ("cuda", 1, None, ["cuda"]),
        ("cuda", 2, None, ["cuda:0", "cuda:1"]),
        ("cuda", 2, 3, ["cuda:0", "cuda:1", "cuda:0"]),
        ("cuda", 2, 1, ["cuda:0"]),
        ("cuda:1", 2, None, ["cuda:1"]),
    ],
)
def test_as_many_groups_at_a_time_as_there_are_gpus_unless_told_otherwise(device, gpus, jobs, expected):
    assert slots(device, gpus, jobs) == expected


def test_workers_compute_in_the_precision_that_was_found_for_the_suite_whatever_their_gpu(tmp_path, monkeypatch):
    file, commands = tmp_path / "mine.yaml", []
    file.write_text("{pairs: [[resnet14, resnet8]], distillers: [kd], seeds: [0, 1]}")
    monkeypatch.setattr("kdzoo.engine.device.bf16_is_fast", lambda device: True)

    @contextmanager
    def started(command):
        commands.append(command)
        yield None

    monkeypatch.setattr(workers, "started", started)
    monkeypatch.setattr(workers, "watched", lambda worker, name, progress: "")
    bench(file, tmp_path / "runs", quiet=True, executor=Local(jobs=2), overrides=["engine.device=cpu"])
    assert len(commands) == 2
    assert all("engine.precision=bf16" in command for command in commands)


def test_what_a_worker_says_need_not_be_text(capsys):
    code = "import sys; sys.stderr.buffer.write(b'caf\\xe9 and more\\nerror: no \\xff\\n'); sys.exit(2)"
    with Progress() as progress, workers.started([sys.executable, "-S", "-c", code]) as worker:
        assert workers.watched(worker, "worker 1", progress) == r"no \xff"
    assert capsys.readouterr().err == "[worker 1] caf\\xe9 and more\n[worker 1] error: no \\xff\n"


def test_settings_of_the_other_executor_are_refused():
    with pytest.raises(UserError, match=r"for --on ray; --jobs N"):
        find("local", gpus=0.5)
    with pytest.raises(UserError, match=r"for --on local; on Ray"):
        find("ray", jobs=2)
    with pytest.raises(UserError, match=r"expected a share of one GPU"):
        find("ray", gpus=1.5)


def test_an_executor_that_is_none_is_one_line(tmp_path):
    with pytest.raises(UserError, match=r'executor is of type str; expected None .*find\("ray"\) gives'):
        bench("digits-short", tmp_path, executor="ray")
    with pytest.raises(UserError, match="executor is of type str"):
        kdzoo.recommend("resnet14", "resnet8", out=tmp_path, executor="local")
    with pytest.raises(UserError, match="did you mean ray"):
        find("rey")
