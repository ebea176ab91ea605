"""What the engine's switches change, and what they leave as it is."""

import platform
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from kdzoo import precision
from kdzoo.distiller import Batch
from kdzoo.engine import compiling
from kdzoo.engine.device import resolve_auto
from kdzoo.engine.lane import Lane
from kdzoo.engine.micro_batches import micro_batches
from kdzoo.engine.passes import TeacherPasses
from kdzoo.engine.progress import Progress
from kdzoo.engine.training import build, train_lanes
from kdzoo.errors import UserError
from kdzoo.store.folder import RunFolder

from ..short_runs import settings


def lane_of(run, dataset, teacher, folder):
    distillation = build(run, dataset, TeacherPasses(teacher.network)).train()
    return Lane(run, distillation, RunFolder(folder), torch.device("cpu"), 5)


def after_a_step(run, dataset, teacher, folder):
    lane = lane_of(run, dataset, teacher, folder)
    batch = next(dataset.loader(run.settings.protocol, seed=0).batches())
    lane.step(batch, 0)
    return lane, torch.cat([p.detach().flatten() for p in lane.trained.parameters()])


def test_parts_are_the_batch_cut_in_order():
    batch = Batch.of(torch.rand(6, 3, 4, 4), torch.arange(6), 7, index=torch.arange(6) + 9)
    batch = batch._replace(views={"weak": torch.rand(6, 3, 4, 4)})
    parts = micro_batches(batch, 3)
    assert [len(part.labels) for part in parts] == [2, 2, 2]
    for name in ("images", "labels", "targets", "index"):
        assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(batch, name))
    assert torch.equal(torch.cat([part.views["weak"] for part in parts]), batch.views["weak"])
    assert micro_batches(batch, 1) == [batch]


@pytest.mark.slow(reason="trains several runs")
def test_without_norms_over_the_batch_accumulated_gradients_are_the_batchs(tmp_path, dataset, teacher):
    sgd = ["protocol.optimizer=sgd", "protocol.lr=0.05"]  # whose step is the gradient, but for a factor
    plain = settings(tmp_path, "kd", *sgd, student="vit_tiny_patch16_224")
    parts = settings(tmp_path, "kd", *sgd, "engine.accumulate=4", student="vit_tiny_patch16_224")
    _, whole = after_a_step(plain, dataset, teacher, tmp_path)
    _, cut = after_a_step(parts, dataset, teacher, tmp_path)
    begun = torch.cat([p.detach().flatten() for p in lane_of(plain, dataset, teacher, tmp_path).trained.parameters()])
    assert (whole - begun).abs().max() > 1e-4
    torch.testing.assert_close(cut - begun, whole - begun, rtol=1e-3, atol=1e-6)


@pytest.mark.slow(reason="trains several runs")
def test_shown_terms_are_means_over_the_parts(tmp_path, dataset, teacher):
    whole, _ = after_a_step(settings(tmp_path, "kd", student="vit_tiny_patch16_224"), dataset, teacher, tmp_path)
    run = settings(tmp_path, "kd", "engine.accumulate=4", student="vit_tiny_patch16_224")
    cut, _ = after_a_step(run, dataset, teacher, tmp_path)
    assert cut.meter.read() == pytest.approx(whole.meter.read(), rel=1e-4)


def test_accumulation_makes_another_run_and_other_switches_do_not(tmp_path):
    plain = settings(tmp_path, "kd").settings.identity()
    assert settings(tmp_path, "kd", "engine.accumulate=2").settings.identity() != plain
    assert (
        settings(tmp_path, "kd", "engine.accumulate=1", "engine.graph=off", "engine.compile=on").settings.identity()
        == plain
    )


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["engine.accumulate=3"], "engine.accumulate=3 does not cut batches of 64"),
        (["engine.accumulate=64"], "parts of at least 2"),
        (["engine.accumulate=2", "protocol.augmentation.mixup=0.2"], "pair rows of a whole batch"),
    ],
)
def test_what_cannot_be_cut_is_said(tmp_path, dataset, teacher, more, said):
    with pytest.raises(UserError, match=said):
        train_lanes([settings(tmp_path, "kd", *more)], dataset, teacher, Progress(quiet=True))


def test_a_batch_has_one_part_at_least():
    with pytest.raises(UserError, match="from 1"):
        settings("runs", "kd", "engine.accumulate=0")


def kept_bytes(lane, batch):
    """What autograd keeps of a forward pass, weights and all."""
    sizes = {}

    def keep(tensor):
        sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        terms = lane.distillation(batch)
    assert terms
    return sum(sizes.values())


@pytest.mark.slow(reason="trains steps of networks of 5 and 11 million weights")
@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "resnet18"])
def test_recomputed_activations_give_the_same_bits_and_keep_less(tmp_path, dataset, teacher, name):
    switched = settings(tmp_path, "uhkd", "engine.checkpoint_activations=true", student=name)
    _, again = after_a_step(switched, dataset, teacher, tmp_path)
    _, kept = after_a_step(settings(tmp_path, "uhkd", student=name), dataset, teacher, tmp_path)
    assert torch.equal(again, kept)
    batch = next(dataset.loader(switched.settings.protocol, seed=0).batches())
    less = kept_bytes(lane_of(switched, dataset, teacher, tmp_path), batch)
    more = kept_bytes(lane_of(settings(tmp_path, "uhkd", student=name), dataset, teacher, tmp_path), batch)
    assert less < 0.8 * more


def test_a_network_that_cannot_compute_again_says_so(tmp_path, dataset, teacher):
    run = settings(tmp_path, "kd", "engine.checkpoint_activations=true")
    [outcome] = train_lanes([run], dataset, teacher, Progress(quiet=True))
    assert "'resnet8' cannot compute activations again" in str(outcome)


FAULTS = """
import resource, sys
import psutil
import torch
from kdzoo.engine import compiling
from kdzoo.engine.device import give_back_memory, keep_freed_memory

assert sys.argv[1] == "as usual" or keep_freed_memory()
for _ in range(4):  # where the heap lies decides whether the second finds it whole
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(2**24).sum()  # 64 MiB
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
resident = psutil.Process().memory_info().rss
give_back_memory()
print(faults, resident - psutil.Process().memory_info().rss)
"""


@pytest.mark.slow(reason="starts two processes that import torch")
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can be told to")
def test_memory_that_was_freed_is_there_for_the_next_tensor_until_it_is_given_back():
    """In fresh processes: a heap that ran out of addresses before, in another test, keeps nothing any more."""
    (kept, given_back), (usual, _) = (
        map(int, subprocess.check_output([sys.executable, "-c", FAULTS, how], text=True).split())
        for how in ("kept", "as usual")
    )
    assert kept < 100 < usual  # of 16384 pages
    assert given_back > 60 * 2**20  # of 64 MiB


def test_tf32_is_for_cuda():
    with pytest.raises(UserError, match="precision tf32 is for CUDA"):
        resolve_auto(settings("runs", "kd", "engine.precision=tf32"))


@pytest.mark.parametrize(("name", "value"), [("accumulate", 0), ("memory", 0.0), ("memory", 1.5)])
def test_a_number_that_means_nothing_is_one_line(name, value):
    with pytest.raises(UserError, match=f"engine.{name}={value}: expected"):
        settings("runs", "kd", f"engine.{name}={value}")


def test_the_precision_of_products_is_as_asked_inside_and_as_before_outside():
    before, float32, tf32 = precision.current(), precision.FLOAT32, precision.PRECISIONS["tf32"]
    with precision.autocast("cuda", tf32):
        assert precision.current() == precision.TF32
        assert torch.backends.cuda.matmul.allow_tf32  # the older switch, which torch's compiler reads
        with precision.autocast("cuda", float32):
            assert precision.current() == precision.IEEE
        assert precision.current() == precision.ambient("cuda").matmul == precision.TF32
    assert precision.current() == before
    with precision.matmul_precision("cuda", float32):
        assert precision.current() == precision.IEEE
    assert precision.current() == before
    with precision.autocast("cpu", float32):
        assert precision.current() == before


def test_float32_inside_autocast_is_float32_and_the_surrounding_code_is_read():
    bf16 = precision.PRECISIONS["bf16"]
    with precision.autocast("cpu", bf16):
        assert precision.ambient("cpu") == precision.Precision(torch.bfloat16, None)
        with precision.autocast("cpu", precision.FLOAT32):
            assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16
    assert precision.ambient("cpu") == precision.Precision(None, None)


def test_the_moving_average_is_what_ships_and_counts_its_batches(tmp_path, dataset, teacher):
    run = settings(tmp_path, "kd", "protocol.ema=0.5")
    lane = lane_of(run, dataset, teacher, tmp_path)
    expected = [parameter.detach().clone() for parameter in lane.trained.student.parameters()]
    for step, batch in zip(range(3), dataset.loader(run.settings.protocol, seed=0).batches(), strict=False):
        lane.step(batch, step)
        expected = [0.5 * old + 0.5 * new for old, new in zip(expected, lane.trained.student.parameters(), strict=True)]
    shipped = lane.deployed()
    for own, wanted in zip(shipped.parameters(), expected, strict=True):
        torch.testing.assert_close(own, wanted)
    counters = [value for name, value in shipped.state_dict().items() if name.endswith("num_batches_tracked")]
    assert counters == [3] * len(counters) != []
    saved = lane.state_dict()
    again = lane_of(run, dataset, teacher, tmp_path)
    again.load_state_dict(saved, 3)
    assert all(
        torch.equal(one, two) for one, two in zip(again.deployed().parameters(), shipped.parameters(), strict=True)
    )


OWN = """
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.layer, self.head = nn.Conv2d(3, 8, 3, 2), nn.Conv2d(8, 8, 3, 1, 1), nn.Linear(8, 10)
        self.again = self.layer
        self.norm = nn.BatchNorm2d(8)
        self.noted = 0

    def forward(self, x):
        x = self.norm(self.stem(x))
        return self.head(self.again(self.layer(x).relu()).relu().mean((2, 3)) + self.noted)


class Noting(Net):
    def __init__(self):
        super().__init__()
        self.stem.register_forward_hook(lambda module, inputs, output: setattr(self, "noted", output.mean()))


def shared(num_classes):
    return Net()


def noting(num_classes):
    return Noting()
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    """Networks of one's own in the working folder."""
    (tmp_path / "owned.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    yield
    sys.modules.pop("owned", None)


@pytest.mark.usefixtures("own")
def test_a_weight_under_two_names_counts_once_in_the_moving_average(tmp_path, dataset, teacher):
    run = settings(tmp_path, "kd", "protocol.ema=0.5", student="owned:shared")
    lane = lane_of(run, dataset, teacher, tmp_path)
    weight = lane.trained.student.body.layer.weight
    before = weight.detach().clone()
    lane.step(next(dataset.loader(run.settings.protocol, seed=0).batches()), 0)
    shipped = lane.deployed().body
    assert shipped.layer is shipped.again
    assert not torch.equal(weight, before)
    torch.testing.assert_close(shipped.layer.weight, 0.5 * before + 0.5 * weight)


@pytest.mark.usefixtures("own")
def test_a_student_whose_copies_do_not_answer_by_themselves_has_no_moving_average(tmp_path, dataset, teacher):
    run = settings(tmp_path, "kd", "protocol.ema=0.5", student="owned:noting")
    with pytest.raises(UserError, match=r"needs a copy of it, and copies of it .* set protocol\.ema=0"):
        lane_of(run, dataset, teacher, tmp_path)
    lane_of(settings(tmp_path, "kd", "protocol.ema=0", student="owned:noting"), dataset, teacher, tmp_path)


def test_the_moving_average_begins_with_what_a_phase_before_training_found(tmp_path, dataset, teacher):
    run = settings(tmp_path, "simkd", "protocol.ema=0.9")
    lane = lane_of(run, dataset, teacher, tmp_path)
    assert lane.deployed().head.weight.isnan().all()  # no network's classifier yet
    lane.prepare(dataset.loader(run.settings.protocol, seed=0), TeacherPasses(teacher.network))
    lane.step(next(dataset.loader(run.settings.protocol, seed=0).batches()), 0)
    assert torch.equal(lane.deployed().head.weight, teacher.network.classifier.weight)


def test_a_methods_weights_of_five_dimensions_are_no_hindrance(tmp_path, dataset, teacher):
    run = settings(tmp_path, "famkd")
    _, weights = after_a_step(run, dataset, teacher, tmp_path)
    assert weights.isfinite().all()


def test_a_methods_weights_of_four_dimensions_are_read_with_channels_last(tmp_path, dataset, teacher):
    run = settings(tmp_path, "sfakd")
    lane = lane_of(run, dataset, teacher, tmp_path)
    weight = lane.trained.distiller.projector.layers[0].weight  # a complex number for each channel and frequency
    before = weight.detach().clone()
    lane.step(next(dataset.loader(run.settings.protocol, seed=0).batches()), 0)
    assert weight.stride()[-1] != 1
    assert not torch.equal(weight, before)


@pytest.mark.slow(reason="torch.compile takes seconds for each")
def test_a_compiled_run_ends_where_a_plain_one_does(tmp_path, dataset, teacher, monkeypatch):
    compiled = []

    class Noted(compiling.Compiled):
        def __init__(self, network, *more):
            compiled.append(network.name)
            super().__init__(network, *more)

    monkeypatch.setattr(compiling, "Compiled", Noted)
    monkeypatch.setattr(compiling, "BACKEND", "eager")  # all that torch.compile does but for writing kernels
    found = {}
    for mode in ("on", "off"):
        run = settings(tmp_path / mode, "uhkd", f"engine.compile={mode}", "protocol.ema=0.9")
        [found[mode]] = train_lanes([run], dataset, teacher, Progress(quiet=True))
    assert sorted(compiled) == ["resnet14", "resnet8"]
    one, other = (load_file(found[mode].folder / "student.safetensors") for mode in ("on", "off"))
    assert one.keys() == other.keys()
    for key in one:
        torch.testing.assert_close(one[key], other[key], rtol=1e-4, atol=1e-5)
