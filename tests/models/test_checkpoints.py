"""Checkpoints as training code of all kinds saves them."""

import argparse
import os
import pathlib
import pickle
import re

import numpy as np
import pytest
import timm
import torch
import torchvision
from omegaconf import OmegaConf
from safetensors.torch import save_file
from torch import nn
from torch.distributed import checkpoint as dist_cp
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from kdzoo import DataSpec
from kdzoo.errors import UserError
from kdzoo.models import create, load_given, load_weights, save_weights

DATA = DataSpec("fake", 10, tuple("abcdefghij"), 32, torch.arange(10))
PREFIXES = ("module.", "_orig_mod.", "model.", "net.", "student.", "backbone.", "encoder.", "_fsdp_wrapped_module.")


@pytest.fixture(scope="module")
def trained():
    return create("resnet8", DATA).body.state_dict()


def loaded(content, tmp_path, name="resnet8", **asked):
    """What a network holds after loading a file with this content, and the line about it."""
    file = tmp_path / "checkpoint.pth"
    torch.save(content, file)
    network = create(name, DATA)
    return network.body.state_dict(), load_weights(network, file, **asked)


def same(state, other):
    return all(value.equal(other[key]) for key, value in state.items())


def shifted(state, by=1):
    return {key: value + by for key, value in state.items()}


def prefixed(state, prefix):
    return {prefix + key: value for key, value in state.items()}


@pytest.mark.parametrize(
    "nest",
    [
        *("state_dict", "model", "student", "net", "network", "model_state_dict", "params", "weights", "teacher"),
        *("backbone", "module", "ema", "state_dict_ema", "model_ema", "a_name_never_seen"),
    ],
)
def test_weights_are_found_in_any_container(nest, trained, tmp_path):
    state, said = loaded({nest: trained, "epoch": 3, "optimizer": {"state": {0: {"step": torch.ones(1)}}}}, tmp_path)
    assert same(state, trained)
    assert f"under {nest}" in said


def test_containers_may_lie_in_containers(trained, tmp_path):
    state, said = loaded({"checkpoint": {"model": {"state_dict": prefixed(trained, "module.")}}}, tmp_path)
    assert same(state, trained)
    assert "under checkpoint.model.state_dict.module" in said


@pytest.mark.parametrize(
    "prefix", [*PREFIXES, "timm_model.", "own_name.", "module._orig_mod.", "_orig_mod.module.model."]
)
def test_prefixes_come_off_in_any_number_and_order(prefix, trained, tmp_path):
    state, said = loaded(prefixed(trained, prefix), tmp_path)
    assert same(state, trained)
    assert f"under {prefix[:-1]}" in said


def test_wrappers_of_single_submodules_come_off(trained, tmp_path):
    inside = {re.sub(r"^(stages\.1)\.", r"\1._orig_mod.", key): value for key, value in trained.items()}
    assert inside.keys() != trained.keys()
    assert same(loaded(inside, tmp_path)[0], trained)


def test_a_prefix_that_only_the_backbone_has_comes_off(trained, tmp_path):
    mixed = {key if key.startswith("fc.") else f"backbone.{key}": value for key, value in trained.items()}
    assert same(loaded(mixed, tmp_path)[0], trained)


@pytest.mark.parametrize("nest", ["ema", "state_dict_ema", "model_ema", "ema_model"])
def test_a_moving_average_is_preferred_and_said(nest, trained, tmp_path):
    state, said = loaded({"state_dict": shifted(trained), nest: trained}, tmp_path)
    assert same(state, trained)
    assert "a moving average (EMA)" in said
    assert "EMA" not in loaded({"state_dict": trained}, tmp_path)[1]


@pytest.mark.parametrize("joined", [False, True])
def test_a_file_of_student_and_teacher_gives_the_one_asked_for(joined, trained, tmp_path):
    teacher = shifted(trained)
    both = {"student": trained, "teacher": teacher}
    if joined:  # as mdistiller saves a distiller as a whole
        both = {"model": prefixed(trained, "module.student.") | prefixed(teacher, "module.teacher.")}
    assert same(loaded(both, tmp_path, role="student")[0], trained)
    assert same(loaded(both, tmp_path, role="teacher")[0], teacher)
    with pytest.raises(UserError, match=r"several networks that fit, under .*student and under .*teacher"):
        loaded(both, tmp_path)


def test_of_student_and_teacher_of_two_architectures_the_one_that_fits_is_taken(trained, tmp_path):
    larger = create("resnet14", DATA).body.state_dict()
    both = {"model": prefixed(trained, "module.student.") | prefixed(larger, "module.teacher.")}
    assert same(loaded(both, tmp_path)[0], trained)
    assert same(loaded(both, tmp_path, "resnet14")[0], larger)


def test_weights_in_several_files_are_refused_by_that_name(trained, tmp_path):
    first = tmp_path / "model-00001-of-00002.safetensors"
    save_file({"fc.weight": trained["fc.weight"]}, first)
    for given in (tmp_path, first):
        with pytest.raises(UserError, match=r"are split into several files; .* save them in one"):
            load_weights(create("resnet8", DATA), given)
    for whole in ("fold-1-of-5.safetensors", "model-00001-of-00001.safetensors"):
        save_file(dict(trained), tmp_path / whole)
        load_weights(create("resnet8", DATA), tmp_path / whole)


@pytest.mark.filterwarnings("ignore:torch.distributed is .*single process:UserWarning")
def test_parts_that_several_processes_wrote_are_refused_with_what_makes_one_file_of_them(trained, tmp_path):
    parts, whole = tmp_path / "parts", tmp_path / "weights.pt"
    dist_cp.save({"model": dict(trained)}, checkpoint_id=parts)
    for given in (parts, *parts.glob("*.distcp")):
        with pytest.raises(UserError, match=r"in parts, .* one file of them with python -m torch\.dist.* dcp_to_torch"):
            load_weights(create("resnet8", DATA), given)
    dcp_to_torch_save(parts, whole)  # which is what that command does
    network = create("resnet8", DATA)
    load_weights(network, whole)
    assert same(network.body.state_dict(), trained)
    zero = tmp_path / "zero"
    zero.mkdir()
    for name in ("latest", "zero_to_fp32.py"):
        (zero / name).write_text("")
    with pytest.raises(UserError, match=r"in parts, .* with the zero_to_fp32\.py that lies beside them"):
        load_weights(create("resnet8", DATA), zero)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "student.safetensors"])
def test_a_folder_gives_the_weights_in_it(name, trained, tmp_path):
    folder = tmp_path / "exported"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"holds no weights; expected model\.safetensors or pytorch_model\.bin"):
        load_weights(create("resnet8", DATA), folder)
    (save_file if name.endswith("safetensors") else torch.save)(dict(trained), folder / name)
    network = create("resnet8", DATA)
    assert name in load_weights(network, folder)
    assert same(network.body.state_dict(), trained)


EXTRAS = {
    "argparse.Namespace": argparse.Namespace(lr=0.1, path=pathlib.Path("runs"), of=argparse.Namespace(x=1)),
    "a numpy scalar": np.float64(71.5),
    "a numpy integer": np.int64(3),
    "a numpy array": np.arange(3.0),
    "pathlib": pathlib.Path("runs") / "one",
    "a windows path": pathlib.PureWindowsPath("C:/runs"),
    "OmegaConf": OmegaConf.create({"model": {"name": "vit", "sizes": [1, 2]}, "lr": 0.1, "on": True}),
}


@pytest.mark.parametrize("extra", EXTRAS)
def test_harmless_extras_beside_the_weights_are_left_out(extra, trained, tmp_path):
    file = tmp_path / "checkpoint.pth"
    torch.save({"model": trained, "args": EXTRAS[extra]}, file)
    with pytest.raises(pickle.UnpicklingError):  # torch by itself refuses them, but for the paths of some versions
        torch.load(file, weights_only=True)
    assert same(loaded({"model": trained, "args": EXTRAS[extra]}, tmp_path)[0], trained)


class Attribute:
    """What a pickle holds that looks up an attribute when it is opened."""

    def __reduce__(self):
        return getattr, ("text", "upper")


def test_what_is_refused_is_named_in_one_line(trained, tmp_path):
    with pytest.raises(UserError, match=r"it holds builtins\.getattr, and loading that may run code") as error:
        loaded({"model": trained, "hook": Attribute()}, tmp_path)
    assert "\n" not in str(error.value)
    assert "\x1b" not in str(error.value)


@pytest.mark.parametrize("wrap", [lambda module: module, lambda module: {"model": module, "epoch": 1}])
def test_a_pickled_module_gets_the_advice_to_save_its_state(wrap, tmp_path):
    with pytest.raises(UserError, match=r"a whole module, and loading one runs code.*save its state_dict\(\)"):
        loaded(wrap(nn.Sequential(nn.Linear(2, 2))), tmp_path)


def test_a_module_in_a_plain_pickle_gets_the_advice_to_save_its_state_too(tmp_path):
    (tmp_path / "model.pkl").write_bytes(pickle.dumps(nn.Sequential(nn.Linear(2, 2))))
    with pytest.raises(UserError, match=r"a whole module, and loading one runs code"):
        load_weights(create("resnet8", DATA), tmp_path / "model.pkl")


def test_programs_are_refused_by_what_they_are(tmp_path):
    layers = nn.Sequential(nn.Linear(2, 2)).eval()
    torch.export.save(torch.export.export(layers, (torch.rand(2, 2),)), tmp_path / "student.pt2")
    (tmp_path / "student.onnx").write_bytes(b"\x08\x0a\x12\x07pytorch:\x1d\x0a\x1btorch.nn.modules.linear.Linear")
    for name, kind in (("student.pt2", "torch.export"), ("student.onnx", "ONNX")):
        with pytest.raises(
            UserError, match=rf"it is a program of {kind}; expected safetensors, or a file of torch\.save"
        ):
            load_weights(create("resnet8", DATA), tmp_path / name)


def test_files_without_counters_and_with_those_of_profilers_load(trained, tmp_path):
    bare = {key: value for key, value in trained.items() if not key.endswith("num_batches_tracked")}
    assert len(bare) < len(trained)
    counted = bare | {"total_ops": torch.zeros(1), "stages.0.total_params": torch.zeros(1)}
    for content in (bare, counted):
        state, _ = loaded(content, tmp_path)
        assert same(bare, state)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_any_precision_become_those_of_the_network(dtype, trained, tmp_path):
    rounded = {key: value.to(dtype) if value.is_floating_point() else value for key, value in trained.items()}
    state, _ = loaded(rounded, tmp_path)
    assert state["fc.weight"].dtype == torch.float32
    assert state["fc.weight"].equal(rounded["fc.weight"].float())


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("sparse", lambda value: value.to_sparse()),
        ("meta", lambda value: value.to("meta")),
        ("quantised", lambda value: torch.quantize_per_tensor(value, 0.1, 0, torch.qint8)),
        ("tensor of complex64", lambda value: value.to(torch.complex64)),
        ("tensor of bool", lambda value: value > 0),
        ("tensor of float8_e4m3fn", lambda value: value.to(torch.float8_e4m3fn)),
    ],
)
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
def test_tensors_that_hold_no_plain_values_are_refused_by_name(kind, change, trained, tmp_path):
    with pytest.raises(UserError, match=rf"fc\.weight is a {kind}") as error:
        loaded(trained | {"fc.weight": change(trained["fc.weight"])}, tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"x", "it has 1 bytes"),
        (b"", "it has 0 bytes"),
        (b"epoch,top1\n1,10.0\n2,20.0\n", "it is a text file"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "git lfs pull"),
        (bytes(range(200)), "it is damaged"),
    ],
)
@pytest.mark.parametrize("suffix", [".pth", ".safetensors", ""])
def test_files_that_are_no_checkpoints_say_what_they_are(content, said, suffix, tmp_path):
    file = tmp_path / f"weights{suffix}"
    file.write_bytes(content)
    with pytest.raises(UserError, match=said) as error:
        load_weights(create("resnet8", DATA), file)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("save", "suffix"), [(torch.save, ".safetensors"), (save_file, ".pth")])
def test_a_file_is_read_for_what_it_holds_and_not_for_its_suffix(save, suffix, trained, tmp_path):
    file = tmp_path / f"weights{suffix}"
    save(dict(trained), file)
    network = create("resnet8", DATA)
    load_weights(network, file)
    assert same(network.body.state_dict(), trained)


def test_a_truncated_file_is_refused_in_one_line(trained, tmp_path):
    torch.save(trained, tmp_path / "whole.pth")
    content = (tmp_path / "whole.pth").read_bytes()
    (tmp_path / "half.pth").write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match="cannot be read as weights") as error:
        load_weights(create("resnet8", DATA), tmp_path / "half.pth")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("other", ["fc.1", "head.last", "cls"])
def test_a_head_that_was_put_in_the_place_of_the_networks_own_has_another_name(other, trained, tmp_path):
    renamed = {re.sub(r"^fc\.", f"{other}.", key): value for key, value in trained.items()}
    state, said = loaded({"state_dict": prefixed(renamed, "module.")}, tmp_path)
    assert same(state, trained)
    assert f"names translated from those of a network whose classifier is named {other}" in said
    wider = {**renamed, f"{other}.weight": torch.rand(3, 64), f"{other}.bias": torch.rand(3)}
    with pytest.raises(UserError, match=r"fc\.weight is \(3, 64\), expected \(10, 64\).*teacher\.finetune=true"):
        loaded(wider, tmp_path)
    state, _ = loaded(wider, tmp_path, drop_head=True)
    assert all(state[key].equal(value) for key, value in trained.items() if not key.startswith("fc."))


def test_a_head_of_two_layers_is_no_head_of_another_name(trained, tmp_path):
    rest = {key: value for key, value in trained.items() if not key.startswith("fc.")}
    own = {"fc.0.weight": torch.rand(64, 64), "fc.2.weight": torch.rand(10, 64), "fc.2.bias": torch.rand(10)}
    with pytest.raises(UserError, match=r"is missing; .*fc\.0\.weight is unexpected"):
        loaded({**rest, **own}, tmp_path)


def test_a_head_can_be_left_out(trained, tmp_path):
    wider = create("resnet8", DATA._replace(num_classes=7)).body.state_dict()
    with pytest.raises(UserError, match=r"teacher\.finetune=true"):
        loaded(wider, tmp_path)
    torch.save(wider, tmp_path / "wider.pth")
    network = create("resnet8", DATA)
    head = network.body.state_dict()["fc.weight"].clone()
    assert "without its head fc" in load_weights(network, tmp_path / "wider.pth", drop_head=True)
    state = network.body.state_dict()
    assert state["fc.weight"].equal(head)
    assert state["stem.0.weight"].equal(wider["stem.0.weight"])


def earlier_swin(state):
    """Name a Swin's tensors as timm 0.6 did: a stage halves at its end, and the head is one layer."""
    found = {}
    for key, value in state.items():
        key = re.sub(r"layers\.(\d)\.downsample", lambda m: f"layers.{int(m[1]) - 1}.downsample", key)
        found[key.replace("head.fc.", "head.")] = value
    return found | {"layers.0.blocks.0.attn.relative_position_index": torch.zeros(49, 49)}


def test_a_swin_of_timm_0_6_loads_exactly(tmp_path):
    state = timm.create_model("swin_nano_patch4_window7_224", num_classes=10).state_dict()
    torch.save({"model": earlier_swin(state), "args": argparse.Namespace()}, tmp_path / "swin.pth")
    network = create("swin_nano", DATA._replace(image_size=224))
    assert "timm's earlier versions" in load_weights(network, tmp_path / "swin.pth")
    assert same(state, network.body.state_dict())


def test_weights_that_timm_would_resample_are_refused(tmp_path):
    torch.save(timm.create_model("vit_pico_patch16_224", num_classes=10).state_dict(), tmp_path / "vit.pth")
    with pytest.raises(UserError, match=r"is \(1, 197, 96\), expected"):
        load_weights(create("vit_pico", DATA), tmp_path / "vit.pth")


@pytest.mark.slow(reason="passes through large networks")
def test_torchvisions_names_load_into_torchvisions_network(tmp_path):
    state = torchvision.models.resnet18(num_classes=10).state_dict()
    torch.save({"model": state}, tmp_path / "resnet.pth")
    network = create("torchvision:resnet18", DATA._replace(image_size=224))
    load_weights(network, tmp_path / "resnet.pth")
    assert same(state, network.body.state_dict())


def test_weights_that_are_not_numbers_are_refused_by_name(trained, tmp_path):
    with pytest.raises(UserError, match=r"fc\.weight holds NaN; the training that it comes from failed"):
        loaded(trained | {"fc.weight": trained["fc.weight"] * float("nan")}, tmp_path)


def test_a_file_that_holds_itself_or_nests_without_end_is_read_once(trained, tmp_path):
    whole = dict(trained)
    whole["again"] = {"state_dict": whole}
    assert same(loaded(whole, tmp_path)[0], trained)
    doubled: dict = {}
    for _ in range(40):  # 2**40 ways lead through it
        doubled = {"a": doubled, "b": doubled}
    with pytest.raises(UserError, match="holds no weights"):
        loaded(doubled, tmp_path)
    for _ in range(200):
        whole = {"a": whole}
    with pytest.raises(UserError, match="holds no weights"):
        loaded(whole, tmp_path)


@pytest.mark.skipif(os.name != "posix", reason="pipes of POSIX")
@pytest.mark.parametrize("make", [os.mkfifo, lambda place: place.symlink_to("nowhere"), lambda place: place.mkdir()])
def test_what_is_no_file_is_named_and_never_waited_for(make, tmp_path):
    make(tmp_path / "weights.safetensors")
    with pytest.raises(UserError, match=r"weights\.safetensors' (not found|holds no weights); expected"):
        load_given("resnet8", DATA, tmp_path / "weights.safetensors")


@pytest.mark.parametrize(
    "facts", ["3", "{", "[" * 100_000, '{"image_size": "x"}', '{"image_size": -1}', '{"std": [0]}', '{"mean": [NaN]}']
)
def test_facts_that_kdzoo_never_writes_beside_weights_are_one_line(facts, trained, tmp_path):
    file = tmp_path / "student.safetensors"
    save_file({key: value.clone() for key, value in trained.items()}, file, {"kdzoo": facts})
    with pytest.raises(UserError, match="is damaged: what it says of its network") as error:
        load_given("resnet8", DATA, file)
    assert "\n" not in str(error.value)
    save_weights(create("resnet8", DATA), file)
    assert load_given("resnet8", DATA, file).image_size == 32
