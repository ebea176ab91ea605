"""Read the maps of stages before their last ReLU."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from kdzoo.models.maps import Layout, Slot, as_map, close_to, first_of, layout_of

RECTIFIERS = (nn.ReLU, nn.ReLU6)
NORMS = (nn.BatchNorm2d, nn.GroupNorm)


class Rectified(NamedTuple):
    """A ReLU through which the map of a stage goes, and how its input holds the map."""

    module: nn.Module
    layout: Layout


class ReluInput(Slot):
    """Storage for the input of one ReLU."""

    def input(self, module: Any, inputs: tuple, keywords: Mapping[str, Any]) -> None:
        if self.is_open:
            value = first_of(inputs, keywords)
            self.value = value.clone() if module.inplace else value  # in place, it would be overwritten


class Preactivations:
    """A reader of the maps of stages before their ReLU, through hooks registered once.

    Of a stage that ends in a ReLU it is what enters that; of one whose map the next layers read through a norm and a
    ReLU, as in pre-activation networks, what the norm gives; of any other the map itself. ReLUs are seen where they
    are modules.

    Args:
        body: the network, in evaluation mode.
        read: a pass through it that gives the same features each time.
    """

    def __init__(self, body: nn.Module, read: Callable[[], Sequence[Tensor]]):
        features = read()
        found = find_rectifiers(body, read, features)
        self._slots: list[tuple[ReluInput, Layout] | None] = []
        for stage in range(len(features)):
            if stage not in found:
                self._slots.append(None)
                continue
            slot = ReluInput()
            found[stage].module.register_forward_pre_hook(slot.input, with_kwargs=True)
            self._slots.append((slot, found[stage].layout))
        # A map without a negative number was rectified, if only in parts or by a function.
        self.known = all(stage in found or bool((maps < 0).any()) for stage, maps in enumerate(features))

    def open(self) -> None:
        """Store the inputs of the ReLUs in the next pass."""
        for slot in self._slots if self.known else ():
            if slot is not None:
                slot[0].open()

    def take(self, features: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Return the maps that the last pass stored, given its ``features``; none if a stage's is unknown."""
        if not self.known:
            return ()
        pairs = zip(features, self._slots, strict=True)
        return tuple(maps if slot is None else as_map(slot[0].take(), slot[1]) for maps, slot in pairs)


def find_rectifiers(
    body: nn.Module, read: Callable[[], Sequence[Tensor]], features: Sequence[Tensor]
) -> dict[int, Rectified]:
    """Find the ReLU of each stage that has one, by comparing values in a pass: stages by number, shallow to deep."""
    ending: dict[int, Rectified] = {}
    entered: dict[int, Rectified] = {}
    reading: dict[int, Layout] = {}  # the stages whose map a norm has read since the last ReLU

    def stages_of(value: Any) -> dict[int, Layout]:
        layout = layout_of(value, len(features[0])) if features else None
        if layout is None:
            return {}
        maps = as_map(value, layout)
        return {i: layout for i, f in enumerate(features) if close_to(maps, f)}

    def before(module: nn.Module, inputs: tuple, keywords: dict[str, Any]) -> None:
        nonlocal reading
        value = first_of(inputs, keywords)
        if isinstance(module, NORMS):
            reading = stages_of(value)
            return
        for found in (ending, entered):  # a module that is called again keeps the last input only
            for stage in [stage for stage, rectified in found.items() if rectified.module is module]:
                del found[stage]
        for stage, layout in reading.items():
            if value.shape == features[stage].shape:
                entered[stage] = Rectified(module, layout)
        reading = {}

    def after(module: nn.Module, inputs: tuple, output: Any) -> None:
        for stage, layout in stages_of(output).items():
            ending[stage] = Rectified(module, layout)

    watched = [module for module in body.modules() if isinstance(module, (*RECTIFIERS, *NORMS))]
    handles = [module.register_forward_pre_hook(before, with_kwargs=True) for module in watched]
    handles += [module.register_forward_hook(after) for module in watched if isinstance(module, RECTIFIERS)]
    try:
        read()
    finally:
        for handle in handles:
            handle.remove()
    return entered | ending
