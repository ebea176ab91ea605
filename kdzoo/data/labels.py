"""Read the classes of image files from a table: a CSV with the columns path, label and, if wanted, split."""

import csv
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import NamedTuple
from unicodedata import normalize

from kdzoo.errors import UserError
from kdzoo.files import read_text
from kdzoo.quantities import counted

COLUMNS = ("path", "label", "split")
LARGEST = 2**32  # bytes of a table, which may name tens of millions of images


class Row(NamedTuple):
    """What a table says of one image."""

    path: str
    label: str
    split: str = ""


@dataclass(frozen=True)
class Table:
    """The rows of a file."""

    title: str  # as errors name it
    rows: list[Row]

    def by_image(self, images: Iterable[str]) -> dict[str, Row]:
        """Find each row's image: by its path, else by its file's name, else by that name without the suffix.

        Args:
            images: paths relative to the tree's root.

        Raises:
            UserError: a row whose image is not there, or that fits several, or two rows of one image.
        """
        known = _Names(images)
        found: dict[str, Row] = {}
        missing = []
        for row in self.rows:
            image = known.find(row.path, self.title)
            if image is None:
                missing.append(row.path)
            elif image in found and found[image] != row:
                raise UserError(f"{self.title} has two rows for '{image}'; remove one")
            else:
                found[image] = row
        if missing:
            raise UserError(
                f"{self.title} names {counted(len(missing), 'image')} not there, such as '{missing[0]}'; expected "
                "paths relative to the data's folder"
            )
        return found


class _Names:
    """Images by path, by name and by name without its suffix, in one Unicode form."""

    def __init__(self, images: Iterable[str]):
        self.paths = {normalize("NFC", path): path for path in images}
        self.short: dict[str, list[str]] = {}
        for path, image in self.paths.items():
            name = os.path.basename(path)
            for key in {name, os.path.splitext(name)[0]}:
                self.short.setdefault(key, []).append(image)

    def find(self, path: str, title: str) -> str | None:
        path = os.path.normpath(path)
        if path in self.paths:
            return self.paths[path]
        candidates = self.short.get(os.path.basename(path), [])
        if len(candidates) > 1:
            raise UserError(f"{title}: '{path}' may be '{candidates[0]}' or '{candidates[1]}'; give the whole path")
        return candidates[0] if candidates else None


def read_table(file: Path, title: str) -> Table:
    """Read a CSV file, in one Unicode form; columns are separated by commas, semicolons or tabs.

    Raises:
        UserError: a column is missing, a row has no label, there is no row, or a quote is not closed.
    """
    text = normalize("NFC", read_text(file, LARGEST).removeprefix("\ufeff"))
    delimiter = max(",;\t", key=text.partition("\n")[0].count)
    given = csv.reader(StringIO(text), delimiter=delimiter, skipinitialspace=True, strict=True)
    try:
        lines = list(filter(None, given))
    except csv.Error as error:
        raise UserError(f"{title} is no CSV ({error}); look for a quote that is opened and not closed") from error
    names = [name.strip().lower() for name in lines[0]] if lines else []
    if not {"path", "label"} <= set(names):
        raise UserError(f"{title} has the columns {', '.join(names)}; expected path,label and, if wanted, split")
    cells = (dict(zip(names, line, strict=False)) for line in lines[1:])
    rows = [Row(*(row.get(column, "").strip() for column in COLUMNS)) for row in cells]
    if not rows:
        raise UserError(f"{title} lists no image; expected a row for each")
    for row in rows:
        if not row.path or not row.label:
            raise UserError(f"{title}: the row '{row.path},{row.label}' lacks a path or a label; complete or remove it")
    return Table(title, rows)


def read_annotations(file: Path, folder: str) -> Table:
    """Read Tiny ImageNet's list of the images in ``folder``: name, class and box, separated by tabs."""
    lines = read_text(file).splitlines()
    parts = [line.split("\t") for line in lines if line.strip()]
    if any(len(each) < 2 for each in parts):
        raise UserError(f"'{file}' is no list of images; expected lines of name and class, separated by tabs")
    return Table(f"'{file}'", [Row(os.path.join(folder, "images", each[0]), each[1]) for each in parts])


def rows_of(tables: Iterable[Table], images: Sequence[str]) -> dict[str, Row]:
    """Give the row of each image that has one; a later table wins."""
    return {image: row for table in tables for image, row in table.by_image(images).items()}
