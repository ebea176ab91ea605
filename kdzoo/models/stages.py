"""Call the stages of a network one by one, on maps of this network or of another."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_aggregate

from kdzoo.errors import is_shortage, told
from kdzoo.models.maps import FAILURES, CannotRead, Layout, as_map, close_to, layout_of
from kdzoo.outputs import STAGES, Output, StageOutput

NOISE = 0.02  # added to the weights of a copy in which stages are looked for: at first some blocks change nothing
TOLERANCE = 1e-3  # between a plain pass and stages one after the other, of devices that do not repeat their bits


class Reader(Protocol):
    """What stages need of the reader of a network."""

    trunk: str  # the method of the body that makes what ``tail`` reads

    def read(self, body: Any, images: Tensor, features: bool) -> Output: ...

    def tail(self, body: Any, final: Any) -> tuple[Tensor, Tensor | None]: ...

    def open(self) -> None: ...

    def forget(self) -> None: ...


@dataclass(frozen=True)
class Value:
    """The result of an earlier operation, by its name."""

    name: str


class Operation(NamedTuple):
    """One operation between two stages: a call of a submodule, function or method, or a parameter that is read."""

    name: str
    kind: str
    target: Any
    args: Any
    kwargs: Any


class Tap(NamedTuple):
    """The submodule that returns a stage's map."""

    name: str
    layout: Layout
    prefix: int  # tokens before those of the map


class Form(NamedTuple):
    """The type of a tensor, and the order of its dimensions in memory, from far apart to next to each other."""

    dtype: torch.dtype
    order: tuple[int, ...]

    @classmethod
    def of(cls, tensor: Tensor) -> Form:
        """Read a tensor's form."""
        return cls(tensor.dtype, tuple(sorted(range(tensor.ndim), key=tensor.stride, reverse=True)))

    def give(self, tensor: Tensor) -> Tensor:
        """Bring a tensor to this form, which costs nothing if it has it."""
        back = [self.order.index(dim) for dim in range(tensor.ndim)]
        return tensor.to(self.dtype).permute(self.order).contiguous().permute(back)


class Stages:
    """A network cut behind each of its four stages into five parts, each a list of operations.

    The operations come from a symbolic trace (``torch.fx``) in which submodules stay whole unless a stage ends inside
    them, so the parts call the network's very submodules. Names are kept and no modules, so a copy of a network can
    run by the same parts.

    Args:
        body: the network, in evaluation mode.
        reader: reads its features.
        images: a probe, (B, 3, H, W), normalised.

    Raises:
        CannotRead: a stage reads more than the map of the stage before, or the network cannot be traced.
    """

    def __init__(self, body: nn.Module, reader: Reader, images: Tensor):
        self.taps = _find_taps(body, reader, images)
        self.parts: dict[bool, list[list[Operation]]] = {}  # by the network's mode
        for mode in (True, False):
            body.train(mode)
            self.parts[mode] = _cut(body, reader.trunk, [tap.name for tap in self.taps])
        self.forms: dict[Any, list[Form]] = {}  # of the stages' maps, by device and what autocast is set to
        self.learn_forms(body, images)
        self._check(body, reader, images)
        self.forms.clear()  # weights may still be laid out in another way

    def _check(self, body: nn.Module, reader: Reader, images: Tensor) -> None:
        wanted, maps, prefix = reader.read(body, images, True), images, None
        found = []
        for number in range(len(self.taps)):
            maps, prefix = self.run(body, number, maps, prefix)
            found.append(maps)
        last = self.tail(body, reader, maps, prefix)
        shown = [*wanted.features, wanted.embedding, wanted.logits]
        pairs = zip([*found, last.embedding, last.logits], shown, strict=True)
        if not all(close_to(one, other, TOLERANCE) for one, other in pairs):
            raise CannotRead("one after the other they give other outputs than the network")

    def knows_forms(self, like: Tensor) -> bool:
        """Tell whether the forms of the stages' maps are known for a tensor's device under the present autocast."""
        return _autocast(like) in self.forms

    def learn_forms(self, body: nn.Module, images: Tensor) -> None:
        """Find out in which form each stage gives its map under the present autocast."""
        key, value = _autocast(images), images
        forms = []
        for number in range(len(self.taps)):
            value = self._run(body, number, value)
            forms.append(Form.of(value))
        self.forms[key] = forms

    def run(self, body: nn.Module, number: int, maps: Tensor, prefix: Tensor | None = None) -> StageOutput:
        """Run one stage.

        Args:
            body: the network.
            number: of the stage, from 0.
            maps: of the stage before, (B, C, H, W); for stage 0 the images, normalised.
            prefix: the class and register tokens (B, P, C) beside that map. A map that comes without them is given
                the mean of its positions in their place.
        """
        tap = self.taps[number]
        found = self._run(body, number, self._entering(number, maps, prefix))
        return StageOutput(as_map(found, tap.layout), found[:, : tap.prefix] if tap.prefix else None)

    def tail(self, body: nn.Module, reader: Reader, maps: Tensor, prefix: Tensor | None = None) -> Output:
        """Run what follows the last stage: its map (B, C, H, W) -> logits and embedding."""
        number = len(self.taps)
        reader.open()
        logits, embedding = reader.tail(body, self._run(body, number, self._entering(number, maps, prefix)))
        reader.forget()
        return Output(logits, maps.mean((2, 3)) if embedding is None else embedding)

    def _entering(self, number: int, maps: Tensor, prefix: Tensor | None) -> Tensor:
        """What the part of this number reads, as the stage before would give it."""
        if not number:
            return maps
        return self.forms[_autocast(maps)][number - 1].give(_as_given(maps, prefix, self.taps[number - 1]))

    def _run(self, body: nn.Module, number: int, value: Tensor) -> Any:
        """Run the operations of one part."""
        values: dict[str, Any] = {"": value}
        operations = self.parts[body.training][number]

        def value_of(arg: Any) -> Any:
            return values[arg.name] if isinstance(arg, Value) else arg

        for name, kind, target, args, kwargs in operations:
            args, kwargs = map_aggregate(args, value_of), map_aggregate(kwargs, value_of)
            if kind == "call_module":
                values[name] = body.get_submodule(target)(*args, **kwargs)
            elif kind == "call_function":
                values[name] = target(*args, **kwargs)
            elif kind == "call_method":
                values[name] = getattr(args[0], target)(*args[1:], **kwargs)
            else:
                values[name] = attrgetter(target)(body)
        return values[operations[-1].name] if operations else value


def _autocast(like: Tensor) -> tuple[str, torch.dtype | None]:
    kind = like.device.type
    return kind, torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None


def _as_given(maps: Tensor, prefix: Tensor | None, tap: Tap) -> Tensor:
    """Bring a map (B, C, H, W) to the layout in which the tap's module returns it."""
    if tap.layout.kind == "NCHW":
        return maps
    if tap.layout.kind == "NHWC":
        return maps.permute(0, 2, 3, 1)
    tokens = maps.flatten(2).mT
    if not tap.prefix:
        return tokens
    if prefix is None:
        prefix = tokens.mean(dim=1, keepdim=True).expand(-1, tap.prefix, -1)
    return torch.cat([prefix, tokens], dim=1)


def _find_taps(body: nn.Module, reader: Reader, images: Tensor) -> list[Tap]:
    """Find the submodule that returns each feature, by comparing values in a copy whose weights all differ."""
    body, reader = deepcopy((body, reader))
    random = torch.Generator().manual_seed(0)
    for parameter in body.parameters():
        parameter.add_(NOISE * torch.randn(parameter.shape, generator=random).to(parameter))
    features = reader.read(body, images, True).features
    if len(features) != STAGES:
        raise CannotRead(f"it shows {len(features)} stages")
    found: list[list[Tap]] = [[] for _ in features]

    def watch(name: str) -> Any:
        def hook(module: nn.Module, inputs: tuple, output: Any) -> None:
            layout = layout_of(output, len(images))
            if layout is None or layout.place is not None:
                return
            prefix = output.shape[1] - layout.height * layout.width if layout.kind == "tokens" else 0
            maps = as_map(output, layout)
            for stage, wanted in enumerate(features):
                if maps.shape == wanted.shape and maps.equal(wanted):
                    found[stage].append(Tap(name, layout, prefix))

        return hook

    for name, module in body.named_modules():
        if name:
            module.register_forward_hook(watch(name))
    reader.read(body, images, False)
    taps: list[Tap] = []
    for stage, candidates in enumerate(found):
        whole = [tap for tap in candidates if not any(one.name.startswith(f"{tap.name}.") for one in taps)]
        if not whole:
            raise CannotRead(f"no submodule returns the map of stage {stage}")
        taps.append(min(reversed(whole), key=lambda tap: tap.name.count(".")))  # the stage, not a layer that keeps it
    return taps


class _Trunk(nn.Module):
    """A network of which one method is traced, whose further arguments keep their defaults."""

    def __init__(self, body: nn.Module, method: str):
        super().__init__()
        self.body, self.method = body, method

    def forward(self, images: Tensor) -> Any:
        return getattr(self.body, self.method)(images)


class _Tracer(fx.Tracer):
    """A tracer that keeps submodules whole, except those inside which a stage ends."""

    def __init__(self, taps: Sequence[str]):
        super().__init__()
        self.proxy_buffer_attributes = True
        parents = [tap.rpartition(".")[0] for tap in taps]
        self.open = {".".join(["body", *parent.split(".")[:depth]]) for parent in parents for depth in range(9)}

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return module_qualified_name not in self.open


def _cut(body: nn.Module, method: str, taps: Sequence[str]) -> list[list[Operation]]:
    """List the operations from images to the first stage, from each stage to the next, and from the last to the end."""
    try:
        graph = _Tracer(taps).trace(_Trunk(body, method))
    except (*FAILURES, fx.proxy.TraceError) as error:
        if is_shortage(error):
            raise
        raise CannotRead(f"torch.fx cannot trace it: {told(error).partition('. ')[0]}") from error
    nodes = list(graph.nodes)
    called = {node.target: node for node in nodes if node.op == "call_module"}
    if missing := [tap for tap in taps if f"body.{tap}" not in called]:
        raise CannotRead(f"its {method} does not call '{missing[0]}', where a stage ends")
    ends = [called[f"body.{tap}"] for tap in taps]
    [result] = [node.args[0] for node in nodes if node.op == "output"]
    if not isinstance(result, fx.Node):
        raise CannotRead("it returns more than one tensor")
    starts = [nodes[0], *ends]
    return [_between(nodes, start, end) for start, end in zip(starts, [*ends, result], strict=True)]


def _between(nodes: Sequence[fx.Node], start: fx.Node, end: fx.Node) -> list[Operation]:
    """List the operations that make ``end`` of ``start``."""
    needed: set[fx.Node] = set()
    left = [end]
    while left:
        node = left.pop()
        if node is start or node in needed:
            continue
        if node.op == "placeholder":
            raise CannotRead(f"'{_shown(end)}' reads more than the map of '{_shown(start)}'")
        needed.add(node)
        left.extend(node.all_input_nodes)

    def named(arg: Any) -> Any:
        return Value("" if arg is start else arg.name) if isinstance(arg, fx.Node) else arg

    return [
        Operation(
            node.name,
            node.op,
            node.target.removeprefix("body.") if isinstance(node.target, str) else node.target,
            map_aggregate(node.args, named),
            map_aggregate(node.kwargs, named),
        )
        for node in nodes
        if node in needed
    ]


def _shown(node: fx.Node) -> str:
    return str(node.target).removeprefix("body.")
