"""The filter before SimKD's projector, and its control."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from kdzoo.distillers.sfakd import SFAKD, SmoothedFrequencies, soft_high_pass
from torch import nn
from torch.nn import functional as F

from kdzoo import Batch, Distillation, Output
from kdzoo.errors import UserError


class Net(nn.Module):
    """Four convolutions and a classifier of the last map's mean."""

    def __init__(self, width, stride=1):
        super().__init__()
        widths = (3, 4, 5, 6, width)
        self.layers = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1) for a, b in pairwise(widths))
        self.classifier, self.stride = nn.Linear(width, 10), stride

    def forward(self, images, show=None):
        maps = []
        for layer in self.layers:
            images = F.relu(layer(images))
            maps.append(images)
        maps[-1] = F.avg_pool2d(images, self.stride)
        embedding = maps[-1].mean((2, 3))
        return Output(self.classifier(embedding), embedding, tuple(maps))


@pytest.fixture
def pair(waves, data):
    """A prepared student of width 4 and its teacher of width 6, on grids of 8 pixels by default; and a batch."""

    def build(s_stride=1, t_stride=1, **keywords):
        torch.manual_seed(0)
        batch = Batch.of(waves(6, 3, 8, 8), torch.arange(6), 10)
        student, teacher = Net(4, s_stride), Net(6, t_stride)
        shapes = [network(batch.images) for network in (student, teacher)]
        together = Distillation(student, teacher, SFAKD(**keywords).assemble(*shapes, data()))
        together.prepare([batch])
        return together, batch

    return build


def numbers(tensor):
    return tensor.detach().double().numpy()


def masked(side, sigma=0.1):
    y, x = np.meshgrid(*[np.fft.fftfreq(side, 1 / side)] * 2, indexing="ij")
    mask = 1 - np.exp(-(x**2 + y**2) / (2 * (sigma * side) ** 2))
    return mask / mask.max()


def augmented(module, maps, side):
    weight = numbers(module.weight)
    spectrum = np.fft.fft2(maps, norm="ortho") * (weight[..., 0] + 1j * weight[..., 1]) * masked(side)
    mixed = np.einsum("oi,bihw->bohw", numbers(module.convolve.weight)[:, :, 0, 0], maps)
    mixed = mixed + numbers(module.convolve.bias)[:, None, None]
    return numbers(module.shares)[1] * np.fft.ifft2(spectrum, norm="ortho").real + numbers(module.shares)[0] * mixed


def projected(layers, maps):
    """The projector's batch norms, convolutions and ReLUs, in double precision."""
    for layer in layers:
        if isinstance(layer, nn.Conv2d):
            weight = layer.weight.detach().double()
            maps = F.conv2d(maps, weight, padding=layer.padding, groups=layer.groups)
        elif isinstance(layer, nn.BatchNorm2d):
            mean, variance = maps.mean((0, 2, 3), keepdim=True), maps.var((0, 2, 3), correction=0, keepdim=True)
            maps = (maps - mean) / (variance + layer.eps).sqrt()
        else:
            maps = maps.clamp(min=0)
    return maps


@pytest.mark.parametrize(
    ("side", "average", "first"),
    [  # Myleswork/SFAKD@f5277b7, SFA_Module
        (8, 0.7134242792030498, [0.08023234132386334, -0.6549181972766926, 1.3704255707012107]),
        (7, 0.6564069953727001, [-0.37654574456385825, 0.2539162077785567, -0.006948586616612483]),
    ],
)
def test_the_filtered_map_is_that_of_numpy_and_of_the_authors_code(waves, side, average, first):
    module = SmoothedFrequencies(3, (side, side), 0.1).double()
    with torch.no_grad():
        parts = [waves(3, side, side, phase=phase, dtype=torch.float64) for phase in (0.0, 1.0)]
        module.weight.copy_(torch.stack(parts, dim=-1))
        module.convolve.weight.copy_(waves(3, 3, 1, 1, phase=2.0))
        module.convolve.bias.copy_(waves(3, phase=3.0))
    maps = waves(2, 3, side, side, phase=4.0, dtype=torch.float64)
    found = module(maps).detach()
    np.testing.assert_allclose(found, augmented(module, maps.numpy(), side), rtol=1e-5, atol=1e-6)
    assert found.abs().mean().item() == pytest.approx(average, rel=1e-6)
    np.testing.assert_allclose(found[1, 2, 3, :3], first, rtol=1e-5, atol=1e-6)


def test_the_term_is_the_error_of_the_projected_filtered_map(pair):
    together, batch = pair(simkd=2.0)
    student, teacher = (network(batch.images).features[3] for network in (together.student, together.teacher))
    module, *layers = together.distiller.projector.layers
    maps = torch.from_numpy(augmented(module, numbers(student), 8))
    seen = projected(layers, maps).clamp(min=0)  # as the teacher's map has no negative number
    assert together(batch)["simkd"].item() == pytest.approx(
        2 * np.mean((seen.numpy() - numbers(teacher)) ** 2), rel=1e-4
    )


def test_without_the_filter_nothing_but_the_filter_changes(pair):
    (whole, batch), (control, _) = pair(), pair(filter=False)
    differ = whole.distiller.state_dict().keys() ^ control.distiller.state_dict().keys()
    assert differ == {"projector.layers.0.weight"}
    control.distiller.load_state_dict(whole.distiller.state_dict() | shorter(whole), strict=False)
    with torch.no_grad():
        small = whole(batch)["simkd"].item()
        whole.distiller.projector.layers[0].weight.zero_()
        none = whole(batch)["simkd"].item()
        whole.distiller.projector.layers[0].weight.fill_(1.0)
    assert none == pytest.approx(control(batch)["simkd"].item(), rel=1e-5)
    assert small == pytest.approx(none, rel=0.2)
    assert whole(batch)["simkd"].item() != pytest.approx(none, rel=1e-3)


def shorter(together):
    name = "projector.layers.0.shares"
    return {name: together.distiller.state_dict()[name][:1]}


@pytest.mark.parametrize("grid", [(8, 8), (7, 5), (2, 2)])
def test_the_filter_lets_no_mean_pass_whatever_its_weights(waves, grid):
    module = SmoothedFrequencies(3, grid, 0.1)
    with torch.no_grad():
        module.weight.copy_(waves(3, *grid, 2))
        module.convolve.weight.zero_()
        module.convolve.bias.zero_()
    passed = module(waves(2, 3, *grid) + 5)
    assert passed.abs().max() > 0.1
    assert passed.mean((2, 3)).abs().max() < 1e-5


def test_the_mask_rises_from_the_slowest_wave_to_one():
    mask = soft_high_pass(8, 8, 0.1)
    assert mask[0, 0] == 0
    assert mask.max() == 1
    assert mask[0, :5].diff().min() > 0
    assert mask[0, 1].item() == pytest.approx(0.5421666502952576, rel=1e-6)  # Myleswork/SFAKD@f5277b7
    assert not soft_high_pass(1, 1, 0.1).any()


@pytest.mark.parametrize(("s_stride", "t_stride"), [(1, 2), (2, 1), (1, 8)])
def test_the_filter_reads_the_common_grid(pair, s_stride, t_stride):
    together, batch = pair(s_stride, t_stride)
    together(batch)["simkd"].backward()
    side = 8 // max(s_stride, t_stride)
    module = together.distiller.projector.layers[0]
    assert module.filters == (side > 1)
    if side > 1:
        assert module.weight.shape == (4, side, side, 2)
        assert module.weight.grad.abs().max() > 0
    assert together.deploy().eval()(batch.images).logits.shape == (6, 10)


def test_what_ships_holds_the_filter_and_the_teachers_classifier(pair):
    together, batch = pair()
    shipped = together.eval().deploy()
    maps = together.distiller.projector(together.student(batch.images).features[-1]).mean((2, 3))
    torch.testing.assert_close(shipped(batch.images).logits, together.teacher.classifier(maps))
    with torch.no_grad():
        before = shipped(batch.images).logits
        together.distiller.projector.layers[0].weight.fill_(1e3)
    assert not torch.allclose(shipped(batch.images).logits, before, atol=1e-3)


def test_a_weight_of_zero_ships_the_student_as_it_is(pair):
    together, batch = pair(simkd=0)
    assert together(batch) == {}
    assert together.deploy() is together.student


def test_a_width_that_is_not_positive_is_the_users_error():
    with pytest.raises(UserError, match="sigma=0"):
        SFAKD(sigma=0)
