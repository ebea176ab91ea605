"""A frozen network whose weights are cast beforehand says what autocast would have it say, to the bit."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from kdzoo import DataSpec
from kdzoo.models import cast_weights, create, wrap
from kdzoo.outputs import EVERYTHING

DATA = DataSpec("fake", 7, tuple("abcdefg"), 32, torch.arange(7))


def outputs(network, images, dtype=torch.bfloat16):
    with torch.no_grad(), torch.autocast("cpu", dtype):
        output = network(images, EVERYTHING)
    final = [] if output.final is None else [output.final]
    return [output.logits, output.embedding, *output.features, *output.preactivations, *final]


@pytest.mark.slow(reason="passes through large networks")
@pytest.mark.parametrize(
    "name",
    ["resnet8x4", "vit_tiny_patch16_224", "swin_pico_patch4_window7_224", "test_convnext", "torchvision:resnet18"],
)
def test_the_bits_are_those_of_autocast(name):
    network = create(name, DATA).eval().requires_grad_(False).to(memory_format=torch.channels_last)
    images = torch.rand(5, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    before = outputs(network, images)
    cast = cast_weights(network, torch.bfloat16)
    assert cast is not network
    assert all(torch.equal(one, other) for one, other in zip(outputs(cast, images), before, strict=True))
    kinds = {weight.dtype for layer in cast.modules() if type(layer) is nn.Conv2d for weight in layer.parameters()}
    assert kinds == {torch.bfloat16}
    assert cast.classifier is None or cast.classifier.weight.dtype == torch.float32
    assert all(p.dtype == torch.float32 for p in network.parameters())
    assert all(torch.equal(one, other) for one, other in zip(outputs(network, images), before, strict=True))


class Odd(nn.Module):
    """Reads the weight of a plain layer by itself, in float32."""

    def __init__(self):
        super().__init__()
        self.stages = nn.Sequential(*(nn.Conv2d(3 if i == 0 else 4, 4, 3, stride=2, padding=1) for i in range(4)))
        self.gate = nn.Linear(4, 4)
        self.head = nn.Linear(4, 7)

    def forward(self, images):
        pooled = self.stages(images).mean((2, 3))
        return self.head(pooled.float() * F.normalize(self.gate.weight).sum(0))


def test_a_network_whose_bits_would_change_is_left_alone():
    network = wrap(Odd(), image_size=32, num_classes=7).eval().requires_grad_(False)
    assert cast_weights(network, torch.bfloat16) is network
