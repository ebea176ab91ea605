"""Convolutions that learn on a CPU: each by what is fastest for its maps there, and right."""

from collections.abc import Sequence
from itertools import product
from math import prod
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kdzoo.errors import is_shortage
from kdzoo.models import winograd
from kdzoo.models.cast import probed
from kdzoo.models.maps import FAILURES
from kdzoo.models.network import Network
from kdzoo.modes import evaluating

# Where one product of matrices learns faster than oneDNN's convolution, measured with batches of 16 to 128 on a Xeon:
# with AMX and AVX-512, and cut down to AVX2.
MOST_COLUMNS = 144  # for each image: positions that are given, times positions of the kernel that read the map
LEAST_WIDTH = {torch.float32: 256, torch.bfloat16: 128}  # channels on either side
FEW = 8  # channels, of which one of AVX2's registers holds as many


def learn_on_cpu(network: nn.Module) -> None:
    """Let a network's convolutions learn by what is fastest for their maps on a CPU, and right.

    In evaluation mode nothing is done for speed, and where no gradient is asked for nothing at all. Weights and their
    names stay, and outputs and gradients but for rounding. A network that answers otherwise then, as one that asks for
    the type of its layers, is left as it was.
    """
    free = getattr(network, "reads_channels_last", True)
    # What derives from it may do more.
    plain = [module for module in network.modules() if type(module) is nn.Conv2d and module.padding_mode == "zeros"]
    before = _answers(network)
    for module in plain:
        module.__class__ = LearningConv2d
        layer = cast(LearningConv2d, module)
        layer.is_free = free
        layer.may_gain = free and winograd.was_measured()  # asked here: torch's compiler cannot
    if _same(before, _answers(network)):
        return
    for module in plain:
        module.__class__ = nn.Conv2d
    if not _same(before, _answers(network)):  # its answers differ anyway
        for module in plain:
            module.__class__ = LearningConv2d


def _same(some: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
    return len(some) == len(others) and all(map(torch.equal, some, others))


def _answers(network: nn.Module) -> list[Tensor]:
    """List what a network of kdzoo shows of two images; nothing of any other module, or where it fails."""
    if not isinstance(network, Network):
        return []
    with evaluating(network), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        try:
            return probed(network)
        except FAILURES as error:  # its training will tell
            if is_shortage(error):
                raise
            return []


class LearningConv2d(nn.Conv2d):
    """A convolution that chooses for each batch how it is computed, where it learns."""

    is_free: bool  # to give maps whose channels lie last
    may_gain: bool  # by Winograd's algorithm, where it is trained, on this processor

    def forward(self, input: Tensor) -> Tensor:  # the name by which networks may give it
        if not (torch.is_grad_enabled() and input.ndim == 4):
            return super().forward(input)
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else input.dtype
        if self._gains_by_winograd(input, dtype):
            return winograd.convolve(input, self.weight, self.bias)
        if isinstance(self.padding, str):
            return super().forward(input)
        if self.is_free and self._is_small(input, dtype):
            return self._as_one_product(input.to(dtype))
        if self.kernel_size == (1, 1) != self.stride and self.in_channels < FEW * self.groups:
            # oneDNN (that of torch 2.14) gives the weight a wrong gradient, or writes over other memory, where it may
            # use no more than AVX2.
            read = self._padded(input)[..., :: self.stride[0], :: self.stride[1]]
            return F.conv2d(read, self.weight, self.bias, groups=self.groups)
        if self._is_slow(input, dtype):
            return self._in_float32(input).to(dtype)
        if dtype == torch.bfloat16 and input.shape[-1] < self.stride[1]:
            # oneDNN (that of torch 2.14) never writes the part of the weight's gradient that belongs to the padding
            # of such maps in bfloat16: what memory held before would be learned.
            return F.conv2d(self._padded(input), self.weight, self.bias, self.stride, 0, self.dilation, self.groups)
        return super().forward(input)

    def _gains_by_winograd(self, maps: Tensor, dtype: torch.dtype) -> bool:
        suits = self.training and self.may_gain and dtype == torch.float32 and winograd.suits(self)
        return suits and winograd.gains(maps, winograd.LEAST_TILES)

    def _is_small(self, maps: Tensor, dtype: torch.dtype) -> bool:
        if not (self.training and self.may_gain) or dtype not in LEAST_WIDTH:
            return False
        if self.groups != 1 or self.dilation != (1, 1) or min(self.in_channels, self.out_channels) < LEAST_WIDTH[dtype]:
            return False
        sides = *self._given(maps), *map(len, self._reading(maps))
        return min(sides) > 0 and prod(sides) <= MOST_COLUMNS

    def _is_slow(self, maps: Tensor, dtype: torch.dtype) -> bool:
        """Tell whether oneDNN takes far too long for the gradients of a convolution of separate channels.

        In bfloat16 it takes 1.3 to 56 times as long as in float32, but for 3x3 kernels of stride 1. Where 3x3 kernels
        are larger than the map, it takes 1.4 to 4 times as long as for the map with its padding.
        """
        if not (self.training and self.may_gain) or dtype not in LEAST_WIDTH or not 1 < self.groups == self.in_channels:
            return False
        is_usual = self.kernel_size == (3, 3) and self.stride == self.dilation == (1, 1)
        is_fast = dtype == torch.float32 or (is_usual and self.in_channels == self.out_channels)
        return self._is_narrow(maps) or not is_fast

    def _is_narrow(self, maps: Tensor) -> bool:
        return self.kernel_size == (3, 3) and min(maps.shape[-2:]) < 3

    def _in_float32(self, maps: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            maps, weight = maps.float(), self.weight.float()
            bias = None if self.bias is None else self.bias.float()
            if self._is_narrow(maps):
                return F.conv2d(self._padded(maps), weight, bias, self.stride, 0, self.dilation, self.groups)
            return self._conv_forward(maps, weight, bias)

    def _as_one_product(self, maps: Tensor) -> Tensor:
        """Multiply all that the kernel reads of maps (B, C, H, W), at each position, with all that reads it at once."""
        (height, width), (down, right), (rows, columns) = self._given(maps), self.stride, self._reading(maps)
        read = [
            (slice(None), slice(row, row + height * down, down), slice(column, column + width * right, right))
            for row, column in product(rows, columns)
        ]
        padded = self._padded(maps).permute(0, 2, 3, 1)
        seen = _Cut.apply(padded, read) if len(read) > 1 else padded[read[0]]
        weight = self.weight.permute(0, 2, 3, 1)[:, rows.start : rows.stop, columns.start : columns.stop]
        return F.linear(seen, weight.flatten(1), self.bias).permute(0, 3, 1, 2)

    def _given(self, maps: Tensor) -> list[int]:
        """Tell height and width of what maps (B, C, H, W) become."""
        sides = zip(maps.shape[-2:], self._added(), self.kernel_size, self.stride, strict=True)
        return [(side + 2 * added - kernel) // stride + 1 for side, added, kernel, stride in sides]

    def _reading(self, maps: Tensor) -> list[range]:
        """Tell which rows and columns of the kernel ever lie on maps (B, C, H, W), and not always on their padding."""
        sides = zip(maps.shape[-2:], self._given(maps), self._added(), self.kernel_size, self.stride, strict=True)
        return [
            range(max(0, added - (given - 1) * stride), min(kernel, side + added))
            for side, given, added, kernel, stride in sides
        ]

    def _padded(self, maps: Tensor) -> Tensor:
        down, right = self._added()
        return F.pad(maps, (right, right, down, down))

    def _added(self) -> list[int]:
        """Tell by how much maps are padded above and below, and on either side."""
        return [int(side) for side in self.padding]


class _Cut(torch.autograd.Function):
    """Parts of maps (B, H, W, C), one beside the other. Autograd alone would make zeros for each part's gradient."""

    generate_vmap_rule = True

    @staticmethod
    def forward(maps: Tensor, parts: Sequence[tuple[slice, ...]]) -> Tensor:
        return torch.cat([maps[part] for part in parts], -1)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Sequence[tuple[slice, ...]]], output: Tensor) -> None:
        maps, ctx.parts = inputs
        ctx.shape = maps.shape

    @staticmethod
    def backward(ctx: Any, slopes: Tensor) -> tuple[Tensor, None]:
        total = slopes.new_zeros(ctx.shape)
        for part, slope in zip(ctx.parts, slopes.chunk(len(ctx.parts), -1), strict=True):
            total[part].add_(slope)
        return total, None
