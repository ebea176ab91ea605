"""Save weights as safetensors, and load checkpoints of any origin without running code in them."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from kdzoo.errors import UserError
from kdzoo.files import write_atomically

NESTS = ("state_dict", "model", "student")  # under which trainers put the weights
SHOWN = 3  # mismatching tensors named in an error


def save_weights(network: nn.Module, file: str | os.PathLike[str]) -> None:
    """Save the weights of ``network.body``, or of the module itself, as safetensors.

    The file's metadata hold what a network must be given to read them, see ``given``.
    """
    state = {k: v.detach().cpu().contiguous().clone() for k, v in _bare(network).state_dict().items()}
    facts = getattr(network, "facts", None)
    metadata = {"kdzoo": json.dumps(facts())} if facts else None
    write_atomically(Path(file), lambda temporary: temporary.write_bytes(save(state, metadata)))


def load_weights(network: nn.Module, file: str | os.PathLike[str], *, drop_head: bool = False) -> str:
    """Load a checkpoint (safetensors, .pt or .pth) into ``network.body``, or into the module itself.

    Nests such as ``{"state_dict": ...}`` and prefixes such as ``module.`` are taken off. Pickled code is not
    run.

    Raises:
        UserError: no such file, no weights in it, or weights of another network.
    """
    path = Path(file)
    if not path.is_file():
        raise UserError(f"weights '{path}' not found; expected a .safetensors, .pt or .pth file")
    state = _unwrapped(_read(path))
    if not state or not all(isinstance(v, Tensor) for v in state.values()):
        raise UserError(f"'{path}' holds no weights; expected a mapping from names to tensors")
    body = _bare(network)
    expected = body.state_dict()
    if drop_head:  # minimal
        state = {k: v for k, v in state.items() if k in expected and v.shape == expected[k].shape}
        state = {**expected, **state}
    missing, unexpected = expected.keys() - state.keys(), state.keys() - expected.keys()
    differing = [k for k in expected if k in state and expected[k].shape != state[k].shape]
    if missing or unexpected or differing:
        shapes = [f"{k} is {tuple(state[k].shape)}, expected {tuple(expected[k].shape)}" for k in differing[:SHOWN]]
        named = shapes or [f"{k} is missing" for k in sorted(missing)[:SHOWN]]
        named = named or [f"{k} is unexpected" for k in sorted(unexpected)[:SHOWN]]
        raise UserError(
            f"'{path}' does not fit {getattr(network, 'name', type(body).__name__)}: {'; '.join(named)} "
            f"({len(differing)} differ, {len(missing)} missing, {len(unexpected)} unexpected); pass the weights of "
            "the same network, classes and image size"
        )
    body.load_state_dict(state)
    return f"{path}"


def _bare(network: nn.Module) -> nn.Module:
    body = getattr(network, "body", network)
    return body if isinstance(body, nn.Module) else network


def _read(path: Path) -> Any:
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"'{path}' cannot be read as weights ({reason[:120]}); expected safetensors, or a .pt or .pth file of "
            "tensors alone"
        ) from error


def _unwrapped(state: Any) -> dict[str, Any]:
    while isinstance(state, Mapping):
        nest = next((n for n in NESTS if isinstance(state.get(n), Mapping)), None)
        if nest is None:
            break
        state = state[nest]
    if not isinstance(state, Mapping):
        return {}
    for prefix in ("module.", "body.", "_orig_mod."):
        if state and all(str(k).startswith(prefix) for k in state):
            state = {k.removeprefix(prefix): v for k, v in state.items()}
    return dict(state)
