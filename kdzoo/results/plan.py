"""The plan of a suite: its runs by group, and the time and memory that each group is expected to take."""

from typing import TYPE_CHECKING

from kdzoo.quantities import counted, duration, size

if TYPE_CHECKING:
    from kdzoo.experiments.estimate import Estimate
    from kdzoo.settings import Run


def plan(name: str, groups: list[list["Run"]], estimates: list["Estimate"]) -> str:
    """List a suite's runs by group, with the time and memory that each group is expected to take."""
    runs, parts = counted(sum(map(len, groups)), "run"), counted(len(groups), "group")
    lines = [f"{name}: {runs} in {parts}; a group shares a teacher and its batches"]
    for group, found in zip(groups, estimates, strict=True):
        first = group[0].settings
        epochs = counted(first.protocol.epochs, "epoch")
        title = f"{first.task}, {first.protocol.name}, {epochs}"
        lines.append(f"- {title}, seed {first.seed}: {_expected(found, len(group))}")
        for i, run in enumerate(run.settings for run in group):
            keywords = " ".join(f"{key}={value}" for key, value in run.distiller.keywords.items())
            failed = f"  cannot be trained: {found.failed[i]}" if i in found.failed else ""
            lines.append(f"    {run.student.name}  {run.distiller.name}  {keywords}{failed}")
    return "\n".join([*lines, *_total(groups, estimates)])


def _expected(found: "Estimate", runs: int) -> str:
    """A group's estimate in words."""
    if found.missing:
        return f"no estimate: {found.missing}"
    said = f"about {duration(found.seconds)}, {size(found.memory)}"
    said += f", in {found.packs} parts" if found.packs > 1 else ""
    said += f", after {duration(found.teaching)} for the teacher's own training" if found.teaching else ""
    return said + (f"; {found.finished} of {counted(runs, 'run')} done" if found.finished else "")


def _total(groups: list[list["Run"]], estimates: list["Estimate"]) -> list[str]:
    """What the whole suite is expected to take, and how far that is to be trusted."""
    known = [found for found in estimates if not found.missing]
    if not known:
        return ["Nothing could be measured, so there is no estimate."]
    of = f" of the {counted(len(known), 'group')} that could be measured" if len(known) < len(groups) else ""
    runs, left, taught = (sum(getattr(found, part) for found in known) for part in ("seconds", "left", "teaching"))
    teachers = f", and {duration(taught)} for teachers that are not trained yet" if taught else ""
    settings, place = groups[0][0]
    device = place.engine.device
    memory = "the device's peak" if device.startswith("cuda") else "counted, with half as much again for kernels"
    return [
        f"Estimate{of}: {duration(runs)} for all runs, of which {duration(left)} are left{teachers}.",
        f"It is no more than an estimate: a few steps of each run on {device} in {settings.engine.precision}, one "
        f"group after the other, with untrained networks. Memory is {memory}.",
    ]
