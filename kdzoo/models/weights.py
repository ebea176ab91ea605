"""Save weights as safetensors, and load checkpoints of any origin without running code in them."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save
from torch import Tensor, nn

from kdzoo.errors import UserError
from kdzoo.files import make_folder, write_atomically
from kdzoo.models.peers import known_as
from kdzoo.models.unwrap import Found, candidates, choose, misfit, tensors_of
from kdzoo.models.weight_files import find_file, read_file, written_by_kdzoo

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)  # numbers of 8 bits mean nothing without a scale
SHOWN = 3  # mismatching tensors named in an error


class Unfitting(UserError):
    """Weights of another network; ``tensors`` counts those that do not fit."""

    def __init__(self, message: str, tensors: int):
        super().__init__(message)
        self.tensors = tensors


def save_weights(network: nn.Module, file: str | os.PathLike[str], facts: Mapping[str, Any] | None = None) -> None:
    """Save the weights of ``network.body``, or of the module itself, as safetensors.

    The file's metadata hold what a network must be given to read them, see ``given``: by default what it says itself.
    """
    state = {k: v.detach().cpu().contiguous().clone() for k, v in _bare(network).state_dict().items()}
    if facts is None and hasattr(network, "facts"):
        facts = network.facts()  # type: ignore[operator]  # of Network
    metadata = None if facts is None else {"kdzoo": json.dumps(facts)}
    make_folder(Path(file).parent)
    write_atomically(Path(file), lambda temporary: temporary.write_bytes(save(state, metadata)))


def load_weights(
    network: nn.Module,
    file: str | os.PathLike[str],
    *,
    drop_head: bool = False,
    role: Literal["student", "teacher", ""] = "",
) -> str:
    """Load a checkpoint of any training code into ``network.body``, or into the module itself.

    Containers such as ``{"state_dict": ...}`` and prefixes such as ``module.`` are taken off, a moving average is
    preferred, and the names of RepDistiller, mdistiller, pytorch-cifar-models, pytorch-cifar100 and earlier versions of
    timm are translated where the architecture is the same. Pickled code is not run.

    Args:
        network: what to load into.
        file: safetensors or what ``torch.save`` wrote, or a folder with ``model.safetensors`` or ``pytorch_model.bin``,
            or that of a finished run.
        drop_head: whether the classifier stays as it is.
        role: which network of a file that holds both student and teacher.

    Returns:
        A line that says what was loaded, and what was taken off and translated.

    Raises:
        UserError: no such file, no weights in it, or weights of another network.
    """
    path = find_file(Path(file))
    chosen, tensors = _chosen(network, path, drop_head, role)
    body = _bare(network)
    expected = body.state_dict()
    head = _head(network, body) if drop_head else ""
    _check_kind(path, chosen.state, expected)
    stem = _hidden_stem(network)
    if stem and not written_by_kdzoo(path):
        raise UserError(
            f"'{path}' was made with another stem than {_name(network, body)} has here ({stem}): the shapes agree, and "
            "the outputs would not; make the network for the image size of the weights (image_size=224)"
        )
    # What is not in the file, counters and a head that is left out, stays as it is.
    kept = {
        key: value for key, value in chosen.state.items() if key in expected and not (head and key.startswith(head))
    }
    body.load_state_dict({**expected, **kept})
    return _line(path, chosen, head, tensors, network)


def head_rows(network: nn.Module, file: str | os.PathLike[str]) -> int:
    """Count the outputs of the classifier in a file of weights that fits a network but for its classifier.

    Raises:
        UserError: as by ``load_weights``, or there is no classifier in the file.
    """
    path = find_file(Path(file))
    chosen, _ = _chosen(network, path, True, "teacher")
    weight = chosen.state.get(f"{_head(network, _bare(network))}weight")
    if weight is None or not weight.ndim:
        raise UserError(f"'{path}' holds no classifier; pass weights with one, or set teacher.classifier=false")
    return len(weight)


def _chosen(network: nn.Module, path: Path, drop_head: bool, role: str) -> tuple[Found, dict[str, Tensor]]:
    """Choose the way to read a file's tensors as the weights of a network; also give these tensors as they are named.

    Raises:
        UserError: there are none, or none that fit.
    """
    tensors = tensors_of(read_file(path))
    if not tensors:
        raise UserError(f"'{path}' holds no weights; expected a mapping from names to tensors")
    body = _bare(network)
    expected = body.state_dict()
    head = _head(network, body) if drop_head else ""
    known: list[Found] = []
    fitting: list[Found] = []
    for ways in candidates(tensors, body):
        known += ways
        fitting = [found for found in ways if not misfit(found.state, expected, head).total]
        if fitting:
            break
    if not fitting:
        said, count = _misfit(known, tensors, expected, head)
        raise Unfitting(f"'{path}' does not fit {_name(network, body)}: {said}", count)
    return choose(fitting, role, str(path)), tensors


def _bare(network: nn.Module) -> nn.Module:
    body = getattr(network, "body", network)
    return body if isinstance(body, nn.Module) else network


def _name(network: nn.Module, body: nn.Module) -> str:
    return getattr(network, "name", type(body).__name__)


def _head(network: nn.Module, body: nn.Module) -> str:
    """Return what the names of the classifier's parameters begin with.

    Raises:
        UserError: the network does not show which layer it is.
    """
    getter = getattr(body, "get_classifier", None)
    layer = getter() if getter else getattr(network, "classifier", None)
    if layer is None:
        layer = next((module for module in reversed(list(body.modules())) if isinstance(module, nn.Linear)), None)
    name = next((name for name, module in body.named_modules() if module is layer), "")
    if not name:
        raise UserError(f"{_name(network, body)} shows no classifier to leave out; load weights of the same classes")
    return name + "."


def _misfit(
    known: list[Found], tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor], head: str
) -> tuple[str, int]:
    """Say how the nearest reading of a file differs from the network, and why; count the tensors that do not fit."""
    nearest = min(
        (found.state for found in known),
        key=lambda state: misfit(state, expected, head).total,
        default=dict(tensors),
    )
    differing, missing, unexpected = found = misfit(nearest, expected, head)
    if missing and (reason := next(filter(None, (known_as(other.state) for other in known)), "")):
        return reason, found.total
    shapes = [f"{k} is {tuple(nearest[k].shape)}, expected {tuple(expected[k].shape)}" for k in differing[:SHOWN]]
    layers = {key.rpartition(".")[0] for key in differing}
    only_head = len(layers) == 1 and not missing and not unexpected and list(expected)[-1] in differing
    absent = [f"{key} is missing" for key in missing[:SHOWN]]
    named = shapes or [*absent, *(f"{key} is unexpected" for key in unexpected[:SHOWN])]
    return (
        f"{'; '.join(named)} ({len(differing)} differ, {len(missing)} missing, {len(unexpected)} unexpected); pass the "
        "weights of the same network, classes and image size"
        + (", or leave the head out and train on (teacher.finetune=true)" if only_head else "")
    ), found.total


def _check_kind(path: Path, state: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Check that weights are plain numbers of a kind that the network's may be made of."""
    for name, value in state.items():
        kind = "quantised" if value.is_quantized else "meta" if value.is_meta else "sparse"
        if kind != "sparse" or value.layout != torch.strided:
            raise UserError(f"'{path}': {name} is a {kind} tensor; expected dense ones, as state_dict() gives them")
        if name in expected and expected[name].is_floating_point():
            if value.dtype not in FLOATS:
                kind = str(value.dtype).removeprefix("torch.")
                raise UserError(
                    f"'{path}': {name} is a tensor of {kind}; expected floats of 16 bits or more, as state_dict() gives"
                )
            if value.sum().isnan() and value.isnan().any():  # the sum alone reads the weights once
                raise UserError(f"'{path}': {name} holds NaN; the training that it comes from failed, take another")


def _hidden_stem(network: nn.Module) -> str:
    """Return how a stem was adapted where the weights' shapes do not show it; else nothing."""
    changes = [change for change in getattr(network, "adapted", ()) if change.startswith("stem")]
    kernels = [re.findall(r"(\d+)x\d+", change) for change in changes]
    return "; ".join(changes) if all(len(set(sides)) <= 1 for sides in kernels) else ""


def _line(path: Path, found: Found, head: str, tensors: Mapping[str, Tensor], network: nn.Module) -> str:
    """Say what was loaded."""
    said = [f"under {found.path}" if found.path else ""]
    if found.averaged:
        said.append("a moving average (EMA)")
    if found.translated:
        said.append(f"names translated from those of {found.translated}")
    if head:
        said.append(f"without its head {head.removesuffix('.')}")
    stem = [change for change in getattr(network, "adapted", ()) if change.startswith("stem")]
    said.append("; ".join(stem) if stem else "stem as defined")
    return f"weights of {path} ({', '.join(filter(None, said))})"
