"""A convolution learns the same in bfloat16, no matter what memory held before."""

import pytest
import torch
from torch import nn

from kdzoo.models import learn_from_narrow_maps

PADDED = {"kernel_size": 3, "stride": 2, "padding": 1}
LAYERS = {
    "3x3": PADDED,
    "5x5, stride 3": {"kernel_size": 5, "stride": 3, "padding": 2},
    "in groups": {**PADDED, "groups": 2},
    "without a bias": {**PADDED, "bias": False},
    "padded by 2 and 1": {**PADDED, "kernel_size": (5, 3), "padding": (2, 1)},
    "dilated": {**PADDED, "padding": 2, "dilation": 2},
}


def layer(kind):
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(16, 16, **LAYERS[kind]))


def slopes(network, maps, dtype):
    """The gradients of weight, bias and maps, computed where memory holds NaN."""
    maps = maps.clone().requires_grad_()
    for size in (64, 256, 1000, 4000, 16000, 64000):
        torch.full((size,), torch.nan)
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        found = network(maps)
    return found, torch.autograd.grad(found.float().square().sum(), [*network.parameters(), maps])


@pytest.mark.parametrize("shape", [(1, 1), (2, 1), (1, 2), (4, 4), (3, 2)])
@pytest.mark.parametrize("kind", LAYERS)
def test_gradients_on_narrow_maps_are_those_of_float32_but_for_rounding(kind, shape):
    plain, changed = layer(kind), layer(kind)
    learn_from_narrow_maps(changed)
    assert changed.state_dict().keys() == plain.state_dict().keys()
    maps = torch.rand(8, 16, *shape)
    outputs, expected = slopes(plain, maps, torch.float32)
    torch.testing.assert_close(outputs, changed(maps))
    for _ in range(3):
        found, gradients = slopes(changed, maps, torch.bfloat16)
        torch.testing.assert_close(found.float(), outputs, rtol=0.05, atol=0.05)
        for one, other in zip(gradients, expected, strict=True):
            assert (one - other).norm() <= 0.05 * other.norm()


def test_other_layers_stay_what_they_are():
    network = nn.Sequential(
        nn.Conv2d(3, 3, 3, padding=1),
        nn.Conv2d(3, 3, 2, stride=2),
        nn.Conv2d(3, 3, 3, stride=2, padding=1, padding_mode="reflect"),
        nn.Conv2d(3, 3, 3, padding="same"),
    )
    learn_from_narrow_maps(network)
    assert [type(module) for module in network] == [nn.Conv2d] * 4
