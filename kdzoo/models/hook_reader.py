"""Read stages and embedding of any network by hooks on its submodules."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.utils._pytree import tree_map

from kdzoo.errors import UserError
from kdzoo.models.maps import (
    CannotRead,
    Layout,
    Slot,
    as_map,
    close_to,
    evenly_spaced,
    first_of,
    layout_of,
    logits_in,
)
from kdzoo.outputs import Output


class ModuleCall(NamedTuple):
    """A call of one submodule in the test pass that looks for stages."""

    name: str
    module: nn.Module
    layout: Layout
    mean: Tensor  # (B, C) of the map over its positions


def find_taps(calls: Sequence[ModuleCall]) -> list[ModuleCall]:
    """Choose four stages among the calls of a pass: the last map of each of the four lowest resolutions.

    Three resolutions give a fourth tap, what the shallowest stage reads (as in the 32x32 ResNets); a single resolution
    gives four of the longest row of equal blocks.

    Raises:
        CannotRead: two resolutions, or no row of four blocks.
    """
    stages: list[list[ModuleCall]] = []
    largest = 0
    # Of modules that are called again and again, hooks keep the last output.
    last = {call.name: call for call in calls}
    # Backwards, because a map that is followed by a larger one (a gate of squeeze-and-excitation) is no stage.
    for call in reversed(calls):
        if call is not last[call.name]:
            continue
        area = call.layout.height * call.layout.width
        if area > largest:
            stages.append([])
            largest = area
        if area == largest:
            stages[-1].append(call)
    if stages and largest > 1 and _is_global_pool(stages[0]):
        stages.pop(0)
    if len(stages) >= 4:
        return [_outermost(stage) for stage in reversed(stages[:4])]
    if len(stages) == 3:
        taps = [_outermost(stage) for stage in reversed(stages)]
        return [_before(taps[0], list(reversed(stages[2]))), *taps]
    if len(stages) == 1:
        return _blocks(list(reversed(stages[0])))
    raise CannotRead(f"{len(stages)} resolutions")


def _outermost(stage: list[ModuleCall]) -> ModuleCall:
    """The last call of the least nested modules: the stage itself, not the first layers of the next."""
    return min(stage, key=lambda call: call.name.count("."))


def _before(stage: ModuleCall, calls: list[ModuleCall]) -> ModuleCall:
    """The call before the first inside a stage; the first of all where the stage has no calls inside or before it."""
    inside = (i for i, call in enumerate(calls) if call.name.startswith(f"{stage.name}."))
    return calls[max(next(inside, 0) - 1, 0)]


def _is_global_pool(stage: list[ModuleCall]) -> bool:
    first = stage[-1]
    kind = type(first.module).__name__
    return (first.layout.height, first.layout.width) == (1, 1) and any(
        word in kind for word in ("Avg", "Adaptive", "Global")
    )


def _blocks(calls: list[ModuleCall]) -> list[ModuleCall]:
    rows: dict[tuple[str, type], list[ModuleCall]] = {}
    for call in calls:
        rows.setdefault((call.name.rpartition(".")[0], type(call.module)), []).append(call)
    row = max(rows.values(), key=len)
    return [row[i] for i in evenly_spaced(len(row))]


class HookReader:
    """A reader of any network's stages, embedding and logits, through hooks registered once.

    ``classifier`` is the name of the layer that makes the logits of the embedding, where there is exactly one.

    Args:
        body: images -> logits (B, K), in evaluation mode.
        images: a probe, (B, 3, H, W), normalised.
        taps: names of four submodules, shallow to deep; None to find them.
        classifier: whether the body ends in one; else it returns the embedding.

    Raises:
        UserError: an unknown name, or an output that is no map.
        CannotRead: no four stages were found, or nothing tells what the embedding is.
    """

    trunk = "forward"

    def __init__(self, body: nn.Module, images: Tensor, taps: Sequence[str] | None = None, classifier: bool = True):
        calls, self.classifier, embedding = _probe(body, images, classifier)
        if taps is None:
            chosen = find_taps(calls)
            _check_stages(body, images, calls, chosen)
        else:
            chosen = [_named(body, calls, name) for name in taps]
        if not chosen and self.classifier is None and classifier:
            raise CannotRead("its logits are not made by a linear layer")
        self.names = tuple(call.name for call in chosen)
        self._layouts = [call.layout for call in chosen]
        self._slots = [Slot() for _ in chosen]
        for call, slot in zip(chosen, self._slots, strict=True):
            call.module.register_forward_hook(slot.output)
        self._final = Slot()
        final = _averaged(calls, embedding)
        self._final_layout = None if final is None else final.layout
        if final is not None:
            final.module.register_forward_hook(self._final.output)
        self._embedding = Slot()
        if self.classifier is not None:
            body.get_submodule(self.classifier).register_forward_pre_hook(self._embedding.input, with_kwargs=True)

    def read(self, body: nn.Module, images: Tensor, features: bool) -> Output:
        """Run normalised images (B, 3, H, W) through the network and return what ``Output`` holds.

        Logits (B, K), embedding (B, D), four maps (B, C, H, W) if ``features``, and the final map where there is one.
        """
        self.open()
        logits, embedding = self.tail(body, body(images))
        maps = tuple(as_map(slot.take(), layout) for slot, layout in zip(self._slots, self._layouts, strict=True))
        embedding = maps[-1].mean((2, 3)) if embedding is None and maps else embedding
        embedding = logits if embedding is None else embedding
        final = None if self._final_layout is None else as_map(self._final.take(), self._final_layout)
        return Output(logits, embedding, maps if features else (), final=final)

    def tail(self, body: nn.Module, output: Any) -> tuple[Any, Tensor | None]:
        """Return logits (B, K) and embedding (B, D) of what the network returned last.

        The embedding is None where it is the last map's mean.
        """
        return logits_in(output), self._embedding.take()

    def open(self) -> None:
        """Store what hooks see from now on."""
        for slot in (*self._slots, self._final, self._embedding):
            slot.open()

    def forget(self) -> None:
        """Drop what hooks have stored, and store no more."""
        for slot in (*self._slots, self._final, self._embedding):
            slot.take()

    def head(self, body: nn.Module, means: Tensor) -> Tensor:
        """Classify means (M, D) over parts of the final map: logits (M, K). The network must have a final map."""
        assert self.classifier is not None, "no final map is shown"
        return body.get_submodule(self.classifier)(means)


def _averaged(calls: Sequence[ModuleCall], embedding: Tensor | None) -> ModuleCall | None:
    """The call whose map's mean is the embedding, the last of the largest; pooled maps are such too, but small."""
    last = {call.name: call for call in calls}
    if embedding is None:
        return None
    means = [call for call in calls if call is last[call.name] and close_to(call.mean, embedding, 1e-3)]
    return max(reversed(means), key=lambda call: call.layout.height * call.layout.width, default=None)


def _probe(body: nn.Module, images: Tensor, classifier: bool) -> tuple[list[ModuleCall], str | None, Tensor | None]:
    """The calls that gave maps, in order; the name of the linear layer that gave the logits, and what it read."""
    calls: list[ModuleCall] = []
    linear: list[tuple[str, Tensor, Tensor]] = []

    def watch(name: str) -> Any:
        def hook(module: nn.Module, inputs: tuple, keywords: dict[str, Any], output: Any) -> None:
            layout = layout_of(output, len(images))
            if layout is not None:
                calls.append(ModuleCall(name, module, layout, as_map(output, layout).mean((2, 3))))
            if isinstance(module, nn.Linear):
                linear.append((name, first_of(inputs, keywords), output))

        return hook

    handles = [m.register_forward_hook(watch(name), with_kwargs=True) for name, m in body.named_modules() if name]
    try:
        output = body(images.clone())  # some change them in place
    finally:
        for handle in handles:
            handle.remove()
    logits = logits_in(output)
    if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != len(images):
        got = tuple(logits.shape) if isinstance(logits, Tensor) else _kind(output)
        raise UserError(
            f"{type(body).__name__} returns {got}, expected logits of shape (batch, classes), alone, as the first of a "
            "tuple or as .logits; wrap it in a module that returns them"
        )
    if not classifier:
        return calls, None, None
    if (logits >= 0).all() and logits.sum(dim=1).sub(1).abs().max() < 1e-4:
        raise UserError(
            f"{type(body).__name__} ends in a softmax: what it returns is positive and sums to 1, and logits are "
            "expected, whose softmax the losses take; return what goes into its softmax"
        )
    for name, inputs, output in reversed(linear):
        if inputs.ndim == 2 and output.shape == logits.shape and output.equal(logits):
            return calls, name, inputs
    return calls, None, None


def _kind(output: Any) -> str:
    keys = f" with {', '.join(map(str, output))}" if isinstance(output, Mapping) else ""
    return f"{type(output).__name__}{keys}"


def _check_stages(body: nn.Module, images: Tensor, calls: Sequence[ModuleCall], chosen: Sequence[ModuleCall]) -> None:
    """Refuse a tap past which something reaches the logits: such a map is a part of a stage, not its output.

    Where the rest of the network reads this map alone, exchanging it between two images exchanges their logits.
    """
    logits = logits_in(body(images.clone()))
    wanted = logits.flip(0)
    for tap in chosen:
        left = [sum(call.name == tap.name for call in calls)]  # of a module that is called again, the last counts

        def exchange(module: nn.Module, inputs: tuple, output: Any, left: list[int] = left) -> Any:
            left[0] -= 1
            return None if left[0] else _exchanged(output)

        handle = tap.module.register_forward_hook(exchange)
        try:
            found = logits_in(body(images.clone()))
        finally:
            handle.remove()
        if (found - wanted).abs().max() > 0.01 * (logits - wanted).abs().max():
            raise CannotRead(f"'{tap.name}' is a part of a stage, whose output no submodule returns")


def _exchanged(output: Any) -> Any:
    """Turn the rows of all tensors (B, ...) in an output around."""
    return tree_map(lambda part: part.flip(0) if isinstance(part, Tensor) and part.ndim else part, output)


def _named(body: nn.Module, calls: Sequence[ModuleCall], name: str) -> ModuleCall:
    for call in reversed(calls):
        if call.name == name:
            return call
    known = [call.name for call in calls]
    raise UserError(
        f"tap '{name}' of {type(body).__name__} gives no map; expected submodules whose output is "
        f"(B, C, H, W), (B, H, W, C) or square tokens (B, N, C), such as {', '.join(known[-4:]) or 'none here'}"
    )
