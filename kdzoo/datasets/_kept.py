"""Keep the arrays of a data set in the cache, where making them takes long."""

from collections.abc import Callable
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from kdzoo.files import cache_folder, make_folder, write_atomically

Arrays = dict[str, NDArray]


def kept(name: str, make: Callable[[], Arrays]) -> Arrays:
    """Read arrays from the cache; make and keep them where they are missing or damaged.

    Args:
        name: of the data set, whose arrays are always the same.
        make: makes them, by their names.
    """
    file = cache_folder() / "data" / f"{name}.npz"
    try:
        with file.open("rb") as opened, np.load(opened) as arrays:  # its checksums tell what is damaged
            return dict(arrays)
    except (OSError, ValueError, KeyError, EOFError, BadZipFile):
        made = make()

    def write(part: Path) -> None:
        with part.open("wb") as out:
            np.savez(out, **made)  # type: ignore[arg-type]  # none of the names is a keyword of savez

    make_folder(file.parent)
    write_atomically(file, write)
    return made
