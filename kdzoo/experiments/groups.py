"""Groups of runs that train side by side, and what every place that trains them offers."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch

from kdzoo.engine.device import settle
from kdzoo.engine.progress import Progress
from kdzoo.settings import Settings


class Group(NamedTuple):
    """Runs that train side by side."""

    title: str  # such as 3/12
    text: str  # what they are, for people
    runs: Sequence[Settings]  # those that are to do; there may be none


class Work(Protocol):
    """What is done for a group; ``wait`` says whether runs that another process holds are waited for."""

    def __call__(self, runs: Sequence[Settings], progress: Progress, wait: bool = False) -> None: ...


class Executor(Protocol):
    """A place to train."""

    def settle(self, runs: Sequence[Settings], quiet: bool) -> None:
        """Replaces every ``auto`` of the engines by what it means where the runs will be trained."""

    def train(self, groups: Sequence[Group], work: Work, progress: Progress, quiet: bool) -> dict[str, str]:
        """Does the work of every group; gives the titles of those that stopped, each with the reason."""


def begin(group: Group, work: Work, progress: Progress, wait: bool = False) -> None:
    """Does a group's work in a process that was made for it."""
    for run in group.runs:
        device = settle(run.engine)
    if device.index is not None:
        torch.accelerator.set_device_index(device.index)
    work(group.runs, progress, wait)
