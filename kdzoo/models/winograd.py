"""Compute 3x3 convolutions with a quarter of the products, on CPUs in float32."""

from collections.abc import Iterator, Sequence
from copy import deepcopy
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kdzoo.models.fold import alike
from kdzoo.models.network import Network

# Winograd's F(4x4, 3x3): Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks" (2016), section 4.1.
TILE, WINDOW = 4, 6  # sides of what a tile gives and of what it reads
KERNEL = [[1 / 4, 0, 0], [-1 / 6, -1 / 6, -1 / 6], [-1 / 6, 1 / 6, -1 / 6]]
KERNEL += [[1 / 24, 1 / 12, 1 / 6], [1 / 24, -1 / 12, 1 / 6], [0, 0, 1]]
TURNED = [row[::-1] for row in KERNEL]  # of the convolution that goes back
READ = [[4, 0, -5, 0, 1, 0], [0, -4, -4, 1, 1, 0], [0, 4, -4, -1, 1, 0]]
READ += [[0, -2, -1, 2, 1, 0], [0, 2, -1, -2, 1, 0], [0, 4, 0, -5, 0, 1]]
GIVEN = [[1, 1, 1, 1, 1, 0], [0, 1, -1, 2, -2, 0], [0, 1, 1, 4, 4, 0], [0, 1, -1, 8, -8, 1]]

LEAST_WIDTH = 128  # channels on either side, below which transforms cost more than the products they save
MEASURED = ("AVX2", "AVX512")  # a processor's instructions
LEAST_TILES = 128  # of a batch, below which the transforms of a weight that changes cost more
MOST_TILES = 0.1  # for each position of a map: the tiles of small maps lie half outside
MOST_OF_ONE = 1024  # tiles of one image, which is worked on whole: more leave the caches, and take much memory
AT_ONCE = 128  # tiles worked on at once: what is between their products lies in a processor's caches


def use_winograd(network: Network) -> Network:
    """Copy a network with Winograd's algorithm in the place of wide 3x3 convolutions of stride 1.

    The copy shares all weights, and its outputs are those of ``network`` but for rounding. It holds each of these
    weights four times more.

    Args:
        network: in evaluation mode, on a CPU, in float32, and never to be trained.

    Returns:
        The copy; ``network`` itself where no layer is of that kind, or where the copy's outputs would differ.
    """
    names = [name for name, module in network.named_modules() if _is_plain(module) and suits(module)]
    if not (names and was_measured()):
        return network
    tensors = chain(network.parameters(), network.buffers())
    copy = deepcopy(network, {id(tensor): tensor for tensor in tensors})

    def changed() -> Network:
        for name in names:
            layer: Any = copy.get_submodule(name)
            copy.set_submodule(name, Winograd(layer))
        return copy

    return alike(changed, network) or network


class Winograd(nn.Module):
    """A 3x3 convolution without gradients: maps (B, C, H, W) -> (B, D, H, W).

    Where a gradient is asked for, or maps are too small, the layer itself is called.

    Args:
        layer: of stride 1 and padding 1.
    """

    products: Tensor
    bias: Tensor

    def __init__(self, layer: nn.Conv2d):
        super().__init__()
        self.layer = layer
        products = transformed(layer.weight.detach().double().transpose(0, 1))
        self.register_buffer("products", products.to(layer.weight.dtype))
        self.register_buffer("bias", _bias(layer.weight, layer.bias).detach())

    def forward(self, input: Tensor) -> Tensor:  # the name by which networks may give it
        if torch.is_grad_enabled() or not gains(input):
            return self.layer(input)
        return winograd(input, self.products, self.bias)


def convolve(maps: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Convolve maps (B, C, H, W), padded by 1, with a weight (D, C, 3, 3) and a bias (D), with gradients for all."""
    return _Convolution.apply(maps, weight, bias)


class _Convolution(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(maps: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return winograd(maps, transformed(weight.transpose(0, 1)), _bias(weight, bias))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None], output: Tensor) -> None:
        maps, weight, _ = inputs
        ctx.save_for_backward(maps, weight)

    @staticmethod
    def backward(ctx: Any, slopes: Tensor) -> tuple[Tensor | None, ...]:
        maps, weight = ctx.saved_tensors
        to_maps, to_weight, to_bias = ctx.needs_input_grad
        if torch.is_grad_enabled():  # for gradients of gradients
            given, sides = [weight.shape[0]] if to_bias else None, [1, 1]
            return torch.ops.aten.convolution_backward(
                slopes, maps, weight, given, sides, sides, sides, False, [0, 0], 1, list(ctx.needs_input_grad)
            )
        return (
            winograd(slopes, transformed(weight, TURNED), slopes.new_zeros(maps.shape[1])) if to_maps else None,
            winograd_weight(maps, slopes) if to_weight else None,
            slopes.sum((0, 2, 3)) if to_bias else None,
        )


def transformed(weight: Tensor, kernel: Sequence[Sequence[float]] = KERNEL) -> Tensor:
    """Transform the weight (D, C, 3, 3) of a convolution: (36, D, C).

    A product with it leads from D to C; forward it is the transposed weight's from C to D.
    """
    return (_both(kernel, weight) @ weight.permute(2, 3, 0, 1).reshape(9, -1)).view(-1, *weight.shape[:2])


@torch.library.custom_op("kdzoo::winograd", mutates_args=())
def winograd(maps: Tensor, products: Tensor, bias: Tensor) -> Tensor:
    """Convolve maps (B, C, H, W), padded by 1, with a transformed weight (36, C, D), and add a bias (D).

    Returns:
        (B, D, H, W), channels-last, and no view, since what follows may write to it.
    """
    (images, _, height, width), wide = maps.shape, products.shape[2]
    rows, columns, count = _tiles(height), _tiles(width), _at_once(maps)
    given = _repeated(_both(GIVEN, maps), count * rows * columns)
    found = _empty(maps, images, wide, TILE * rows, TILE * columns)
    tiles = found.permute(0, 2, 3, 1).view(images, rows, TILE, columns, TILE, wide)
    for windows, some in zip(_windows(maps), tiles.split(count), strict=True):
        inner = (windows @ products).transpose(0, 1)
        outer = (given[: len(inner)] @ inner).view(-1, rows, columns, TILE, TILE, wide)
        torch.add(outer.transpose(2, 3), bias, out=some)
    if (TILE * rows, TILE * columns) == (height, width):
        return found
    return _empty(maps, images, wide, height, width).copy_(found[..., :height, :width])


@winograd.register_fake
def _(maps: Tensor, products: Tensor, bias: Tensor) -> Tensor:
    return _empty(maps, len(maps), products.shape[2], *maps.shape[2:])


@torch.library.custom_op("kdzoo::winograd_weight", mutates_args=())
def winograd_weight(maps: Tensor, slopes: Tensor) -> Tensor:
    """Compute the gradient of the weight from maps (B, C, H, W) and the gradient of what they became, (B, D, H, W).

    Returns:
        (D, C, 3, 3), channels-last
    """
    (_, channels, height, width), wide = maps.shape, slopes.shape[1]
    rows, columns, count = _tiles(height), _tiles(width), _at_once(maps)
    given = _repeated(_both(GIVEN, maps).mT, count * rows * columns)
    products = maps.new_zeros(WINDOW**2, channels, wide)
    for windows, some in zip(_windows(maps), slopes.split(count), strict=True):
        padded = F.pad(some.permute(0, 2, 3, 1), (0, 0, 0, TILE * columns - width, 0, TILE * rows - height))
        tiles = padded.reshape(-1, rows, TILE, columns, TILE, wide).transpose(2, 3).reshape(-1, TILE**2, wide)
        products.baddbmm_(windows.mT, (given[: len(tiles)] @ tiles).transpose(0, 1))
    kernel = _both(KERNEL, maps).mT @ products.flatten(1)
    gradient = kernel.view(3, 3, channels, wide).permute(3, 2, 0, 1)
    return gradient.contiguous(memory_format=torch.channels_last)


@winograd_weight.register_fake
def _(maps: Tensor, slopes: Tensor) -> Tensor:
    return _empty(maps, slopes.shape[1], maps.shape[1], 3, 3)


def _windows(maps: Tensor) -> Iterator[Tensor]:
    """Transform what each tile reads of maps (B, C, H, W), some images after others: (36, tiles, C) each time."""
    _, channels, height, width = maps.shape
    rows, columns, count = _tiles(height), _tiles(width), _at_once(maps)
    read = _repeated(_both(READ, maps), count * rows * columns)
    padded = maps.new_zeros(count, TILE * rows + 2, TILE * columns + 2, channels)
    image, row, column, channel = padded.stride()
    windows = padded.as_strided(
        (count, rows, columns, WINDOW, WINDOW, channels),
        (image, TILE * row, TILE * column, row, column, channel),
    )
    for some in maps.split(count):
        padded[: len(some), 1 : height + 1, 1 : width + 1] = some.permute(0, 2, 3, 1)
        tiles = windows[: len(some)].reshape(-1, WINDOW**2, channels)
        yield (read[: len(tiles)] @ tiles).transpose(0, 1)


def _at_once(maps: Tensor) -> int:
    """Count the images of maps (B, C, H, W) that are worked on at once."""
    images, _, height, width = maps.shape
    return min(images, max(1, AT_ONCE // (_tiles(height) * _tiles(width))))


def _repeated(matrix: Tensor, times: int) -> Tensor:
    """Lay a matrix out for each tile: torch would do so for each product."""
    return matrix.expand(times, -1, -1).contiguous()


def _empty(like: Tensor, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=torch.channels_last)


def _both(side: Sequence[Sequence[float]], like: Tensor) -> Tensor:
    """Transform rows and columns of a tile at once."""
    matrix = torch.tensor(side, dtype=like.dtype)
    return torch.kron(matrix, matrix)


def _bias(weight: Tensor, bias: Tensor | None) -> Tensor:
    return weight.new_zeros(weight.shape[0]) if bias is None else bias


def _tiles(side: int) -> int:
    return -(-side // TILE)


def gains(maps: Tensor, least: int = 1) -> bool:
    """Tell whether the tiles of maps (B, C, H, W) are at least so many, not too many, and not mostly outside."""
    images, (height, width) = len(maps), maps.shape[-2:]
    tiles = _tiles(height) * _tiles(width)
    return maps.ndim == 4 and images * tiles >= least and tiles <= min(MOST_OF_ONE, MOST_TILES * height * width)


def was_measured() -> bool:
    """Tell whether processors with the instructions of this one were measured to gain."""
    return torch.backends.cpu.get_cpu_capability() in MEASURED


def suits(module: nn.Module) -> bool:
    """Tell whether a layer is a convolution of the kind that is computed here, and wide enough to gain."""
    return (
        isinstance(module, nn.Conv2d)
        and module.kernel_size == (3, 3)
        and module.stride == module.dilation == (1, 1)
        and module.padding in ((1, 1), "same")
        and module.padding_mode == "zeros"
        and module.groups == 1
        and min(module.in_channels, module.out_channels) >= LEAST_WIDTH
    )


def _is_plain(module: nn.Module) -> bool:
    """Tell whether a layer is torch's own, since what derives from it, or is watched, may do more."""
    return type(module) is nn.Conv2d and not (module._forward_pre_hooks or module._forward_hooks)
