"""Compile networks where that pays for itself within the training."""

import hashlib
import os
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from math import inf
from pathlib import Path
from statistics import median
from tempfile import gettempdir
from typing import Any

import torch
from torch import Tensor

from kdzoo.distiller import Batch
from kdzoo.engine.agreement import OUTPUTS, WEIGHTS, agree, distance
from kdzoo.engine.host_work import first_line
from kdzoo.engine.lane import Lane
from kdzoo.engine.micro_batches import micro_batches
from kdzoo.engine.passes import TeacherPasses
from kdzoo.engine.progress import Progress
from kdzoo.errors import UserError
from kdzoo.files import cache_folder
from kdzoo.models import Network
from kdzoo.outputs import Output, Show
from kdzoo.precision import PRECISIONS, autocast, matmul_precision
from kdzoo.process_state import check_compiler, only_errors_of
from kdzoo.randomness import seed_of, seed_torch
from kdzoo.tensors import leaves

BACKEND = "inductor"
WATCHED = 10.0  # seconds of steps before anything is decided
SHARE = 0.03  # of the time that a training still takes, which may be spent on trying
COSTS = {"teacher": 60.0, "student": 120.0}  # seconds that it takes to try one, on two cores
NEXT = 0.1  # of these, for a student of which another was compiled before
NEAR = 1.1  # times as far from float32 as plain code of less precision, that compiled code may be at most
LEAST = 0.95  # share of the plain time that compiled code may take at most
ROUNDS = 5  # in which plain and compiled code take turns
CODES = 256  # variants of a network's code that torch may keep, of all lanes and groups of lanes

FOLDER = "TORCHINDUCTOR_CACHE_DIR"  # the variable that names the folder of compiled code
TORCHS = "torchinductor_"  # how torch's own begins, in the folder of temporary files

Passes = Callable[[Tensor, Show], Output]
Found = list[list[Tensor]]  # what a pass gives, by kind: outputs, gradients, changes of statistics and of counts
Work = Callable[[Passes, str], Found]  # a pass in a precision, and what it gives


def begin_anew() -> None:
    """Forget the code of trainings before this one; what is compiled from now on is kept in the cache on disk."""
    folder = Path(os.environ.get(FOLDER) or Path(gettempdir(), TORCHS))
    if folder.name.startswith(TORCHS) and folder.parent == Path(gettempdir()):  # set by torch when it was imported
        with suppress(UserError):  # a cache that is lost meanwhile is no end of a training
            os.environ[FOLDER] = str(cache_folder() / "compiled" / processor())
    torch.compiler.reset()
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, CODES)


def processor() -> str:
    """Name the processor by the instructions that compilers may use.

    Machines of several kinds may share a cache, and torch finds code there that was made for another: it computes wrong
    numbers, or ends the process.
    """
    found = {name: value for name, value in torch.cpu.get_capabilities().items() if isinstance(value, bool | str)}
    names = [torch.backends.cpu.get_cpu_capability(), *sorted(f"{name}={value}" for name, value in found.items())]
    return hashlib.sha256(" ".join(names).encode()).hexdigest()[:12]


def find_compiler() -> None:
    """Check that a C++ compiler works; inductor says only after minutes that there is none.

    Raises:
        UserError: none does.
    """
    from torch._inductor import config
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    with suppress(InvalidCxxCompiler):
        get_cpp_compiler()
        return
    names = [name for name in config.cpp.cxx if name]
    raise UserError(f"no C++ compiler runs as {' or '.join(names)}; install one, or name another by CXX")


def darker(call: Passes, times: float, images: Tensor, show: Show) -> Output:
    """Make a pass over other images than those that were compiled for."""
    return call(images / times, show)


def codes() -> int:
    """Count the pieces of code that torch's compiler has read so far."""
    return int(torch._dynamo.utils.counters["frames"]["total"])


class Compiled:
    """A network's passes by compiled code, for inputs of one kind, and by its plain code for all others.

    Args:
        network: makes ``network(images, show)``.
        images: of the kind that is compiled for.
        show: what a pass shows.
        grad: whether the passes are those of a network that learns.
    """

    def __init__(self, network: Network, images: Tensor, show: Show, grad: bool):
        self.network = network
        self.kind = self._kind(images, show, grad)
        if BACKEND == "inductor" and images.device.type == "cpu":
            find_compiler()
        check_compiler()
        # Weights that stay are laid out for the kernels; draws are those of plain code.
        options = {"fallback_random": True} if grad else {"freezing": True}
        wanted: Any = {"options": options} if BACKEND == "inductor" else {}
        self.code = torch.compile(network.forward, backend=BACKEND, dynamic=False, **wanted)

    def __call__(self, images: Tensor, show: Show) -> Output:
        known = self._kind(images, show, torch.is_grad_enabled()) == self.kind
        return (self.code if known else self.network)(images, show)

    def _kind(self, images: Tensor, show: Show, grad: bool) -> tuple[Any, ...]:
        return images.shape, images.stride(), show, grad, self.network.training


class Compiling:
    """The decision which networks of a training are compiled, made once.

    ``engine.compile=on`` compiles all before the first step. ``auto`` looks at the time of some steps, compiles where
    the rest of the training is long enough, and keeps what a stopwatch finds faster. Either keeps nothing whose outputs
    or gradients are not those of plain code.

    Args:
        lanes: that are trained.
        teacher: of all lanes.
        total: steps of the training.
        progress: is told what is done.
    """

    def __init__(self, lanes: Sequence[Lane], teacher: TeacherPasses | None, total: int, progress: Progress):
        self.lanes, self.teacher, self.total, self.progress = lanes, teacher, total, progress
        settings, place = lanes[0].run
        asked = place.engine.compile
        self.mode = ("on" if asked else "off") if isinstance(asked, bool) else asked
        self.precision = settings.engine.precision
        self.device, self.parts = lanes[0].device, settings.engine.accumulate
        self.left = 0.0  # seconds that may still be spent
        self.decided = self.mode == "off" or (self.mode == "auto" and lanes[0].ranks.world > 1)

    def is_due(self, step: int, done: int, seconds: float) -> bool:
        """Tell, once, that enough is known to decide and that it pays to try.

        Args:
            step: the next one.
            done: how many steps this process did before it.
            seconds: how long these took.
        """
        if self.decided or (self.mode == "auto" and (seconds < WATCHED or not done)):
            return False
        self.decided = True
        self.left = SHARE * seconds / done * (self.total - step) if self.mode == "auto" else inf
        return self.left >= min(COSTS.values())

    def decide(self, batch: Batch) -> bool:
        """Compile what is worth it, and tell whether a network was compiled now; ``batch`` is that of the next step."""
        images = micro_batches(batch, self.parts)[0].images
        begin_anew()
        found = []
        if self.teacher is not None and not self.teacher.takes_turns:  # code is compiled for what one teacher shows
            found.append(self.try_teacher(self.teacher, images))
        kinds: dict[str, list[Lane]] = {}
        for lane in self.lanes:
            if lane.failure is None:
                kinds.setdefault(str(lane.run.settings.student), []).append(lane)
        return any([*found, *(self.try_students(lanes, images) for lanes in kinds.values())])

    def spend(self, cost: float) -> bool:
        """Take so many seconds from those that may be spent, and tell whether they were there."""
        if cost > self.left:
            return False
        self.left -= cost
        return True

    def try_teacher(self, teacher: TeacherPasses, images: Tensor) -> bool:
        """Let compiled code make the teacher's passes where that is right and pays; tell whether it does."""
        network, show = teacher.fast, teacher.show
        if not self.spend(COSTS["teacher"]):
            return False

        def outputs(call: Passes, precision: str) -> Found:
            with torch.no_grad(), autocast(self.device.type, PRECISIONS[precision]):
                return [leaves(call(images, show))]

        make = partial(Compiled, network, images, show, False)
        compiled = self.tried("teacher", teacher.network, make, network, outputs)
        if compiled is None:
            return False
        teacher.calls = compiled
        return True

    def try_students(self, lanes: Sequence[Lane], images: Tensor) -> bool:
        """Let compiled code make the passes of students of one kind where that is right and pays; tell whether."""
        if not self.spend(COSTS["student"] * (1 + NEXT * (len(lanes) - 1))):
            return False
        made: list[Compiled] = []
        for lane in lanes:
            student = lane.distillation.student
            show = lane.distillation.distiller.needs.show("student")
            if not isinstance(student, Network):
                return False
            work = partial(self.gradients, student, images, show)
            make = partial(Compiled, student, images, show, True)
            compiled = self.tried("student", student, make, student, work, again=bool(made))
            if compiled is None:
                break
            lane.distillation.pass_student_through(compiled)
            made.append(compiled)
        return bool(made)

    def gradients(self, student: Network, images: Tensor, show: Show, call: Passes, name: str) -> Found:
        """Return what a student's pass gives, and put the statistics back."""
        buffers = list(student.buffers())
        before = [buffer.clone() for buffer in buffers]
        seed_torch(seed_of(0, "compiling"))
        weights = [weight for weight in student.parameters() if weight.requires_grad]
        precision = PRECISIONS[name]
        changes: Found = [[], []]
        try:
            with autocast(self.device.type, precision):
                outputs = leaves(call(images, show))
            with matmul_precision(self.device.type, precision):
                slopes: Sequence[Tensor | None] = torch.autograd.grad(
                    torch.stack([output.square().mean() for output in outputs]).sum(), weights, allow_unused=True
                )
        finally:  # code for the backward pass is made after the forward pass, and that may fail
            with torch.no_grad():
                for buffer, kept in zip(buffers, before, strict=True):
                    changes[not buffer.is_floating_point()].append(buffer.double() - kept.double())
                    buffer.copy_(kept)
        return [[output.detach() for output in outputs], [one for one in slopes if one is not None], *changes]

    def tried(
        self,
        role: str,
        original: Network,
        make: Callable[[], Compiled],
        network: Network,
        work: Work,
        again: bool = False,
    ) -> Compiled | None:
        """Compile a network, check what it computes, and return it where it is worth it.

        Args:
            role: teacher or student.
            original: the network with its weights in float32.
            make: makes the compiled passes.
            network: makes the plain ones.
            work: a pass by either in some precision, and all that it gives.
            again: another of its kind was tried before and is faster, so that no stopwatch is needed.
        """
        timed, name, precision = self.mode == "auto" and not again, network.name, self.precision
        times: tuple[list[float], list[float]] = [], []
        why = ""
        try:
            with warnings.catch_warnings(), only_errors_of("torch"):  # of its compiler, about itself
                warnings.simplefilter("ignore")
                plain, other = work(network, precision), work(network, precision)
                with self.progress.doing(f"compiling {role} {name}"):
                    begun = time.perf_counter()
                    compiled = make()
                    found = work(compiled, precision)
                    took = time.perf_counter() - begun
                if not right(found, plain, other, precision, partial(work, original, "float32")):
                    why = "compiled code gives other outputs"
                made = codes()
                for number in range(0 if why else ROUNDS if timed else 1):
                    calls: tuple[Passes, Passes] = network, compiled
                    for call, spent in zip(calls, times, strict=True):
                        spent.append(self.seconds(partial(work, partial(darker, call, 2.0 + number), precision)))
                    if codes() > made:
                        why = "it would be compiled anew in each step: what its code reads changes from pass to pass"
                        break
        except Exception as error:
            why = f"it cannot be compiled: {first_line(error)}"
        if why:
            self.progress.say(f"{role} {name}: steps run as they are, as {why}")
            return None
        if not timed:
            return compiled
        share = median(times[1]) / median(times[0])
        kept = "kept" if share <= LEAST else "not kept"
        self.progress.say(f"{role} {name}: compiled in {took:.0f} s, takes {share:.2f} of the plain time: {kept}")
        return compiled if share <= LEAST else None

    def seconds(self, work: Callable[[], object]) -> float:
        """Time a call."""
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)
        begun = time.perf_counter()
        work()
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)
        return time.perf_counter() - begun


def right(found: Found, plain: Found, again: Found, precision: str, exact: Callable[[], Found]) -> bool:
    """Tell whether what a pass gives is that of two plain ones: each output by itself, all gradients, all statistics.

    In less than float32 another order of the same sums may change gradients by more than any fixed share. There,
    outputs and gradients are right too where they are hardly further from those of float32 than plain ones are.

    Args:
        found: by compiled code.
        plain: by plain code.
        again: by plain code, a second time.
        precision: of all three.
        exact: makes the same pass by plain code in float32.
    """
    if list(map(len, found)) != list(map(len, plain)):
        return False
    if not all(map(partial(agree, share=WEIGHTS), found[2:], plain[2:], again[2:])):
        return False
    computed = list(zip(_parts(found), _parts(plain), _parts(again), strict=True))
    off = [i for i, part in enumerate(computed) if not agree(*part, share=OUTPUTS[precision])]
    if not off or precision == "float32":
        return not off
    truth = _parts(exact())
    return all(distance(computed[i][0], truth[i]) <= NEAR * distance(computed[i][1], truth[i]) for i in off)


def _parts(found: Found) -> Found:
    return [*([output] for output in found[0]), *found[1:2]]
