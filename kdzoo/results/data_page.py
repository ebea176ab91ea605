"""Answer ``kdzoo data``: what a data set holds, and which of its images deserve a look."""

from collections.abc import Callable, Mapping
from pathlib import Path

from kdzoo.data.inspection import Inspection, inspect
from kdzoo.data.pictures import Reading
from kdzoo.data.sources import open_source
from kdzoo.errors import visible
from kdzoo.quantities import counted
from kdzoo.settings import Run


def inspected(run: Run, report: Callable[[str], object] | None = None) -> Inspection:
    """Look at every image of the data that a run would open; ``report`` is called with a line of progress.

    Raises:
        UserError: the data cannot be opened.
    """
    wanted = run.settings.data
    reading = Reading(wanted.exif, wanted.alpha)
    root = Path(run.place.data.root)
    source = open_source(
        wanted.name,
        root,
        wanted.options,
        classes=wanted.classes,
        val=wanted.val,
        select=wanted.select,
        reading=reading,
        test=wanted.test,
    ).limited(wanted.limit)
    return inspect(source, wanted.fingerprint, run.place.data.workers, report)


def page(name: str, found: Inspection) -> str:
    """Write what was found, one fact a line."""
    totals = {split: int(counts.sum()) for split, counts in found.counts.items()}
    small, large = (" x ".join(map(str, size)) for size in (found.smallest, found.largest))
    kinds = counted(len(found.class_names), "class") if found.class_names else "no labels"
    lines = [
        f"data {name}: {kinds}, {totals['train']} training and {totals['test']} test images",
        f"size (width x height): {small if small == large else f'from {small} to {large}'} pixels",
        f"fingerprint: {found.fingerprint or 'none, as the name and the options decide every image'}",
    ]
    width = max(map(len, [*found.class_names, "class"]))
    rows = [("", "", ""), ("class", "train", "test")] if found.class_names else []
    rows += [
        (each, str(found.counts["train"][label]), str(found.counts["test"][label]))
        for label, each in enumerate(found.class_names)
    ]
    lines += [f"{each:{width}}  {train:>6}  {test:>6}".rstrip() for each, train, test in rows]
    lines += _part("damaged images", {path: f"({reason})" for path, reason in found.damaged.items()})
    lines += _part("test images that are nearly the same as a training image", found.doubles)
    return "\n".join(map(visible, lines))  # files may have any name


def _part(title: str, entries: Mapping[str, str]) -> list[str]:
    return ["", f"{title}: {len(entries) or 'none'}", *(f"  {one}  {other}" for one, other in entries.items())]
