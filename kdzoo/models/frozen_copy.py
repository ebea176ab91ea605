"""Make the copy of a frozen network that computes its outputs faster."""

from collections.abc import Callable
from functools import partial

from kdzoo.models.cast import cast_weights
from kdzoo.models.copies import fault_of_copies
from kdzoo.models.ensemble import Ensemble
from kdzoo.models.fold import fold_norms
from kdzoo.models.network import Network
from kdzoo.models.winograd import use_winograd
from kdzoo.precision import Precision


def frozen(network: Network, precision: Precision, say: Callable[[str], object] = lambda _: None) -> Network:
    """Copy a network for passes without gradients: batch norms folded, weights cast once, fewer products on a CPU.

    Args:
        network: in evaluation mode, on its device, in float32, and never to be trained.
        precision: in which its passes run.
        say: is told in a line where batch norms cannot be folded, or the network not be copied.

    Returns:
        The copy, whose outputs are those of ``network`` but for rounding; ``network`` itself where nothing is gained.
    """
    if isinstance(network, Ensemble):
        return network.over(partial(frozen, precision=precision, say=say))
    if why := fault_of_copies(network):
        say(f"{network.name} makes its passes itself, without a faster copy: {why}")
        return network
    fast = fold_norms(network)
    if fast is None:
        say(f"batch norms of {network.name} stay as they are: folded into the layers before them, its outputs differ")
        fast = network
    if precision.dtype is not None:
        return cast_weights(fast, precision.dtype)
    on_cpu = network.mean.device.type == "cpu"
    return use_winograd(fast) if on_cpu and network.reads_channels_last else fast
