"""The teacher's logits are kept where it is asked for: later runs read them, and nothing else changes."""

import io
from dataclasses import replace
from unittest.mock import patch

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from kdzoo import models
from kdzoo.engine.lane import Lane
from kdzoo.engine.passes import Teacher
from kdzoo.engine.progress import Progress, plain_console
from kdzoo.engine.training import train_lanes
from kdzoo.errors import StorageError, UserError
from kdzoo.losses import softened_kl

from ..short_runs import distance, interrupted_at, same, settings

pytestmark = pytest.mark.slow(reason="trains runs with kept logits and without")

STEPS = 320 // 64  # of an epoch
EPOCH = 32 + 2 * STEPS * 64 * 10  # bytes: a checksum, and a number of float16 for each image and class
KEEP = "teacher.keep=logits"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The cache of this test alone."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("KDZOO_CACHE", str(folder))
    return folder


@pytest.fixture
def passes(teacher):
    """The images of each pass of the teacher."""
    return watched(teacher)


def watched(teacher):
    shown = []
    teacher.network.register_forward_hook(lambda _network, images, _output: shown.append(images[0]))
    return shown


@pytest.fixture
def train(tmp_path, dataset, teacher, cache):
    """Train these methods side by side, in a folder of this name: their outcomes and the lines that were said."""

    def train(name, *methods, also=(), teacher=teacher):
        console = plain_console(file=io.StringIO(), width=1000)
        runs = [settings(tmp_path / name, method, *also) for method in methods]
        return train_lanes(runs, dataset, teacher, Progress(console=console)), console.file.getvalue()

    return train


def kept(cache):
    return sorted(file for file in cache.glob("logits/*/*"))


def student(outcome):
    return load_file(outcome.folder / "student.safetensors")


def test_nothing_is_kept_unless_it_is_asked_for(train, cache, passes):
    _, said = train("a", "kd")
    assert kept(cache) == []
    assert "logits" not in said
    train("b", "kd")
    assert len(passes) == 2 * 2 * STEPS


def test_a_run_that_keeps_logits_ends_with_the_bits_of_one_that_reads_them_and_near_one_without(train, cache, passes):
    [plain], _ = train("a", "kd")
    [keeping], _ = train("b", "kd", also=[KEEP])
    assert len(kept(cache)) == 2
    passes.clear()
    [reading], _ = train("c", "kd", also=[KEEP])
    assert passes == []
    assert same(student(reading), student(keeping))
    assert 0 < distance(student(keeping), student(plain)) < 0.01


@pytest.mark.parametrize("methods", [["dist"], ["kd", "none", "logitmse"]])
def test_a_later_run_of_other_methods_makes_no_pass_of_the_teacher(train, cache, passes, methods):
    plain, _ = train("a", *methods)
    train("b", "kd", also=[KEEP])
    passes.clear()
    outcomes, said = train("c", *methods, also=[KEEP])
    assert passes == []
    assert f"teacher.keep=logits: reading all epochs from {cache / 'logits'}" in said
    [other], _ = train("d", methods[0], also=["seed=1"])
    for outcome, alone in zip(outcomes, plain, strict=True):
        assert distance(student(outcome), student(alone)) < 0.02
    assert distance(student(other), student(plain[0])) > 0.2  # as two seeds are


def test_a_method_reads_the_logits_of_its_step_rounded_to_float16(train, cache, monkeypatch):
    seen = []

    def noted(student, teacher, temperature):
        seen.append(teacher.clone())
        return softened_kl(student, teacher, temperature)

    monkeypatch.setattr("kdzoo.distillers.kd.softened_kl", noted)
    train("a", "kd", also=[KEEP])
    train("b", "kd", also=[KEEP])
    computed, read = torch.stack(seen).chunk(2)
    assert len(computed) == len(read) == 2 * STEPS
    assert torch.equal(read, computed.half().float())
    assert not torch.equal(read[0], read[STEPS])  # other images, so other logits


def test_the_size_is_said_first_and_is_the_size_on_disk(train, cache):
    _, said = train("a", "kd", also=[KEEP])
    files = kept(cache)
    assert [file.stat().st_size for file in files] == [EPOCH, EPOCH]
    [line] = [line for line in said.splitlines() if "logits" in line]
    where = files[0].parent
    assert line == f"teacher.keep=logits: {2 * EPOCH:,} bytes will be written to {where} (epochs to compute: 2)"
    assert said.index(line) < said.index("epoch   1/2")


def test_a_longer_training_adds_its_own_epochs_alone(train, cache, passes):
    train("a", "kd", also=[KEEP])
    passes.clear()
    _, said = train("b", "kd", also=[KEEP, "protocol.epochs=3", "protocol.lr=0.01"])
    assert f": {EPOCH:,} bytes will be written to {kept(cache)[0].parent} (epochs to compute: 1)" in said
    assert (len(passes), len(kept(cache))) == (STEPS, 3)


@pytest.mark.parametrize("harm", ["a flipped bit", "a cut", "another size"])
def test_a_damaged_file_is_computed_again_and_told(train, cache, passes, harm):
    train("a", "kd", also=[KEEP])
    first, second = kept(cache)
    content = bytearray(whole := first.read_bytes())
    content[1000] ^= 1
    first.write_bytes({"a flipped bit": content, "a cut": whole[:-500], "another size": whole + b"more"}[harm])
    passes.clear()
    _, said = train("b", "dist", also=[KEEP])
    assert len(passes) == STEPS
    assert f"the teacher's logits in {first} are damaged" in said
    assert str(second) not in said
    assert first.read_bytes() == whole


def stopped(train, at, name, *methods):
    """Train until a step, where the process is interrupted; each step before it has its checkpoint."""
    with interrupted_at(at):
        train(name, *methods, also=[KEEP, "engine.checkpoint_seconds=0"])
    return train(name, *methods, also=[KEEP])


def test_an_epoch_that_was_resumed_in_its_midst_is_not_kept(train, cache, passes):
    [outcome], said = stopped(train, STEPS + 2, "b", "kd")
    assert f"resumed at step {STEPS + 2}" in said
    assert len(passes) == 2 * STEPS
    assert [file.name for file in kept(cache)] == ["epoch-000000.float16"]
    [whole], _ = train("a", "kd", also=[KEEP])
    assert same(student(outcome), student(whole))


def test_a_resumed_run_is_given_the_logits_of_its_own_steps(train, cache, passes):
    train("a", "kd", also=[KEEP])
    passes.clear()
    [whole], _ = train("b", "dist", also=[KEEP])
    [outcome], said = stopped(train, STEPS + 2, "c", "dist")
    assert f"resumed at step {STEPS + 2}" in said
    assert passes == []
    assert same(student(outcome), student(whole))


@pytest.mark.parametrize(
    "other",
    [
        "seed=1",
        "protocol.batch_size=32",
        "protocol.augmentation.flip=true",
        "protocol.augmentation.mixup=0.2",
        "engine.precision=bf16",
        "data.alpha=black",
    ],
)
def test_another_seed_recipe_precision_or_data_is_kept_apart(train, cache, passes, other):
    train("a", "kd", also=[KEEP])
    before = kept(cache)
    passes.clear()
    _, said = train("b", "kd", also=[KEEP, other])
    assert len(passes) >= 2 * STEPS
    assert len(set(kept(cache)) - set(before)) == 2
    assert "(epochs to compute: 2)" in said


def test_other_images_under_the_same_name_are_kept_apart(tmp_path, dataset, teacher, cache, passes):
    run = settings(tmp_path / "a", "kd", KEEP)
    data = replace(run.settings.data, fingerprint="of other images")
    train_lanes([run], dataset, teacher, Progress(quiet=True))
    passes.clear()
    train_lanes([run._replace(settings=replace(run.settings, data=data))], dataset, teacher, Progress(quiet=True))
    assert len(passes) == 2 * STEPS
    assert len(kept(cache)) == 4


def test_a_teacher_that_reads_images_in_another_way_is_kept_apart(train, cache, teacher, passes):
    train("a", "kd", also=[KEEP])
    passes.clear()
    teacher.network.normalise((0.4, 0.4, 0.4), None)
    train("b", "kd", also=[KEEP])
    assert len(passes) == 2 * STEPS


def test_another_teacher_is_kept_apart(train, dataset, cache):
    torch.manual_seed(1)
    other = Teacher(models.create("resnet14", dataset.spec).eval().requires_grad_(False), top1=10.0)
    train("a", "kd", also=[KEEP])
    passes = watched(other)
    train("b", "kd", also=[KEEP], teacher=other)
    assert len(passes) == 2 * STEPS
    assert len(kept(cache)) == 4


@pytest.mark.parametrize(
    ("methods", "also", "reason"),
    [
        (["kd", "lfcc"], [], "lfcc may read more of the teacher than these"),
        (["rkd"], [], "rkd may read more"),  # the embedding
        (["crld"], [], "crld may read more"),  # logits of other views
        (["kd"], ["engine.accumulate=2"], "engine.accumulate cuts the batches"),
    ],
)
def test_where_logits_do_not_suffice_a_line_says_why_nothing_is_kept(train, cache, methods, also, reason):
    plain, _ = train("a", *methods, also=also)
    outcomes, said = train("b", *methods, also=[KEEP, *also])
    assert f"teacher.keep=logits keeps no logits in this run: {reason}" in said
    assert kept(cache) == []
    assert all(same(student(one), student(other)) for one, other in zip(outcomes, plain, strict=True))


def test_a_method_that_failed_before_training_asks_for_nothing(train, cache):
    with patch("kdzoo.distillers.ab.AB.prepare", side_effect=ZeroDivisionError):
        [failed, beside], said = train("a", "ab", "kd", also=[KEEP])
    assert "before training" in str(failed)
    assert "(epochs to compute: 2)" in said
    [alone], _ = train("b", "kd", also=[KEEP])
    assert same(student(beside), student(alone))


def test_nothing_is_kept_of_a_teacher_that_draws_random_numbers(train, cache, teacher):
    teacher.network.classifier.register_forward_pre_hook(lambda _layer, given: nn.functional.dropout(given[0], 0.01))
    [plain], _ = train("a", "kd")
    [outcome], said = train("b", "kd", also=[KEEP])
    assert "teacher.keep=logits keeps no logits in this run: resnet14 draws random numbers" in said
    assert kept(cache) == []
    assert same(student(outcome), student(plain))


def test_a_run_without_a_teacher_has_nothing_to_keep(train, cache):
    _, said = train("a", "none", also=[KEEP])
    assert kept(cache) == []
    assert "logits" not in said


def test_a_method_that_declares_nothing_is_never_given_kept_logits(tmp_path, train, cache, passes):
    train("a", "kd", also=[KEEP])
    passes.clear()
    method = tmp_path / "mine.py"
    method.write_text(OWN.format(needs="Needs(features=False)"))
    _, said = train("b", str(method), also=[KEEP])
    assert "may read more of the teacher" in said
    assert len(passes) == 2 * STEPS


def test_a_method_that_reads_what_it_says_it_does_not_fails(tmp_path, train, cache):
    method = tmp_path / "mine.py"
    method.write_text(OWN.format(needs="Needs(features=False, embedding=False)"))
    train("a", "kd", also=[KEEP])
    [outcome, beside], _ = train("b", str(method), "kd", also=[KEEP])
    assert isinstance(outcome, UserError)
    assert "is not finite" in str(outcome)
    assert beside.epochs == 2


OWN = '''
"""A method for tests."""

from kdzoo import Distiller, Fidelity, Needs
from kdzoo.losses import cross_entropy


class Own(Distiller):
    """Reads the embedding."""

    paper, fidelity, needs = "-", Fidelity.EXACT, {needs}

    def __init__(self, *, ce: float = 1.0, size: float = 1.0):
        super().__init__(ce=ce, size=size)

    def loss(self, student, teacher, batch):
        return self.weigh(
            ce=lambda: cross_entropy(student.logits, batch.targets),
            size=lambda: (student.logits.square().mean() - teacher.embedding.square().mean()).abs(),
        )
'''


def full(path, write):
    raise StorageError(f"the disk of {path.parent} is full")


def test_a_full_disk_ends_the_keeping_and_not_the_training(train, cache, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("kdzoo.engine.kept_logits.write_atomically", full)
        [outcome], said = train("b", "kd", also=[KEEP])
    assert said.count("no more of the teacher's logits are kept in this run: the disk of") == 1
    assert kept(cache) == []
    [whole], _ = train("a", "kd", also=[KEEP])
    assert same(student(outcome), student(whole))


def test_logits_that_float16_cannot_hold_are_not_kept(train, cache, teacher):
    with torch.no_grad():
        teacher.network.classifier.weight.mul_(1e6)
    [outcome], said = train("a", "dist", also=[KEEP])
    assert said.count("are kept in this run: some are too large for float16") == 1
    assert outcome.epochs == 2
    assert kept(cache) == []


def test_two_trainings_that_keep_the_same_logits_harm_neither(train, cache, passes, monkeypatch):
    inner, advance = [], Lane.step

    def interleaved(lane, batch, step):
        if step == 2 and not inner:
            inner.append("begun")
            inner[:] = train("inner", "dist", also=[KEEP])
        advance(lane, batch, step)

    monkeypatch.setattr(Lane, "step", interleaved)
    [outer], said = train("outer", "kd", also=[KEEP])
    [beside], also_said = inner
    assert (outer.epochs, beside.epochs) == (2, 2)
    assert len(passes) == 3 * STEPS  # the outer one reads the second epoch, which the inner one has written
    assert "damaged" not in said + also_said
    passes.clear()
    train("after", "kd", also=[KEEP])
    assert passes == []
    assert len(list(cache.glob("logits/*/.*"))) == 0


def test_a_method_that_writes_to_kept_logits_harms_neither_them_nor_what_is_beside_it(tmp_path, train, cache, passes):
    train("a", "kd", also=[KEEP])
    before = [file.read_bytes() for file in kept(cache)]
    [alone], _ = train("b", "dist", also=[KEEP])
    passes.clear()
    method = tmp_path / "mine.py"
    changed = OWN.format(needs="Needs(features=False, embedding=False)")
    changed = changed.replace("teacher.embedding.square()", "teacher.logits.mul_(2).square()")
    method.write_text(changed)
    [outcome, beside], _ = train("c", str(method), "dist", also=[KEEP])
    assert "changed the teacher's outputs" in str(outcome)
    assert same(student(beside), student(alone))
    assert passes == []
    assert [file.read_bytes() for file in kept(cache)] == before
