"""A teacher, and its passes, which all lanes share."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kdzoo.engine.agreement import OUTPUTS, agree
from kdzoo.engine.host_work import generators
from kdzoo.errors import is_shortage
from kdzoo.models import Ensemble, Network
from kdzoo.models.cast import probed
from kdzoo.models.maps import FAILURES
from kdzoo.outputs import LOGITS, Output, Show
from kdzoo.precision import PRECISIONS
from kdzoo.tensors import leaves


@dataclass(frozen=True)
class Teacher:
    """A frozen network on its device, and what it reaches."""

    network: Network
    top1: float | None  # in percent, on the test set; None where it has no labels
    classes: Tensor | None = None  # (N,) what it takes the test images for
    each: tuple[float, ...] = ()  # of several networks that answer together: what each reaches alone


def writes(tensors: Iterable[Tensor]) -> int:
    """Count the writes in place that tensors have seen, which costs nothing on their device."""
    return sum(tensor._version for tensor in tensors)


class Pass(NamedTuple):
    """One pass of the teacher."""

    images: Tensor  # kept so that their memory is not used again
    seen: int  # writes to the images, when they were shown
    output: Output
    tensors: list[Tensor]  # of the output
    writes: int  # to these, when they were made


def why_unsteady(network: Network, precision: str) -> str:
    """Say what a network does where its answer to an image cannot be used again; empty where it can."""
    drawn = generators()
    try:
        answers = [probed(network, PRECISIONS[precision].dtype) for _ in range(2)]
    except FAILURES as error:  # its passes in training will tell
        if is_shortage(error):
            raise
        return ""
    if generators() != drawn:
        return "draws random numbers"
    steady = all(agree([one], [other], [other], OUTPUTS[precision]) for one, other in zip(*answers, strict=True))
    return "" if steady else "answers the same images differently each time"


class TeacherPasses:
    """The passes of one teacher that all lanes share: the same images go through it once a step.

    They run without gradients, not in inference mode: losses multiply outputs with the student's, and autograd refuses
    to keep an inference tensor for the backward pass.

    Args:
        network: the teacher.
        show: what a pass shows. Each lane adds what it needs before the first pass, and is given that alone.
        fast: a network of the same outputs that makes the passes; None for the teacher itself.
    """

    def __init__(self, network: Network, show: Show = LOGITS, fast: Network | None = None):
        self.network, self.show, self.fast = network, show, fast or network
        self.calls: Callable[[Tensor, Show], Output] = self.fast  # what makes the passes that are shared
        self.kept: Callable[[Output], Output] = lambda output: output  # what is kept on disk of an output, if anything
        self.made: dict[tuple[Any, ...], Pass] = {}  # by the memory of the images

    def __call__(self, images: Tensor, show: Show) -> Output:
        """Return ``network(images, show)``, remembered until ``forget``; a pass that keeps a graph is not shared."""
        if torch.is_grad_enabled():
            return self.fast(images, show)
        if (output := self.output_of(images)) is None:
            output = self.kept(self.calls(images, self.show))
            self.remember(images, output)
        return output.only(show)

    def output_of(self, images: Tensor) -> Output | None:
        """Return the output of the shared pass of these images; None where there was none, or they were other ones."""
        made = self.made.get(_slice(images))
        return None if made is None or made.seen != writes([images]) else made.output

    def remember(self, images: Tensor, output: Output) -> None:
        """Take an output for that of the shared pass of these images until ``forget``."""
        tensors = leaves(output)
        self.made[_slice(images)] = Pass(images, writes([images]), output, tensors, writes(tensors))

    def repeat(self, passes: Mapping[tuple[Any, ...], Pass]) -> None:
        """Take passes for those of what their images hold now, since the same code is made anew on the same memory."""
        self.made = {key: made._replace(seen=writes([made.images])) for key, made in passes.items()}

    @property
    def takes_turns(self) -> bool:
        """Whether there are several teachers, of which each shows its features in one step after the other."""
        return isinstance(self.network, Ensemble) and self.network.turns

    def begin(self, step: int) -> None:
        """Forget all passes, and let the teacher show in this step whose turn it is, where there are several."""
        self.forget()
        if isinstance(self.network, Ensemble):
            self.network.take_turn(step)

    def forget(self) -> None:
        """Forget all passes; call this between steps."""
        self.made.clear()


def _slice(images: Tensor) -> tuple[Any, ...]:
    """Name the memory of images, which is one for the same slice, no matter who cut it."""
    return images.data_ptr(), images.shape, images.stride(), images.dtype
