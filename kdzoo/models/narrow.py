"""Convolutions on maps that are narrower than the stride, whose gradient oneDNN leaves unwritten in bfloat16."""

from torch import Tensor, nn
from torch.nn import functional as F


def learn_from_narrow_maps(network: nn.Module) -> None:
    """Let a network's padded convolutions pad by themselves where a map is narrower than their stride.

    On CPUs with bfloat16 instructions, oneDNN (that of torch 2.14) then never writes the part of the weight's gradient
    that belongs to the padding: what memory held before is learned. Outputs stay what they were but for rounding, and
    weights and their names stay.
    """
    for module in network.modules():
        if (
            type(module) is nn.Conv2d  # what derives from it may do more
            and module.padding_mode == "zeros"
            and module.stride[1] > 1
            and module.padding != (0, 0)
        ):
            module.__class__ = NarrowConv2d


class NarrowConv2d(nn.Conv2d):
    """A convolution that pads maps which are narrower than its stride before it reads them."""

    def forward(self, maps: Tensor) -> Tensor:
        if maps.shape[-1] >= self.stride[1]:
            return super().forward(maps)
        down, right = (int(side) for side in self.padding)  # no text, which goes with a stride of 1
        padded = F.pad(maps, (right, right, down, down))
        return F.conv2d(padded, self.weight, self.bias, self.stride, 0, self.dilation, self.groups)
