"""Exports that other tools read without kdzoo, compared with the student; whole folders or none."""

import importlib.util
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

import kdzoo
from kdzoo import models
from kdzoo.cli import cli
from kdzoo.data import open_dataset
from kdzoo.errors import UserError
from kdzoo.experiments import exports

from ..made_runs import write

TINY = ["engine.device=cpu", "engine.precision=float32", "protocol.epochs=1", "protocol.batch_size=16"]
TINY += ["data.limit=128", "teacher.epochs=1", "teacher.allow_weak=true"]

# What a process does that cannot import kdzoo: reads images, and writes the logits that timm's network gives them.
WITHOUT_KDZOO = """
import sys
sys.modules["kdzoo"] = None
import timm
import torch
from safetensors.torch import load_file, save_file

folder, images, logits = sys.argv[1:]
shown = load_file(images)["images"]
network = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
facts = timm.data.resolve_data_config(network.pretrained_cfg)
assert facts["input_size"][1:] == tuple(shown.shape[2:]), facts
mean, std = (torch.tensor(facts[name]).view(3, 1, 1) for name in ("mean", "std"))
print(*network.pretrained_cfg["label_names"])
with torch.no_grad():
    save_file({"logits": network((shown - mean) / std)}, logits)
"""


def run(out, student="resnet8", *more, distiller="none", teacher=None):
    return kdzoo.run(distiller, student, teacher, out=out, overrides=[*TINY, *more], quiet=True)


@pytest.fixture(scope="module")
def resnet(tmp_path_factory):
    """A network of kdzoo's, shipped with more: timm knows neither."""
    return run(tmp_path_factory.mktemp("runs"), distiller="simkd", teacher="resnet14")


@pytest.fixture(scope="module")
def transformer(tmp_path_factory):
    """A network of timm's, whose patches kdzoo made smaller."""
    return run(tmp_path_factory.mktemp("runs"), "test_vit")


def shown_in_tests():
    return torch.cat([images for images, _ in open_dataset("digits").test_batches(256)]).contiguous()


def exported(made, style, out, *more):
    done = CliRunner().invoke(
        cli, ["export", str(made.folder), "--format", style, "--out", str(out), *more], catch_exceptions=False
    )
    assert done.exit_code == 0, done.output
    return done.stdout


@pytest.mark.slow(reason="trains a student and exports it")
def test_timm_reads_a_students_folder_where_kdzoo_cannot_be_imported(transformer, tmp_path):
    said = exported(transformer, "timm", tmp_path / "out")
    assert said.splitlines()[0].startswith("wrote ")
    student = kdzoo.load(transformer.folder)
    assert student.network.adapted  # so that its configuration has to say it
    save_file({"images": shown_in_tests()}, tmp_path / "images")
    arguments = [tmp_path / "out", tmp_path / "images", tmp_path / "logits"]
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_KDZOO, *map(str, arguments)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    theirs, ours = load_file(tmp_path / "logits")["logits"], student(shown_in_tests()).detach()
    torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-4)
    assert torch.equal(theirs.argmax(1), ours.argmax(1))
    assert tuple(done.stdout.split()) == student.classes
    files = {"config.json", "model.safetensors", "classes.txt", "export.json"}
    assert {file.name for file in (tmp_path / "out").iterdir()} == files


def test_a_folder_for_timm_is_a_teacher_that_reads_images_as_the_student_did(tmp_path):
    folder = write(tmp_path, 50.0, 0, "student.name=test_vit", student="test_vit", image_size=32)
    spec = open_dataset("digits", image_size=32).spec
    models.save_weights(models.create("test_vit", spec), folder.student)
    folder.classes.write_text("".join(f"{name}\n" for name in spec.class_names))
    exported(folder.read_result(), "timm", tmp_path / "out")
    larger = spec._replace(image_size=64, mean=(0.1, 0.1, 0.1))
    network = models.load_given("test_vit", larger, tmp_path / "out")
    assert network.facts() == kdzoo.load(folder.path).network.facts()
    assert "assumed" not in network.origin
    assert (tmp_path / "out" / "classes.txt").read_text() == folder.classes.read_text()


@pytest.mark.slow(reason="trains a student and exports it")
@pytest.mark.filterwarnings("ignore:The given buffer is not writable")  # of torch 2.11
def test_what_timm_cannot_say_is_a_program_and_the_line_says_so(resnet, tmp_path):
    said = exported(resnet, "timm", tmp_path / "out")
    assert "not for timm, since it consists of more than a network of timm's: it holds a torch.export program" in said
    program = torch.export.load(tmp_path / "out" / "model.pt2").module()
    images, student = shown_in_tests(), kdzoo.load(resnet.folder)
    torch.testing.assert_close(program(images), student(images), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(program(images), student(1 - images), rtol=1e-4, atol=1e-4)
    assert {file.name for file in (tmp_path / "out").iterdir()} == {"model.pt2", "export.json"}


@pytest.mark.slow(reason="trains a student and exports it")
def test_a_stem_that_was_shrunk_is_noticed_though_all_shapes_agree(tmp_path):
    name = "resnet10t"  # its stem has three small convolutions, whose strides alone differ
    folder = write(tmp_path, 50.0, 0, f"student.name={name}", student=name, image_size=32)
    spec = open_dataset("digits", image_size=32).spec
    models.save_weights(models.create(name, spec), folder.student)
    folder.classes.write_text("".join(f"{name}\n" for name in spec.class_names))
    assert any("stem" in change for change in kdzoo.load(folder.path).network.adapted)
    said = exported(folder.read_result(), "timm", tmp_path / "out")
    assert "cannot say how resnet10t was adapted (stem" in said
    assert not (tmp_path / "out" / "config.json").exists()


@pytest.mark.slow(reason="trains a student and exports it")
def test_onnx_answers_as_the_student_does_also_in_8_bits(resnet, tmp_path):
    onnx, runtime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    said = exported(resnet, "onnx", tmp_path / "out", "--quantize", "int8", "--images", "100")
    assert "model.onnx: top-1" in said
    record = json.loads((tmp_path / "out" / "export.json").read_text())
    assert (record["model.onnx"]["images"], record["model.onnx"]["of"]) == (100, 360)
    assert record["model.onnx"]["agreement"] == 100
    assert record["model.onnx"]["max_difference"] < 1e-3
    assert record["model-int8.onnx"]["max_difference"] > record["model.onnx"]["max_difference"]
    assert f"model-int8.onnx: top-1 {record['model-int8.onnx']['top1']:.2f} %" in said
    assert said.count(f"(the student in float32: {record['model.onnx']['student_top1']:.2f} %)") == 2
    file = tmp_path / "out" / "model.onnx"
    properties = {each.key: each.value for each in onnx.load(file).metadata_props}
    student = kdzoo.load(resnet.folder)
    assert tuple(json.loads(properties["classes"])) == student.classes
    session = runtime.InferenceSession(file)
    for count in (1, 5):
        images = torch.rand(count, 3, student.image_size, student.image_size)
        [logits] = session.run(["logits"], {"images": images.numpy()})
        torch.testing.assert_close(torch.from_numpy(logits), student(images).detach(), rtol=1e-3, atol=1e-3)
    size, small = (((tmp_path / "out") / name).stat().st_size for name in ("model.onnx", "model-int8.onnx"))
    assert small < size


@pytest.mark.slow(reason="trains a student and exports it")
def test_a_program_is_compared_with_the_student(transformer, tmp_path):
    made = kdzoo.export(transformer.folder, "torch", tmp_path / "out", images=0)
    found = json.loads((made.folder / "export.json").read_text())["model.pt2"]
    assert (found["images"], found["agreement"]) == (360, 100)
    assert found["top1"] == pytest.approx(transformer.top1)


@pytest.mark.parametrize("reads", [32, 64])
def test_an_export_says_how_pictures_of_other_sizes_are_cut(reads, tmp_path):
    settings = ["student.name=test_vit", f"student.image_size={reads}", "protocol.test_crop=0.8"]
    folder = write(tmp_path, 50.0, 0, *settings, student="test_vit", image_size=32)
    spec = open_dataset("digits", image_size=32).spec
    models.save_weights(models.create("test_vit", spec, image_size=reads), folder.student)
    folder.classes.write_text("".join(f"{name}\n" for name in spec.class_names))
    made = kdzoo.export(folder.path, "hub", tmp_path / "out")
    record = json.loads((made.folder / "export.json").read_text())
    assert (record["image_size"], record["test_crop"]) == (32, 0.8)
    config = json.loads((made.folder / "config.json").read_text())["pretrained_cfg"]
    assert (config["input_size"], config["crop_pct"]) == ([3, reads, reads], 0.8)
    said = "images of 32 px that were enlarged to 64 px: resize the short side of larger pictures to 40 px before"
    for text in ("\n".join(made.lines), (made.folder / "README.md").read_text()):
        assert (said in text) is (reads == 64)


def test_a_card_for_the_hub_tells_what_the_student_is_and_leaves_the_licence_open(transformer, tmp_path):
    from huggingface_hub import ModelCard

    exported(transformer, "hub", tmp_path / "out")
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert (card.data.pipeline_tag, card.data.library_name, card.data.license) == ("image-classification", "timm", None)
    [result] = card.data.eval_results
    assert result.metric_value == round(transformer.top1, 2)
    written = (tmp_path / "out" / "README.md").read_text()
    assert "\n# license:" in written
    assert "training images that were held out" in written
    assert f"{transformer.top1:.2f} %".replace(".", r"\.") in written or f"{transformer.top1:.2f} %" in written
    assert (tmp_path / "out" / "config.json").is_file()


def test_a_card_counts_the_seeds_beside_it_and_escapes_what_is_not_ours(tmp_path):
    from kdzoo.experiments.model_card import card

    for seed, top1 in enumerate((80.0, 81.0, 85.0)):
        write(tmp_path, top1, seed)
    write(tmp_path, 10.0, 3, "distiller.temperature=1")
    result = write(tmp_path, 82.0, 4).read_result()
    student = kdzoo.models.Student(torch.nn.Identity(), classes=["a", "b"], image_size=8)
    student.test_crop = 0.875
    text = card(result, student, program=True)
    assert "the short side resized to 9 pixels, then the centre of 8 x 8 cut out" in text
    assert "82.00 ± 2.16 % over 4 seeds \\(0, 1, 2, 4\\)" in text
    assert "model.pt2" in text
    strange = replace(result, names=replace(result.names, data="<b>|`pets`\n# [x](y)"))
    lines = card(strange, student, program=False).splitlines()
    assert r"| data | &lt;b&gt;\|\`pets\` \# \[x\]\(y\) |" in lines
    assert not [line for line in lines if line.startswith("# [x]")]


BRANCHES = """
import torch
from torch import nn

class Branching(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 8, 3), nn.Linear(8, num_classes)

    def forward(self, images):
        maps = self.conv(images)
        maps = maps.relu() if maps.sum() > 0 else maps.tanh()
        return self.head(maps.mean((2, 3)))

def branching(num_classes):
    return Branching(num_classes)
"""


def test_a_network_that_no_program_can_express_is_one_line_and_no_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.chdir(tmp_path)
    (tmp_path / "branches.py").write_text(BRANCHES)
    made = run("runs", "branches:branching")
    with pytest.raises(UserError, match="cannot be written for torch") as caught:
        kdzoo.export(made.folder, "torch", "out")
    assert "\n" not in str(caught.value)
    assert sorted(file.name for file in tmp_path.iterdir() if "out" in file.name) == []


def test_a_missing_package_is_named_with_its_extra(resnet, tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *more: None if "onnx" in name else find(name, *more))
    with pytest.raises(UserError, match=r"ONNX needs onnx, onnxscript, onnxruntime: pip install 'kdzoo\[export\]'"):
        kdzoo.export(resnet.folder, "onnx", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_package_that_is_installed_and_broken_is_one_line(resnet, tmp_path, monkeypatch):
    (tmp_path / "onnxruntime").mkdir()
    (tmp_path / "onnxruntime" / "__init__.py").write_text("raise ImportError('libgomp.so.1: cannot open it')\n")
    for name in [name for name in sys.modules if name.partition(".")[0] == "onnxruntime"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match=r"onnxruntime, which is installed and cannot be imported .*libgomp") as caught:
        kdzoo.export(resnet.folder, "onnx", tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_there_is_replaced_only_if_it_is_an_export_and_one_asks(transformer, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious.txt").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(UserError, match="is there, and no export of kdzoo; choose another --out"):
            kdzoo.export(transformer.folder, "timm", out, overwrite=overwrite)
    assert (out / "precious.txt").read_text() == "mine"
    other = tmp_path / "other"
    kdzoo.export(transformer.folder, "timm", other)
    (other / "left.txt").write_text("of before")
    with pytest.raises(UserError, match="or replace it by --overwrite"):
        kdzoo.export(transformer.folder, "timm", other)
    assert (other / "left.txt").exists()
    kdzoo.export(transformer.folder, "hub", other, overwrite=True)
    assert (other / "README.md").exists()
    assert not (other / "left.txt").exists()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["other", "out"]


def test_a_folder_that_somebody_makes_meanwhile_is_not_replaced(transformer, tmp_path, monkeypatch):
    out, write = tmp_path / "out", exports.write_timm

    def write_and_meet(*arguments):
        write(*arguments)
        out.mkdir()
        (out / "precious.txt").write_text("mine")

    monkeypatch.setattr(exports, "write_timm", write_and_meet)
    with pytest.raises(UserError, match="is there, and no export of kdzoo"):
        kdzoo.export(transformer.folder, "timm", out)
    assert [file.name for file in tmp_path.rglob("*")] == ["out", "precious.txt"]


def test_a_place_that_cannot_be_written_is_one_line(transformer, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written") as caught:
        kdzoo.export(transformer.folder, "timm", tmp_path / "file" / "out")
    assert "\n" not in str(caught.value)


def test_what_makes_no_sense_is_refused_before_any_work(transformer, tmp_path):
    with pytest.raises(UserError, match="unknown format 'onxx'; did you mean onnx"):
        kdzoo.export(transformer.folder, "onxx", tmp_path / "out")
    with pytest.raises(UserError, match="--quantize is for --format onnx, not for timm"):
        kdzoo.export(transformer.folder, "timm", tmp_path / "out", quantize="int8")
    with pytest.raises(UserError, match="is no run"):
        kdzoo.export(Path("nothing"), "timm", tmp_path / "out")
