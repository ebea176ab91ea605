"""What 'kdzoo recommend' prints: its plan, and at the end the finalists, the answer and the command to run next."""

import math
import shlex
from collections.abc import Sequence
from pathlib import Path

from rich.table import Table

from kdzoo.errors import visible
from kdzoo.experiments import halving
from kdzoo.experiments.recommend import beside, outline
from kdzoo.quantities import counted, p_value, short
from kdzoo.results.last_screen import shortened, written
from kdzoo.results.recommendation import Recommendation
from kdzoo.results.statistics import ALPHA, EQUAL
from kdzoo.store.result import MEASURED_BY
from kdzoo.store.search import Search


def plan(made: Search) -> str:
    """List the candidates, the methods that do not fit, and what each rung trains."""
    lines = [outline(made), ""]
    for student in made.students:
        methods: dict[str, int] = {}
        for number in made.of(student):
            name = made.candidates[number].method
            methods[name] = methods.get(name, 0) + 1
        named = ", ".join(f"{name} ({count} settings)" if count > 1 else name for name, count in methods.items())
        lines += [f"{made.asked['teacher']} -> {student}: {named}", ""]
    counts = [len(made.of(student)) for student in made.students]
    begins = [0, *made.rungs]
    for rung, (begin, end) in enumerate(zip(begins, made.rungs, strict=False)):
        left = sum(halving.left(count, rung) for count in counts)
        lines.append(f"epochs {begin + 1} to {end}: {counted(left, 'candidate')}")
    finalists = sum(halving.left(count, len(made.rungs)) for count in counts)
    references = " and ".join(beside(made.candidates)) if made.rungs else ""  # without a rung they are among them
    others = f", with {references} beside them," if references else ""
    seeds = ", ".join(map(str, made.seeds))
    length = counted(made.epochs, "epoch")
    lines.append(f"then {counted(finalists, 'finalist')}{others} for {length} with seeds {seeds}")
    if made.left_out:
        lines += ["", "These do not fit:"]
        lines += [f"  {student}, {method}: {reason}" for student, method, reason in made.left_out]
    return visible_lines(lines)


def visible_lines(lines: Sequence[str]) -> str:
    """Join lines, in which no character commands a terminal."""
    return "\n".join(map(visible, lines))


def table(found: Recommendation) -> Table:
    """Tabulate the finalists of each student, the best first."""
    kinds = {one.measured for answer in found.answers for each in answer.finalists for one in each.results}
    by = "".join(f", measured by {MEASURED_BY[kind]}" for kind in sorted(kinds - {"accuracy"}))
    drawn = Table(title=f"Finalists: top-1 on the test images{by}", title_justify="left")
    several = len(found.answers) > 1
    for name in ("student", "latency") if several else ():
        drawn.add_column(name, justify="left" if name == "student" else "right", overflow="fold")
    for name in ("method", "top-1", "best minus it", "95 % interval", "p (Holm)", "verdict", "cost"):
        drawn.add_column(name, justify="left" if name in ("method", "verdict") else "right", overflow="fold")
    for row in found.rows():
        cells = [visible(row["student"]), _latency(row["latency_1"])] if several else []
        known = not math.isnan(row["behind"])
        cells += [
            visible(row["method"]),
            "" if math.isnan(row["top1"]) else f"{row['top1']:.2f} ± {row['std']:.2f}",
            f"{row['behind']:+z.2f}" if known else "",
            f"{row['low']:+z.2f} to {row['high']:+z.2f}" if known else "",
            p_value(row["p"]) if known else "",
            visible(row["verdict"]),
            f"{row['cost']:.2f}",
        ]
        drawn.add_row(*cells)
    return drawn


def screen(found: Recommendation, files: Sequence[Path]) -> str:
    """Answer in sentences, and name the commands to run next, each on a line that can be copied whole."""
    lines = [
        *sentences(found),
        "",
        f"Worse means that p (Holm), of a paired t-test corrected for the number of finalists, is below {ALPHA}.",
        "Cost is the time of a training step, that of the best one being 1. Train at full length:",
    ]
    lines += [f"  {shlex.join(['kdzoo', 'run', '--config', str(shortened(file))])}" for file in files]
    page = shlex.join(["kdzoo", "report", written(found.folder)])
    return visible_lines([*lines, "How the search went, as a page:", f"  {page}"])


def sentences(found: Recommendation) -> list[str]:
    """Answer in sentences, the last of which compares students where there are several."""
    return [*found.sentences(), *front(found)]


def front(found: Recommendation) -> list[str]:
    """Name the students of which no other is both faster and more accurate; none where there is nothing to compare."""
    best = [(answer.student, answer.best) for answer in found.answers]
    speed = {name: one.results[0].latency_1 for name, one in best if one.results[0].latency_1 is not None}
    if len(best) == 1 or len(speed) < len(best):
        return []
    kept = [
        f"{name} ({one.mean:.2f} %, {short(speed[name])} ms)"
        for name, one in best
        if not any(
            other.mean >= one.mean - EQUAL and speed[rival] < speed[name] for rival, other in best if rival != name
        )
    ]
    return [f"No other student is both faster and at least as accurate as: {', '.join(kept)}."]


def _latency(milliseconds: float | None) -> str:
    return "" if milliseconds is None else f"{short(milliseconds)} ms"
