"""Make the network that a file of weights belongs to, and load them."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import timm
import torch
from safetensors import SafetensorError, safe_open

from kdzoo.distiller import DataSpec
from kdzoo.errors import UserError, is_shortage
from kdzoo.files import path_of
from kdzoo.models import names
from kdzoo.models.adapt import SMALL
from kdzoo.models.by_name import create, pretrained_classes
from kdzoo.models.network import Network
from kdzoo.models.weights import load_weights


def load_given(
    name: str,
    data: DataSpec,
    file: str | Path,
    *,
    drop_head: bool = False,
    role: Literal["student", "teacher", ""] = "",
    image_size: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    **options: Any,
) -> Network:
    """Make the network that a file of weights belongs to, and load them; its ``origin`` says what was loaded.

    It reads images as its weights were trained to: a file that kdzoo wrote says how. Any other is tried in the network
    as its weights are published, at their image size and with their statistics, and then in the one that is adapted to
    the data, which reads its statistics; the other way round where a small ``image_size`` is asked for.

    Args:
        name: as in ``create``.
        data: the same.
        file: the weights.
        drop_head: whether a head of other classes is left out.
        role: which network of a file that holds both student and teacher.
        image_size: side in pixels that it reads, if another than its own.
        mean: per channel of images in [0, 1], if another than its own.
        std: the same.
        options: keywords of ``create``.

    Raises:
        UserError: the weights cannot be read, or are of another network.
    """
    written = written_facts(path_of(file))
    own = {key: written.get(key) for key in ("image_size", "mean", "std")}
    asked = {"image_size": image_size, "mean": mean, "std": std}
    options |= {key: own[key] if value is None else value for key, value in asked.items()}
    small = image_size is not None and image_size <= SMALL
    orders = ((False, True) if small else (True, False)) if pretrained_classes(name) is not None else (False,)
    state = torch.get_rng_state()
    refused: list[UserError] = []
    others: list[UserError] = []
    for drop in (False, True) if drop_head else (False,):
        for published in orders:
            torch.set_rng_state(state)
            chosen = dict(options)
            if not published and chosen["image_size"] is None:
                chosen["image_size"] = min(_native(name) or data.image_size, data.image_size)
            try:
                network = create(name, data, pretrained=published, fetch=False, **chosen)
                adapted = network.facts()["adapted"]
                was = written.get("adapted", adapted)
                if adapted != was:
                    said = "; ".join(was) or "nothing adapted"
                    others.append(
                        UserError(f"'{file}' was written for '{name}' with {said}, which no image size here has")
                    )
                    continue
                network.origin = load_weights(network, file, drop_head=drop, role=role)
                return network
            except UserError as error:
                refused.append(error)
    raise [*refused, *others][0]


def written_facts(file: Path) -> Mapping[str, Any]:
    """Read what kdzoo wrote beside the weights in a file; nothing from a file of other origin."""
    try:
        with safe_open(file, "pt") as content:
            return json.loads((content.metadata() or {}).get("kdzoo", "{}"))
    except (SafetensorError, OSError) as error:
        if is_shortage(error):
            raise
        return {}


def _native(name: str) -> int | None:
    facts = timm.get_pretrained_cfg(names.resolve(name)) if ":" not in name else None
    return facts.input_size[-1] if facts else None
