"""The interface of a data set: its images, labels and class names, small enough to read at once."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from kdzoo.errors import UserError

Images = NDArray[np.uint8] | Sequence[str | Path]
Split = tuple[Images, NDArray[np.integer[Any]] | Sequence[int] | None]
Loaded = tuple[Sequence[str], Split, Split | None]


class ImageSet:
    """A data set by name: what is known of it, and how its images are loaded.

    A data set is one file with one class derived from this one. The keyword-only arguments of its constructor are its
    options, ``data.options.KEY=VALUE``; the constructor stores and checks them, and ``load`` does the work.

    Attributes:
        num_classes: how many classes there are. Like ``image_size`` it serves pages that do not load the set, and is
            None where only loading tells. A constructor sets both again where they depend on its options.
        image_size: the side of the images in pixels.
        argument: what has to follow the set's name and a colon, as ``PATH`` in ``folder:PATH``; it is the constructor's
            first argument. Empty: nothing follows.

    Example:
        >>> class Noise(ImageSet):
        ...     num_classes = 2
        ...     image_size = 8
        ...
        ...     def __init__(self, *, images: int = 10):
        ...         self.images = images
        ...
        ...     def load(self, root):
        ...         labels = np.arange(self.images) % 2
        ...         noise = np.random.default_rng(0).integers(0, 256, (self.images, 8, 8, 3), dtype=np.uint8)
        ...         return ("even", "odd"), (noise, labels), (noise[:4], labels[:4])
        >>> class_names, (images, labels), _ = Noise(images=20).load(Path("data"))
        >>> images.shape, labels[:4].tolist()
        ((20, 8, 8, 3), [0, 1, 0, 1])
    """

    num_classes: int | None = None
    image_size: int | None = None
    argument: ClassVar[str] = ""

    def load(self, root: Path) -> Loaded:
        """Load class names, training images with their labels, and test images with theirs.

        Images are an array (N, S, S, 3) of uint8, or (N, S, S) for gray ones; or a list of image files of any size,
        relative to ``root`` or absolute. Labels are whole numbers (N,), the positions in the class names. None instead
        of the test images says that there are none, so that ``data.val`` must hold out a share of the others. A set
        without labels gives no class names, and None in place of all labels.

        Args:
            root: the folder of ``data.root``, where sets that are files may lie.
        """
        raise UserError(f"{type(self).__name__} has no load(root); help(kdzoo.ImageSet) shows what it returns")

    def fingerprint(self, root: Path) -> str | None:
        """Return a text that changes with the images or labels: a run on other data is another run.

        None, the default: kdzoo reads and hashes what ``load`` gives. A set whose name and options decide everything
        returns an empty text, and a large set may return the version that it carries.

        Args:
            root: the folder of ``data.root``.
        """
        return None
