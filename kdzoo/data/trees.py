"""Walk a tree of image files: all that Pillow decodes, without hidden files and leftovers of archives and disks."""

import os
from collections import Counter
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from PIL import Image, ImageFile

from kdzoo.data.pictures import warn_once
from kdzoo.errors import UserError

TRAIN = "train"
TESTS = ("val", "valid", "validation", "eval", "test")  # the first that holds images is the test split
LEFTOVERS = ("__MACOSX", "@eaDir")  # of archives made on a Mac, and of Synology's disks


@dataclass
class Tree:
    """What lies below a folder, by paths relative to it."""

    images: list[str] = field(default_factory=list)
    folders: list[str] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)  # files that are no images, by their suffix

    def say_left_out(self, root: Path, unused: str = "") -> None:
        """Say once which files below ``root`` take no part: those that are no images, and ``unused`` ones."""
        parts = [f"{count} {suffix}" for suffix, count in self.left_out.most_common() if count] + [unused]
        if any(parts):
            warn_once(f"'{root}': left out: {', '.join(filter(None, parts))}")


def split_of(name: str) -> str:
    """Give the split that a name stands for, in any case of its letters; empty where it stands for none."""
    name = name.casefold()
    return name if name == TRAIN or name in TESTS else ""


@cache
def suffixes() -> frozenset[str]:
    """Collect the suffixes of all formats that Pillow decodes by itself, in lower case."""
    formats = Image.registered_extensions()  # which loads Pillow's plug-ins, and fills Image.OPEN
    opened = {name: opener[0] for name, opener in Image.OPEN.items()}

    def decodes(name: str) -> bool:
        kind = opened.get(name)
        is_stub = isinstance(kind, type) and issubclass(kind, ImageFile.StubImageFile)
        return kind is not None and not is_stub and name != "MPEG"  # a film: Pillow reads its size alone

    return frozenset(suffix.lower() for suffix, name in formats.items() if decodes(name))


def walk(root: Path) -> Tree:
    """List all images below ``root``, sorted; linked folders are followed, a link back to a folder above is not.

    Raises:
        UserError: a folder that cannot be read, or a link to none.
    """
    tree, known = Tree(), suffixes()

    def enter(folder: str, prefix: str, above: frozenset[tuple[int, int]]) -> None:
        try:
            state = os.stat(folder)
            here = (state.st_dev, state.st_ino)
            if here in above:
                return
            with os.scandir(folder) as found:
                entries = sorted(found, key=lambda entry: entry.name)
        except OSError as error:
            raise UserError(f"cannot read the folder '{folder}' ({error.strerror}); check its permissions") from error
        for entry in entries:
            name = entry.name
            if name[0] == "." or name in LEFTOVERS:
                continue
            leads_nowhere = entry.is_symlink() and not os.path.exists(entry.path)
            if not leads_nowhere and entry.is_dir():
                tree.folders.append(prefix + name)
                enter(entry.path, f"{prefix}{name}{os.sep}", above | {here})
                continue
            suffix = name[name.rfind(".") :].lower() if "." in name else ""
            if suffix in known:
                tree.images.append(prefix + name)
            elif leads_nowhere:  # perhaps to a class on a disk that is not there
                raise UserError(f"'{entry.path}' is a link that leads nowhere; repair or remove it")
            else:
                tree.left_out[suffix or "without a suffix"] += 1

    enter(str(root), "", frozenset())
    return tree
