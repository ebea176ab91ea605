"""Networks are compiled where that is right and pays, and nothing but rounding changes."""

import json
import os
import shutil
import tempfile
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from kdzoo import models
from kdzoo.checks import Outcome, check
from kdzoo.engine import compiling
from kdzoo.engine.passes import Teacher
from kdzoo.engine.progress import Progress
from kdzoo.engine.training import train_lanes
from kdzoo.errors import UserError
from kdzoo.resolve import resolve

from ..short_runs import settings

ALWAYS = {"WATCHED": 0.0, "SHARE": 1e9, "LEAST": 1e9}  # however short the run, and however slow the code


class Said(Progress):
    def __init__(self):
        super().__init__(quiet=True)
        self.lines = []

    def say(self, text):
        self.lines.append(text)


@pytest.fixture
def code(monkeypatch):
    """Exchanges compiled code for a function of the network's own output, and notes what was compiled and called."""

    class Code:
        made: list[str]
        called: list[str]

        @staticmethod
        def change(output):
            return output

    code = Code()
    code.made, code.called = [], []

    class Fake:
        def __init__(self, network, images, show, grad):
            self.network = network
            code.made.append(network.name)

        def __call__(self, images, show):
            code.called.append(self.network.name)
            return code.change(self.network(images, show))

    monkeypatch.setattr(compiling, "Compiled", Fake)
    return code


def trained(out, dataset, teacher, *more, names=("kd",)):
    said = Said()
    outcomes = train_lanes([settings(out, name, *more) for name in names], dataset, teacher, said)
    assert not any(isinstance(outcome, UserError) for outcome in outcomes), outcomes
    weights = [load_file(outcome.folder / "student.safetensors") for outcome in outcomes]
    return weights, [line for line in said.lines if line.startswith(("teacher", "student"))]


def same(some, others):
    return all(torch.equal(one[key], other[key]) for one, other in zip(some, others, strict=True) for key in one)


def set_all(monkeypatch, values):
    for name, value in values.items():
        monkeypatch.setattr(compiling, name, value)


@pytest.mark.parametrize(("mode", "made"), [("on", ["resnet14", "resnet8"]), ("off", []), ("auto", [])])
def test_a_switch_says_whether_networks_are_compiled_and_a_short_run_is_left_alone(
    tmp_path, dataset, teacher, code, mode, made
):
    _, said = trained(tmp_path, dataset, teacher, f"engine.compile={mode}")
    assert sorted(code.made) == made
    assert said == []


@pytest.mark.slow(reason="trains several runs")
def test_a_teacher_whose_logits_come_from_disk_is_not_compiled(tmp_path, dataset, teacher, code, monkeypatch):
    monkeypatch.setenv("KDZOO_CACHE", str(tmp_path / "cache"))
    keeping = "teacher.keep=logits", "engine.compile=on"
    trained(tmp_path / "a", dataset, teacher, *keeping)
    assert code.made == ["resnet14", "resnet8"]
    code.made.clear()
    trained(tmp_path / "b", dataset, teacher, *keeping, names=("dist",))
    assert code.made == ["resnet8"]


@pytest.mark.slow(reason="trains several runs")
def test_left_to_itself_it_compiles_where_the_rest_of_the_run_is_worth_it(
    tmp_path, dataset, teacher, code, monkeypatch
):
    set_all(monkeypatch, ALWAYS)
    compiled, said = trained(tmp_path / "compiled", dataset, teacher, names=["kd", "uhkd"])
    assert sorted(code.made) == ["resnet14", "resnet8", "resnet8"]
    assert [line.endswith(": kept") for line in said] == [True, True]
    steps = 10 - 1  # the first is plain
    assert code.called.count("resnet14") > steps
    plain, _ = trained(tmp_path / "plain", dataset, teacher, "engine.compile=off", names=["kd", "uhkd"])
    assert same(compiled, plain)


def test_code_that_is_no_faster_is_not_kept(tmp_path, dataset, teacher, code, monkeypatch):
    set_all(monkeypatch, ALWAYS | {"LEAST": 0.0})
    _, said = trained(tmp_path, dataset, teacher)
    assert [line.endswith(": not kept") for line in said] == [True, True]
    assert len(code.called) == 2 * (1 + compiling.ROUNDS)


def with_other_logits(output):
    return output._replace(logits=1.01 * output.logits)


def with_other_gradients(output):
    return output._replace(logits=2 * output.logits - output.logits.detach())


@pytest.mark.slow(reason="trains several runs")
@pytest.mark.parametrize(
    ("change", "refused"), [(with_other_logits, ["teacher", "student"]), (with_other_gradients, ["student"])]
)
def test_code_that_gives_other_outputs_or_gradients_is_not_kept(tmp_path, dataset, teacher, code, change, refused):
    code.change = change
    wrong, said = trained(tmp_path / "wrong", dataset, teacher, "engine.compile=on")
    assert [line.split()[0] for line in said] == refused
    assert all(line.endswith(": steps run as they are, as compiled code gives other outputs") for line in said)
    assert code.called.count("resnet8") == 1
    plain, _ = trained(tmp_path / "plain", dataset, teacher, "engine.compile=off")
    assert same(wrong, plain)


IN_BF16 = ("engine.precision=bf16", "engine.compile=on", "teacher.name=null")
OTHER = "student resnet8: steps run as they are, as compiled code gives other outputs"


@pytest.mark.slow(reason="trains several runs")
def test_code_that_is_nearer_to_float32_than_plain_bf16_is_kept(tmp_path, dataset, monkeypatch):
    class Exact(compiling.Compiled):
        def __init__(self, network, *_):
            self.network = network

        def __call__(self, images, show):
            with torch.autocast("cpu", enabled=False):
                return self.network(images.float(), show)

    monkeypatch.setattr(compiling, "Compiled", Exact)
    monkeypatch.setattr(compiling, "OUTPUTS", {"bf16": 1e-3})  # less than bf16's own rounding, on any processor
    assert trained(tmp_path / "kept", dataset, None, *IN_BF16, names=("none",))[1] == []
    monkeypatch.setattr(compiling, "NEAR", -1.0)  # and would not be, if nothing but the share counted
    assert trained(tmp_path / "refused", dataset, None, *IN_BF16, names=("none",))[1] == [OTHER]


@pytest.mark.slow(reason="trains several runs")
@pytest.mark.parametrize("change", [with_other_logits, with_other_gradients])
def test_code_that_is_further_from_float32_than_plain_bf16_is_not_kept(tmp_path, dataset, code, change, monkeypatch):
    code.change = change
    monkeypatch.setattr(compiling, "OUTPUTS", {"bf16": 1e-3})
    assert trained(tmp_path, dataset, None, *IN_BF16, names=("none",))[1] == [OTHER]


@pytest.mark.slow(reason="trains a run")
def test_code_whose_logits_are_wrong_beside_right_features_is_not_kept(tmp_path, dataset, teacher, code):
    code.change = with_other_logits
    _, said = trained(tmp_path, dataset, teacher, "engine.compile=on", names=("fitnet",))
    assert [line.split()[0] for line in said] == ["teacher", "student"]
    assert all(line.endswith(": steps run as they are, as compiled code gives other outputs") for line in said)


@pytest.mark.slow(reason="trains a run")
def test_code_that_leaves_the_statistics_as_they_were_is_not_kept(tmp_path, dataset, monkeypatch):
    class Stale(compiling.Compiled):
        def __init__(self, network, *_):
            self.network = network

        def __call__(self, images, show):
            norms = [module for module in self.network.modules() if isinstance(module, torch.nn.BatchNorm2d)]
            for norm in norms:
                norm.momentum = 0.0
            output = self.network(images, show)
            for norm in norms:
                norm.momentum = 0.1
            return output

    def late(self, lanes, images):
        for buffer in lanes[0].distillation.student.buffers():
            if not buffer.is_floating_point():
                buffer.fill_(10_000)  # batches were seen, which is more than all statistics together
        return try_students(self, lanes, images)

    try_students = compiling.Compiling.try_students
    monkeypatch.setattr(compiling.Compiling, "try_students", late)
    monkeypatch.setattr(compiling, "Compiled", Stale)
    set_all(monkeypatch, ALWAYS)
    _, said = trained(tmp_path, dataset, None, "engine.precision=bf16", "teacher.name=null", names=("none",))
    assert said == [OTHER]


@pytest.mark.slow(reason="trains several runs")
def test_code_that_differs_by_rounding_is_kept(tmp_path, dataset, teacher, code):
    code.change = lambda output: output._replace(logits=(1 + 1e-6) * output.logits)
    rounded, said = trained(tmp_path / "rounded", dataset, teacher, "engine.compile=on")
    assert said == []
    plain, _ = trained(tmp_path / "plain", dataset, teacher, "engine.compile=off")
    assert not same(rounded, plain)


@pytest.mark.slow(reason="trains several runs")
def test_where_nothing_can_be_compiled_a_run_is_as_it_was_and_says_so(tmp_path, dataset, teacher, monkeypatch):
    def compiled(*_):
        raise RuntimeError("no C++ compiler\nmore")

    monkeypatch.setattr(compiling, "Compiled", compiled)
    weights, said = trained(tmp_path / "on", dataset, teacher, "engine.compile=on")
    assert said == [
        "teacher resnet14: steps run as they are, as it cannot be compiled: no C++ compiler",
        "student resnet8: steps run as they are, as it cannot be compiled: no C++ compiler",
    ]
    assert same(weights, trained(tmp_path / "off", dataset, teacher, "engine.compile=off")[0])


@pytest.mark.slow(reason="trains two runs")
def test_a_run_whose_backward_pass_cannot_be_compiled_is_as_it_was(tmp_path, dataset, teacher, code):
    class Failing(torch.autograd.Function):
        @staticmethod
        def forward(ctx, logits):
            return logits.clone()

        @staticmethod
        def backward(ctx, slopes):
            raise OSError("No space left on device")

    code.change = lambda output: output._replace(logits=Failing.apply(output.logits))
    plain, _ = trained(tmp_path / "plain", dataset, teacher)
    found, said = trained(tmp_path / "found", dataset, teacher, "engine.compile=on")
    assert said == ["student resnet8: steps run as they are, as it cannot be compiled: No space left on device"]
    assert same(found, plain)


@pytest.mark.slow(reason="trains a run")
@pytest.mark.parametrize("variable", ["TORCH_COMPILE_DISABLE", "TORCHDYNAMO_DISABLE"])
def test_compilation_that_the_environment_turns_off_is_told(tmp_path, dataset, teacher, monkeypatch, variable):
    monkeypatch.setenv(variable, "1")
    with torch._dynamo.config.patch(disable=variable == "TORCH_COMPILE_DISABLE"):  # read when torch is imported
        _, said = trained(tmp_path, dataset, teacher, "engine.compile=on")
        [found] = [result for result in check("none", on_fail=None) if result.name == "check_compiles"]
    assert [variable in line for line in said] == [True, True]
    assert found.outcome is Outcome.FAILED
    assert variable in found.message


@pytest.mark.slow(reason="trains a run")
def test_a_check_that_lacks_memory_leaves_the_run_as_it_was(tmp_path, dataset, teacher, code, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("no memory is left")

    monkeypatch.setattr(compiling, "right", full)
    _, said = trained(tmp_path, dataset, teacher, "engine.compile=on")
    assert [line.endswith("cannot be compiled: no memory is left") for line in said] == [True, True]


@pytest.mark.slow(reason="trains a run")
def test_a_missing_compiler_is_noticed_before_anything_is_compiled(tmp_path, dataset, teacher, monkeypatch):
    def missing():
        raise RuntimeError("no compiler is here")

    monkeypatch.setattr("torch._inductor.cpp_builder.get_cpp_compiler", missing)
    monkeypatch.setattr(torch, "compile", None)
    _, said = trained(tmp_path, dataset, teacher, "engine.compile=on")
    assert [line.endswith("cannot be compiled: no compiler is here") for line in said] == [True, True]


@pytest.mark.slow(reason="trains a run")
def test_the_time_of_compiling_is_none_of_training(tmp_path, dataset, teacher, code, monkeypatch):
    spent, clock = 0.0, time.perf_counter
    make = compiling.Compiled

    class Slow(make):
        def __init__(self, *given):
            nonlocal spent
            super().__init__(*given)
            spent += 1e6

    monkeypatch.setattr(compiling, "Compiled", Slow)
    monkeypatch.setattr(time, "perf_counter", lambda: clock() + spent)
    trained(tmp_path, dataset, teacher, "engine.compile=on")
    [metrics] = tmp_path.rglob("metrics.jsonl")
    assert code.made
    assert all(json.loads(line)["images_per_second"] > 1 for line in metrics.read_text().splitlines())


def test_a_compiler_that_does_not_run_is_named_with_what_to_do():
    said = r"no C\+\+ compiler runs as /nowhere/g\+\+; install one, or name another by CXX"
    with torch._inductor.config.patch({"cpp.cxx": (None, "/nowhere/g++")}), pytest.raises(UserError, match=said):
        compiling.find_compiler()


COUNTS = """
from torch import nn


class Counts(nn.Sequential):
    def forward(self, images):
        self.passes += 1
        return super().forward(images) * (1 + 1e-9 * self.passes)


class Reads(nn.Sequential):
    def forward(self, images):
        return super().forward(images) * (1 + 1e-9 * float(images.detach().mean()))


def layers(num_classes):
    ends = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, num_classes)
    return nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), *ends


def counts(num_classes):
    network = Counts(*layers(num_classes))
    network.passes = 0
    return network


def reads(num_classes):
    return Reads(*layers(num_classes))
"""


@pytest.mark.slow(reason="trains runs")
@pytest.mark.parametrize("network", ["counts", "reads"])
def test_a_network_that_would_be_compiled_anew_in_each_step_is_not(tmp_path, dataset, monkeypatch, network, capfd):
    (tmp_path / "countingnets.py").write_text(COUNTS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(compiling, "BACKEND", "eager")
    student = f"student.name=countingnets:{network}"
    _, [said] = trained(tmp_path, dataset, None, "engine.compile=on", "teacher.name=null", student, names=("none",))
    assert said.startswith(
        f"student countingnets:{network}: steps run as they are, as it would be compiled anew in each"
    )
    assert capfd.readouterr().err == ""  # nor does torch's compiler tell what it met


@pytest.mark.parametrize("own", [None, "mine"])
def test_compiled_code_lies_in_the_cache_or_where_the_user_wants_it(tmp_path, monkeypatch, cache, own):
    torchs = Path(tempfile.gettempdir()) / "torchinductor_me"  # which torch sets by itself
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / own if own else torchs))
    compiling.begin_anew()
    found = Path(os.environ["TORCHINDUCTOR_CACHE_DIR"])
    assert found == tmp_path / own if own else found.parent == cache / "compiled"


def test_machines_that_share_a_cache_find_code_for_their_own_instructions_alone(monkeypatch, cache):
    def folder(level, **more):
        monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(Path(tempfile.gettempdir()) / "torchinductor_me"))
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: level)
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True, **more})
        compiling.begin_anew()
        return os.environ["TORCHINDUCTOR_CACHE_DIR"]

    one = folder("AVX2", num_logical_cores=8)
    assert folder("AVX2", num_logical_cores=4) == one
    others = {folder("AVX512"), folder("AVX2", avx512_f=True), folder("AVX2", cpu_name="another")}
    assert len({one, *others}) == 4


def test_a_training_does_not_end_where_the_cache_of_compiled_code_is_lost(tmp_path, monkeypatch):
    torchs = str(Path(tempfile.gettempdir()) / "torchinductor_me")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", torchs)
    (tmp_path / "file").touch()
    monkeypatch.setenv("KDZOO_CACHE", str(tmp_path / "file" / "cache"))
    compiling.begin_anew()
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == torchs


def test_a_switch_is_on_off_or_auto(tmp_path):
    with pytest.raises(UserError, match=r"engine\.compile=fast: expected on, off or auto"):
        settings(tmp_path, "kd", "engine.compile=fast")
    assert settings(tmp_path, "kd").place.engine.compile == "auto"
    networks = {"distiller": {"name": "none"}, "student": {"name": "resnet8"}}
    assert resolve({**networks, "engine": {"compile": "off"}}).place.engine.compile == "off"


TINY = """
from torch import nn

def tiny(num_classes):
    layers = [nn.Conv2d(3, 128, 3, padding=1), nn.BatchNorm2d(128), nn.ReLU()]
    layers += [nn.Conv2d(128, 128, 3, padding=1), nn.BatchNorm2d(128), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(128, num_classes))
"""


@pytest.mark.slow(reason="writes and compiles C++ for two networks")
@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
def test_code_of_torchs_compiler_trains_as_plain_code_does(tmp_path, dataset, monkeypatch):
    (tmp_path / "tinynets.py").write_text(TINY)
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    network = models.create("tinynets:tiny", dataset.spec).to(memory_format=torch.channels_last)
    teacher = Teacher(network.eval().requires_grad_(False), top1=10.0)
    own = "student.name=tinynets:tiny"
    compiled, said = trained(tmp_path / "on", dataset, teacher, "engine.compile=on", own)
    assert said == []
    plain, _ = trained(tmp_path / "off", dataset, teacher, "engine.compile=off", own)
    assert not same(compiled, plain)
    [one], [other] = compiled, plain
    gap = sum((one[key] - other[key]).float().square().sum() for key in one).sqrt()
    assert gap <= 0.01 * sum(other[key].float().square().sum() for key in other).sqrt()
