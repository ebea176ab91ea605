"""Weights to files and back."""

import errno
import os
import pickle

import pytest
import timm
import torch
from safetensors.torch import load_file

from kdzoo import DataSpec
from kdzoo.errors import UserError
from kdzoo.models import create, load_weights, save_weights

DATA = DataSpec("fake", 10, tuple("abcdefghij"), 32, torch.arange(10))


class Exploit:
    """What a hostile pickle does when it is opened."""

    def __init__(self, proof):
        self.proof = proof

    def __reduce__(self):
        return os.mkdir, (str(self.proof),)


def differ(first, second):
    theirs = second.state_dict()
    return any(not value.equal(theirs[key]) for key, value in first.state_dict().items())


def test_saved_weights_come_back(tmp_path):
    first, second = create("resnet8", DATA), create("resnet8", DATA)
    assert differ(first, second)
    save_weights(first, tmp_path / "new" / "weights.safetensors")
    load_weights(second, tmp_path / "new" / "weights.safetensors")
    assert not differ(first, second)
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["weights.safetensors"]


def test_saved_weights_load_straight_into_timm(tmp_path):
    network = create("resnet8", DATA)
    save_weights(network, tmp_path / "weights.safetensors")
    timm.create_model("resnet8", num_classes=10).load_state_dict(load_file(tmp_path / "weights.safetensors"))


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    file = tmp_path / "weights.safetensors"
    save_weights(create("resnet8", DATA), file)
    before = file.read_bytes()

    def full(descriptor):
        raise OSError(errno.ENOSPC, "disk full")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"the disk of .* is full"):
        save_weights(create("resnet8", DATA), file)
    assert file.read_bytes() == before
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("nest", ["state_dict", "model", "student"])
def test_nests_and_prefixes_of_other_trainers_are_taken_off(tmp_path, nest):
    first, second = create("resnet8", DATA), create("resnet8", DATA)
    state = {f"module.{key}": value for key, value in first.body.state_dict().items()}
    torch.save({nest: state, "epoch": 3}, tmp_path / "weights.pth")
    load_weights(second, tmp_path / "weights.pth")
    assert not differ(first, second)


def test_weights_of_another_network_are_refused_by_name(tmp_path):
    save_weights(create("resnet8", DATA._replace(num_classes=7)), tmp_path / "weights.safetensors")
    network = create("resnet8", DATA)
    before = {key: value.clone() for key, value in network.state_dict().items()}
    with pytest.raises(UserError, match=r"fc\.weight is \(7, 64\), expected \(10, 64\)") as error:
        load_weights(network, tmp_path / "weights.safetensors")
    assert "2 differ, 0 missing, 0 unexpected" in str(error.value)
    assert all(value.equal(before[key]) for key, value in network.state_dict().items())


def test_missing_and_unexpected_tensors_are_counted(tmp_path):
    save_weights(create("resnet8", DATA), tmp_path / "weights.safetensors")
    with pytest.raises(UserError, match=r"[1-9]\d* missing, 0 unexpected"):
        load_weights(create("resnet14", DATA), tmp_path / "weights.safetensors")


def test_a_pickle_that_runs_code_is_refused_unrun(tmp_path):
    proof = tmp_path / "owned"
    (tmp_path / "weights.pt").write_bytes(pickle.dumps({"state_dict": Exploit(proof)}, protocol=2))
    torch.save({"state_dict": Exploit(proof)}, tmp_path / "zipped.pt")
    for name in ("weights.pt", "zipped.pt"):
        with pytest.raises(UserError, match="cannot be read as weights"):
            load_weights(create("resnet8", DATA), tmp_path / name)
    assert not proof.exists()


@pytest.mark.parametrize("name", ["weights.safetensors", "weights.pt"])
def test_files_that_hold_no_weights_are_refused(tmp_path, name):
    network = create("resnet8", DATA)
    with pytest.raises(UserError, match="not found"):
        load_weights(network, tmp_path / name)
    (tmp_path / name).write_text("no weights at all")
    with pytest.raises(UserError, match="cannot be read as weights"):
        load_weights(network, tmp_path / name)
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(UserError, match="holds no weights"):
        load_weights(network, tmp_path / "list.pt")
