"""A run in two processes is the run in one: same losses, parameters in step, one set of files, no process left over."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from safetensors.torch import load_file

import kdzoo
from kdzoo.engine import ranks
from kdzoo.errors import UserError
from kdzoo.experiments import suites
from kdzoo.experiments.bench import bench
from kdzoo.resolve import resolve
from kdzoo.store.folder import RunFolder

pytestmark = pytest.mark.slow(reason="starts processes, each of which imports torch and trains")
PROGRAM = str(Path(__file__).with_name("two_ranks.py"))
# crd draws each of the 112 images of other classes once, so that no draw is left to chance.
ALIKE = ["none", "kd", "ctkd", "lfcc", "figkd:class_order=confusion", "crd:negatives=112,width=16"]
APART = ["mlld", "simkd"]  # one compares the images of a batch, the other has batch norms
WRITTEN = {"classes.txt", "config.yaml", "environment.json", "metrics.jsonl", "predictions.safetensors", "result.json"}
WRITTEN |= {"student.safetensors"}


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    """Runs the program with some arguments, once for all of pytest's workers, and gives the folder it wrote."""
    shared = tmp_path_factory.getbasetemp()
    shared = shared.parent if "PYTEST_XDIST_WORKER" in os.environ else shared

    def run(name: str, *arguments: str) -> Path:
        out = shared / name
        with FileLock(shared / f"{name}.lock"):
            if not out.exists():
                out.mkdir()
                subprocess.run([sys.executable, PROGRAM, str(out), *arguments], check=True)
        return out

    return run


@pytest.fixture(scope="module")
def one(program):
    return program("one", "1", *ALIKE, *APART)


@pytest.fixture(scope="module")
def two(program):
    return program("two", "2", *ALIKE, *APART)


def losses(out: Path) -> dict[str, list[dict[str, float]]]:
    """The terms of each epoch, by method."""
    folders = [RunFolder(file.parent) for file in out.glob("*/result.json")]
    return {f.read_config()["distiller"]["name"]: [epoch["loss"] for epoch in f.read_history()] for f in folders}


def largest_gap(one: list[dict[str, float]], two: list[dict[str, float]]) -> float:
    return max(abs(a[term] - b[term]) for a, b in zip(one, two, strict=True) for term in a)


@pytest.mark.parametrize("method", [name.partition(":")[0] for name in ALIKE])
def test_two_processes_have_the_losses_of_one_with_the_whole_batch(one, two, method):
    assert largest_gap(losses(one)[method], losses(two)[method]) < 1e-4


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two cuda devices")
def test_two_cuda_devices_have_the_losses_of_one_process(one, program):
    two = program("cuda", "2", "kd", "lfcc", "engine.device=cuda")
    assert max(largest_gap(losses(one)[method], losses(two)[method]) for method in ("kd", "lfcc")) < 1e-3


def test_what_compares_the_images_of_a_batch_sees_those_of_one_process(one, two):
    assert largest_gap(losses(one)["mlld"], losses(two)["mlld"]) > 1e-3


def test_student_and_method_hold_the_same_bits_in_every_process(two):
    held = [torch.load(two / f"held-{rank}.pt") for rank in (0, 1)]
    assert set(held[0]) == {name.partition(":")[0] for name in ALIKE + APART}
    for method in held[0]:
        for name, value in held[0][method].items():
            own = ".running_" in name  # statistics of a batch norm
            assert own or torch.equal(value, held[1][method][name]), f"{method}: {name}"
    assert {"distiller.memory_s", "distiller.memory_t", "distiller.log_z"} <= set(held[0]["crd"])


def test_one_process_writes(two):
    folders = [file.parent for file in two.glob("*/result.json")]
    assert len(folders) == len(ALIKE + APART)
    for folder in folders:
        assert {file.name for file in folder.rglob("*") if file.is_file()} == WRITTEN
        assert [json.loads(line)["epoch"] for line in (folder / "metrics.jsonl").read_text().splitlines()] == [1, 2]


# A method that, where it is told to, interrupts the command in the fourth step and then trains no further.
INTERRUPTING = '''"""Interrupts its command."""
import os, signal
import torch
from kdzoo import Distiller, Fidelity, Needs
from kdzoo.losses import cross_entropy
from kdzoo.tensors import all_sum


class Interrupting(Distiller):
    """Cross-entropy of noisy logits with a memory."""

    paper = "none"
    fidelity = Fidelity.EXACT
    needs = Needs(teacher=False)

    logit_terms = ()

    def __init__(self, *, ce: float = 1.0):
        super().__init__(ce=ce)
        self.calls = 0

    def build(self, student, teacher, data):
        self.register_buffer("bank", torch.zeros(data.num_classes))

    def loss(self, student, teacher, batch):
        self.calls += 1
        if self.calls == 4 and os.environ["RANK"] == "1" and "INTERRUPTS" in os.environ:
            with open(os.environ["INTERRUPTS"], "w") as file:
                file.write(str(os.getpid()))
            os.kill(os.getppid(), signal.SIGINT)
            signal.pause()
        self.bank.lerp_(all_sum(batch.targets.mean(0)) / 2, 0.1)
        noise = torch.randn_like(student.logits)
        return self.weigh(ce=lambda: cross_entropy(student.logits + 0.1 * noise + self.bank, batch.targets))
'''
SHORT = ["protocol.epochs=2", "data.limit=320", "engine.device=cpu", "engine.precision=float32", "engine.threads=1"]
SHORT += ["engine.checkpoint_seconds=0", "protocol.ema=0.9"]


def in_shell(*words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, **variables}
    return subprocess.run([sys.executable, *words], env=environment, capture_output=True, text=True, check=False)


def is_gone(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return True
    return False


def test_a_run_whose_processes_were_killed_ends_with_the_bits_of_one_that_torchrun_started(tmp_path):
    method, process = tmp_path / "interrupting.py", tmp_path / "process"
    method.write_text(INTERRUPTING)
    command = ["-m", "kdzoo.cli", "run", "--distiller", str(method), "--student", "resnet8", *SHORT]

    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    started = in_shell(*torchrun, *command, f"output.root={tmp_path / 'whole'}")
    assert started.stdout.count("student top-1, last epoch") == 1
    [whole] = (tmp_path / "whole").iterdir()

    root = tmp_path / "killed"
    interrupted = in_shell(*command, "--devices", "2", "--out", str(root), INTERRUPTS=str(process))
    assert interrupted.returncode == 130
    assert interrupted.stderr.split("\n")[-2:-1] == [
        "interrupted; the same command continues a training where it stopped"
    ]
    assert "Traceback" not in interrupted.stderr
    assert is_gone(int(process.read_text()))
    [killed] = root.iterdir()
    assert list((killed / "checkpoints").iterdir())

    resumed = kdzoo.run(str(method), "resnet8", out=root, overrides=[*SHORT, "engine.devices=2"], quiet=True)
    assert resumed.folder == killed
    one, other = (load_file(folder / "student.safetensors") for folder in (whole, killed))
    assert all(torch.equal(one[name], other[name]) for name in one)
    histories = [RunFolder(folder).read_history() for folder in (whole, killed)]
    timeless = [[{**record, "images_per_second": 0} for record in history] for history in histories]
    assert timeless[0] == timeless[1]


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("error", "this is missing; ask for that"),
        ("kill", "process 0 of 2 was ended by SIGKILL; the same command"),
        ("end", "process 0 of 2 exited with 143; the same command"),
    ],
)
def test_a_process_that_fails_ends_all_with_its_reason(tmp_path, monkeypatch, how, said):
    monkeypatch.syspath_prepend(Path(__file__).parent)
    from doomed import fail

    settings = resolve({"distiller": {"name": "none"}, "student": {"name": "resnet8"}}, ["engine.devices=2"])
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match=said):
        ranks.start(fail, settings, str(tmp_path / "pipe"), how)
    assert is_gone(int((tmp_path / "pipe.number").read_text()))


def test_the_handlers_of_signals_are_those_of_before_when_the_processes_have_ended(monkeypatch):
    def launched(*_):
        signal.signal(signal.SIGTERM, lambda *_: None)
        return lambda *_: None

    monkeypatch.setattr("kdzoo.engine.ranks.elastic_launch", launched)
    before = signal.getsignal(signal.SIGTERM)
    ranks.start(print, resolve({"distiller": {"name": "none"}, "student": {"name": "resnet8"}}, ["engine.devices=2"]))
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (
            ["engine.devices=3", "protocol.batch_size=64"],
            "batch of 64 images cannot be shared evenly by 3 devices; set protocol.batch_size",
        ),
        (["engine.devices=0"], "engine.devices=0: expected a number from 1"),
        (["engine.devices=2", "engine.device=cuda"], "no cuda device"),
    ],
)
def test_what_cannot_be_shared_is_refused_before_any_process_starts(tmp_path, monkeypatch, more, said):
    monkeypatch.setattr("kdzoo.engine.ranks.start", None)
    if "cuda" in said and torch.cuda.is_available():
        pytest.skip("this machine has cuda devices")
    with pytest.raises(UserError, match=said):
        kdzoo.run("none", "resnet8", out=tmp_path, overrides=more, quiet=True)


def test_a_suite_shares_no_batch_among_devices(tmp_path):
    with pytest.raises(UserError, match=r"engine\.devices belongs to kdzoo run"):
        bench(suites.load("digits", overrides=["engine.devices=2"]), tmp_path, quiet=True)


def test_the_number_of_devices_is_part_of_a_run():
    def identity(*overrides: str) -> str:
        return resolve({"distiller": {"name": "none"}, "student": {"name": "resnet8"}}, overrides).settings.identity()

    assert identity("engine.devices=1") == identity() != identity("engine.devices=2") != identity("engine.devices=4")


def test_one_device_needs_no_lightning(one, two):
    assert (two / "with-fabric").exists()
    assert not (one / "with-fabric").exists()
