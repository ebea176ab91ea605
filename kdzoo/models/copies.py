"""Find out whether copies of a network answer by themselves, without the network that they were copied from."""

from copy import deepcopy
from itertools import chain

import torch

from kdzoo.errors import is_shortage, told
from kdzoo.models.cast import probed
from kdzoo.models.maps import FAILURES, close_to
from kdzoo.models.network import Network
from kdzoo.modes import evaluating


def fault_of_copies(network: Network) -> str:
    """Say why copies of a network do not answer as it does; empty where they do.

    A hook that is a lambda or an inner function stays bound to the network that it was made in: called for a copy, it
    stores a map there, and the copy reads an old one.
    """
    devices = {p.device for p in network.parameters() if p.device.type == "cuda"}
    tensors = chain(network.parameters(), network.buffers())
    with evaluating(network), torch.no_grad(), torch.random.fork_rng(devices=list(devices)):
        try:
            probed(network)  # so that what a copy keeps of its last pass is known, and of other images
            copy = deepcopy(network, {id(tensor): tensor for tensor in tensors})
        except FAILURES as error:
            if is_shortage(error):
                raise
            return f"it cannot be copied ({told(error)})"
        try:
            same = _same(copy, network) or not _same(network, network)  # one may draw its answers
        except FAILURES as error:
            if is_shortage(error):
                raise
            same = False
    return "" if same else "copies of it answer differently, as where a hook is a lambda that refers to the network"


def _same(one: Network, other: Network) -> bool:
    outputs = []
    for network in (one, other):
        torch.manual_seed(0)
        outputs.append(probed(network, seed=1))
    return all(close_to(found, wanted) for found, wanted in zip(*outputs, strict=True))
