"""The precision that ``auto`` means, decided by what the hardware can do; and a device that others are beside."""

import pytest
import torch

from kdzoo.engine.device import bf16_is_fast, find_precision
from kdzoo.engine.progress import Progress
from kdzoo.experiments import spectrum
from kdzoo.experiments.run import Here, evaluate_run, execute
from kdzoo.experiments.work import work_on

from .. import short_runs

CPU = torch.device("cpu")
WITH_BF16 = {"avx512_bf16": True}


@pytest.mark.parametrize("name", ["avx512_bf16", "amx_bf16"])
def test_a_cpu_with_instructions_for_bf16_is_fast_in_it(name):
    assert bf16_is_fast(CPU, {name: True}, {})
    assert not bf16_is_fast(CPU, {name: False, "avx512_f": True}, {})


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("ONEDNN_MAX_CPU_ISA", "DEFAULT"),
        ("ONEDNN_MAX_CPU_ISA", "ALL"),
        ("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16"),
        ("ONEDNN_MAX_CPU_ISA", "avx512_core_amx_fp16"),
        ("DNNL_MAX_CPU_ISA", "AVX10_1_512"),
        ("ONEDNN_MAX_CPU_ISA", ""),
        ("ATEN_CPU_CAPABILITY", "avx512"),
        ("MKL_ENABLE_INSTRUCTIONS", "AVX512_E3"),
    ],
)
def test_a_variable_that_leaves_bf16_changes_nothing(variable, value):
    assert bf16_is_fast(CPU, WITH_BF16, {variable: value})
    assert not bf16_is_fast(CPU, {}, {variable: value})


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("ONEDNN_MAX_CPU_ISA", "AVX2"),
        ("ONEDNN_MAX_CPU_ISA", "avx2_vnni_2"),
        ("ONEDNN_MAX_CPU_ISA", "AVX512_CORE"),
        ("DNNL_MAX_CPU_ISA", "AVX512_CORE_VNNI"),
        ("ATEN_CPU_CAPABILITY", "avx2"),
        ("ATEN_CPU_CAPABILITY", "default"),
        ("MKL_ENABLE_INSTRUCTIONS", "AVX2"),
        ("MKL_ENABLE_INSTRUCTIONS", "AVX512_E2"),
    ],
)
def test_a_variable_that_forbids_the_instructions_makes_bf16_slow(variable, value):
    assert not bf16_is_fast(CPU, WITH_BF16, {"ONEDNN_MAX_CPU_ISA": "DEFAULT", variable: value})


def test_the_environment_of_the_process_is_read(monkeypatch):
    for variable in ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY", "MKL_ENABLE_INSTRUCTIONS"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: WITH_BF16, raising=False)
    assert find_precision("auto", CPU) == "bf16"
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    assert find_precision("auto", CPU) == "float32"


def test_a_torch_that_does_not_know_the_cpu_computes_in_float32(monkeypatch):
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert find_precision("auto", CPU) == "float32"


@pytest.mark.parametrize(("capability", "fast"), [((7, 5), False), ((8, 0), True), ((9, 0), True)])
def test_a_gpu_is_fast_in_bf16_from_compute_capability_8(capability, fast, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert bf16_is_fast(torch.device("cuda", 1)) is fast


def test_another_kind_of_device_computes_in_float32():
    assert find_precision("auto", torch.device("mps")) == "float32"


@pytest.mark.parametrize("name", ["float32", "bf16"])
def test_a_precision_that_is_named_is_taken(name, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict, raising=False)
    assert find_precision(name, CPU) == name


@pytest.mark.slow(reason="trains a run")
def test_what_runs_on_a_cpu_touches_no_gpu(tmp_path, monkeypatch):
    touched = []
    monkeypatch.delenv("PYTORCH_NVML_BASED_CUDA_CHECK", raising=False)  # lightning sets it: the devices below count
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda *args: touched.append(args) or torch.zeros(1))
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda *args: touched.append(args))
    run = short_runs.settings(tmp_path, "none", "protocol.epochs=1")
    folder = execute(run, quiet=True).folder
    evaluate_run(folder)
    spectrum.of_networks("resnet14", "resnet8", batches=1, here=Here(device="cpu"))
    work_on([[short_runs.settings(tmp_path, "none", "protocol.epochs=1", "seed=1")]], 0, Progress(), wait=False)
    assert not touched
