"""Cast the weights of a frozen network once, instead of in every pass under autocast."""

from copy import deepcopy

import torch
from torch import Tensor, nn

from kdzoo.errors import is_shortage
from kdzoo.models.network import Network
from kdzoo.outputs import EVERYTHING
from kdzoo.precision import Precision, autocast

# Types that autocast is known to feed with cast weights. Not what derives from them, which may do more with weights.
_CAST = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)


def cast_weights(network: Network, dtype: torch.dtype) -> Network:
    """Copy a network for use under autocast, with the weights of convolutions and linear layers in ``dtype``.

    The copy's outputs under autocast are bit-identical to ``network``'s. This is verified on two images; if it fails,
    ``network`` itself is returned. The classifier is not cast, as methods apply it outside autocast.

    Args:
        network: in evaluation mode, and never to be trained.
        dtype: autocast's.
    """
    copy = deepcopy(network)
    for layer in copy.modules():
        if type(layer) in _CAST and layer is not copy.classifier:
            for name, weight in layer.named_parameters(recurse=False):
                setattr(layer, name, nn.Parameter(weight.to(dtype), requires_grad=False))
    try:
        pairs = zip(probed(copy, dtype), probed(network, dtype), strict=True)
        same = all(torch.equal(one, other) for one, other in pairs)
    except RuntimeError as error:  # of types that do not go together
        if is_shortage(error):
            raise
        same = False
    return copy if same else network


@torch.no_grad()
def probed(network: Network, dtype: torch.dtype | None = None, seed: int = 0) -> list[Tensor]:
    """List all outputs of a network for the two images of a seed, under autocast to ``dtype`` or in float32."""
    side, generator = network.image_size, torch.Generator().manual_seed(seed)
    images = torch.rand(2, 3, side, side, generator=generator)
    images = images.to(network.mean.device).contiguous(memory_format=torch.channels_last)
    with autocast(images.device.type, Precision(dtype)):
        output = network.forward(images, EVERYTHING)  # not a call, which would be one for those who watch the network
    shown = [output.logits, output.embedding, *output.features, *output.preactivations]
    return shown if output.final is None else [*shown, output.final]
