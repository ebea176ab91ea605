"""What a person sees while it trains: a live bar on a terminal, plain lines elsewhere."""

import sys
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars


class Progress:
    """Shows one run; ``quiet`` shows nothing. A context manager, so that the bar never outlives an error."""

    def __init__(self, quiet: bool = False, console: Console | None = None):
        self.console = console or Console(file=sys.stderr, quiet=quiet, highlight=False)
        self.bars = Bars(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[speed]}"),
            TimeRemainingColumn(),
            TextColumn("[dim]{task.fields[terms]}"),
            console=self.console,
            transient=True,
            disable=quiet or not self.console.is_terminal,
        )
        self.per_epoch = self.epochs = 1

    def __enter__(self) -> "Progress":
        self.bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bars.stop()

    def say(self, text: str) -> None:
        """One line that stays."""
        self.console.print(text, markup=False, soft_wrap=True)

    def begin(self, per_epoch: int, total: int, start: int) -> None:
        """A training of ``total`` steps begins at step ``start``."""
        self.per_epoch, self.epochs = per_epoch, total // per_epoch
        for task in self.bars.task_ids:
            self.bars.remove_task(task)
        self.task = self.bars.add_task(self._title(start), total=total, completed=start, speed="", terms="")

    def show(self, step: int, terms: dict[str, float], speed: float, title: str = "") -> None:
        """The state after ``step`` steps: mean terms of this epoch, images per second; ``title`` names the lane."""
        self.bars.update(
            self.task,
            completed=step,
            description=self._title(step),
            speed=f"{speed:.0f} images/s",
            terms="  ".join([title, *(f"{name} {value:.3f}" for name, value in terms.items())]).strip(),
        )

    def epoch(self, record: dict[str, Any], title: str = "") -> None:
        """An epoch's end."""
        self.show(record["step"], record["loss"], record["images_per_second"], title)
        terms = ", ".join(f"{name} {value:.3f}" for name, value in record["loss"].items())
        self.say(
            f"  epoch {record['epoch']:>3}/{self.epochs}: top-1 {record['top1']:6.2f} %"
            f"  ({terms}; {record['images_per_second']:.0f} images/s)  {title}".rstrip()
        )

    def _title(self, step: int) -> str:
        return f"epoch {min(step // self.per_epoch + 1, self.epochs)}/{self.epochs}"
