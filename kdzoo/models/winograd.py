"""Compute the 3x3 convolutions of a frozen network with a quarter of the products, on CPUs in float32."""

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
READ = [[4, 0, -5, 0, 1, 0], [0, -4, -4, 1, 1, 0], [0, 4, -4, -1, 1, 0]]
READ += [[0, -2, -1, 2, 1, 0], [0, 2, -1, -2, 1, 0], [0, 4, 0, -5, 0, 1]]
GIVEN = [[1, 1, 1, 1, 1, 0], [0, 1, -1, 2, -2, 0], [0, 1, 1, 4, 4, 0], [0, 1, -1, 8, -8, 1]]

LEAST_WIDTH = 64  # channels on either side, below which transforms cost more than the products they save
MOST_TILES = 0.1  # for each position of a map: the tiles of small maps lie half outside
CACHED = 2**14  # numbers of a transformed map that are worked on at once, for each of its 36 products


def use_winograd(network: Network) -> Network:
    """Copy a network with Winograd's algorithm in the place of wide 3x3 convolutions of stride 1.

    The copy shares all weights, and its outputs are those of ``network`` but for rounding. It holds each of these
    weights four times more.

    Args:
        network: in evaluation mode, on a CPU, in float32, and never to be trained.

    Returns:
        The copy; ``network`` itself where no layer is of that kind, or where the copy's outputs would differ.
    """
    names = [name for name, module in network.named_modules() if _is_wide(module)]
    if not names:
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

    def __init__(self, layer: nn.Conv2d):
        super().__init__()
        self.layer = layer
        self.register_buffer("products", transformed(layer.weight))
        bias = torch.zeros_like(layer.weight[:, 0, 0, 0]) if layer.bias is None else layer.bias
        self.register_buffer("bias", bias.detach())

    def forward(self, maps: Tensor) -> Tensor:
        height, width = maps.shape[-2:]
        if torch.is_grad_enabled() or _tiles(height) * _tiles(width) > MOST_TILES * height * width:
            return self.layer(maps)
        return winograd(maps, self.products, self.bias)


def transformed(weight: Tensor) -> Tensor:
    """Transform the weight (D, C, 3, 3) of a convolution: (36, C, D)."""
    kernel = torch.tensor(KERNEL, dtype=torch.float64)
    found = torch.einsum("ia,dcab,jb->ijcd", kernel, weight.detach().double(), kernel)
    return found.flatten(0, 1).to(weight.dtype).contiguous()


@torch.library.custom_op("kdzoo::winograd", mutates_args=())
def winograd(maps: Tensor, products: Tensor, bias: Tensor) -> Tensor:
    """Convolve maps (B, C, H, W), padded by 1, with a transformed weight (36, C, D), and add a bias (D).

    Some images at a time, so that what is between the products lies in the processor's caches.

    Returns:
        (B, D, H, W), channels-last.
    """
    (images, channels, height, width), wide = maps.shape, products.shape[2]
    rows, columns = _tiles(height), _tiles(width)
    read, given = (torch.tensor(side, dtype=maps.dtype) for side in (READ, GIVEN))
    read, given = torch.kron(read, read), torch.kron(given, given)  # both sides of a tile at once
    found = maps.new_empty(images, TILE * rows, TILE * columns, wide)
    tiles = found.view(images, rows, TILE, columns, TILE, wide)
    below, right = (TILE * count + 1 - side for count, side in ((rows, height), (columns, width)))
    at_once = max(1, max(CACHED // channels, WINDOW**2) // (rows * columns))
    for start in range(0, images, at_once):
        some = F.pad(maps[start : start + at_once].permute(0, 2, 3, 1), (0, 0, 1, right, 1, below))
        image, row, column, channel = some.stride()
        windows = some.as_strided(
            (WINDOW, WINDOW, len(some), rows, columns, channels),
            (row, column, image, TILE * row, TILE * column, channel),
        )
        inner = (read @ windows.reshape(WINDOW**2, -1)).view(WINDOW**2, -1, channels) @ products
        outer = (given @ inner.flatten(1)).view(TILE, TILE, len(some), rows, columns, wide)
        torch.add(outer.permute(2, 3, 0, 4, 1, 5), bias, out=tiles[start : start + at_once])
    if (TILE * rows, TILE * columns) != (height, width):
        found = found[:, :height, :width].contiguous()
    return found.permute(0, 3, 1, 2)


@winograd.register_fake
def _(maps: Tensor, products: Tensor, bias: Tensor) -> Tensor:
    images, _, height, width = maps.shape
    return maps.new_empty(images, height, width, products.shape[2]).permute(0, 3, 1, 2)


def _tiles(side: int) -> int:
    return -(-side // TILE)


def _is_wide(module: nn.Module) -> bool:
    """Tell whether a layer is a 3x3 convolution that is known to gain; what derives from it may do more."""
    return (
        type(module) is nn.Conv2d
        and module.kernel_size == (3, 3)
        and module.stride == module.dilation == (1, 1)
        and module.padding in ((1, 1), "same")
        and module.padding_mode == "zeros"
        and module.groups == 1
        and min(module.in_channels, module.out_channels) >= LEAST_WIDTH
        and not (module._forward_pre_hooks or module._forward_hooks)
    )
