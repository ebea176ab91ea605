"""Settings of runs that take seconds: digits on a CPU in float32, resnet14 teaching resnet8 unless told otherwise.

Epochs and batches are named here, so that changes of the quick protocol change no test. Images are shifted, as in most
recipes, so that the teacher is asked in each step.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import pytest
import torch

from kdzoo.engine.lane import Lane
from kdzoo.resolve import resolve

SHORT = ["protocol.epochs=2", "protocol.batch_size=64", "protocol.augmentation.crop=1", "data.limit=320"]
SHORT += ["engine.device=cpu", "engine.precision=float32"]


def settings(out, distiller, *more, student="resnet8", teacher="resnet14"):
    values = {
        "distiller": {"name": distiller},
        "student": {"name": student},
        "teacher": {"name": teacher},
        "output": {"root": str(out)},
    }
    return resolve(values, [*SHORT, *more])


def same(some, others):
    """Whether two students have the same bits."""
    return all(torch.equal(some[name], others[name]) for name in others)


def distance(some, others):
    """The norm of what differs in two students, as a share of the second's."""
    names = [name for name in others if others[name].is_floating_point()]
    one, two = (torch.cat([weights[name].flatten() for name in names]) for weights in (some, others))
    return ((one - two).norm() / two.norm()).item()


@contextmanager
def interrupted_at(step: int) -> Iterator[None]:
    """A context in which a training ends by Ctrl-C in this step, which it must reach."""
    advance = Lane.step

    def stopping(lane, batch, at):
        if at == step:
            raise KeyboardInterrupt
        advance(lane, batch, at)

    with patch.object(Lane, "step", stopping), pytest.raises(KeyboardInterrupt):
        yield
