"""A finished run's student in use: as a module, and on files."""

import csv
import io
import json
import shutil
import sys

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import ExifTags, Image

import kdzoo
from kdzoo.cli import cli, main
from kdzoo.data import open_dataset
from kdzoo.errors import UserError
from kdzoo.experiments.predictions import predict
from kdzoo.experiments.run import evaluate_run
from kdzoo.store.folder import RunFolder

ON = ["engine.device=cpu", "engine.precision=float32", "protocol.epochs=1", "protocol.batch_size=16"]
TINY = [*ON, "data.limit=128", "teacher.epochs=1", "teacher.allow_weak=true"]


def run(out, distiller="none", student="resnet8", teacher=None, *more, **options):
    return kdzoo.run(distiller, student, teacher, out=out, overrides=[*TINY, *more], quiet=True, **options)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return run(tmp_path_factory.mktemp("runs"))


@pytest.fixture
def moved(finished, tmp_path):
    return RunFolder(shutil.copytree(finished.folder, tmp_path / "moved"))


def pictures(root):
    """Dark and bright pictures of many kinds, larger than they are read, on their sides, transparent, and deep."""
    random = np.random.default_rng(0)
    for split, count in (("train", 8), ("test", 5)):
        for shade, name in ((60, "=dark"), (190, "bright")):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = random.integers(shade - 50, shade + 50, (20, 28, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{i}.png")
    where, exif = root / "test" / "=dark", Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    pixels = random.integers(256, size=(20, 28), dtype=np.uint8)
    Image.fromarray(pixels).save(where / "turned.jpg", exif=exif)
    Image.fromarray(np.dstack([pixels] * 4)).save(where / "clear.png")
    Image.fromarray(pixels.astype(np.uint16) * 257).save(where / "deep.png")
    return root


@pytest.fixture(scope="module")
def on_files(tmp_path_factory):
    """A run on a folder of pictures, and that folder."""
    root = pictures(tmp_path_factory.mktemp("data"))
    out = tmp_path_factory.mktemp("runs")
    return run(out, "none", "resnet8", None, "protocol.image_size=16", data=f"folder:{root}"), root


def hits(classify, data):
    found = [(classify(images).argmax(1) == labels).float() for images, labels in data.test_batches(64)]
    return 100 * torch.cat(found).mean().item()


def test_a_loaded_student_reaches_what_the_run_measured(finished):
    student, data = kdzoo.load(finished.folder), open_dataset("digits")
    assert hits(student, data) == pytest.approx(finished.top1)
    assert hits(lambda images: student(1 - images), data) != pytest.approx(finished.top1)
    assert student.classes == data.spec.class_names
    assert not student.training


def test_bytes_and_floats_are_read_alike(finished):
    student = kdzoo.load(finished.folder)
    images = torch.randint(256, (3, 3, student.image_size, student.image_size), dtype=torch.uint8)
    assert torch.equal(student(images), student(images.float() / 255))
    for wrong in (images.long(), images[0], images[:, :1], images.numpy()):
        with pytest.raises(UserError, match="images"):
            student(wrong)


def test_floats_from_0_to_255_are_told_once(recwarn):
    network = kdzoo.models.create("resnet8", open_dataset("digits").spec)
    images = torch.randint(256, (3, 3, 8, 8), dtype=torch.uint8)
    for given in (images, images / 255, images[:0] / 255):
        kdzoo.models.Student(network, classes=(), image_size=8)(given)
    assert not recwarn.list
    student = kdzoo.models.Student(network, classes=(), image_size=8)
    for _ in range(2):
        assert not torch.allclose(student(images.float()), student(images))
    assert [str(each.message).partition("expects them ")[2] for each in recwarn.list] == [
        "in [0, 1]; divide them by 255, or pass whole numbers as torch.uint8"
    ]


def test_pictures_of_any_size_are_resized_and_their_centre_is_read(finished):
    student = kdzoo.load(finished.folder)
    small = torch.rand(2, 3, student.image_size, student.image_size)
    side = student.image_size
    wide = torch.nn.functional.pad(small, (side // 4, side // 4))  # of the same height
    assert torch.allclose(student(wide), student(small), atol=1e-5)
    assert not torch.allclose(student(wide.roll(3, dims=3)), student(small), atol=1e-5)
    assert student(torch.rand(1, 3, 7, 300)).shape == (1, 10)


def test_a_share_of_the_resized_side_is_kept_as_in_the_run(tmp_path):
    student = kdzoo.load(run(tmp_path, "none", "resnet8", None, "protocol.test_crop=0.5").folder)
    side = student.image_size
    large = torch.rand(1, 3, 2 * side, 2 * side)
    centre = large[:, :, side // 2 : side // 2 + side, side // 2 : side // 2 + side]
    assert torch.allclose(student(large), student(centre), atol=1e-5)


def test_a_method_that_ships_more_is_loaded_without_its_teacher_and_its_data(tmp_path, monkeypatch):
    made = run(tmp_path / "runs", "simkd", "resnet8", "resnet14")
    measured = evaluate_run(made.folder)
    monkeypatch.setenv("KDZOO_CACHE", str(tmp_path / "empty"))
    student, data = kdzoo.load(made.folder), open_dataset("digits")
    assert hits(student, data) == pytest.approx(made.top1)
    assert measured == (made.top1, made.top5)
    assert not (tmp_path / "empty" / "teachers").exists()


def test_a_networks_own_options_are_those_of_the_run(tmp_path):
    made = run(tmp_path, "none", "test_vit", None, "student.options.num_heads=4", "student.options.depth=3")
    assert len(kdzoo.load(made.folder).network.body.blocks) == 3
    assert evaluate_run(made.folder) == (made.top1, made.top5)


HARM = {
    "is not finished": lambda run: run.result.unlink(),
    r"expected a folder with a config\.yaml": lambda run: shutil.rmtree(run.path),
    r"has lost its student\.safetensors": lambda run: run.student.unlink(),
    r"student\.safetensors is damaged": lambda run: run.student.write_bytes(run.student.read_bytes()[:-9]),
    r"has lost its classes\.txt": lambda run: run.classes.unlink(),
    "another version of kdzoo": lambda run: run.config.write_text(run.config.read_text() + "newer: 1\n"),
    "format differs": lambda run: run.config.write_text(run.config.read_text().replace("format: 3", "format: 99")),
}


@pytest.mark.parametrize("said", HARM)
def test_a_run_that_is_not_whole_is_refused_in_one_line(moved, said):
    kdzoo.load(moved.path)
    HARM[said](moved)
    with pytest.raises(UserError, match=said) as caught:
        kdzoo.load(moved.path)
    assert "\n" not in str(caught.value)


NETWORK = """
from pathlib import Path
from torch import nn

Path({marker!r}).touch()

def plain(num_classes):
    stages = [nn.Sequential(nn.Conv2d(a, b, 3, 2, 1), nn.ReLU()) for a, b in ((3, 4), (4, 8))]
    return nn.Sequential(*stages, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, num_classes))
"""


def test_code_of_others_runs_only_where_the_student_is_made_of_it_and_it_is_trusted(tmp_path, monkeypatch):
    home, marker = tmp_path / "home", tmp_path / "marker"
    home.mkdir()
    (home / "theirs.py").write_text(NETWORK.format(marker=str(marker)))
    (home / "method.py").write_text(
        "import theirs\nfrom kdzoo.distillers.none import NoDistillation\n\n\nclass Mine(NoDistillation):\n    pass\n"
    )
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.chdir(home)
    network = run("runs", "none", "theirs:plain").folder.resolve()
    method = run("runs", "./method.py").folder.resolve()
    sys.modules.pop("theirs")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    marker.unlink()
    assert kdzoo.load(method).classes[0] == "0"
    with pytest.raises(UserError, match="theirs:plain"):
        kdzoo.load(network)
    assert not marker.exists()
    assert kdzoo.load(network, trust_code=True)(torch.rand(1, 3, 8, 8)).shape == (1, 10)
    assert marker.exists()


def answers(*arguments, code=0):
    done = CliRunner().invoke(cli, ["predict", *map(str, arguments)])
    assert done.exit_code == code, done.output
    return done.stdout


def test_files_are_classified_as_the_run_classified_them(on_files, monkeypatch):
    made, root = on_files
    monkeypatch.chdir(root)
    rows = list(csv.DictReader(io.StringIO(answers(made.folder, "test", "--device", "cpu"))))
    expected = kdzoo.load(made.folder)
    data = open_dataset(f"folder:{root}", image_size=16)
    images, labels = next(data.test_batches(64))
    assert [row["class"].lstrip("'") for row in rows] == [
        expected.classes[k] for k in expected.network(images).logits.argmax(1)
    ]
    assert len(rows) == len(labels) == 13
    assert sum(row["image"].endswith("turned.jpg") for row in rows) == 1


def test_classes_are_named_by_rank_and_no_cell_is_a_formula(on_files, monkeypatch):
    made, root = on_files
    monkeypatch.chdir(root / "test")
    out = answers(made.folder, "=dark/0.png", "bright/1.png", "--top", "5")
    lines = list(csv.reader(io.StringIO(out)))
    assert lines[0] == ["image", "class", "probability", "class_2", "probability_2"]
    assert {lines[1][1], lines[1][3]} == {"'=dark", "bright"}
    assert lines[1][0] == "'=dark/0.png"
    assert float(lines[1][2]) + float(lines[1][4]) == pytest.approx(1, abs=1e-4)
    found = json.loads(answers(made.folder, "=dark/0.png", "--top", "2", "--format", "json"))
    assert [each["class"] for each in found[0]["classes"]] == [lines[1][1].lstrip("'"), lines[1][3].lstrip("'")]
    assert found[0]["image"] == "=dark/0.png"


def test_a_damaged_image_is_named_and_the_others_are_classified(on_files, tmp_path, monkeypatch, capsys):
    made, root = on_files
    monkeypatch.chdir(tmp_path)
    shutil.copy(root / "test" / "bright" / "0.png", "good.png")
    (tmp_path / "bad.png").write_bytes(b"no image")
    monkeypatch.setattr(sys, "argv", ["kdzoo", "predict", str(made.folder), "bad.png", "good.png"])
    with pytest.raises(SystemExit) as end:
        main()
    found = capsys.readouterr()
    assert end.value.code == 2
    assert "cannot read image 'bad.png' (UnidentifiedImageError)\n" in found.err
    assert "data.skip_damaged" not in found.err  # predict takes no settings
    assert "error: 1 of 2 images cannot be read" in found.err
    assert [row["image"] for row in csv.DictReader(io.StringIO(found.out))] == ["good.png"]


def test_paths_that_hold_no_images_are_refused(on_files, tmp_path):
    made, _ = on_files
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no image below"):
        predict(made.folder, [tmp_path / "empty"])
    with pytest.raises(UserError, match="no file or folder"):
        predict(made.folder, [tmp_path / "nothing"])


@pytest.mark.slow(reason="starts processes that decode")
def test_processes_that_decode_change_no_answer(on_files):
    made, root = on_files
    alone, shared = (list(predict(made.folder, [root] * 5, device="cpu", workers=workers)) for workers in (0, 2))
    assert alone == shared
    assert len(alone) == 5 * 29
