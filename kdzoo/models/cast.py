"""A frozen network's weights, cast once to what autocast would cast them to in every pass."""

import torch
from torch import Tensor, nn

from kdzoo.models.network import Network

# Types that autocast is known to feed with cast weights. Not what derives from them, which may do more with weights.
_CAST = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)


def cast_weights(network: Network, dtype: torch.dtype) -> bool:
    """Casts the weights of convolutions and linear layers in place; under autocast all outputs keep their bits.

    That is tried on two images: where it does not hold, or a pass fails, every weight is put back. The classifier
    is left alone, as methods apply it outside of autocast. From then on the network runs under autocast only.

    Args:
        network: in evaluation mode, and never to be trained.
        dtype: autocast's.

    Returns:
        Whether any weight was cast.
    """
    layers = [layer for layer in network.modules() if type(layer) in _CAST and layer is not network.classifier]
    kept = [
        (layer, name, weight)
        for layer in layers
        for name, weight in layer.named_parameters(recurse=False)
        if weight.dtype == torch.float32
    ]
    if not kept:
        return False
    before = _outputs(network, dtype)
    for layer, name, weight in kept:
        setattr(layer, name, nn.Parameter(weight.to(dtype), requires_grad=False))
    try:
        same = all(torch.equal(new, old) for new, old in zip(_outputs(network, dtype), before, strict=True))
    except RuntimeError:  # of types that do not go together
        same = False
    if not same:
        for layer, name, weight in kept:
            setattr(layer, name, weight)
    return same


@torch.no_grad()
def _outputs(network: Network, dtype: torch.dtype) -> list[Tensor]:
    images = torch.rand(2, 3, network.image_size, network.image_size, generator=torch.Generator().manual_seed(0))
    images = images.to(network.mean.device).contiguous(memory_format=torch.channels_last)
    wanted, network.wants_features = network.wants_features, True
    try:
        with torch.autocast(images.device.type, dtype):
            logits, embedding, features = network(images)
    finally:
        network.wants_features = wanted
    return [logits, embedding, *features]
