"""Your own images in folders: PATH/train/CLASS/* with val or test beside train, PATH/CLASS/*, or a CSV of labels."""

import os
from collections.abc import Iterable, Iterator
from functools import cache, partial
from pathlib import Path
from unicodedata import normalize

from kdzoo import ImageSet
from kdzoo.data.labels import Table, read_annotations, read_table, rows_of
from kdzoo.data.trees import TESTS, TRAIN, Tree, split_of, walk
from kdzoo.errors import UserError, unknown
from kdzoo.files import path_of
from kdzoo.image_set import Loaded, Split
from kdzoo.quantities import counted

ARCHIVES = {".tar", ".zip", ".gz", ".tgz", ".7z"}
EXPECTED = "expected train/CLASS/* with val or test beside train, or CLASS/* with data.val=0.1"


class Folder(ImageSet):
    """Read an image tree whose folders are the classes, in alphabetical order.

    The test split is the first of ``val``, ``valid``, ``validation``, ``eval`` and ``test`` that holds images. A tree
    without any of these folders is all for training, and ``data.val`` holds out a share of it.

    Tiny ImageNet is read as it is unpacked. Hidden files and folders, ``__MACOSX`` and ``@eaDir`` are skipped, linked
    folders are followed, and class names are compared in one Unicode form.

    Args:
        path: the folder that holds ``train``, or the classes.
        labels: a CSV file with the columns ``path`` (below ``path``, or a file's name), ``label`` and, if wanted,
            ``split``. Where it names images of a split, those that it does not name are left out; in other splits the
            folders are the classes.
    """

    argument = "PATH"

    def __init__(self, path: str, *, labels: str = ""):
        self.path, self.labels = path_of(path), labels

    def load(self, root: Path) -> Loaded:
        """List the images of both splits.

        Raises:
            UserError: a split or a class is missing or empty, a class is tested and not trained, or an image has no
                class.
        """
        if not self.path.is_dir():
            raise UserError(f"no folder '{self.path}'; {EXPECTED}")
        path = self.path.resolve()
        tree = walk(path)
        splits = {name: split_of(name) for name in tree.folders if os.sep not in name and split_of(name)}
        rows = rows_of(self._tables(path, splits, tree), tree.images)
        if splits and TRAIN not in splits.values() and not any(row.split for row in rows.values()):
            raise UserError(f"no folder 'train' in '{path}'; {EXPECTED}")
        by_folder = cache(partial(_by_folder, splits))
        listed = {by_folder(os.path.dirname(image))[0] for image in rows}
        found: dict[str, list[tuple[str, str]]] = {}  # by split, the class and the path of each image; class "": none
        for image in tree.images:
            split, label = by_folder(image.rpartition(os.sep)[0])
            if row := rows.get(image):
                split, label = self._split(row.split) or split, row.label
            elif split in listed:
                label = ""
            found.setdefault(split, []).append((label, image))
        test = next((split for split in TESTS if split in found), "")
        for images in (found.get(split, []) for split in filter(None, (TRAIN, test))):
            if images and not any(label for label, _ in images):
                raise _without_class(path, [image for _, image in images])
        homeless = sum(not label for images in found.values() for label, _ in images)
        tree.say_left_out(path, f"{counted(homeless, 'image')} of no class" if homeless else "")
        classes = sorted({label for label, _ in found.get(TRAIN, ()) if label})
        self._check_folders(path, tree, splits, classes)
        places = {name: place for place, name in enumerate(classes)}
        for label, image in found.get(test, ()) if test else ():
            if label and label not in places:
                raise unknown("test class", label, classes, f"('{path / image}' is of a class that is not in train)")
        return classes, _split(path, found[TRAIN], places), _split(path, found[test], places) if test else None

    def _tables(self, path: Path, splits: Iterable[str], tree: Tree) -> Iterator[Table]:
        """Read the tables that give images their classes, and no longer count them as left out of the tree."""
        for name in splits:
            file = path / name / f"{name}_annotations.txt"
            if file.is_file():
                tree.left_out[file.suffix] -= 1
                yield read_annotations(file, name)
        if self.labels:
            given = path_of(self.labels)
            file = given if given.is_file() else path / given
            if not file.is_file():
                raise UserError(f"no file data.labels={self.labels}; expected a CSV file with the columns path,label")
            if file.resolve().is_relative_to(path):
                tree.left_out[file.suffix] -= 1
            yield read_table(file, f"data.labels={self.labels}")

    def _split(self, name: str) -> str:
        if name and not split_of(name):
            raise unknown("split", name, [TRAIN, *TESTS], f"(in data.labels={self.labels})")
        return split_of(name)

    def _check_folders(self, path: Path, tree: Tree, splits: dict[str, str], classes: list[str]) -> None:
        """Check that there are classes, and that each training folder that looks like one holds images."""
        train = next((name for name, split in splits.items() if split == TRAIN), "")
        if not classes:
            held = [f"{count} {suffix}" for suffix, count in tree.left_out.items() if suffix in ARCHIVES]
            unpack = f"; it holds {', '.join(held)}: unpack them first" if held else ""
            raise UserError(f"no class folders with images in '{path / train}'; {EXPECTED}{unpack}")
        for folder in tree.folders:
            above, name = os.path.split(folder)
            if above == train and folder not in splits and not self.labels and _one_form(name) not in classes:
                raise UserError(f"no images in '{path / folder}'; expected files such as .png or .jpg, or remove it")


def _by_folder(splits: dict[str, str], folder: str) -> tuple[str, str]:
    """Tell split and class of the images in a folder; empty where it does not tell."""
    above = folder.split(os.sep) if folder else []
    split = TRAIN
    if splits:
        split = splits.get(above[0], "") if above else ""
        above = above[1:]
    return split, _one_form(above[0]) if above and split else ""


def _split(path: Path, images: list[tuple[str, str]], places: dict[str, int]) -> Split:
    """Sort the images that have a class by class and path: absolute paths, and labels."""
    ordered = sorted((places[label], image) for label, image in images if label)
    return [f"{path}{os.sep}{image}" for _, image in ordered], [label for label, _ in ordered]


def _one_form(name: str) -> str:
    return name if name.isascii() else normalize("NFC", name)


def _without_class(path: Path, images: list[str]) -> UserError:
    first = os.path.basename(images[0])
    todo = "give their classes in a CSV file with the columns path,label: data.labels=FILE"
    if first.startswith("ILSVRC2012_val"):
        todo += "; for ImageNet: sed '1s/.*/path,label/; s/ .*//' LOC_val_solution.csv > FILE"
    folder = (path / images[0]).parent
    return UserError(f"'{folder}' holds images in no class folder, {len(images)} in all, such as '{first}'; {todo}")
