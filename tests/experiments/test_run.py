"""A whole run: from a method's name to a student on disk, killed, resumed, measured again."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file

import kdzoo
from kdzoo.data import open_dataset
from kdzoo.errors import UserError
from kdzoo.experiments.run import evaluate_run
from kdzoo.experiments.teachers import near_chance
from kdzoo.files import cache_folder
from kdzoo.settings import DistillerSettings
from kdzoo.store import checkpoint, predictions
from kdzoo.store.folder import RunFolder, find_runs

QUICK = ["protocol.batch_size=64", "teacher.epochs=2", "protocol.epochs=2", "protocol.augmentation.flip=true"]

# A method that kills its own process, as a power cut would, where an environment variable says so.
DOOMED = '''"""Dies when told to."""
import os, signal
import torch
from kdzoo import Distiller, Fidelity
from kdzoo.losses import cross_entropy, softened_kl


class Doomed(Distiller):
    """Plain distillation with a memory and noise of its own."""

    paper = "none"
    fidelity = Fidelity.EXACT

    logit_terms = ("ce",)

    def __init__(self, *, ce: float = 1.0, kd: float = 1.0):
        super().__init__(ce=ce, kd=kd)
        self.calls = 0

    def build(self, student, teacher, data):
        self.register_buffer("bank", torch.zeros(data.num_classes))
        self.head = torch.nn.Linear(data.num_classes, data.num_classes)

    def loss(self, student, teacher, batch):
        self.calls += 1
        if self.calls == int(os.environ.get("DIE_AT", -1)):
            os.kill(os.getpid(), signal.SIGKILL)
        self.bank.lerp_(student.logits.detach().mean(0), 0.1)
        noisy = self.head(student.logits + 0.1 * torch.randn_like(student.logits)) + self.bank
        return self.weigh(
            ce=lambda: cross_entropy(student.logits, batch.targets),
            kd=lambda: softened_kl(noisy, teacher.logits, 4.0),
        )
'''


def distil(out, *more, distiller="kd", **options):
    return kdzoo.run(distiller, "resnet8", "resnet14", out=out, overrides=[*QUICK, *more], quiet=True, **options)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return distil(tmp_path_factory.mktemp("runs"))


def test_a_run_leaves_everything_that_its_number_stands_on(finished):
    folder = RunFolder(finished.folder)
    assert json.loads(folder.result.read_text())["top1"] == finished.top1
    assert folder.run().settings.distiller == DistillerSettings("kd", {"ce": 0.1, "kd": 0.9, "temperature": 4.0})
    history = folder.read_history()
    assert [record["epoch"] for record in history] == [1, 2]
    assert set(history[0]["loss"]) == {"ce", "kd"}
    assert history[-1]["top1"] == finished.top1
    environment = json.loads(folder.environment.read_text())
    assert environment["packages"]["torch"] == torch.__version__.split("+")[0] or environment["packages"]["torch"]
    assert not list(folder.checkpoints.glob("*.pt"))


def test_a_finished_run_is_shown_where_no_lock_can_be_taken(finished, tmp_path):
    folder = shutil.copytree(finished.folder, tmp_path / finished.folder.name)
    (folder / ".lock").unlink(missing_ok=True)
    (folder / ".lock").mkdir()
    assert distil(tmp_path).top1 == finished.top1
    with pytest.raises(UserError, match="cannot be written"):
        distil(tmp_path, fresh=True)


def test_it_says_what_the_student_and_its_teacher_take_each_test_image_for(finished):
    found = predictions.read(finished.folder / "predictions.safetensors", 10)
    for classes, top1 in ((found.student, finished.top1), (found.teacher, finished.teacher_top1)):
        assert 100 * float((classes == found.labels).mean()) == pytest.approx(top1)
    assert (found.labels[found.worst] != found.student[found.worst]).all()
    digits = open_dataset("digits").test_pixels.numpy()
    assert np.array_equal(found.pictures, digits[found.worst])
    assert not np.array_equal(found.pictures, digits[found.worst - 1])
    assert found.titles[0] == f"image {found.worst[0]}"


def test_a_student_without_a_teacher_has_predictions_of_its_own_alone(tmp_path):
    result = kdzoo.run("none", "resnet8", out=tmp_path, overrides=QUICK, quiet=True)
    assert len(predictions.read(result.folder / "predictions.safetensors", 10).teacher) == 0


@pytest.mark.slow(reason="trains several runs")
def test_a_student_may_be_measured_in_some_epochs_only_and_always_in_the_last(finished, tmp_path):
    seldom = distil(tmp_path, "output.measure_every=5", "output.log=[tensorboard]")
    assert [record["top1"] for record in RunFolder(seldom.folder).read_history()] == [None, finished.top1]
    assert (seldom.top1, seldom.best_epoch) == (finished.top1, 2)
    with pytest.raises(UserError, match="from 1"):
        distil(tmp_path, "output.measure_every=0")


def test_a_method_that_does_not_fit_the_pair_says_so_before_its_teacher_is_trained(tmp_path):
    with pytest.raises(UserError, match="this method needs logits that are made of the mean of a map"):
        kdzoo.run("sdd", "resnet8", "vit_pico", out=tmp_path, overrides=QUICK, quiet=True)
    assert not list((cache_folder() / "teachers").glob("*vit_pico*"))


def test_what_ships_is_the_student_alone_and_measures_the_same(finished):
    names = load_file(finished.folder / "student.safetensors").keys()
    assert not [name for name in names if "teacher" in name or "distiller" in name]
    assert evaluate_run(finished.folder) == (finished.top1, finished.top5)


@pytest.mark.slow(reason="trains and reads three networks of timm's")
def test_a_run_of_another_machine_is_measured_on_what_this_one_has(finished, tmp_path):
    moved = RunFolder(Path(shutil.copytree(finished.folder, tmp_path / "moved")))
    moved.config.write_text(moved.config.read_text().replace("device: cpu", "device: cuda:7"))
    assert evaluate_run(moved.path) == (finished.top1, finished.top5)


def test_a_folder_of_another_version_is_refused_in_one_line(finished, tmp_path):
    moved = RunFolder(Path(shutil.copytree(finished.folder, tmp_path / "moved")))
    moved.config.write_text(moved.config.read_text().replace("format: 3\n", ""))
    found = json.loads(moved.result.read_text())
    moved.result.write_text(json.dumps({key: value for key, value in found.items() if key != "names"}))
    for read in (evaluate_run, kdzoo.table):
        with pytest.raises(UserError, match=r"was written by another version of kdzoo.*environment\.json") as caught:
            read(moved.path)
        assert "\n" not in str(caught.value)


@pytest.mark.slow(reason="trains at 160 pixels, the size of the pretrained weights")
def test_pretrained_networks_that_were_trained_on_are_read_again_as_they_were_made(tmp_path, monkeypatch):
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained=False, **options: create(name, **options))
    networks = ["student.name=test_vit", "teacher.name=test_vit", "student.pretrained=true", "teacher.pretrained=true"]
    short = ["data.name=bands", "data.options={train: 8, test: 16, classes: 8, size: 24}", "data.limit=null"]
    short += ["protocol.epochs=1", "teacher.epochs=1", "teacher.allow_weak=true"]
    result = distil(tmp_path, *networks, *short)
    again = evaluate_run(result.folder)
    assert again == (result.top1, result.top5)
    assert load_file(result.folder / "student.safetensors")["pos_embed"].shape[1] == 1 + 10 * 10
    assert distil(tmp_path, *networks, *short, "seed=1").teacher_top1 == result.teacher_top1  # read from the cache


def test_a_finished_run_is_shown_and_not_run_again(finished, monkeypatch):
    monkeypatch.setattr("kdzoo.experiments.run.train_one", None)
    assert distil(finished.folder.parent) == finished


def test_the_same_seed_gives_the_same_student(finished, tmp_path):
    again = distil(tmp_path)
    measured = dict.fromkeys(("seconds", "images_per_second", "peak_memory", "latency_1", "latency_64"))
    assert again.plain() | measured == finished.plain() | measured
    one, other = (load_file(run.folder / "student.safetensors") for run in (finished, again))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert len({(run.folder / "predictions.safetensors").read_bytes() for run in (finished, again)}) == 1


@pytest.mark.slow(reason="trains several runs")
def test_another_seed_gives_another(finished, tmp_path):
    other = load_file(distil(tmp_path, seed=1).folder / "student.safetensors")
    one = load_file(finished.folder / "student.safetensors")
    assert any(not torch.equal(one[name], other[name]) for name in one)
    files = list(tmp_path.glob("*/predictions.safetensors"))
    assert files[0].read_bytes() != (finished.folder / "predictions.safetensors").read_bytes()


def test_a_run_leaves_global_randomness_alone(tmp_path):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    kdzoo.run("none", "resnet8", out=tmp_path, overrides=["protocol.epochs=1", "data.limit=128"], quiet=True)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.slow(reason="trains again and again, killed at many moments")
def test_a_run_killed_at_any_step_ends_with_the_same_bits(tmp_path):
    method = tmp_path / "doomed.py"
    method.write_text(DOOMED)
    more = ["engine.checkpoint_seconds=0", "data.limit=640", "protocol.ema=0.9"]
    whole = distil(tmp_path / "whole", *more, distiller=str(method))
    code = ("import kdzoo; kdzoo.run({!r}, 'resnet8', 'resnet14', out={!r}, overrides={!r}, quiet=True)").format(
        str(method), str(tmp_path / "killed"), [*QUICK, *more]
    )
    for die_at in (1, 5, 8):  # steps of a process: the first, one amid the first epoch, one amid the second
        killed = subprocess.run([sys.executable, "-c", code], env={**os.environ, "DIE_AT": str(die_at)}, check=False)
        assert killed.returncode == -9
    [file] = (tmp_path / "killed").glob("*/metrics.jsonl")
    assert len(file.read_text().splitlines()) == 1  # epochs that are done
    resumed = distil(tmp_path / "killed", *more, distiller=str(method))
    one, other = (load_file(run.folder / "student.safetensors") for run in (whole, resumed))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert len({(run.folder / "predictions.safetensors").read_bytes() for run in (whole, resumed)}) == 1
    records = [RunFolder(run.folder).read_history() for run in (whole, resumed)]
    timeless = [[{**record, "images_per_second": 0} for record in history] for history in records]
    assert timeless[0] == timeless[1]


@pytest.mark.slow(reason="trains again and again, killed at many moments")
def test_a_damaged_newest_checkpoint_does_not_change_the_end(tmp_path):
    method = tmp_path / "doomed.py"
    method.write_text(DOOMED)
    more = ["engine.checkpoint_seconds=0", "data.limit=640"]
    whole = distil(tmp_path / "whole", *more, distiller=str(method))
    code = ("import kdzoo; kdzoo.run({!r}, 'resnet8', 'resnet14', out={!r}, overrides={!r}, quiet=True)").format(
        str(method), str(tmp_path / "killed"), [*QUICK, *more]
    )
    subprocess.run([sys.executable, "-c", code], env={**os.environ, "DIE_AT": "6"}, check=False)
    newest = max((tmp_path / "killed").glob("*/checkpoints/step-*.pt"))
    newest.write_bytes(newest.read_bytes()[:-100])
    resumed = distil(tmp_path / "killed", *more, distiller=str(method))
    assert resumed.top1 == whole.top1
    one, other = (load_file(run.folder / "student.safetensors") for run in (whole, resumed))
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.slow(reason="trains several runs")
def test_a_loss_that_is_not_finite_is_named_with_its_step_and_the_good_checkpoint_kept(tmp_path):
    method = tmp_path / "bad.py"
    method.write_text(
        DOOMED.replace(
            "softened_kl(noisy, teacher.logits, 4.0)",
            "softened_kl(noisy, teacher.logits, 4.0) / (batch.progress < 0.5)",
        )
    )
    with pytest.raises(UserError, match="'kd' is not finite at step 20"):
        distil(tmp_path, "engine.checkpoint_seconds=0", "data.limit=1280", distiller=str(method))
    folder = next(tmp_path.glob("*/checkpoints"))
    whole, _ = checkpoint.whole(folder)
    assert max(whole) == 20
    assert all(value.isfinite().all() for value in checkpoint.load(whole[20])["trained"].values())


def test_a_teacher_near_chance_is_refused_unless_one_insists(tmp_path):
    more = ["teacher.epochs=1", "data.limit=64", "protocol.epochs=1", "protocol.lr=1e-9"]  # which learns nothing
    with pytest.raises(
        UserError,
        match=r"near the chance of 10.00 %; train it longer .*allow_weak=true, or --allow-weak-teacher of kdzoo run",
    ):
        distil(tmp_path, *more)
    assert distil(tmp_path, *more, "teacher.allow_weak=true").teacher_top1 < near_chance(10, 360)


@pytest.mark.slow(reason="trains several runs")
def test_a_teacher_comes_from_a_file_of_weights(finished, tmp_path, cache):
    folders = map(RunFolder, cache.glob("teachers/digits-resnet14-none-s0-*"))
    weights = next(folder.student for folder in folders if folder.read_config()["data"]["limit"] is None)
    result = distil(tmp_path, f"teacher.weights={weights}", "protocol.epochs=1")
    assert result.teacher_top1 == finished.teacher_top1
    with pytest.raises(UserError, match=r"not fit"):
        kdzoo.run("kd", "resnet8", "resnet20", out=tmp_path, overrides=[f"teacher.weights={weights}"], quiet=True)


def test_a_method_that_needs_a_teacher_says_so(tmp_path):
    with pytest.raises(UserError, match="needs a teacher; pass --teacher"):
        kdzoo.run("kd", "resnet8", out=tmp_path, quiet=True)


def test_all_weights_at_zero_is_an_error(tmp_path):
    with pytest.raises(UserError, match="all weights are 0"):
        distil(tmp_path, "distiller.ce=0", "distiller.kd=0")


def test_an_unwritable_folder_is_refused_before_any_work(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        distil(tmp_path / "file")


@pytest.mark.slow(reason="trains several runs")
def test_a_finished_run_stays_until_the_one_that_replaces_it_is_finished(tmp_path, monkeypatch):
    whole = distil(tmp_path)
    folder = RunFolder(whole.folder)
    for moment in (
        "experiments.run.open_data",
        "experiments.run.train_one",
        "engine.loop.finish_epoch",
    ):
        with monkeypatch.context() as patch:
            patch.setattr(f"kdzoo.{moment}", gone)
            with pytest.raises(KeyboardInterrupt):
                distil(tmp_path, fresh=True)
        [found] = find_runs([tmp_path])
        assert found.read_result().top1 == whole.top1
        assert found.student.is_file()
        assert found.predictions.is_file()
    again = distil(tmp_path, fresh=True)
    assert find_runs([tmp_path])[0].path == folder.path
    assert len(find_runs([tmp_path])) == 1
    assert again.top1 == whole.top1


def test_what_a_finished_run_was_made_on_stays_beside_it_until_it_is_replaced(tmp_path, monkeypatch):
    folder = RunFolder(
        kdzoo.run("none", "resnet8", out=tmp_path, overrides=[*QUICK, "data.limit=64"], quiet=True).folder
    )
    folder.environment.write_text('{"folder": "/where/it/was/made"}')
    for moment, home in (("experiments.run.open_data", folder), ("engine.loop.finish_epoch", RunFolder(folder.before))):
        with monkeypatch.context() as patch:
            patch.setattr(f"kdzoo.{moment}", gone)
            with pytest.raises(KeyboardInterrupt):
                kdzoo.run("none", "resnet8", out=tmp_path, overrides=[*QUICK, "data.limit=64"], quiet=True, fresh=True)
        assert home.result.is_file()
        assert home.read_environment() == {"folder": "/where/it/was/made"}


def gone(*_, **__):
    raise KeyboardInterrupt
