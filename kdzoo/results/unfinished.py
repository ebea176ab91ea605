"""Find the runs without a result, which tables and reports leave out: those that failed, and those not finished."""

from collections.abc import Sequence
from pathlib import Path

from kdzoo.errors import UserError, visible
from kdzoo.files import files_below
from kdzoo.store.folder import RunFolder
from kdzoo.store.search import FILE

TRIALS = "search"  # the folder, in that of a search, of runs that are never finished
NAMED = 5  # runs that a line names


def find_searches(paths: Sequence[Path]) -> list[Path]:
    """Find the folders of searches in or below ``paths``, each once."""
    return [file.parent for file in files_below(paths, FILE)]


def trials(searches: Sequence[Path]) -> list[Path]:
    """Return the folders of what searches train on a part of the training images."""
    return [(folder / TRIALS).resolve() for folder in searches]


def unfinished(paths: Sequence[Path], apart: Sequence[Path]) -> list[str]:
    """Say which runs in or below ``paths`` failed, and which others have no result: a line for each of the two.

    Args:
        paths: folders.
        apart: folders whose runs never have one, see ``trials``.
    """
    begun = {file.parent.resolve() for file in files_below(paths, "config.yaml")}
    names: dict[str, list[str]] = {"failed": [], "not finished": []}
    for folder in map(RunFolder, sorted(begun)):
        is_part = folder.path.parent in begun  # what a kill left of a finished run that was to be set aside
        if not (folder.result.is_file() or is_part or folder.path.parent in apart):
            names["failed" if folder.failure.is_file() else "not finished"].append(visible(folder.path.name))
    return [f"left out, since {why}: {_some(found)}" for why, found in names.items() if found]


def none_finished(paths: Sequence[Path], waiting: Sequence[str]) -> UserError:
    """Make the error that says that no run in or below ``paths`` has a result, and what is ``waiting`` for one."""
    also = f" ({'; '.join(waiting)})" if waiting else ""
    return UserError(f"no finished run in {', '.join(map(str, paths))}{also}")


def _some(names: Sequence[str]) -> str:
    """List the first names, and count the others."""
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return f"{', '.join(names[:NAMED])}{more}"
