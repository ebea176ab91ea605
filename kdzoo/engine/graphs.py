"""The step of all lanes as CUDA graphs: launched whole, where Python would launch it kernel by kernel."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, distributed
from torch.utils._pytree import tree_map_only

from kdzoo.distiller import Batch
from kdzoo.engine.agreement import OUTPUTS, LaneState, Snapshot, agree
from kdzoo.engine.host_work import changed, first_line, host_work, kept
from kdzoo.engine.lane import Lane
from kdzoo.engine.passes import TeacherPasses
from kdzoo.precision import PRECISIONS, autocast
from kdzoo.tensors import leaves

WARM_UP = 3  # plain steps before the capture: they make moments, workspaces and all else that is made when first used
CHECKED = 2  # replays that are compared with plain steps; the second has another batch than the capture

Work = Callable[[], None]
Record = Callable[[Work, Any], Work]  # (work, stream) -> what does the work again


class Plain:
    """Steps that run operation by operation."""

    def __init__(self, teacher: TeacherPasses | None):
        self.teacher = teacher
        self.asks_teacher = True  # whether steps make passes of the teacher

    def begin(self, batch: Batch, step: int) -> Batch:
        """Begin a step of all lanes, and return the batch that they take."""
        if self.teacher is not None:
            self.teacher.begin(step)
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
    graph draw what the plain step draws. The first replays are compared with plain steps from the same state; where
    they differ, the plain step's result is kept, and the lane continues plainly.

    Args:
        teacher: of all lanes.
        device: where they are.
        precision: of the networks.
        say: takes a line for the user.
        record: how work becomes a graph. Where work is not asynchronous, doing it again is the same.
        checked: how many of the first replays are compared with plain steps.
    """

    def __init__(
        self,
        teacher: TeacherPasses | None,
        device: torch.device,
        precision: str,
        say: Callable[[str], None],
        record: Record,
        checked: int = CHECKED,
    ):
        super().__init__(teacher)
        self.checked = checked
        self.device, self.precision, self.say, self.record = device, precision, say, record
        self.runtime: Any = torch.get_device_module(device)
        self.streams: dict[Any, Any] = {}  # of each lane that is captured, and one for all others
        self.replays: dict[int, Work | None] = {}  # by lane; None: it cannot be captured
        self.checks: Counter[Any] = Counter()  # by lane, and of the teacher
        self.teach: Work | None = None  # the teacher's passes
        self.shown: list[Tensor] = []  # the images that they read
        self.passes: dict[Any, Any] = {}  # what they leave for the lanes
        self.plainly = False  # the teacher cannot be captured, and so nothing can
        self.batch: Batch | None = None
        self.begun = 0

    def begin(self, batch: Batch, step: int) -> Batch:
        self.begun += 1
        if self.plainly:
            return super().begin(batch, step)
        if self.batch is None:
            self.batch = tree_map_only(Tensor, Tensor.clone, batch)
        else:
            for still, new in zip(leaves(self.batch), leaves(batch), strict=True):
                still.copy_(new, non_blocking=True)
        if self.begun <= WARM_UP:
            return super().begin(self.batch, step)
        if self.teacher is not None:
            self.run_teacher(self.teacher)
        return self.batch

    def run_teacher(self, teacher: TeacherPasses) -> None:
        """Make the teacher's passes that the last plain step asked for, on the batch of this one."""
        if self.teach is None:
            # Only of memory that holds the next batch too: what a method made of the images is its lane's own.
            ours = {tensor.untyped_storage().data_ptr() for tensor in leaves(self.batch)}
            self.shown = [
                one.images for one in teacher.made.values() if one.images.untyped_storage().data_ptr() in ours
            ]
            work = partial(self.pass_through, teacher)
            try:
                with self.aside("teacher") as stream:
                    self.teach = self.record(work, stream) if self.shown else work
            except Exception as error:
                self.stay_plain(teacher, f"the teacher cannot be a CUDA graph: {first_line(error)}")
                return
        self.teach()
        if self.checks["teacher"] < self.checked:
            self.checks["teacher"] += 1
            passes = dict(self.passes)
            found = self.shown_by(passes)
            plain, again = (self.shown_by(self.pass_plainly(teacher)) for _ in range(2))
            if not agree(found, plain, again, OUTPUTS[self.precision]):
                self.stay_plain(teacher, "the teacher as a CUDA graph gives other outputs")
                return
            self.passes = passes
        teacher.repeat(self.passes)

    def stay_plain(self, teacher: TeacherPasses, reason: str) -> None:
        """Run all steps operation by operation from now on, and say why."""
        self.say(f"all steps run kernel by kernel, as {reason}")
        self.plainly = True
        teacher.forget()

    def pass_through(self, teacher: TeacherPasses) -> None:
        """Make the teacher's passes as a lane would ask for them, and leave them for the lanes."""
        self.passes = self.pass_plainly(teacher)

    def pass_plainly(self, teacher: TeacherPasses) -> dict[Any, Any]:
        """Return the teacher's passes, as a lane would ask for them."""
        teacher.forget()
        with torch.no_grad(), autocast(self.device.type, PRECISIONS[self.precision]):
            for images in self.shown:
                teacher(images, teacher.show)
        return dict(teacher.made)

    @staticmethod
    def shown_by(passes: dict[Any, Any]) -> list[Tensor]:
        """Copy the outputs of passes to the host."""
        return [tensor.detach().to("cpu", copy=True) for made in passes.values() for tensor in made.tensors]

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
        elif self.checks[key] < self.checked:
            self.checks[key] += 1
            self.check(lane, batch, step)
        else:
            self.take(lane, batch, step)

    def take(self, lane: Lane, batch: Batch, step: int) -> None:
        """Take a lane's step by its graph, which the first one records, or plainly where that fails."""
        key = id(lane)
        if key in self.replays or self.capture(lane, batch):
            with self.aside(key):
                lane.begin(step)
                self.replays[key]()  # type: ignore[misc]  # it is there
        else:
            lane.step(batch, step)

    def check(self, lane: Lane, batch: Batch, step: int) -> None:
        """Take a lane's step by its graph and plainly, twice; keep the plain result where they differ."""
        state = LaneState(lane)
        with self.aside(id(lane)):
            before = state.read()
            plain, again = (self.plain_result(lane, batch, step, state, before) for _ in range(2))
        if self.teacher is not None:
            self.teacher.repeat(self.passes)
        self.take(lane, batch, step)
        if self.replays[id(lane)] is None:
            return
        with self.aside(id(lane)):
            if different := state.read().difference(plain, again, before):
                state.write(plain)
                self.give_up(lane, f"its {different} differ from those of a plain step")

    @staticmethod
    def plain_result(lane: Lane, batch: Batch, step: int, state: LaneState, before: Snapshot) -> Snapshot:
        """Return what a plain step makes of a lane, and put the lane back to the state before it."""
        lane.step(batch, step)
        made = state.read()
        state.write(before)
        return made

    def capture(self, lane: Lane, batch: Batch) -> bool:
        """Record a lane's step, which does nothing yet, and tell whether that could be done."""
        try:
            with self.aside(id(lane)) as stream:
                self.replays[id(lane)] = self.record(partial(lane.advance, batch), stream)
        except Exception as error:
            lane.optimizer.forget()  # gradients that were never computed
            if self.teacher is not None:
                self.teacher.repeat(self.passes)
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
        if teacher is not None and teacher.takes_turns:
            say("steps run kernel by kernel: a CUDA graph is of one step, and the teachers take turns")
            return Plain(teacher)
        return Graphed(teacher, lane.device, settings.engine.precision, say, cuda_graph)
    return Plain(teacher)


def cuda_graph(work: Work, stream: torch.cuda.Stream) -> Work:
    """Capture ``work``, which computes nothing yet, and return the function that computes it."""
    graph = torch.cuda.CUDAGraph()
    # Only this thread's calls are judged: another may be pinning memory for the batches to come.
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        work()
    return graph.replay
