"""Finished runs on another machine, in another folder and on another device; each lack is emulated."""

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import psutil
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from torch import Tensor
from torch.overrides import TorchFunctionMode

import kdzoo
from kdzoo.cli import cli
from kdzoo.data import open_dataset
from kdzoo.data.stream import OUT_OF_SHARED_MEMORY
from kdzoo.engine.finish import peak_memory
from kdzoo.engine.measure import evaluate
from kdzoo.errors import UserError
from kdzoo.experiments import spectrum
from kdzoo.experiments.run import Here, evaluate_run
from kdzoo.models import create
from kdzoo.store.folder import RunFolder

NETS = """
from torch import nn
from mylayers import WIDTH

def plain(num_classes):
    stages = [nn.Sequential(nn.Conv2d(a, b, 3, 2, 1), nn.ReLU()) for a, b in ((3, WIDTH), (WIDTH, 8))]
    return nn.Sequential(*stages, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, num_classes))
"""
METHOD = '''"""The student alone."""
from kdzoo import Distiller, Fidelity, Needs
from kdzoo.losses import cross_entropy


class Alone(Distiller):
    """No teacher."""

    paper, fidelity, needs = "-", Fidelity.EXACT, Needs(teacher=False, features=False)

    def __init__(self, *, ce: float = 1.0):
        super().__init__(ce=ce)

    def loss(self, student, teacher, batch):
        return self.weigh(ce=lambda: cross_entropy(student.logits, batch.targets))
'''
SHORT = ["protocol.epochs=1", "protocol.batch_size=8", "engine.device=cpu", "engine.precision=float32"]


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A folder with pictures, networks and a method, and a run that was made in it by relative paths."""
    folder = tmp_path / "project"
    random = np.random.default_rng(0)
    for split, count in (("train", 12), ("test", 6)):
        for shade, name in ((60, "dark"), (190, "bright")):
            (folder / "pictures" / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = random.integers(shade - 50, shade + 50, (16, 16, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / "pictures" / split / name / f"{i}.png")
    (folder / "mynets.py").write_text(NETS)
    (folder / "mylayers.py").write_text("WIDTH = 4\n")
    (folder / "mine.py").write_text(METHOD)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.chdir(folder)
    made = kdzoo.run("./mine.py", "mynets:plain", data="folder:pictures", out="runs", overrides=SHORT, quiet=True)
    monkeypatch.chdir(tmp_path)
    yield folder, RunFolder(folder / made.folder), (made.top1, made.top5)
    for name in ("mynets", "mylayers"):
        sys.modules.pop(name, None)


def test_relative_paths_mean_what_they_did_where_the_run_was_made(project):
    _, run, measured = project
    assert evaluate_run(run.path) == measured
    run.environment.unlink()  # where it was made is known from there
    with pytest.raises(UserError, match=r"mine\.py"):
        evaluate_run(run.path)


def test_a_run_and_its_data_may_be_moved_to_different_places(project, tmp_path, monkeypatch):
    folder, run, measured = project
    moved = shutil.copytree(folder, tmp_path / "moved")
    shutil.move(moved / "pictures", tmp_path / "images")
    shutil.rmtree(folder)
    monkeypatch.chdir(moved)
    assert evaluate_run(Path("runs") / run.path.name, Here(data="folder:../images")) == measured
    with pytest.raises(UserError, match="pictures"):
        evaluate_run(Path("runs") / run.path.name)


def test_an_address_is_left_to_the_data_set_that_reads_it(project):
    with pytest.raises(UserError, match="unknown data 'mine:s3://bucket/pictures'"):
        evaluate_run(project[1].path, Here(data="mine:s3://bucket/pictures"))


def test_a_run_of_another_device_and_precision_is_measured_here(project):
    _, run, measured = project
    written = run.config.read_text()
    assert "device: cpu" in written
    assert "precision: float32" in written
    run.config.write_text(
        written.replace("device: cpu", "device: cuda:3").replace("precision: float32", "precision: tf32")
    )
    here = Here(device="cpu")
    assert evaluate_run(run.path, here) == measured
    with pytest.raises(UserError, match="tf32 is for CUDA"):
        evaluate_run(run.path, here._replace(precision="tf32"))
    with pytest.raises(UserError, match="unknown precision 'float16'"):
        evaluate_run(run.path, here._replace(precision="float16"))


def test_the_command_takes_where_and_on_what(project, tmp_path):
    folder, run, measured = project
    pictures = shutil.move(folder / "pictures", tmp_path / "images")
    arguments = ["--data", f"folder:{pictures}", "--device", "cpu", "--precision", "float32"]
    result = CliRunner().invoke(cli, ["eval", str(run.path), *arguments], catch_exceptions=False)
    assert f"top-1 {measured[0]:.2f} %" in result.output


@pytest.mark.slow(reason="trains several runs")
@pytest.mark.parametrize("more", [["--data-root", ".", "--trust-code"], ["--precision", "bf16"]])
def test_a_spectrum_elsewhere_takes_the_teacher_that_was_trained(project, tmp_path, cache, more, monkeypatch):
    folder, _, _ = project
    monkeypatch.chdir(folder)
    short = [*SHORT, "teacher.epochs=1", "teacher.allow_weak=true"]
    made = kdzoo.run("kd", "resnet8", "resnet8", data="folder:pictures", out="kd", overrides=short, quiet=True)
    kept = sorted((cache / "teachers").iterdir())
    pictures = shutil.move(folder / "pictures", tmp_path / "images")
    arguments = ["--data", f"folder:{pictures}", "--device", "cpu", "--out", str(tmp_path / "seen"), *more]
    result = CliRunner().invoke(cli, ["spectrum", str(made.folder), *arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert sorted((cache / "teachers").iterdir()) == kept
    found = pd.read_csv(tmp_path / "seen.csv").query("measure == 'top1'").set_index("network").value
    assert found["resnet8 by kd"] == pytest.approx(made.top1, abs=10 if more[-1:] == ["bf16"] else 1e-3)


@pytest.mark.slow(reason="trains several runs")
def test_a_spectrum_of_other_data_has_another_teacher_and_says_so(project, cache, monkeypatch, capsys):
    folder, _, _ = project
    monkeypatch.chdir(folder)
    short = [*SHORT, "teacher.epochs=1", "teacher.allow_weak=true"]
    made = kdzoo.run("kd", "resnet8", "resnet8", data="folder:pictures", out="kd", overrides=short, quiet=True)
    kept = sorted((cache / "teachers").iterdir())
    Image.new("RGB", (16, 16), (255, 0, 0)).save(folder / "pictures" / "train" / "dark" / "0.png")
    spectrum.of_runs([made.folder], here=Here(device="cpu"))
    assert len(sorted((cache / "teachers").iterdir())) == len(kept) + 1
    assert "data differ from those of" in " ".join(capsys.readouterr().err.split())


def test_a_module_that_was_edited_since_is_named(project, capsys):
    folder, run, _ = project
    evaluate_run(run.path)
    assert "changed since" not in capsys.readouterr().err
    (folder / "mylayers.py").write_text("WIDTH = 4  # as before\n")
    evaluate_run(run.path, Here(trust_code=True))
    assert "mylayers changed since this run was made" in " ".join(capsys.readouterr().err.split())


def test_a_table_needs_neither_the_folder_nor_the_files(project, tmp_path):
    folder, run, measured = project
    moved = shutil.copytree(run.path, tmp_path / "one")
    shutil.rmtree(folder)
    table = kdzoo.table(moved, baseline="./mine.py")
    assert table["top1_mean"].tolist() == [measured[0]]


class NoFloat64(TorchFunctionMode):
    """A device that has no float64, as Apple's GPUs."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.dtype == torch.float64:
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype")
        return result


def test_accuracy_is_measured_without_float64(dataset):
    network = create("resnet8", dataset.spec).eval()
    with NoFloat64():
        found = evaluate(network, dataset, "float32")
        with pytest.raises(TypeError, match="float64"):
            torch.zeros(1).double()
    assert found == evaluate(network, dataset, "float32")


def test_memory_is_measured_without_what_windows_lacks(monkeypatch, tmp_path):
    class Memory:
        peak_wset = 12345

    monkeypatch.setitem(sys.modules, "resource", None)
    with pytest.raises(ImportError):
        import resource  # noqa: F401
    monkeypatch.setattr(psutil.Process, "memory_info", lambda self: Memory())
    assert peak_memory(torch.device("cpu")) == 12345
    monkeypatch.delattr("os.sysconf")
    assert open_dataset("digits", limit=20).spec.num_classes == 10


UNGUARDED = """
import multiprocessing
multiprocessing.set_start_method("spawn")
import kdzoo
from kdzoo.data import open_dataset
from kdzoo.recipe import Augmentation, Protocol

print("script")
data = open_dataset("folder:pictures", stream=True, workers=2)
loader = data.loader(Protocol(epochs=1, batch_size=8), seed=0)
print(len(list(loader.batches())), "batches")
"""


@pytest.mark.slow(reason="starts processes, each of which imports torch")
def test_a_script_without_a_main_guard_may_start_processes(project):
    folder, _, _ = project
    (folder / "script.py").write_text(UNGUARDED)
    done = subprocess.run([sys.executable, "script.py"], cwd=folder, capture_output=True, text=True, check=False)
    assert done.stdout.splitlines() == ["script", "3 batches"], done.stderr


TWO_DEVICES = """
import kdzoo

print("script")
more = ["engine.devices=2", "protocol.epochs=1", "data.limit=128", "engine.device=cpu"]
print(kdzoo.run("none", "resnet8", overrides=more, quiet=True).epochs, "epoch")
"""


@pytest.mark.slow(reason="starts two processes, each of which imports torch")
def test_a_script_without_a_main_guard_may_train_on_several_devices(tmp_path):
    pytest.importorskip("lightning_fabric")
    (tmp_path / "script.py").write_text(TWO_DEVICES)
    done = subprocess.run([sys.executable, "script.py"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.stdout.splitlines() == ["script", "1 epoch"], done.stderr


@pytest.mark.parametrize("sign", OUT_OF_SHARED_MEMORY)
def test_a_shared_memory_that_is_too_small_is_one_line(project, monkeypatch, sign):
    def fails(self):
        raise RuntimeError(f"DataLoader worker (pid 1) is killed by signal: {sign}.")

    folder, _, _ = project
    monkeypatch.setattr("torch.utils.data.DataLoader.__iter__", fails)
    for workers, kind, said in ((2, UserError, "--shm-size"), (0, RuntimeError, "DataLoader worker")):
        data = open_dataset(f"folder:{folder / 'pictures'}", stream=True, workers=workers)
        with pytest.raises(kind, match=said):
            list(data.test_batches(4))
