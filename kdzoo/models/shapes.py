"""Write the shapes of a network's outputs down, and read them: a method's modules are built from them alone."""

from collections.abc import Mapping
from typing import Any

import torch

from kdzoo.errors import UserError
from kdzoo.keywords import between
from kdzoo.outputs import STAGES, Output

LARGEST = 2**16  # of a side, or a number of channels


def shapes_of(output: Output) -> dict[str, Any]:
    """List the shapes of an output; those before activations are those of its features."""
    return {
        "logits": list(output.logits.shape),
        "embedding": list(output.embedding.shape),
        "features": [list(maps.shape) for maps in output.features],
        "preactivations": bool(output.preactivations),
        "final": None if output.final is None else list(output.final.shape),
    }


def output_of(shapes: Mapping[str, Any]) -> Output:
    """Make an output on the meta device, without data, of the shapes that ``shapes_of`` listed.

    Raises:
        UserError: they are no such shapes.
    """

    def tensor(name: str, sides: Any, count: int, least: int = 1) -> torch.Tensor:
        if not isinstance(sides, list) or len(sides) != count or not all(type(side) is int for side in sides):
            raise UserError(f"shape of {name}={sides}: expected {count} numbers")
        return torch.empty([between(least, LARGEST, **{name: side}) for side in sides], device="meta")

    maps = shapes.get("features")
    if not isinstance(maps, list) or len(maps) not in (0, STAGES):
        raise UserError(f"shapes of features={maps}: expected none or {STAGES}")
    features = tuple(tensor("features", sides, 4) for sides in maps)
    final = None if shapes.get("final") is None else tensor("final", shapes["final"], 4)
    before = features if shapes.get("preactivations") else ()
    logits, embedding = (tensor(name, shapes.get(name), 2, least) for name, least in (("logits", 0), ("embedding", 1)))
    return Output(logits, embedding, features, before, final)
