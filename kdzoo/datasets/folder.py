"""Your own images in folders: PATH/train/CLASS/*.png|jpg|webp, with val or test beside train."""

import os
from pathlib import Path

from kdzoo import ImageSet
from kdzoo.errors import UserError, unknown
from kdzoo.image_set import Loaded, Split

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


class Folder(ImageSet):
    """Read an image tree whose folders are the classes, in alphabetical order.

    ``val`` is the test split where there is one, else ``test``.

    Args:
        path: the folder that holds ``train``.
    """

    argument = "PATH"

    def __init__(self, path: str):
        self.path = Path(path).expanduser()

    def load(self, root: Path) -> Loaded:
        """List the images of both splits.

        Raises:
            UserError: a split or a class is missing or empty, or a class is tested and not trained.
        """
        if not self.path.is_dir():
            raise UserError(f"no folder '{self.path}'; expected train/CLASS/*.png and val or test beside train")
        path = self.path.resolve()
        if not (path / "train").is_dir():
            raise UserError(f"no folder 'train' in '{path}'; expected train/CLASS/*.png")
        beside = [split for split in ("val", "test") if (path / split).is_dir()]
        if not beside:
            raise UserError(f"neither 'val' nor 'test' in '{path}', beside 'train'")
        classes = _subfolders(path / "train")
        if not classes:
            raise UserError(f"no class folders in '{path / 'train'}'; expected train/CLASS/*.png")
        tested = _subfolders(path / beside[0])
        for name in tested:
            if name not in classes:
                raise unknown("test class", name, classes, f"('{path / beside[0] / name}' is not in train)")
        if not tested:
            raise UserError(f"no class folders in '{path / beside[0]}'; expected {beside[0]}/CLASS/*.png")
        return classes, _listed(path / "train", classes, classes), _listed(path / beside[0], tested, classes)


def _subfolders(path: Path) -> list[str]:
    return sorted(entry.name for entry in os.scandir(path) if entry.is_dir() and entry.name[0] != ".")


def _listed(split: Path, present: list[str], classes: list[str]) -> Split:
    """List the images of the classes that are ``present``, with their positions in ``classes`` as labels."""
    images: list[str] = []
    labels: list[int] = []
    for name in present:
        found = sorted(
            os.path.join(folder, file)
            for folder, _, files in os.walk(split / name)
            for file in files
            if file.lower().endswith(SUFFIXES) and file[0] != "."
        )
        if not found:
            raise UserError(f"no images in '{split / name}'; expected {', '.join(SUFFIXES)}")
        images += found
        labels += [classes.index(name)] * len(found)
    return images, labels
