"""The training loop writes checkpoints as often as it is asked to, and by default no oftener than the disk is fast."""

import time
from types import SimpleNamespace

import pytest

from kdzoo.engine import loop
from kdzoo.engine.progress import Progress
from kdzoo.engine.training import train_lanes

from ..short_runs import settings

STEP = 20.0  # seconds, on the machine of these tests


@pytest.mark.parametrize(
    ("asked", "writing", "saved"),
    [
        ([], 0.5, [3, 6, 9, 12, 15, 18]),  # every minute
        ([], 2.0, [3, 6, 9, 12, 15, 18]),
        ([], 4.0, [3, 9, 15]),  # two minutes after the first
        (["engine.checkpoint_seconds=100"], 4.0, [5, 10, 15, 20]),
        (["engine.checkpoint_seconds=0"], 4.0, [*range(1, 21)]),
    ],
)
def test_checkpoints_are_as_far_apart_as_was_asked_or_as_writing_them_allows(
    tmp_path, dataset, teacher, monkeypatch, asked, writing, saved
):
    now, steps, advance = [0.0], [], loop.graphs.Plain.end

    def step_ends(self):
        now[0] += STEP
        advance(self)

    def save(folder, step, state):
        now[0] += writing
        steps.append(step)

    monkeypatch.setattr(loop, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    monkeypatch.setattr(loop.graphs.Plain, "end", step_ends)
    monkeypatch.setattr(loop.checkpoint, "save", save)
    train_lanes([settings(tmp_path, "none", "protocol.epochs=4", *asked)], dataset, teacher, Progress(quiet=True))
    assert steps == saved


def test_speed_counts_the_images_that_there_are_where_a_batch_could_hold_more(tmp_path, dataset, monkeypatch):
    now, advance = [0.0], loop.graphs.Plain.end

    def step_ends(self):
        now[0] += STEP
        advance(self)

    monkeypatch.setattr(loop, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    monkeypatch.setattr(loop.graphs.Plain, "end", step_ends)
    run = settings(tmp_path, "none", "protocol.epochs=1", "protocol.batch_size=4096")
    [result] = train_lanes([run], dataset, None, Progress(quiet=True))
    assert result.images_per_second == len(dataset.spec.labels) / STEP


def test_an_epoch_that_is_shorter_than_a_tick_of_the_systems_clock_has_a_speed(monkeypatch):
    monkeypatch.setattr(time, "monotonic", lambda: 7.0)  # that of Windows ticks every 16 ms
    monkeypatch.setattr(time, "time", lambda: 7.0)
    assert loop.Clock().since("epoch") > 0
