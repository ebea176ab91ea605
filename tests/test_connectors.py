"""Pooling that both networks' maps go through."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from kdzoo import Output
from kdzoo.connectors import (
    BatchNorm2d,
    CommonGrid,
    CommonGrids,
    Pool,
    Positions,
    Resize,
    TeachersClassifier,
    before_relu,
    connector,
    conv_batch_norm,
)
from kdzoo.errors import UserError
from kdzoo.outputs import NetworkView


def wave(*shape):
    t = torch.arange(torch.Size(shape).numel(), dtype=torch.float64)
    return torch.sin(1.7 * t + t.sqrt()).reshape(shape)


@pytest.mark.parametrize("grid", [(8, 8), (7, 5), (6, 4), (1, 1), (5, 12)])
@pytest.mark.parametrize("size", [(1, 1), (2, 4), (4, 4), (5, 3), (8, 8)])
def test_pooling_is_adaptive_average_pooling(grid, size):
    size = (min(size[0], grid[0]), min(size[1], grid[1]))
    maps = wave(2, 3, *grid)
    torch.testing.assert_close(Pool(grid, size).double()(maps), F.adaptive_avg_pool2d(maps, size))


def test_pooling_to_the_same_grid_changes_nothing():
    maps = wave(2, 3, 7, 5)
    assert Pool((7, 5), (7, 5))(maps) is maps


@pytest.mark.parametrize(("grid", "size"), [((8, 8), (4, 4)), ((7, 5), (4, 4))])
def test_pooling_takes_half_precision_to_float32_and_has_the_gradient_of_its_values(grid, size):
    pool = Pool(grid, size)
    assert pool(wave(2, 3, *grid).bfloat16()).dtype == torch.float32
    assert torch.autograd.gradcheck(pool.double(), wave(1, 2, *grid).requires_grad_())


def test_pooling_keeps_no_state():
    assert not Pool((7, 5), (4, 4)).state_dict()


@pytest.mark.parametrize(
    ("student", "teacher", "size"),
    [((8, 8), (4, 4), (4, 4)), ((4, 4), (8, 8), (4, 4)), ((7, 5), (5, 7), (5, 5)), ((1, 1), (7, 7), (1, 1))],
)
def test_the_common_grid_has_the_smaller_height_and_the_smaller_width(student, teacher, size):
    f_s, f_t = wave(2, 3, *student).requires_grad_(), wave(2, 5, *teacher).requires_grad_()
    grid = CommonGrid(f_s, f_t).double()
    assert grid.size == size
    pooled = grid(f_s, f_t)
    for maps, each in zip(pooled, (f_s, f_t), strict=True):
        torch.testing.assert_close(maps, F.adaptive_avg_pool2d(each, size))
    assert pooled[0].requires_grad
    assert not pooled[1].requires_grad


@pytest.mark.parametrize(("kernel", "groups", "weights"), [(1, 1, 6 * 4), (3, 1, 6 * 4 * 9), (3, 2, 6 * 4 * 9 // 2)])
def test_a_convolution_with_batch_norm_keeps_the_grid_and_has_no_bias(kernel, groups, weights):
    layers = conv_batch_norm(4, 6, kernel, groups)
    assert nn.Sequential(*layers)(torch.randn(2, 4, 7, 5)).shape == (2, 6, 7, 5)
    assert [p.numel() for p in layers[0].parameters()] == [weights]


def shown(*grids):
    return Output(wave(2, 4), wave(2, 3), tuple(wave(2, 3, *grid) for grid in grids))


def test_common_grids_pool_the_stages_asked_for_in_their_order():
    student, teacher = shown((8, 8), (7, 5), (4, 4)), shown((4, 4), (9, 9), (5, 7))
    grids = CommonGrids(student, teacher, (2, 0)).double()
    assert grids.sizes == [(4, 4), (4, 4)]
    for stage, pooled in zip((2, 0), grids(student, teacher), strict=True):
        for maps, each in zip(pooled, (student, teacher), strict=True):
            torch.testing.assert_close(maps, F.adaptive_avg_pool2d(each.features[stage], 4))
    assert not torch.equal(grids(student, teacher)[0][0], grids(student, teacher)[1][0])


@pytest.mark.parametrize("stages", [(), (1, 1), (0, 2)])
def test_common_grids_are_of_distinct_stages_of_both_networks(stages):
    with pytest.raises(UserError, match="expected distinct numbers from 0 to 1"):
        CommonGrids(shown((8, 8), (4, 4), (2, 2)), shown((8, 8), (4, 4)), stages)


def test_a_connector_gives_rectified_maps_the_variance_they_came_with():
    torch.manual_seed(0)
    convolution, norm = connector(64, 256, kernel=3)
    assert convolution.weight.std().item() == pytest.approx((2 / (256 * 9)) ** 0.5, rel=0.02)
    assert connector(6, 4)(torch.randn(5, 6, 3, 2)).shape == (5, 4, 3, 2)
    assert convolution.bias is None
    assert norm.num_features == 256


def test_maps_before_the_relu_take_the_place_of_features():
    first, second = (Output(torch.zeros(1, 2), torch.zeros(1, 3), (a,), (b,)) for a, b in ("ab", "cd"))
    assert [output.features for output in before_relu(first, second)] == [("b",), ("d",)]
    with pytest.raises(UserError, match="the teacher does not show them"):
        before_relu(first, second._replace(preactivations=()))


@pytest.mark.parametrize("bias", [True, False])
def test_the_teachers_classifier_is_a_frozen_copy(bias):
    copied, network = TeachersClassifier(3, 2), nn.Module()
    assert all(parameter.isnan().all() and not parameter.requires_grad for parameter in copied.parameters())
    network.classifier = nn.Linear(3, 2, bias=bias)
    copied.copy_from(NetworkView(network))
    embedding = torch.randn(4, 3)
    torch.testing.assert_close(copied(embedding), network.classifier(embedding))
    network.classifier = nn.ReLU()
    with pytest.raises(UserError, match="linear classifier"):
        copied.copy_from(NetworkView(network))


@pytest.mark.parametrize(
    ("grid", "size"), [((4, 4), (4, 4)), ((8, 6), (4, 3)), ((2, 3), (4, 6)), ((7, 5), (3, 8)), ((1, 1), (5, 3))]
)
def test_a_map_can_be_brought_to_any_grid_and_a_constant_stays_one(grid, size):
    resize = Resize(grid, size)
    assert torch.allclose(resize(torch.full((2, 3, *grid), 1.5)), torch.full((2, 3, *size), 1.5))
    maps = torch.sin(torch.arange(6 * grid[0] * grid[1]).double()).view(2, 3, *grid)
    assert torch.allclose(resize.double()(maps), F.adaptive_avg_pool2d(maps, size))
    assert (resize(maps) is maps) == (grid == size)


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_a_batch_norm_gives_what_torchs_gives_for_a_gradient_of_any_layout(layout):
    maps = torch.randn(4, 6, 5, 3, generator=torch.Generator().manual_seed(0))
    found = []
    for kind in (BatchNorm2d, nn.BatchNorm2d):
        given, norm = maps.contiguous(memory_format=torch.channels_last).requires_grad_(), kind(6)
        seen = norm(given)
        seen.backward(maps.sin().contiguous(memory_format=layout))
        found.append((seen.detach(), given.grad, norm.weight.grad, norm.bias.grad, norm.running_var))
    for ours, torchs in zip(*found, strict=True):
        torch.testing.assert_close(ours, torchs)


@pytest.mark.parametrize(("kind", "kept"), [(BatchNorm2d, True), (nn.BatchNorm2d, False)])
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_the_gradient_that_reaches_a_batch_norm_lies_as_its_map_does(kind, kept, layout):
    seen = kind(6)(torch.randn(4, 6, 5, 3).contiguous(memory_format=layout))
    node = seen.grad_fn if kind is nn.BatchNorm2d else seen.grad_fn.next_functions[0][0]
    lies = []
    node.register_prehook(lambda gradients: lies.append(gradients[0].is_contiguous(memory_format=layout)))
    other = torch.contiguous_format if layout is torch.channels_last else torch.channels_last
    seen.backward(torch.ones(4, 6, 5, 3).contiguous(memory_format=other))
    assert lies == [kept]


@pytest.mark.parametrize("kind", [lambda shown: Positions(torch.eye(15)), lambda shown: CommonGrid(shown, shown)])
def test_gradients_of_flattened_maps_lie_as_the_maps_do(kind):
    maps = torch.randn(4, 6, 5, 3).contiguous(memory_format=torch.channels_last).requires_grad_()
    seen, module = maps * 1, kind(maps)  # the end of a graph would take a gradient as it lies
    lies = []
    seen.register_hook(lambda slope: lies.append(slope.is_contiguous(memory_format=torch.channels_last)))
    found = module(seen) if isinstance(module, Positions) else module(seen, maps)[0]
    found.flatten(1).sin().sum().backward()
    assert lies == [True]
    torch.testing.assert_close(maps.grad, maps.detach().cos())
