"""What a person sees while it trains: a live view on a terminal, plain lines elsewhere."""

import sys
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars
from rich.progress_bar import ProgressBar
from rich.table import Table

from kdzoo.words import duration


class Progress:
    """Shows one training, or those of a whole suite. A context manager, so that the view never outlives an error.

    Args:
        quiet: show nothing.
        console: where to show it; None: the standard error.
        clock: seconds of a clock that never goes back.
    """

    def __init__(
        self, quiet: bool = False, console: Console | None = None, clock: Callable[[], float] = time.monotonic
    ):
        self.console = console or Console(file=sys.stderr, quiet=quiet, highlight=False)
        self.is_live = self.console.is_terminal and not quiet
        self.bars = Bars(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[speed]}"),
            TimeRemainingColumn(),
            TextColumn("[dim]{task.fields[terms]}"),
            console=self.console,
        )
        self.clock, self.begun = clock, clock()
        self.per_epoch = self.epochs = 1
        self.lanes: dict[str, dict[str, str]] = {}  # by their titles; what is shown of each
        self.works: Sequence[float] = ()  # of the suite's groups, in epochs of one lane; empty for a single run
        self.number = 0  # of the group that is at work
        self.before = self.here = 0.0  # work done before the training that is shown, and what that is worth
        self.start = self.share = 0.0  # of that training, done when it was taken up, and done now
        self.trained = 0.0  # work that this process did before it
        self.live = Live(get_renderable=self.view, console=self.console, transient=True)

    def __enter__(self) -> "Progress":
        if self.is_live:
            self.live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.live.stop()

    def say(self, text: str) -> None:
        """One line that stays."""
        self.console.print(text, markup=False, soft_wrap=True)

    def suite(self, works: Sequence[float]) -> None:
        """A suite begins; ``works`` is what each of its groups has to do, in epochs of one lane."""
        self.works, self.begun = works, self.clock()

    def group(self, number: int, text: str) -> None:
        """The suite's group of this number, from 0, begins, and those before it are done; ``text`` says what it is."""
        self.worth(0.0)
        self.number, self.before = number, sum(self.works[:number])
        self.say(f"group {number + 1}/{len(self.works)}: {text}{self.left()}")

    def worth(self, work: float) -> None:
        """The next training is of the suite, and this much of its work; a teacher's is not."""
        self.before += self.here * self.share
        self.trained += self.here * (self.share - self.start)
        self.here, self.start, self.share = work, 0.0, 0.0

    def left(self) -> str:
        """The time left for the whole suite in words, by the epochs that this process did; empty where it did none."""
        missing = sum(self.works) - self.before - self.here * self.share
        trained = self.trained + self.here * (self.share - self.start)
        if not trained:
            return ""
        return f", about {duration((self.clock() - self.begun) * missing / trained)} left in all"

    def begin(self, per_epoch: int, total: int, start: int, titles: Sequence[str] = ()) -> None:
        """A training of ``total`` steps begins at step ``start``, of a lane for each of ``titles``."""
        self.per_epoch, self.epochs = per_epoch, total // per_epoch
        self.lanes = {title: {"top-1": "-", "loss": "-"} for title in titles}
        for task in self.bars.task_ids:
            self.bars.remove_task(task)
        self.start = self.share = start / total if self.here else 0.0
        self.task = self.bars.add_task(self._title(start), total=total, completed=start, speed="", terms="")

    def show(self, step: int, terms: dict[str, float], speed: float, title: str = "") -> None:
        """The state after ``step`` steps: mean terms of this epoch, images per second; ``title`` names the lane."""
        said = "  ".join(f"{name} {value:.3f}" for name, value in terms.items())
        self.bars.update(
            self.task,
            completed=step,
            description=self._title(step),
            speed=f"{speed:.0f} images/s",
            terms="" if self.has_lanes else said,
        )
        self.lanes.setdefault(title, {})["loss"] = said
        self.share = step / (self.per_epoch * self.epochs) if self.here else 0.0

    def epoch(self, record: dict[str, Any], title: str = "") -> None:
        """An epoch's end."""
        self.show(record["step"], record["loss"], record["images_per_second"], title)
        if record["top1"] is not None:
            self.lanes[title]["top-1"] = f"{record['top1']:.2f} %"
        if self.has_lanes and self.is_live and record["epoch"] < self.epochs:
            return  # the table shows it
        terms = ", ".join(f"{name} {value:.3f}" for name, value in record["loss"].items())
        top1 = "not measured" if record["top1"] is None else f"top-1 {record['top1']:6.2f} %"
        self.say(
            f"  epoch {record['epoch']:>3}/{self.epochs}: {top1}"
            f"  ({terms}; {record['images_per_second']:.0f} images/s)  {title if self.has_lanes else ''}".rstrip()
        )

    @property
    def has_lanes(self) -> bool:
        """Whether lanes are told apart by their titles: in a suite always, but for teachers in training."""
        return bool(self.here) or len(self.lanes) > 1

    def view(self) -> RenderableType:
        """What stands on the terminal now: the suite, the training, its lanes."""
        parts: list[RenderableType] = []
        if self.works:
            total = sum(self.works) or 1.0
            line = Table.grid(padding=(0, 1))
            bar = ProgressBar(total, self.before + self.here * self.share, width=24)
            line.add_row(f"group {self.number + 1}/{len(self.works)}", bar, self.left().removeprefix(", "))
            parts.append(line)
        parts.append(self.bars)
        if self.has_lanes:
            table = Table("lane", "top-1", "loss", box=None, padding=(0, 2, 0, 0))
            for title, shown in list(self.lanes.items()):
                table.add_row(title, shown.get("top-1"), shown.get("loss"))
            parts.append(table)
        return Group(*parts)

    def _title(self, step: int) -> str:
        return f"epoch {min(step // self.per_epoch + 1, self.epochs)}/{self.epochs}"
