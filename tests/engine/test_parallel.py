"""A run in two processes is the run in one: same losses, parameters in step, one set of files, no process left over."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import kdzoo
from kdzoo import config
from kdzoo.errors import UserError
from kdzoo.results.folder import RunFolder

PROGRAM = str(Path(__file__).with_name("two_ranks.py"))
# crd draws each of the 112 images of other classes once, so that no draw is left to chance.
ALIKE = ["none", "kd", "ctkd", "lfcc", "figkd:class_order=confusion", "crd:negatives=112,width=16"]
APART = ["mlld", "simkd"]  # one compares the images of a batch, the other has batch norms
WRITTEN = {".lock", "config.yaml", "environment.json", "metrics.jsonl", "result.json", "student.safetensors"}


def run_program(out: Path, *arguments: str) -> Path:
    subprocess.run([sys.executable, PROGRAM, str(out), *arguments], check=True)
    return out


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    return run_program(tmp_path_factory.mktemp("one"), "1", *ALIKE, *APART)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    return run_program(tmp_path_factory.mktemp("two"), "2", *ALIKE, *APART)


def losses(out: Path) -> dict[str, list[dict[str, float]]]:
    """The terms of each epoch, by method."""
    folders = [RunFolder(file.parent) for file in out.glob("*/result.json")]
    return {f.read_config()["distiller"]["name"]: [epoch["loss"] for epoch in f.read_history()] for f in folders}


def largest_gap(one: list[dict[str, float]], two: list[dict[str, float]]) -> float:
    return max(abs(a[term] - b[term]) for a, b in zip(one, two, strict=True) for term in a)


@pytest.mark.parametrize("method", [name.partition(":")[0] for name in ALIKE])
def test_two_processes_have_the_losses_of_one_with_the_whole_batch(one, two, method):
    assert largest_gap(losses(one)[method], losses(two)[method]) < 1e-4
    first, last = (sum(losses(two)[method][epoch].values()) for epoch in (0, -1))
    assert first != last  # it learned


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
        assert {file.name for file in folder.rglob("*") if file.is_file()} == WRITTEN - {".lock"}
        assert [json.loads(line)["epoch"] for line in (folder / "metrics.jsonl").read_text().splitlines()] == [1, 2]


# A method that ends its own process, raises an error or interrupts its parent in the step that FATE names.
FATEFUL = '''"""Does at a step what it is told."""
import os, signal
import torch
from kdzoo import Distiller, Fidelity, Needs
from kdzoo.errors import UserError
from kdzoo.losses import cross_entropy


class Fateful(Distiller):
    """Cross-entropy of noisy logits with a memory."""

    paper = "none"
    fidelity = Fidelity.EXACT
    needs = Needs(teacher=False)

    def __init__(self, student, teacher, data, *, ce: float = 1.0):
        super().__init__()
        self.ce, self.calls = ce, 0
        self.register_buffer("bank", torch.zeros(data.num_classes))

    def loss(self, student, teacher, batch):
        self.calls += 1
        fate, _, call = os.environ.get("FATE", "none:0").partition(":")
        if self.calls == int(call):
            if fate == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            if fate == "error" and os.environ["RANK"] == "1":
                raise UserError("rank 1 does not like this; give it another")
            if fate == "interrupt" and os.environ["RANK"] == "1":
                with open(os.environ["PIDS"], "w") as file:
                    file.write(str(os.getpid()))
                os.kill(os.getppid(), signal.SIGINT)
        self.bank.lerp_(batch.targets.mean(0), 0.1)
        noise = torch.randn_like(student.logits)
        return {"ce": self.ce * cross_entropy(student.logits + 0.1 * noise + self.bank, batch.targets)}
'''
SHORT = ["protocol.epochs=2", "data.limit=320", "engine.device=cpu", "engine.precision=float32", "engine.threads=1"]
SHORT += ["engine.checkpoint_seconds=0", "protocol.ema=0.9"]


@pytest.fixture
def method(tmp_path):
    file = tmp_path / "fateful.py"
    file.write_text(FATEFUL)
    return str(file)


def run_in_two(method: str, out: Path) -> kdzoo.engine.run.Result:
    return kdzoo.run(method, "resnet8", out=out, overrides=[*SHORT, "engine.devices=2"], quiet=True)


def command(method: str, out: Path, *more: str) -> list[str]:
    return ["-m", "kdzoo.cli", "run", "--distiller", method, "--student", "resnet8", "--out", str(out), *more, *SHORT]


def test_two_that_were_killed_and_interrupted_end_with_the_bits_of_two_that_torchrun_started(
    method, tmp_path, monkeypatch
):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    whole = subprocess.run(
        [*torchrun, *command(method, tmp_path / "whole")], stdout=subprocess.PIPE, text=True, check=True
    )
    assert whole.stdout.count("student top-1, last epoch") == 1

    monkeypatch.setenv("FATE", "kill:3")
    with pytest.raises(UserError, match=r"process \d of 2 ended by SIGKILL; the same command goes on"):
        run_in_two(method, tmp_path / "killed")

    monkeypatch.setenv("FATE", "interrupt:4")
    monkeypatch.setenv("PIDS", str(tmp_path / "pids"))
    interrupted = subprocess.run(
        [sys.executable, *command(method, tmp_path / "killed", "--devices", "2")],
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    assert interrupted.returncode == 130
    assert "Traceback" not in interrupted.stderr
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pids").read_text()), 0)

    monkeypatch.delenv("FATE")
    resumed = run_in_two(method, tmp_path / "killed")
    [file] = (tmp_path / "whole").glob("*/student.safetensors")
    assert file.parent.name == resumed.folder.name
    one, other = load_file(file), load_file(resumed.folder / "student.safetensors")
    assert all(torch.equal(one[name], other[name]) for name in one)
    timeless = [
        [{**record, "images_per_second": 0} for record in RunFolder(folder).read_history()]
        for folder in (file.parent, resumed.folder)
    ]
    assert timeless[0] == timeless[1]


def test_an_error_in_one_process_ends_all_with_one_line(method, tmp_path, monkeypatch):
    monkeypatch.setenv("FATE", "error:2")
    failed = subprocess.run(
        [sys.executable, *command(method, tmp_path, "--devices", "2")], stderr=subprocess.PIPE, text=True, check=False
    )
    assert failed.returncode == 2
    assert failed.stderr.splitlines()[-1] == "error: rank 1 does not like this; give it another"
    assert "Traceback" not in failed.stderr


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["engine.devices=3"], "batch of 64 images cannot be shared evenly by 3 devices; set protocol.batch_size"),
        (["engine.devices=0"], "--devices 0: expected a number from 1"),
        (["engine.devices=2", "engine.device=cuda"], "no cuda device"),
    ],
)
def test_what_cannot_be_shared_is_refused_before_any_process_starts(tmp_path, monkeypatch, more, said):
    monkeypatch.setattr("kdzoo.engine.parallel.start", None)
    if "cuda" in said and torch.cuda.is_available():
        pytest.skip("this machine has cuda devices")
    with pytest.raises(UserError, match=said):
        kdzoo.run("none", "resnet8", out=tmp_path, overrides=more, quiet=True)


def test_the_number_of_devices_is_part_of_a_run_and_how_they_share_is_not():
    def identity(*overrides: str) -> str:
        return config.resolve({"distiller": {"name": "none"}, "student": {"name": "resnet8"}}, overrides).identity()

    assert identity("engine.devices=1") == identity() != identity("engine.devices=2") != identity("engine.devices=4")
    assert identity("engine.devices=2") == identity("engine.devices=2", "engine.strategy=fsdp")


def test_one_device_needs_no_lightning(tmp_path):
    code = (
        "import sys, kdzoo; kdzoo.run('none', 'resnet8', out=sys.argv[1], quiet=True, "
        "overrides=['protocol.epochs=1', 'data.limit=64']); sys.exit('lightning_fabric' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)
