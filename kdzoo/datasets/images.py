"""Pictures without classes: all image files below PATH, those in val or test apart."""

import os
from pathlib import Path

from kdzoo import ImageSet
from kdzoo.data.trees import TESTS, TRAIN, split_of, walk
from kdzoo.errors import UserError
from kdzoo.files import path_of
from kdzoo.image_set import Loaded, Split
from kdzoo.quantities import counted


class Images(ImageSet):
    """Read all images below a folder, in any folders, without labels: students learn from the teacher alone.

    Where the folder holds ``train``, or one of ``val``, ``valid``, ``validation``, ``eval`` and ``test``, images
    are in the split that the name says, and folders beside them are left out. Else all are for training, and
    ``data.val`` holds out a share of them.

    Args:
        path: the folder.
    """

    argument = "PATH"

    def __init__(self, path: str):
        self.path = path_of(path)

    def load(self, root: Path) -> Loaded:
        """List the images of both splits.

        Raises:
            UserError: there is no such folder, or no image to train on in it.
        """
        if not self.path.is_dir():
            raise UserError(f"no folder '{self.path}'; expected one that holds images, in any folders below it")
        path = self.path.resolve()
        tree = walk(path)
        splits = {name: split_of(name) for name in tree.folders if os.sep not in name and split_of(name)}
        found: dict[str, list[str]] = {}
        for image in tree.images:
            above, below, _ = image.partition(os.sep)
            split = splits.get(above if below else "", "") if TRAIN in splits.values() else split_of(above) or TRAIN
            found.setdefault(split, []).append(f"{path}{os.sep}{image}")
        if not found.get(TRAIN):
            raise UserError(f"no images to train on below '{path}'; expected files such as .png or .jpg")
        unused = len(found.get("", ()))
        tree.say_left_out(path, f"{counted(unused, 'image')} beside the folder '{TRAIN}'" if unused else "")
        test = next((split for split in TESTS if split in found), "")
        train: Split = (found[TRAIN], None)
        return (), train, (found[test], None) if test else None
