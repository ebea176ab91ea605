"""Pages for people: a finished run, a method, a network, and lists of what can be named."""

import inspect
import os
import shlex
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from kdzoo import registry
from kdzoo.errors import UserError
from kdzoo.words import duration, size

if TYPE_CHECKING:
    from kdzoo.experiments.estimate import Estimate
    from kdzoo.settings import Settings
    from kdzoo.store.folder import Result


def result_table(result: "Result") -> Table:
    """Tabulate what a run found, beside what its student reaches without a teacher where that is known."""
    pair = f"{result.teacher} → {result.student}" if result.teacher else result.student
    title = f"{result.distiller} ({result.fidelity}): {pair} on {result.data}"
    table = Table(title=title, title_justify="left", show_header=False)
    table.add_column()
    table.add_column(justify="right")
    if result.teacher_top1 is not None:
        table.add_row("teacher top-1", f"{result.teacher_top1:.2f} %")
    table.add_row("student top-1, last epoch", f"{result.top1:.2f} %")
    table.add_row("student top-1, best epoch", f"{result.best_top1:.2f} % (epoch {result.best_epoch})")
    table.add_row("student top-5, last epoch", f"{result.top5:.2f} %")
    alone = without_teacher(result)
    if alone is not None:
        table.add_row("student top-1 without a teacher", f"{alone.top1:.2f} %")
    table.add_row("protocol, seed", f"{result.protocol}, {result.seed}")
    table.add_row("time", duration(result.seconds))
    table.add_row("images per second", f"{result.images_per_second:.0f}")
    return table


def next_steps(result: "Result") -> str:
    """Say where a run lies and which commands follow, each on a line that can be copied whole."""
    from kdzoo.experiments import suites

    root = result.folder.parent
    steps = [("Run:", str(from_here(result.folder)))]
    if result.distiller != "none" and without_teacher(result) is None:
        steps.append(("Next, the student without a teacher:", command_without_teacher(result)))
    if result.data in suites.shipped():
        steps.append((f"Many methods on {result.data}, compared over seeds:", f"kdzoo bench {result.data}"))
    else:
        steps.append(("Suites that compare many methods:", "kdzoo list suites"))
    steps.append(("All runs of this folder:", shlex.join(["kdzoo", "table", str(from_here(root))])))
    return "\n".join(f"{what}\n  {line}" for what, line in steps)


def without_teacher(result: "Result") -> "Result | None":
    """Find the run beside this one that trains the same student without a teacher; None where there is none."""
    from kdzoo.store.folder import RunFolder

    wanted = _same_student(result.folder)
    for file in sorted(result.folder.parent.glob(f"*-none-s{result.seed}-*/result.json")):
        with suppress(UserError):  # a damaged neighbour is not this run's concern
            if file.parent != result.folder and _same_student(file.parent) == wanted:
                return RunFolder(file.parent).read_result()
    return None


def command_without_teacher(result: "Result") -> str:
    """Write the command that trains a run's student by the same recipe on the same data, without a teacher."""
    from kdzoo.settings import read_protocol, resolve
    from kdzoo.store.folder import RunFolder

    settings = RunFolder(result.folder).read_config()
    parts = ("student", "data", "protocol")
    given: dict[str, dict[str, Any]] = {part: {"name": settings[part]["name"]} for part in parts}
    given["protocol"]["epochs"] = settings["protocol"]["epochs"]  # which milestones and warm-up follow
    usual = _flat(resolve({**given, "distiller": {"name": "none"}}).plain())
    usual["protocol.epochs"] = read_protocol(result.protocol).epochs
    own = _flat({part: settings[part] for part in parts})
    words = ["kdzoo", "run", "--distiller", "none", "--student", result.student]
    for option, value, default in (
        ("--data", result.data, "digits"),
        ("--protocol", result.protocol, "quick"),
        ("--seed", str(result.seed), "0"),
        ("--out", str(from_here(result.folder.parent)), "runs"),
    ):
        words += [option, value] if value != default else []
    words += [f"{key}={'null' if value is None else value}" for key, value in own.items() if value != usual.get(key)]
    return shlex.join(words)


def from_here(path: Path) -> Path:
    """Shorten a path to one that starts at the working folder, if it lies inside."""
    whole = Path(os.path.abspath(path))
    return whole.relative_to(Path.cwd()) if whole.is_relative_to(Path.cwd()) else whole


def _same_student(folder: Path) -> dict[str, Any]:
    """What a run's student was trained on and how, beside the method and the teacher."""
    from kdzoo.store.folder import RunFolder

    settings = RunFolder(folder).read_config()
    data = {key: value for key, value in settings["data"].items() if key not in ("root", "workers")}
    return {**{key: settings[key] for key in ("student", "protocol")}, "data": data}


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by their full keys."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found


def is_distiller(name: str) -> bool:
    """Whether ``kdzoo show`` is asked for a method rather than a network."""
    return name.endswith(".py") or name in registry.names()


def distiller_page(name: str) -> RenderableType:
    """A method: its paper, how faithful it is, its documentation, its keywords with their defaults."""
    method = registry.find(name)
    distiller = registry.load(name)
    keywords = Table("keyword", "type", "default", title="distiller.KEYWORD=value", title_justify="left")
    for parameter in inspect.signature(distiller.__init__).parameters.values():
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY:
            kind = inspect.formatannotation(parameter.annotation).replace("typing.", "")
            keywords.add_row(parameter.name, kind, repr(parameter.default))
    facts = Table.grid(padding=(0, 2))
    facts.add_row("method", method.name)
    facts.add_row("paper", distiller.paper)
    facts.add_row("fidelity", f"{distiller.fidelity}: {FIDELITIES[str(distiller.fidelity)]}")
    facts.add_row("file", str(method.file))
    return Group(facts, Text(), Text(method.summary), Text(inspect.getdoc(distiller) or ""), Text(), keywords)


FIDELITIES = {
    "exact": "formulas read in the authors' code or paper",
    "adapted": "carried over from another task or architecture",
    "reconstructed": "the full text was not available; our reading of abstract and relatives",
}


def model_page(name: str, data: str) -> RenderableType:
    """A network at the size of a data set: taps, shapes, parameters, what was adapted."""
    from kdzoo import models
    from kdzoo.data import outline

    spec = outline(data)
    known = models.describe(models.create(name, spec))
    facts = Table.grid(padding=(0, 2))
    for key, value in known.items():
        if key == "adapted":
            value = "\n".join(value) or "nothing"
        elif key == "taps":
            value = "\n".join(" x ".join(map(str, shape)) for shape in value)
        facts.add_row(key.replace("_", " "), f"{value:,}" if isinstance(value, int) else str(value))
    return Group(Text(f"{name} on {data} ({spec.num_classes} classes, {spec.image_size} px)"), Text(), facts)


def listing(kind: str, style: str) -> str:
    """The names of one kind, a line each; methods with their paper and fidelity."""
    if kind == "distillers":
        rows = [("method", "fidelity", "paper", "what it does")]
        rows += [(m.name, m.fidelity, m.paper, m.summary) for m in registry.methods().values()]
        if style == "markdown":
            head, *body = [f"| {' | '.join(row)} |" for row in rows]
            return "\n".join([head, "|---" * len(rows[0]) + "|", *body])
        widths = [max(len(row[i]) for row in rows) for i in range(3)]
        return "\n".join(
            "  ".join([*(cell.ljust(w) for cell, w in zip(row, widths, strict=False)), row[3]]) for row in rows
        )
    if kind == "models":
        from kdzoo import models

        return "\n".join(
            [*sorted(models.short_names()), "and any name of timm, torchvision:NAME, package.module:factory"]
        )
    if kind == "data":
        found = registry.data_sets.all().values()
        width = max(len(each.title) for each in found)
        return "\n".join(f"{each.title:{width}}  {each.summary}" for each in found)
    from kdzoo.experiments import suites
    from kdzoo.settings import protocol_names

    return "\n".join(protocol_names() if kind == "protocols" else suites.shipped())


def plan(name: str, groups: list[list["Settings"]], estimates: list["Estimate"]) -> str:
    """A suite's runs by the groups that train side by side, with what each group is expected to take."""
    lines = [f"{name}: {sum(map(len, groups))} runs in {len(groups)} groups that each share a teacher and its batches"]
    for group, found in zip(groups, estimates, strict=True):
        first = group[0]
        title = f"{first.teacher.name} on {first.data.name}, {first.protocol.name}"
        lines.append(f"- {title}, {first.protocol.epochs} epochs, seed {first.seed}: {_expected(found, len(group))}")
        for i, run in enumerate(group):
            keywords = " ".join(f"{key}={value}" for key, value in run.distiller.items() if key != "name")
            failed = f"  cannot be trained: {found.failed[i]}" if i in found.failed else ""
            lines.append(f"    {run.student.name}  {run.distiller['name']}  {keywords}{failed}")
    return "\n".join([*lines, *_total(groups, estimates)])


def _expected(found: "Estimate", runs: int) -> str:
    """A group's estimate in words."""
    if found.missing:
        return f"no estimate: {found.missing}"
    said = f"about {duration(found.seconds)}, {size(found.memory)}"
    said += f", in {found.parts} parts" if found.parts > 1 else ""
    said += f", after {duration(found.teaching)} for the teacher's own training" if found.teaching else ""
    return said + (f"; {found.finished} of {runs} runs are done" if found.finished else "")


def _total(groups: list[list["Settings"]], estimates: list["Estimate"]) -> list[str]:
    """What the whole suite is expected to take, and how far that is to be trusted."""
    known = [found for found in estimates if not found.missing]
    if not known:
        return ["Nothing could be measured, so there is no estimate."]
    of = f" of the {len(known)} groups that could be measured" if len(known) < len(groups) else ""
    runs, left, taught = (sum(getattr(found, part) for found in known) for part in ("seconds", "left", "teaching"))
    teachers = f", and {duration(taught)} for teachers that are not trained yet" if taught else ""
    engine = groups[0][0].engine
    memory = "the device's peak" if engine.device.startswith("cuda") else "counted, with half as much again for kernels"
    return [
        f"Estimate{of}: {duration(runs)} for all runs, of which {duration(left)} are left{teachers}.",
        f"It is no more than an estimate: a few steps of each run on {engine.device} in {engine.precision}, one group "
        f"after the other, untrained networks, phases before training not counted. Memory is {memory}.",
    ]
