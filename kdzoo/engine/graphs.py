"""The step of all lanes as CUDA graphs: launched whole, where Python would launch it kernel by kernel."""

import random
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, distributed, nn
from torch.utils._pytree import tree_map_only

from kdzoo.distiller import Batch
from kdzoo.engine.lane import Lane
from kdzoo.engine.passes import TeacherPasses
from kdzoo.precision import PRECISIONS, autocast
from kdzoo.tensors import leaves

WARM_UP = 3  # plain steps before the capture: they make moments, workspaces and all else that is made when first used

Work = Callable[[], None]
Record = Callable[[Work, Any], Work]  # (work, stream) -> what does the work again


class Plain:
    """Steps that run operation by operation."""

    def __init__(self, teacher: TeacherPasses | None):
        self.teacher = teacher

    def begin(self, batch: Batch) -> Batch:
        """Begin a step of all lanes, and return the batch that they take."""
        if self.teacher is not None:
            self.teacher.forget()
        return batch

    def step(self, lane: Lane, batch: Batch, step: int) -> None:
        """Take one lane's step."""
        lane.step(batch, step)

    def end(self) -> None:
        """End a step of all lanes."""


class Graphed(Plain):
    """Steps that are captured once as CUDA graphs, after some plain ones, and replayed.

    The teacher's passes are one graph, and each lane's step is another on a separate stream, so that small
    networks overlap. A lane that fails is replayed no more and touches no other; one that cannot be captured continues
    plainly, beside the others, saying why. Graphs read batch, learning rate and step from tensors that stay in place,
    and the generator's seed and offset when they are replayed, so the seed that the host sets before each makes a
    graph draw what the plain step draws.

    Args:
        teacher: of all lanes.
        device: where they are.
        precision: of the networks.
        say: takes a line for the user.
        record: how work becomes a graph. Where work is not asynchronous, doing it again is the same.
    """

    def __init__(
        self,
        teacher: TeacherPasses | None,
        device: torch.device,
        precision: str,
        say: Callable[[str], None],
        record: Record,
    ):
        super().__init__(teacher)
        self.device, self.precision, self.say, self.record = device, precision, say, record
        self.runtime: Any = torch.get_device_module(device)
        self.streams: dict[Any, Any] = {}  # of each lane that is captured, and one for all others
        self.replays: dict[int, Work | None] = {}  # by lane; None: it cannot be captured
        self.teach: Work | None = None  # the teacher's passes
        self.passes: dict[Any, Any] = {}  # what they leave for the lanes
        self.plainly = False  # the teacher cannot be captured, and so nothing can
        self.batch: Batch | None = None
        self.begun = 0

    def begin(self, batch: Batch) -> Batch:
        self.begun += 1
        if self.plainly:
            return super().begin(batch)
        if self.batch is None:
            self.batch = tree_map_only(Tensor, Tensor.clone, batch)
        else:
            for still, new in zip(leaves(self.batch), leaves(batch), strict=True):
                still.copy_(new, non_blocking=True)
        if self.begun <= WARM_UP:
            return super().begin(self.batch)
        if self.teacher is not None:
            self.run_teacher(self.teacher)
        return self.batch

    def run_teacher(self, teacher: TeacherPasses) -> None:
        """Make the teacher's passes that the last plain step asked for, on the batch of this one."""
        if self.teach is None:
            # Only of memory that holds the next batch too: what a method made of the images is its lane's own.
            ours = {tensor.untyped_storage().data_ptr() for tensor in leaves(self.batch)}
            shown = [one.images for one in teacher.made.values() if one.images.untyped_storage().data_ptr() in ours]
            work = partial(self.pass_through, teacher, shown)
            try:
                with self.aside("teacher") as stream:
                    self.teach = self.record(work, stream) if shown else work
            except Exception as error:
                self.say(f"all steps run kernel by kernel, as the teacher cannot be a CUDA graph: {first_line(error)}")
                self.plainly = True
                teacher.forget()
                return
        self.teach()
        teacher.made = dict(self.passes)

    def pass_through(self, teacher: TeacherPasses, shown: list[Tensor]) -> None:
        """Make the teacher's passes as a lane would ask for them."""
        teacher.forget()
        with torch.no_grad(), autocast(self.device.type, PRECISIONS[self.precision]):
            for images in shown:
                teacher(images, teacher.show)
        self.passes = dict(teacher.made)

    def step(self, lane: Lane, batch: Batch, step: int) -> None:
        key = id(lane)
        if self.plainly:
            lane.step(batch, step)
        elif key in self.replays and self.replays[key] is None:
            with self.aside("plain"):  # where the lanes that come after need not wait for it
                lane.step(batch, step)
        elif self.begun <= WARM_UP:
            before = kept(lane.trained)
            with self.aside(key):
                lane.begin(step)
                with host_work(self.device) as found:
                    lane.advance(batch)
            self.end()  # the next lane may read what this one made the teacher say
            found += [f"it gives '{name}' another value in Python" for name in changed(before, kept(lane.trained))]
            if self.begun == WARM_UP and (reason := lane.host_bound or next(iter(found), None)):
                self.give_up(lane, reason)
        elif key in self.replays or self.capture(lane, batch):
            with self.aside(key):
                lane.begin(step)
                self.replays[key]()  # type: ignore[misc]  # it is there
        else:
            lane.step(batch, step)

    def capture(self, lane: Lane, batch: Batch) -> bool:
        """Record a lane's step, which does nothing yet, and tell whether that could be done."""
        try:
            with self.aside(id(lane)) as stream:
                self.replays[id(lane)] = self.record(partial(lane.advance, batch), stream)
        except Exception as error:
            lane.optimizer.forget()  # gradients that were never computed
            if self.teacher is not None:
                self.teacher.made = dict(self.passes)
            self.give_up(lane, first_line(error))
            return False
        return True

    def give_up(self, lane: Lane, reason: str) -> None:
        """Run this lane operation by operation from now on, and say why."""
        self.replays[id(lane)] = None
        self.say(f"{lane.title}: steps run kernel by kernel, as they cannot be a CUDA graph: {reason}")

    @contextmanager
    def aside(self, key: Any) -> Iterator[Any]:
        """Run on a lane's own stream, after all work of the main stream so far."""
        if key not in self.streams:
            self.streams[key] = self.runtime.Stream()
        stream = self.streams[key]
        stream.wait_stream(self.runtime.current_stream())
        with self.runtime.stream(stream):
            yield stream

    def end(self) -> None:
        for stream in self.streams.values():
            self.runtime.current_stream().wait_stream(stream)


def steps(lane: Lane, teacher: TeacherPasses | None, say: Callable[[str], None]) -> Plain:
    """Choose how to take the steps of a training, of which ``lane`` is one."""
    settings, place = lane.run
    alone = not (distributed.is_available() and distributed.is_initialized())
    if lane.device.type == "cuda" and place.engine.graph and alone:
        return Graphed(teacher, lane.device, settings.engine.precision, say, cuda_graph)
    return Plain(teacher)


def cuda_graph(work: Work, stream: torch.cuda.Stream) -> Work:
    """Capture ``work``, which computes nothing yet, and return the function that computes it."""
    graph = torch.cuda.CUDAGraph()
    # Only this thread's calls are judged: another may be pinning memory for the batches to come.
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        work()
    return graph.replay


@contextmanager
def host_work(device: torch.device) -> Iterator[list[str]]:
    """Detect what a CUDA graph cannot capture: waiting for the device, and random numbers drawn by the host."""
    found: list[str] = []
    if device.type != "cuda":
        yield found
        return
    drawn, mode = _generators(), torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield found
        finally:
            torch.cuda.set_sync_debug_mode(mode)
    for warning in caught:
        if "called a synchronizing" in str(warning.message):
            found.append(f"the host reads the device at {Path(warning.filename).name}:{warning.lineno}")
        elif "debug mode is a prototype" not in str(warning.message):
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
    if drawn != _generators():
        found.append("the host draws random numbers in it")


def _generators() -> tuple[Any, ...]:
    """Read the state of the generators that a capture does not follow."""
    # A method may draw from numpy's global generator, hence the legacy call.
    numbers = np.random.get_state(legacy=False)  # noqa: NPY002
    return (
        random.getstate(),
        str(numbers),
        numbers["state"]["key"].tobytes(),
        torch.default_generator.get_state().tolist(),
    )


def kept(module: nn.Module) -> dict[str, Any]:
    """Read what a module and its parts hold between steps: plain values, and where their tensors lie."""
    held: dict[str, Any] = {}
    for path, owner in module.named_modules():
        own = [*owner.named_parameters(recurse=False), *owner.named_buffers(recurse=False), *vars(owner).items()]
        for name, value in own:
            if isinstance(value, Tensor):
                held[f"{path}.{name}"] = value.data_ptr()
            elif isinstance(value, bool | int | float | str):
                held[f"{path}.{name}"] = value
    return held


def changed(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """List the names whose values differ."""
    return [name for name in {**before, **after} if before.get(name) != after.get(name)]


def first_line(error: BaseException) -> str:
    """Find the first error and its first line; a capture that was broken off raises again when it ends."""
    while error.__context__ is not None:
        error = error.__context__
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
