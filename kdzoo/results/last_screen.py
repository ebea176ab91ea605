"""The last screen of a run: its result, its folder, and the commands to try next."""

import os
import shlex
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from kdzoo.errors import UserError
from kdzoo.keywords import flat
from kdzoo.quantities import duration, short

if TYPE_CHECKING:
    from kdzoo.store.result import Result

KEPT = {"last": "of the last epoch", "best": "of the best epoch", "ema": "averaged, of the last epoch"}


def result_table(result: "Result") -> Table:
    """Tabulate a run's result, beside that of its student trained without a teacher, if there is one."""
    from kdzoo.store.result import MEASURED

    pair = f"{result.teacher} → {result.student}" if result.teacher else result.student
    title = f"{result.distiller} ({result.fidelity}): {pair} on {result.data}"
    table = Table(title=title, title_justify="left", show_header=False)
    table.add_column()
    table.add_column(justify="right")
    if result.teacher_top1 is not None:
        table.add_row("teacher top-1", f"{result.teacher_top1:.2f} %")
        for number, top1 in enumerate(result.teachers_top1, 1):
            table.add_row(f"teacher {number} alone", f"{top1:.2f} %")
    table.add_row("student top-1, last epoch", f"{result.top1:.2f} %")
    table.add_row("student top-1, best epoch", f"{result.best_top1:.2f} % (epoch {result.best_epoch})")
    table.add_row("student top-5, last epoch", f"{result.top5:.2f} %")
    if result.measured != "accuracy":
        table.add_row("top-1 is the share of", MEASURED[result.measured])
    for value, what, unit in (
        (result.agreement, "agreement with the teacher", " %"),
        (result.kl, "divergence from the teacher", " nats"),
        (result.knn, "top-1 by nearest neighbours", " %"),
        (result.probe, "top-1 of a linear probe", " %"),
    ):
        if value is not None:
            table.add_row(what, f"{value:.2f}{unit}")
    alone = without_teacher(result)
    if alone is not None:
        table.add_row("student top-1 without a teacher", f"{alone.shipped_top1:.2f} %")
    table.add_row("student that is kept", KEPT.get(result.ship, result.ship))
    if cost := cost_of(result):
        table.add_row("its size", cost)
    if result.latency_1 is not None and result.latency_64 is not None:
        table.add_row("its latency", f"{short(result.latency_1)} ms, {short(result.latency_64)} ms for 64")
    table.add_row("protocol, seed", f"{result.protocol}, {result.seed}")
    table.add_row("time", duration(result.seconds))
    table.add_row("images per second", f"{result.images_per_second:.0f}")
    return table


def cost_of(result: "Result") -> str:
    """Write the size of a run's student, as far as it is known."""
    parts = [
        (result.parameters, lambda count: f"{count:,} parameters"),
        (result.file_bytes, lambda size: f"{short(size / 1e6)} MB"),
        (result.flops, lambda flops: f"{short(flops / 1e9)} GFLOPs"),
    ]
    return ", ".join(text(value) for value, text in parts if value is not None)


def next_steps(result: "Result") -> str:
    """Print a run's folder and the commands to try next, each on a line that can be copied whole."""
    from kdzoo.experiments import suites

    root = result.folder.parent
    steps = [("Run:", written(result.folder))]
    learns_alone = result.measured == "accuracy" and result.agreement is None  # else there is nothing to learn from
    if result.distiller != "none" and learns_alone and without_teacher(result) is None:
        steps.append(("Next, the student without a teacher:", command_without_teacher(result)))
    if (suite := f"{result.data}-short") in suites.shipped():
        steps.append((f"Several methods on {result.data}, compared over seeds:", f"kdzoo bench {suite}"))
    else:
        steps.append(("Suites that compare many methods:", "kdzoo list suites"))
    steps.append(("All runs of this folder:", shlex.join(["kdzoo", "table", written(root)])))
    return "\n".join(f"{what}\n  {line}" for what, line in steps)


def without_teacher(result: "Result") -> "Result | None":
    """Find the run in the same folder that trains the same student without a teacher; None if there is none."""
    from kdzoo.store.folder import RunFolder

    wanted = _same_student(result.folder)
    for file in sorted(result.folder.parent.glob(f"*-none-s{result.seed}-*/result.json")):
        with suppress(UserError):  # a damaged neighbour is not this run's concern
            if file.parent != result.folder and _same_student(file.parent) == wanted:
                return RunFolder(file.parent).read_result()
    return None


def command_without_teacher(result: "Result") -> str:
    """Write the command that trains a run's student without a teacher, by the same recipe on the same data."""
    from kdzoo.resolve import read_protocol, resolve
    from kdzoo.store.folder import RunFolder

    settings = RunFolder(result.folder).read_config()
    parts = ("student", "data", "protocol")
    given: dict[str, dict[str, Any]] = {part: {"name": settings[part]["name"]} for part in parts}
    given["protocol"]["epochs"] = settings["protocol"]["epochs"]  # which milestones and warm-up follow
    known = settings["data"].get("fingerprint", "")  # of the same data, and nothing to give
    usual = flat(resolve({**given, "distiller": {"name": "none"}}, fingerprint=known).plain())
    usual["protocol.epochs"] = read_protocol(result.protocol).epochs
    used = flat({part: settings[part] for part in parts} | {"output": {"ship": result.ship}})
    words = ["kdzoo", "run", "--distiller", "none", "--student", result.student]
    for option, value, default in (
        ("--data", result.data, "digits"),
        ("--protocol", result.protocol, "quick"),
        ("--seed", str(result.seed), "0"),
        ("--out", str(shortened(result.folder.parent)), "runs"),
    ):
        words += [option, value] if value != default else []
    words += [f"{key}={'null' if value is None else value}" for key, value in used.items() if value != usual.get(key)]
    return shlex.join(words)


def shortened(path: Path) -> Path:
    """Shorten a path to one relative to the working folder, if it lies inside."""
    whole = Path(os.path.abspath(path))
    return whole.relative_to(Path.cwd()) if whole.is_relative_to(Path.cwd()) else whole


def written(path: Path) -> str:
    """Write a path as a command takes it: one that begins with a dash would be taken for an option."""
    text = str(shortened(path))
    return f"./{text}" if text.startswith("-") else text


def _same_student(folder: Path) -> dict[str, Any]:
    """What a run's student was trained on and how, beside the method and the teacher."""
    from kdzoo.settings import apart
    from kdzoo.store.folder import RunFolder

    settings, _ = apart(RunFolder(folder).read_config())
    return {
        **{key: settings[key] for key in ("student", "protocol", "data")},
        "ship": settings["output"].get("ship", "last"),
    }
