"""What a person sees while it trains: a live view on a terminal or in a notebook, plain lines elsewhere."""

import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from importlib.util import find_spec
from statistics import fmean
from threading import Event, Thread
from types import TracebackType
from typing import Any, TextIO

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from kdzoo.errors import out_of_memory_told, visible
from kdzoo.quantities import counted, duration

FIRST, EVERY = 5.0, 13.0  # seconds without a line, when something begins and later; a ticker adds one at most

Ticker = Callable[[Callable[[], object]], AbstractContextManager[object]]


def plain_console(**options: Any) -> Console:
    """Make a console that prints every text as it is: paths, names and errors may hold what rich takes for markup."""
    return Console(highlight=False, markup=False, emoji=False, **options)


class Heard:
    """A stream that is written to for as long as somebody can read it; then its text is dropped, and work continues."""

    def __init__(self, stream: TextIO):
        self.stream = stream

    def write(self, text: str) -> int:
        """Write a text."""
        try:
            return self.stream.write(text)
        except OSError:  # the reader of a pipe has ended, or a terminal is closed
            self.turn_away()
            return len(text)

    def flush(self) -> None:
        """Hand on what was written."""
        try:
            self.stream.flush()
        except OSError:
            self.turn_away()

    def turn_away(self) -> None:
        """Lead the stream to where all is dropped, with what it still holds."""
        with suppress(OSError), open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), self.stream.fileno())

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


@contextmanager
def every_second(work: Callable[[], object], seconds: float = 1.0) -> Iterator[None]:
    """Call ``work`` once a second in a thread, until the context ends."""
    ended = Event()

    def repeat() -> None:
        while not ended.wait(seconds):
            work()

    thread = Thread(target=repeat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


class Progress:
    """Show one training, or those of a whole suite. A context manager, so that the view never outlives an error.

    Where the view cannot be live, a thread prints a line whenever nothing was printed for ``EVERY`` seconds, so that
    slow steps, downloads and decoding are seen too.

    Args:
        quiet: show nothing.
        console: where to show it, made by ``plain_console``; None: the standard error.
        clock: seconds of a clock that never goes back.
        ticker: calls ``tick`` again and again.
    """

    def __init__(
        self,
        quiet: bool = False,
        console: Console | None = None,
        clock: Callable[[], float] = time.perf_counter,
        ticker: Ticker = every_second,
    ):
        quiet = quiet or (console is None and sys.stderr is None)  # a process without a stream for errors
        self.console = console or plain_console(file=Heard(sys.stderr), quiet=quiet)
        self.quiet, self.ticker = quiet, ticker
        has_cursor = self.console.is_terminal and not self.console.is_dumb_terminal
        in_notebook = self.console.is_jupyter and find_spec("ipywidgets") is not None
        self.is_live = not quiet and (has_cursor or in_notebook)
        self.bars = Bars(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[speed]}"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[terms]}", style="dim", markup=False),
            console=self.console,
        )
        self.clock, self.begun = clock, clock()
        self.due = self.begun + FIRST  # when the next line is printed by itself
        self.activities: list[tuple[str, float]] = []  # beside training: what it is, and since when; the last is shown
        self.text, self.announced = "", True  # what is trained, and whether that was said
        self.per_epoch = self.epochs = 1
        self.total = self.done = self.first = 0  # steps: of the training, those done, and done before it was taken up
        self.since = self.begun  # when the newest step was done
        self.mark: tuple[int, float] | None = None  # a step and when it was done, from which on steps are timed
        self.speed = 0.0  # images per second
        self.lanes: dict[str, dict[str, str]] = {}  # by their titles; what is shown of each
        self.losses: dict[str, float] = {}  # of each lane, the sum of its terms
        self.top1: dict[str, float] = {}  # of each lane, as it was last measured
        self.measure = "top-1"  # what that is
        self.works: Sequence[float] = ()  # of the suite's groups, in epochs of one lane; empty for a single run
        self.number = 0  # of the group that is at work
        self.before = self.here = 0.0  # work done before the training that is shown, and what that is worth
        self.start = self.share = 0.0  # of that training, done when it was taken up, and done now
        self.trained = 0.0  # work that this process did before it
        self.live = Live(get_renderable=self.view, console=self.console, transient=True)
        self.open = ExitStack()

    def __enter__(self) -> "Progress":
        if not self.quiet:
            self.open.enter_context(self.live if self.is_live else self.ticker(self.tick))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.open.close()

    def say(self, text: str) -> None:
        """Print one line that stays."""
        self.due = self.clock() + EVERY
        self.console.print(visible(text), soft_wrap=True)

    @contextmanager
    def doing(self, text: str) -> Iterator[Callable[[str], None]]:
        """Name what is done inside this context; gives a function that renames it.

        It is shown if it takes long, and named where memory does not hold it.
        """
        begun = self.clock()
        self.due = min(self.due, begun + FIRST)
        self.activities.append((text, begun))

        def rename(text: str) -> None:
            self.activities[-1] = text, begun

        try:
            with out_of_memory_told(lambda: self.activities[-1][0]):
                yield rename
        finally:
            self.activities.pop()

    def tick(self) -> None:
        """Print how it stands, if nothing was printed for long enough."""
        if self.clock() >= self.due:
            if not (self.activities or self.announced):
                self.announce()
            self.say(f"  {self.state()}")

    def state(self) -> str:
        """Say in one line what is done now."""
        if latest := self.activities[-1:]:  # read once: the main thread may end it meanwhile
            [(text, begun)] = latest
            return f"{text}, {duration(self.clock() - begun)} so far"
        if not self.total:
            return f"at work, {duration(self.clock() - self.begun)} so far"
        waited = self.clock() - self.since
        if self.done < self.total and (waited >= EVERY or not self.losses):
            return f"still in step {self.done + 1}/{self.total}, {duration(waited)} so far"
        losses, found = list(self.losses.values()), dict(self.top1)
        if not losses:  # it was taken up at its end
            return f"step {self.done}/{self.total}{self.left()}"
        if len(self.lanes) > 1:
            said = f"{len(self.lanes)} runs, mean loss {fmean(losses):.3f}"
        else:
            said = f"loss {losses[-1]:.3f}"
        if found and len(self.lanes) > 1:
            best = max(found, key=lambda title: found[title])
            said += f", best {self.measure} {found[best]:.2f} % ({best})"
        step = self.seconds_of_step()
        left = "" if step is None else f", about {duration(step * (self.total - self.done))} left"
        if not left or self.work_of_others() > 0:
            left += self.left()
        return f"step {self.done}/{self.total}: {said}, {self.speed:.0f} images/s{left}"

    def seconds_of_step(self) -> float | None:
        """Give the mean time of a step, measuring included; None before the second look at the losses."""
        if self.mark is None or self.done <= self.mark[0]:
            return None
        return (self.since - self.mark[1]) / (self.done - self.mark[0])

    def announce(self) -> None:
        """Say what is trained, and about how long it takes where steps were timed."""
        self.announced = True
        step = self.seconds_of_step()
        self.say(
            f"{self.text}: {counted(self.epochs, 'epoch')} of {counted(self.per_epoch, 'step')}"
            + (f", from step {self.first}" if self.first else "")
            + ("" if step is None else f", about {duration(max(1.0, step * (self.total - self.first)))}")
        )

    def suite(self, works: Sequence[float]) -> None:
        """Begin a suite; ``works`` is what each of its groups has to do, in epochs of one lane."""
        self.works, self.begun = works, self.clock()

    def group(self, number: int, text: str) -> None:
        """Begin the suite's group of this number, from 0; those before it are done. ``text`` says what it is."""
        self.count_next(0.0)
        self.number, self.before = number, sum(self.works[:number])
        self.say(f"group {number + 1}/{len(self.works)}: {text}{self.left()}")

    def count_next(self, work: float) -> None:
        """Count the next training as this much of the suite's work; a teacher's own training is none of it."""
        self.before += self.here * self.share
        self.trained += self.here * (self.share - self.start)
        self.here, self.start, self.share = work, 0.0, 0.0

    def work_of_others(self) -> float:
        """Give the suite's work after the training that is shown."""
        return sum(self.works) - self.before - self.here

    def left(self) -> str:
        """Say how long the whole suite still takes, by the epochs that this process did; empty where it did none."""
        trained = self.trained + self.here * (self.share - self.start)
        if not trained:
            return ""
        each = (self.clock() - self.begun) / trained
        step = self.seconds_of_step() if self.here else None
        now = each * self.here * (1 - self.share) if step is None else step * (self.total - self.done)
        return f", about {duration(now + each * self.work_of_others())} left in all"

    def begin(self, text: str, per_epoch: int, total: int, start: int, titles: Sequence[str] = ()) -> None:
        """Begin a training of ``total`` steps at step ``start``, of a lane for each of ``titles``.

        ``text`` says what is trained. It is announced as soon as a few steps were timed.
        """
        if self.here and not self.trained:
            self.begun = self.clock()  # what was done before, such as the teacher's training, tells nothing of the rest
        self.text, self.announced = text, start == total
        self.total, self.done, self.first, self.since, self.mark = total, start, start, self.clock(), None
        self.due = min(self.due, self.since + FIRST)
        self.losses, self.top1 = {}, {}
        self.per_epoch, self.epochs = per_epoch, total // per_epoch
        self.lanes = {title: {"top-1": "-", "loss": "-"} for title in titles}
        for task in self.bars.task_ids:
            self.bars.remove_task(task)
        self.start = self.share = start / total if self.here else 0.0
        self.task = self.bars.add_task(self._title(start), total=total, completed=start, speed="", terms="")

    def step(self, done: int) -> None:
        """Note that so many steps are done."""
        self.done, self.since = done, self.clock()

    def show(self, step: int, terms: dict[str, float], speed: float, title: str = "") -> None:
        """Show the state after ``step`` steps: the epoch's mean terms, images per second; ``title`` names the lane."""
        self.step(step)
        self.losses[title], self.speed = sum(terms.values()), speed
        if self.mark is None:
            self.mark = step, self.since
        elif step > self.mark[0] and not self.announced:
            self.announce()
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
        """Show what an epoch found."""
        self.show(record["step"], record["loss"], record["images_per_second"], title)
        if not self.announced:
            self.announce()
        if record["top1"] is not None:
            self.top1[title] = record["top1"]
            self.lanes[title]["top-1"] = f"{record['top1']:.2f} %"
        if self.has_lanes and self.is_live and record["epoch"] < self.epochs:
            return  # the table shows it
        terms = ", ".join(f"{name} {value:.3f}" for name, value in record["loss"].items())
        top1 = "not measured" if record["top1"] is None else f"{self.measure} {record['top1']:6.2f} %"
        self.say(
            f"  epoch {record['epoch']:>3}/{self.epochs}: {top1}"
            f"  ({terms}; {record['images_per_second']:.0f} images/s)  {title if self.has_lanes else ''}".rstrip()
        )

    @property
    def has_lanes(self) -> bool:
        """Tell whether lanes are named by their titles: in a suite always, but for teachers in training."""
        return bool(self.here) or len(self.lanes) > 1

    def view(self) -> RenderableType:
        """Draw what stands on the terminal now: the suite, the training, its lanes."""
        parts: list[RenderableType] = []
        if self.works:
            total = sum(self.works) or 1.0
            line = Table.grid(padding=(0, 1))
            bar = ProgressBar(total, self.before + self.here * self.share, width=24)
            line.add_row(f"group {self.number + 1}/{len(self.works)}", bar, self.left().removeprefix(", "))
            parts.append(line)
        parts.append(self.bars)
        if self.activities:
            parts.append(Text(self.state(), style="dim"))
        if self.has_lanes:
            table = Table("lane", "top-1", "loss", box=None, padding=(0, 2, 0, 0))
            for title, shown in list(self.lanes.items()):
                table.add_row(Text(title), shown.get("top-1"), shown.get("loss"))
            parts.append(table)
        return Group(*parts)

    def _title(self, step: int) -> str:
        return f"epoch {min(step // self.per_epoch + 1, self.epochs)}/{self.epochs}"
