"""Methods and networks of others that misbehave fail alone, each in one line, all side by side in one training."""

import os
import re
import sys

import pytest
import torch
from safetensors.torch import load_file

from kdzoo import models, registry
from kdzoo.data import open_dataset
from kdzoo.engine.passes import Teacher
from kdzoo.engine.progress import Progress
from kdzoo.engine.training import train_lanes
from kdzoo.errors import UserError

from ..misbehaving import IMPORTS, METHODS, NETWORKS, write_method, write_network
from ..short_runs import settings

SHORT = ["protocol.epochs=1", "protocol.batch_size=16", "data.limit=32", "engine.checkpoint_seconds=0"]


@pytest.fixture(scope="module")
def train(tmp_path_factory):
    """Train lanes of a few steps, and give the outcome of each."""
    images = open_dataset("digits", limit=32)
    torch.manual_seed(0)
    teacher = Teacher(models.create("resnet14", images.spec).eval().requires_grad_(False), top1=10.0)

    def train(folder, *lanes):
        runs = [settings(folder / str(i), method, *SHORT, student=student) for i, (method, student) in enumerate(lanes)]
        return train_lanes(runs, images, teacher, Progress(quiet=True))

    return train


@pytest.fixture(scope="module")
def alone(train, tmp_path_factory):
    """The weights of kd's student, trained without any method beside it."""
    [outcome] = train(tmp_path_factory.mktemp("alone"), ("kd", "resnet8"))
    return load_file(outcome.folder / "student.safetensors")


@pytest.fixture(scope="module")
def methods(train, tmp_path_factory):
    """The outcome of each misbehaving method, and last that of kd beside them."""
    folder = tmp_path_factory.mktemp("methods")
    files = [write_method(folder, number, name) for number, name in enumerate(METHODS)]
    outcomes = train(folder, *((file, "resnet8") for file in files), ("kd", "resnet8"))
    return dict(zip([*METHODS, "kd"], outcomes, strict=True))


@pytest.fixture(scope="module")
def networks(train, tmp_path_factory):
    """The same of students."""
    folder, here = tmp_path_factory.mktemp("networks"), os.getcwd()
    names = [write_network(folder, number, name) for number, name in enumerate(NETWORKS)]
    os.chdir(folder)
    try:
        outcomes = train(folder, *(("kd", name) for name in names), ("kd", "resnet8"))
    finally:
        os.chdir(here)
        sys.path.remove(str(folder))
    return dict(zip([*NETWORKS, "kd"], outcomes, strict=True))


def told(outcome):
    assert isinstance(outcome, UserError), "it ended well"
    assert "\n" not in str(outcome)
    assert len(str(outcome)) < 800
    return str(outcome)


@pytest.mark.slow(reason="a hundred runs in training, side by side")
@pytest.mark.parametrize("name", METHODS)
def test_a_method_that_misbehaves_fails_in_one_line(methods, name):
    said = told(methods[name])
    assert re.search(METHODS[name][-1], said), said


@pytest.mark.slow(reason="a hundred runs in training, side by side")
@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_that_misbehaves_fails_in_one_line_or_harms_nothing(networks, name):
    expected = NETWORKS[name][-1]
    if expected:
        assert re.search(expected, told(networks[name])), networks[name]
    else:
        assert not isinstance(networks[name], UserError), networks[name]


@pytest.mark.slow(reason="a hundred runs in training, side by side")
@pytest.mark.parametrize("zoo", ["methods", "networks"])
def test_what_is_beside_them_ends_with_the_same_bits(zoo, alone, request):
    weights = load_file(request.getfixturevalue(zoo)["kd"].folder / "student.safetensors")
    assert all(torch.equal(tensor, weights[name]) for name, tensor in alone.items())


@pytest.mark.parametrize("name", IMPORTS)
def test_a_file_that_misbehaves_at_import_is_one_line_and_changes_nothing(tmp_path, name):
    code, expected = IMPORTS[name]
    file, here = tmp_path / "foreign.py", os.getcwd()
    file.write_text(f"from kdzoo import Distiller\n{code}\nclass Foreign(Distiller): pass\n")
    with pytest.raises(UserError) as caught:
        registry.load(str(file))
    assert re.search(expected, told(caught.value)), caught.value
    assert (torch.get_default_dtype(), torch.is_grad_enabled(), os.getcwd()) == (torch.float32, True, here)
    assert torch.get_default_device() == torch.device("cpu")
    file.write_text("from kdzoo import Distiller\nclass Foreign(Distiller): pass\n")
    assert registry.load(str(file)).__name__ == "Foreign"
