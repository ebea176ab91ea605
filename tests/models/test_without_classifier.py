"""Networks without a classifier: made by name, filled from files that hold one, folded, written and read."""

import pytest
import torch
from safetensors.torch import save_file

from kdzoo import DataSpec, UserError
from kdzoo.models import create, frozen, load_given, save_weights
from kdzoo.models.given import classes_in
from kdzoo.precision import PRECISIONS

DATA = DataSpec("x", 5, tuple("abcde"), 32, torch.zeros(0, dtype=torch.int64))
BARE = DATA._replace(num_classes=0, class_names=())
NAMES = ("resnet8", "test_vit", "test_resnet")


def filled(name, data=DATA):
    torch.manual_seed(0)
    return create(name, data).eval()


@pytest.mark.parametrize("kind", ["kdzoo", "plain"])
@pytest.mark.parametrize("name", NAMES)
def test_a_checkpoint_with_a_head_is_read_without_it_and_embeds_alike(name, kind, tmp_path):
    network, file = filled(name), tmp_path / ("x.safetensors" if kind == "kdzoo" else "x.pth")
    if kind == "kdzoo":
        save_weights(network, file, network.facts())
    else:
        torch.save(network.body.state_dict(), file)
    bare, images = load_given(name, BARE, file, role="teacher").eval(), torch.rand(2, 3, 32, 32)
    if kind == "plain":  # which is also tried as its weights are published
        network = load_given(name, DATA, file, role="teacher").eval()
    output = bare(images)
    assert output.logits.shape == (2, 0)
    assert torch.equal(output.embedding, network(images).embedding)
    assert not bare.has_classifier
    assert network.has_classifier
    assert sum(p.numel() for p in bare.parameters()) < sum(p.numel() for p in network.parameters())
    assert classes_in(name, DATA, file) == 5


@pytest.mark.parametrize("name", NAMES)
def test_it_is_written_and_read_as_it_is(name, tmp_path):
    bare, file, images = filled(name, BARE), tmp_path / "x.safetensors", torch.rand(2, 3, 32, 32)
    save_weights(bare, file, bare.facts())
    again = load_given(name, DATA, file).eval()  # the file says that it has no classifier
    assert torch.equal(again(images).embedding, bare(images).embedding)
    with pytest.raises(UserError, match=r"holds no classifier; pass weights with one, or set teacher\.classifier"):
        classes_in(name, DATA, file)


@pytest.mark.parametrize("kind", ["kdzoo", "plain"])
@pytest.mark.parametrize("name", NAMES)
def test_training_may_begin_from_a_network_without_a_classifier_by_a_new_one(name, kind, tmp_path):
    bare, file, images = filled(name, BARE), tmp_path / "x.safetensors", torch.rand(2, 3, 32, 32)
    save_weights(bare, file, bare.facts()) if kind == "kdzoo" else save_file(bare.body.state_dict(), file)
    begun = load_given(name, DATA, file, drop_head=True, image_size=32).eval()
    output = begun(images)
    assert output.logits.shape == (2, 5)
    if kind == "kdzoo":  # the other file does not say what its network reads
        assert torch.allclose(output.embedding, bare(images).embedding, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_its_fast_copy_embeds_as_it_does(name):
    bare, images = filled(name, BARE).requires_grad_(False), torch.rand(2, 3, 32, 32)
    copy = frozen(bare, PRECISIONS["float32"])
    with torch.inference_mode():
        ours, theirs = bare(images), copy(images)
    assert theirs.logits.shape == (2, 0)
    assert torch.allclose(ours.embedding, theirs.embedding, atol=1e-4)


def test_a_network_that_cannot_lack_its_classifier_says_so():
    with pytest.raises(UserError, match="cannot be made without a classifier here"):
        create("torchvision:resnet18", BARE)
