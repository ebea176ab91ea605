"""Find the weights of one network in what a training script saved: under its containers, prefixes and other names."""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from kdzoo.errors import UserError, is_shortage
from kdzoo.models.peers import dialects

ROLES = ("student", "teacher")
DEEPEST = 64  # mappings in mappings that are read
# Where training code puts the weights, be it as a container or as a prefix of their names.
WRAPPERS = (
    *(
        "state_dict",
        "model",
        "net",
        "network",
        "model_state_dict",
        "params",
        "weights",
        "backbone",
        "encoder",
        "module",
    ),
    *("timm_model", "body", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", *ROLES),
)
INSIDE = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")  # these may wrap any submodule
AVERAGED = re.compile(r"(^|_)ema($|_)", re.IGNORECASE)  # names of an exponential moving average of weights
COUNTERS = ("num_batches_tracked", "total_ops", "total_params")  # of batch norm and profilers; logits need none


class Found(NamedTuple):
    """Weights found in a file, by the names of the network they are for."""

    path: str  # the containers and prefixes that were taken off
    translated: str  # whose names were translated; empty: none were
    state: dict[str, Tensor]

    @property
    def averaged(self) -> bool:
        """Whether they are a moving average."""
        return any(AVERAGED.search(part) for part in self.path.split("."))

    def rank(self, role: str) -> tuple[bool, bool, bool]:
        """Return what to sort candidates by: those of the role asked for first, then averages, then known places."""
        parts = self.path.split(".") if self.path else []
        others = [one for one in ROLES if one != role] if role else []
        known = all(part in WRAPPERS or AVERAGED.search(part) for part in parts)
        return any(part in others for part in parts), not self.averaged, not known


class Misfit(NamedTuple):
    """How far weights are from those of a network: names of tensors."""

    differing: list[str]
    missing: list[str]
    unexpected: list[str]

    @property
    def total(self) -> int:
        """How many tensors do not fit."""
        return len(self.differing) + len(self.missing) + len(self.unexpected)


def tensors_of(content: Any) -> dict[str, Tensor]:
    """List all tensors in nested mappings by their names, joined by dots; all else is left out.

    A mapping that a file holds in several places, perhaps in itself, is read in the first of them.
    """
    found: dict[str, Tensor] = {}
    seen: set[int] = set()

    def enter(mapping: Mapping[Any, Any], prefix: str, depth: int) -> None:
        seen.add(id(mapping))
        for key, value in mapping.items():
            if isinstance(value, Tensor) and not value.is_nested:
                found[f"{prefix}{key}"] = value
            elif isinstance(value, Mapping) and id(value) not in seen and depth < DEEPEST:
                enter(value, f"{prefix}{key}.", depth + 1)

    if isinstance(content, Mapping):
        enter(content, "", 1)
    return found


def misfit(state: Mapping[str, Tensor], expected: Mapping[str, Tensor], left: str = "") -> Misfit:
    """Compare names and shapes with those of a network, without the layer whose name ``left`` begins."""
    names = {key for key in state if not (left and key.startswith(left))}
    wanted = {key for key in expected if not (left and key.startswith(left))}
    both = names & wanted
    return Misfit(
        [key for key in expected if key in both and state[key].shape != expected[key].shape],
        sorted(key for key in wanted - names if not key.endswith(COUNTERS)),
        sorted(key for key in names - wanted if not key.endswith(COUNTERS)),
    )


def candidates(tensors: Mapping[str, Tensor], body: nn.Module) -> Iterator[list[Found]]:
    """List the ways to read a file's tensors as the weights of a network, the plainest first, whether they fit or not.

    These are the tensors below each container or prefix, first by their own names, then by translated ones, then
    without prefixes that only some of them have, and at last with a classifier of another name.
    """
    needed = sum(not key.endswith(COUNTERS) for key in body.state_dict())
    counts: Counter[str] = Counter()
    for name in tensors:
        parts = name.split(".")
        counts.update(".".join(parts[:depth]) for depth in range(len(parts)))
    places = [
        (path, {key[len(path) + 1 if path else 0 :]: value for key, value in tensors.items() if _below(key, path)})
        for path, count in sorted(counts.items())
        if count >= needed // 2
    ]
    yield from _ways(places, body)
    stripped = list(_stripped(places))
    yield from _ways(stripped, body)
    yield [found for path, state in (*places, *stripped) for found in _headed(path, state, body)]


def choose(fitting: list[Found], role: str, file: str) -> Found:
    """Choose among weights that all fit: those of ``role``, then a moving average, then those in a known place.

    Raises:
        UserError: two are as good and not the same.
    """
    best = min(found.rank(role) for found in fitting)
    first, *others = [found for found in fitting if found.rank(role) == best]
    for other in others:
        if any(not torch.equal(first.state[key], other.state[key]) for key in first.state.keys() & other.state.keys()):
            raise UserError(
                f"'{file}' holds several networks that fit, under {first.path or 'no name'} and under "
                f"{other.path or 'no name'}; save the one that you mean to a file by itself"
            )
    return first


def _ways(places: Sequence[tuple[str, dict[str, Tensor]]], body: nn.Module) -> Iterator[list[Found]]:
    """The weights in these places by their own names, then by translated ones."""
    yield [Found(path, "", state) for path, state in places]
    yield [translated for path, state in places for translated in _translated(path, state, body)]


def _stripped(places: Iterable[tuple[str, dict[str, Tensor]]]) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """The same weights without wrappers in their names, where that changes them and no two become one."""
    for path, inner in places:
        bare = {_bare(key): value for key, value in inner.items()}
        if bare.keys() != inner.keys() and len(bare) == len(inner):
            taken = sorted({part for key in inner for part in key.split(".") if part in WRAPPERS})
            yield ".".join(filter(None, [path, *taken])), bare


def _below(key: str, path: str) -> bool:
    return not path or key.startswith(path + ".")


def _bare(key: str) -> str:
    """Take the wrappers off a name: all at its beginning, and those that may stand inside."""
    parts = key.split(".")
    while len(parts) > 2 and parts[0] in WRAPPERS:
        parts.pop(0)
    return ".".join(part for part in parts if part not in INSIDE)


def _headed(path: str, state: dict[str, Tensor], body: nn.Module) -> Iterator[Found]:
    """The same weights where all layers but the last linear one are there, and one layer more, which stands for it.

    So they are saved where a head was put in its place, as in ``net.fc = nn.Sequential(nn.Dropout(), nn.Linear(...))``.
    """
    expected = body.state_dict()
    differing, missing, unexpected = misfit(state, expected)
    layers = [{key.rpartition(".")[0] for key in keys} for keys in (missing, unexpected)]
    if differing or [len(names) for names in layers] != [1, 1] or list(expected)[-1] not in missing:
        return
    [[name], [other]] = layers
    renamed = {name + key.removeprefix(other) if key in unexpected else key: value for key, value in state.items()}
    if isinstance(body.get_submodule(name), nn.Linear) and renamed.keys() >= set(missing):
        yield Found(path, f"a network whose classifier is named {other}", renamed)


def _translated(path: str, state: dict[str, Tensor], body: nn.Module) -> Iterator[Found]:
    for dialect in dialects(body):
        translated = {dialect.translate(key): value for key, value in state.items()}
        if translated.keys() != state.keys() and len(translated) == len(state):
            yield Found(path, dialect.origin, translated)
    converted = _by_timm(state, body)
    if converted is not None and converted.keys() != state.keys():
        yield Found(path, "timm's earlier versions and sources", converted)


def _by_timm(state: dict[str, Tensor], body: nn.Module) -> dict[str, Tensor] | None:
    """Convert the names of earlier versions of a timm network by its own filter; None where it changes values too."""
    convert = getattr(sys.modules[type(body).__module__], "checkpoint_filter_fn", None)
    if convert is None:
        return None
    try:
        converted: dict[str, Tensor] = convert(dict(state), body)
    except Exception as error:  # of names that it does not know
        if is_shortage(error):
            raise
        return None
    resampled = any(
        not isinstance(value, Tensor)
        or (key in state and state[key].numel() != value.numel() and _is_new(value, state))
        for key, value in converted.items()
    )
    return None if resampled else converted


def _is_new(value: Tensor, state: Mapping[str, Tensor]) -> bool:
    return all(value is not known for known in state.values())
