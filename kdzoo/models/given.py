"""Make the network that a file of weights belongs to, and load them."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import timm
import torch
from safetensors import SafetensorError, safe_open

from kdzoo.distiller import DataSpec
from kdzoo.errors import UserError, is_shortage
from kdzoo.files import is_file
from kdzoo.keywords import between, each, positive, setting, typed
from kdzoo.models import names
from kdzoo.models.adapt import SMALL
from kdzoo.models.by_name import create, pretrained_classes
from kdzoo.models.network import Network
from kdzoo.models.weight_files import find_file
from kdzoo.models.weights import Unfitting, head_rows, load_weights


@dataclass(frozen=True)
class Facts:
    """What kdzoo writes beside weights: what a network must be given to read them."""

    image_size: int | None = setting(None, "Side in pixels that it reads", between, 1, 4096)
    mean: tuple[float, ...] | None = setting(None, "Mean of each colour", each, between, -1e6, 1e6)
    std: tuple[float, ...] | None = setting(None, "Standard deviation of each colour", each, positive)
    adapted: tuple[str, ...] | None = None  # what of the network was changed to suit the image size
    classifier: bool = True  # whether it ends in one
    teacher: dict[str, Any] | None = None  # shapes of the teacher's outputs, where more than the student is shipped


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
    """Make the network that a file of weights belongs to, and load them; its ``origin`` says what, and what is assumed.

    It reads images as its weights were trained to: a file that kdzoo wrote says how. Any other is tried in the network
    as its weights are published, at their image size and with their statistics, and then in the one that is adapted to
    the data, which reads its statistics; the other way round where a small ``image_size`` is asked for.

    Args:
        name: as in ``create``.
        data: the same.
        file: the weights.
        drop_head: whether a head of other classes is left out; a network whose weights have none then gets a new one.
        role: which network of a file that holds both student and teacher.
        image_size: side in pixels that it reads, if another than its own.
        mean: per channel of images in [0, 1], if another than its own.
        std: the same.
        options: keywords of ``create``.

    Raises:
        UserError: the weights cannot be read, or are of another network.
    """
    path = find_file(Path(file))
    written = written_facts(path)
    if not drop_head and not written.get("classifier", True):
        data = data._replace(num_classes=0)
    drop_head = drop_head or not data.num_classes
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
            if not published and chosen["image_size"] is None and (_native(name) or data.image_size) < data.image_size:
                chosen["image_size"] = _native(name)
            try:
                network = create(name, data, pretrained=published, fetch=False, **chosen)
            except UserError as error:
                others.append(error)
                continue
            adapted = network.facts()["adapted"]
            was = adapted if written.get("adapted") is None else list(written["adapted"])
            if adapted != was:
                said = "; ".join(was) or "nothing adapted"
                others.append(UserError(f"'{file}' was written for '{name}' with {said}, which no image size here has"))
                continue
            try:
                network.origin = load_weights(network, file, drop_head=drop, role=role)
            except UserError as error:
                refused.append(error)
                continue
            if assumed := [key for key in asked if options[key] is None]:
                network.origin += f"; assumed: {', '.join(assumed)}"
            return network
    raise min(refused or others, key=_far)


def _far(refusal: UserError) -> int:
    """Count the tensors that do not fit, so that of two networks the one that the file is nearly of says why."""
    return refusal.tensors if isinstance(refusal, Unfitting) else 0


def classes_in(name: str, data: DataSpec, file: str | Path, **making: Any) -> int:
    """Count the classes of a network by the file of its weights.

    Args:
        name: as in ``create``.
        data: the same; its number of classes is not read.
        file: the weights.
        making: keywords of ``load_given``.

    Raises:
        UserError: the weights cannot be read, are of another network, or hold no classifier.
    """
    network = load_given(name, data._replace(num_classes=2), file, drop_head=True, role="teacher", **making)
    return head_rows(network, file)


def written_facts(file: Path) -> Mapping[str, Any]:
    """Read what kdzoo wrote beside the weights in a file; nothing from a file of other origin.

    Raises:
        UserError: it is damaged.
    """
    try:
        if not is_file(file):
            return {}
        with safe_open(file, "pt") as content:
            text = (content.metadata() or {}).get("kdzoo")
    except (SafetensorError, OSError) as error:
        if is_shortage(error):
            raise
        return {}
    if text is None:
        return {}
    try:
        return asdict(typed(Facts, json.loads(text), ""))
    except (UserError, ValueError, TypeError, RecursionError) as error:
        raise UserError(f"'{file}' is damaged: what it says of its network is not what kdzoo writes") from error


def _native(name: str) -> int | None:
    facts = timm.get_pretrained_cfg(names.resolve(name)) if ":" not in name else None
    return facts.input_size[-1] if facts else None
