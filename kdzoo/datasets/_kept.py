"""Keep the arrays of a data set in the cache, where making them takes long."""

import zlib
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from kdzoo.errors import UserError
from kdzoo.files import cache_folder, make_folder, write_atomically

Arrays = dict[str, NDArray]


def kept(name: str, shapes: Mapping[str, tuple[int, ...]], make: Callable[[], Arrays]) -> Arrays:
    """Read arrays of whole numbers from the cache; make and keep them where they are missing, damaged or others.

    Args:
        name: of the data set, whose arrays are always the same.
        shapes: of the arrays, by their names.
        make: makes them.
    """
    file = cache_folder() / "data" / f"{name}.npz"
    try:
        with file.open("rb") as opened, np.load(opened) as arrays:  # its checksums tell what is damaged
            found = {key: arrays[key] for key in shapes}
        if all(found[key].shape == shape and found[key].dtype.kind in "iu" for key, shape in shapes.items()):
            return found
    except (OSError, ValueError, KeyError, EOFError, BadZipFile, zlib.error):
        pass
    made = make()

    def write(part: Path) -> None:
        with part.open("wb") as out:
            np.savez(out, **made)  # type: ignore[arg-type]  # none of the names is a keyword of savez

    with suppress(UserError):  # of a cache that cannot be written
        make_folder(file.parent)
        write_atomically(file, write)
    return made
