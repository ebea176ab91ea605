"""Settings of runs that take seconds: digits on a CPU in float32, resnet14 teaching resnet8 unless told otherwise.

Epochs and batches are named here, so that changes of the quick protocol change no test.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import pytest

from kdzoo.engine.lane import Lane
from kdzoo.resolve import resolve

SHORT = ["protocol.epochs=2", "protocol.batch_size=64", "data.limit=320"]
SHORT += ["engine.device=cpu", "engine.precision=float32"]


def settings(out, distiller, *more, student="resnet8", teacher="resnet14"):
    values = {
        "distiller": {"name": distiller},
        "student": {"name": student},
        "teacher": {"name": teacher},
        "output": {"root": str(out)},
    }
    return resolve(values, [*SHORT, *more])


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
