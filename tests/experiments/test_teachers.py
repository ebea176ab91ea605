"""Teachers that come with weights: what they read, how they are trained on, and what is said of them."""

import re
from dataclasses import replace

import pytest
import timm
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

import kdzoo
from kdzoo import DataSpec
from kdzoo.engine.progress import Progress
from kdzoo.engine.training import network_of
from kdzoo.errors import UserError
from kdzoo.experiments import teachers
from kdzoo.files import digest
from kdzoo.models import create, load_given, save_weights
from kdzoo.resolve import read_protocol, resolve
from kdzoo.settings import StudentSettings
from kdzoo.store.folder import RunFolder

from ..made_runs import write

DATA = DataSpec("fake", 10, tuple("abcdefghij"), 32, torch.arange(10), (0.4, 0.5, 0.6), (0.2, 0.3, 0.4))
IMAGES = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
SHORT = ["protocol.epochs=1", "data.limit=128", "teacher.epochs=1", "teacher.allow_weak=true", "engine.device=cpu"]


def statistics(network):
    return tuple(tuple(part.flatten().tolist()) for part in (network.mean, network.std))


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A file as timm's own training code leaves it, of a network whose published weights read 224 pixels."""
    torch.manual_seed(1)
    body = timm.create_model("resnet10t", num_classes=10).eval()
    file = tmp_path_factory.mktemp("weights") / "best.pth"
    torch.save(body.state_dict(), file)
    return body, file


def test_weights_of_a_published_network_are_read_at_its_size_with_its_statistics(published):
    body, file = published
    size = timm.get_pretrained_cfg("resnet10t").input_size[-1]
    network = load_given("resnet10t", DATA, file)
    network.eval()
    assert size == network.image_size == 176
    assert statistics(network) == tuple(tuple(torch.tensor(part).tolist()) for part in IMAGENET)
    assert "best.pth" in network.origin
    assert network.origin.endswith("; assumed: image_size, mean, std")
    mean, std = (torch.tensor(part).view(1, 3, 1, 1) for part in IMAGENET)
    shown = F.interpolate(IMAGES, (size, size), mode="bilinear", align_corners=False)
    torch.testing.assert_close(network(IMAGES).logits, body((shown - mean) / std))


def test_what_a_teacher_reads_can_be_set(published):
    _, file = published
    network = load_given("resnet10t", DATA, file, image_size=96, mean=(0.5,), std=(0.25,))
    assert network.reads == "96 px, mean 0.5 0.5 0.5, std 0.25 0.25 0.25"
    assert network(IMAGES).logits.shape == (2, 10)


@pytest.mark.parametrize("size", [32, 40, 64])
def test_a_size_that_is_asked_for_is_read_though_the_last_map_is_one_pixel(published, size):
    body, file = published
    network = load_given("resnet10t", DATA, file, image_size=size, mean=(0.5,), std=(0.25,)).eval()
    assert network.image_size == size
    assert network.adapted in ((), (f"images resized to {size} inside",))
    assert "assumed" not in network.origin
    shown = F.interpolate(IMAGES, (size, size), mode="bilinear", align_corners=False) if size != 32 else IMAGES
    torch.testing.assert_close(network(IMAGES).logits, body((shown - 0.5) / 0.25))


def test_a_teacher_near_chance_that_was_given_is_to_be_read_as_it_was_trained(tmp_path):
    torch.save(create("resnet14", DATA._replace(image_size=8)).body.state_dict(), tmp_path / "mine.pth")
    given = ["protocol.epochs=1", "data.limit=128", "engine.device=cpu", f"teacher.weights={tmp_path / 'mine.pth'}"]
    with pytest.raises(
        UserError, match=r"near the chance.*reads 8 px.*set teacher\.image_size, teacher\.mean"
    ) as caught:
        kdzoo.run("kd", "resnet8", "resnet14", out=tmp_path, overrides=given, quiet=True)
    assert "give --teacher-weights" not in str(caught.value)


@pytest.mark.slow(reason="trains several runs")
def test_weights_that_fit_the_network_adapted_to_the_data_only_are_read_in_it(tmp_path):
    adapted = create("resnet18", DATA).eval()
    torch.save(adapted.body.state_dict(), tmp_path / "mine")
    network = load_given("resnet18", DATA, tmp_path / "mine")
    assert (network.image_size, network.facts()["adapted"]) == (32, adapted.facts()["adapted"])
    torch.testing.assert_close(network.eval()(IMAGES).logits, adapted(IMAGES).logits)


def test_weights_of_unknown_origin_never_go_into_a_stem_that_their_shapes_do_not_show(tmp_path):
    adapted = create("mobilenetv2", DATA).eval()
    torch.save(adapted.body.state_dict(), tmp_path / "mine")
    for size in (None, 32):
        network = load_given("mobilenetv2", DATA, tmp_path / "mine", image_size=size)
        assert "stride 2 -> 3x3 stride 1" not in network.reads
        assert "stem as defined" in network.origin
    assert "stride 2 -> 3x3 stride 1" in adapted.reads


@pytest.mark.parametrize("name", ["resnet8", "mobilenetv2", "test_vit", "resnet10t"])
def test_a_file_that_kdzoo_wrote_is_read_as_it_was_on_any_data(name, tmp_path):
    written = create(name, DATA).eval()
    save_weights(written, tmp_path / "student.safetensors")
    larger = DATA._replace(image_size=64, mean=(0.1, 0.1, 0.1))
    network = load_given(name, larger, tmp_path / "student.safetensors")
    assert network.facts() == written.facts()
    torch.testing.assert_close(network.eval()(IMAGES).logits, written(IMAGES).logits)


def test_weights_of_another_network_are_refused(published):
    with pytest.raises(UserError, match=r"best\.pth"):
        load_given("resnet8", DATA, published[1])


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"head.weight": torch.zeros(7, 64), "head.bias": torch.zeros(7)}, r"head\.weight is .*teacher\.finetune=true"),
        ({"head.bias": torch.full((10,), torch.nan)}, r"head\.bias holds NaN"),
    ],
)
def test_a_refusal_is_that_of_the_network_that_the_file_is_nearly_of(change, why, tmp_path):
    body = timm.create_model("test_vit", num_classes=10, img_size=32)  # whose patches are larger than for small images
    torch.save({**body.state_dict(), **change}, tmp_path / "mine.pth")
    with pytest.raises(UserError, match=why) as caught:
        load_given("test_vit", DATA, tmp_path / "mine.pth", image_size=32)
    assert "patch_embed" not in str(caught.value)


def test_teacher_and_student_may_read_different_sizes_from_one_batch(published):
    teacher = load_given("resnet10t", DATA._replace(image_size=96), published[1])
    student = create("resnet8", DATA._replace(image_size=96), image_size=32)
    images = torch.rand(2, 3, 96, 96)
    assert (teacher.image_size, student.image_size) == (176, 32)
    assert teacher(images).logits.shape == student(images).logits.shape == (2, 10)
    shown = F.interpolate(images, (32, 32), mode="bilinear", align_corners=False, antialias=True)
    torch.testing.assert_close(student.eval()(images).logits, student(shown).logits)


def test_a_published_token_network_reads_smaller_images_with_the_patches_it_has():
    network = create("vit_small_patch14_dinov2", DATA, pretrained=True, fetch=False, image_size=98)
    assert network.image_size == 98
    assert network.body.patch_embed.patch_size == (14, 14)
    fresh = create("test_vit", DATA)
    assert fresh.body.patch_embed.patch_size != timm.create_model("test_vit").patch_embed.patch_size  # those adapt


def trained_by(*overrides, dataset):
    run = resolve(
        {"distiller": {"name": "kd"}, "student": {"name": "resnet8"}, "teacher": {"name": "resnet18"}}, overrides
    )
    return teachers.recipe(run, dataset).settings


def test_a_teacher_that_starts_from_weights_is_fine_tuned_and_one_that_does_not_is_trained(dataset):
    scratch, tuned = trained_by(dataset=dataset), trained_by("teacher.pretrained=true", dataset=dataset)
    assert (scratch.protocol.name, tuned.protocol.name) == ("quick", "finetune")
    usual = {"adamw": read_protocol("ofa-vit").lr, "sgd": read_protocol("ofa-cnn").lr}[tuned.protocol.optimizer]
    assert 10 <= usual / tuned.protocol.lr <= 20
    chosen = trained_by("teacher.pretrained=true", "teacher.protocol=crd", "teacher.lr=0.003", dataset=dataset)
    assert (chosen.protocol.name, chosen.protocol.lr, chosen.protocol.lr_of) == ("crd", 0.003, {})


def test_a_teachers_settings_reach_the_run_that_trains_it(dataset):
    keys = ["teacher.image_size=16", "teacher.mean=[0.5]", "teacher.std=[0.25]"]
    student = trained_by(*keys, dataset=dataset).student
    assert (student.name, student.image_size, list(student.mean), list(student.std)) == ("resnet18", 16, [0.5], [0.25])


@pytest.mark.slow(reason="trains several runs")
def test_weights_with_another_head_start_a_network_with_a_new_one(published):
    _, file = published
    wanted = StudentSettings(name="resnet10t", weights=str(file))
    network = network_of(wanted, DATA._replace(num_classes=7))
    whole = torch.load(file, weights_only=True)
    state = network.body.state_dict()
    assert state["fc.weight"].shape[0] == 7
    assert all(value.equal(whole[key]) for key, value in state.items() if not key.startswith("fc."))
    kept = network_of(wanted, DATA)
    assert kept.body.state_dict()["fc.weight"].equal(whole["fc.weight"])


def test_a_file_of_another_head_is_trained_on_where_that_is_asked_for(tmp_path, capsys):
    body = create("resnet14", DATA._replace(num_classes=7, image_size=8))
    file = tmp_path / "seven"
    torch.save(body.body.state_dict(), file)
    given = [*SHORT, f"teacher.weights={file}"]
    with pytest.raises(UserError, match="seven"):
        kdzoo.run("kd", "resnet8", "resnet14", out=tmp_path / "runs", overrides=given, quiet=True)
    result = kdzoo.run("kd", "resnet8", "resnet14", out=tmp_path / "runs", overrides=[*given, "teacher.finetune=true"])
    assert result.teacher_top1 is not None
    said = " ".join(capsys.readouterr().err.split())
    assert re.search(r"teacher resnet14: top-1 [\d.]+ % on digits, reads 8 px, mean [\d. ]+, std [\d. ]+ \(", said)


@pytest.mark.parametrize("share", ["data.val", "data.select"])
def test_an_accuracy_on_held_out_training_images_is_told_from_one_on_test_images(tmp_path, capsys, share):
    file = tmp_path / "seen.pth"
    torch.save(create("resnet14", DATA._replace(image_size=8)).body.state_dict(), file)
    given = [*SHORT, f"teacher.weights={file}", f"{share}=0.5"]
    kdzoo.run("kd", "resnet8", "resnet14", out=tmp_path / "runs", overrides=given)
    said = " ".join(capsys.readouterr().err.split())
    assert re.search(r"teacher resnet14: top-1 [\d.]+ % on held-out training images of digits, reads", said)


def test_a_student_starts_from_the_weights_of_a_file_and_says_so(tmp_path, capsys):
    file = tmp_path / "start.pth"
    start = create("resnet8", DATA._replace(image_size=8)).body.state_dict()
    torch.save({"state_dict": {f"module.{key}": value for key, value in start.items()}}, file)
    still = [*SHORT, "protocol.lr=1e-20", "protocol.min_lr=0", "protocol.weight_decay=0", "protocol.ema=0"]
    for out, more in (("drawn", []), ("started", [f"student.weights={file}"])):
        kdzoo.run("none", "resnet8", out=tmp_path / out, overrides=[*still, *more])
        said = " ".join(capsys.readouterr().err.split())
        line = re.search(r"student resnet8: top-1 [\d.]+ % before training, reads 8 px, .*start\.pth", said)
        assert bool(line) == bool(more)
        ends = load_file(next((tmp_path / out).rglob("student.safetensors")))
        trained = [key for key in start if "running" not in key and "tracked" not in key]
        assert all(ends[key].allclose(start[key]) for key in trained) == bool(more)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["teacher.finetune=true"], "expected weights to start from"),
        (["student.weights=a.pt", "student.pretrained=true"], "both set"),
    ],
)
def test_settings_that_contradict_each_other_are_one_line(overrides, said):
    with pytest.raises(UserError, match=said):
        resolve({"distiller": {"name": "none"}, "student": {"name": "resnet8"}}, overrides)


def test_a_cached_teacher_that_was_damaged_is_not_used(tmp_path, monkeypatch, dataset):
    monkeypatch.setenv("KDZOO_CACHE", str(tmp_path))
    values = {"distiller": {"name": "kd"}, "student": {"name": "resnet8"}, "teacher": {"name": "resnet14"}}
    run = resolve(values, ["data.limit=320", "engine.device=cpu", "engine.precision=float32"])
    own = teachers.recipe(run, dataset)
    folder = RunFolder.of(own)

    def train(*_):
        folder.open(own)
        folder.student.write_bytes(b"weights")
        written = write(tmp_path / "made", 80.0, 0).read_result()
        folder.write_result(replace(written, folder=folder.path, weights=digest(folder.student)))

    monkeypatch.setattr(teachers, "train_one", train)
    assert teachers.trained(run, dataset, Progress(quiet=True)).path == folder.path
    assert teachers.trained(run, dataset, Progress(quiet=True)).path == folder.path
    folder.student.write_bytes(b"wEights")
    with pytest.raises(UserError, match=r"damaged \(its checksum differs\); move its folder away"):
        teachers.trained(run, dataset, Progress(quiet=True))
