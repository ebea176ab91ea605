"""Open data sets by name, and give their batches on the device.

>>> data = open_dataset("digits")
>>> batch = next(data.loader(Protocol(), seed=0).batches())
"""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from kdzoo.data.dataset import Dataset
from kdzoo.data.fingerprint import fingerprint
from kdzoo.data.inspection import without_damaged
from kdzoo.data.loader import Loader
from kdzoo.data.pictures import Reading
from kdzoo.data.prepare import prepare
from kdzoo.data.sources import image_set, open_source, option_settings
from kdzoo.distiller import DataSpec
from kdzoo.files import cache_folder

__all__ = ["Dataset", "Loader", "fingerprint", "open_dataset", "option_settings", "outline"]


def open_dataset(
    name: str,
    *,
    root: Path | str = "data",
    image_size: int | None = None,
    limit: int | None = None,
    device: torch.device | str = "cpu",
    cache: Path | None = None,
    report: Callable[[str], object] | None = None,
    stream: bool | None = None,
    options: Mapping[str, Any] | None = None,
    classes: str | None = None,
    val: float = 0.0,
    select: float = 0.0,
    test: str | None = None,
    exif: bool = True,
    alpha: str = "white",
    skip_damaged: bool = False,
    workers: int = 0,
) -> Dataset:
    """Open a data set.

    Args:
        name: one of ``kdzoo list data``, such as ``cifar100`` or ``folder:PATH``, or the path of a Python file that
            holds a ``kdzoo.ImageSet``.
        root: the folder of sets that are files; torchvision's are downloaded to it.
        image_size: the side in pixels at which images are shown; None: the set's own if all its images have the same
            size, else 224.
        limit: keep this many training images, each class with its share; the test set stays whole.
        device: where batches lie.
        cache: folder of decoded images; None: ``data`` in $KDZOO_CACHE, else in ~/.cache/kdzoo.
        report: is called with a line of progress, again and again, while images are decoded.
        stream: True decodes images each time they are used, False keeps the set on the device; None: keeps it if it
            fits.
        options: keywords of the set's constructor, where it has any.
        classes: order of the classes: ``text``, ``natural`` (2 before 10), or the path of a file with one name a line;
            None: the set's own. It decides which output of a network means which class.
        val: the share of the training images that is held out, of each class alike, to measure on instead of the test
            images; 0: none.
        select: the share of those that are left that is held out in the same way, to choose methods by, and measured on
            instead; 0: none.
        test: another data set, labelled, whose test images are measured on instead of the set's own.
        exif: whether images of files are turned and mirrored as their camera noted.
        alpha: the colour that transparent pixels of image files are laid on, such as ``white`` or ``#808080``.
        skip_damaged: whether to leave out image files that cannot be decoded, instead of stopping at the first.
        workers: processes that decode streamed images, and look for damaged ones; 0: this process does.

    Raises:
        UserError: an unknown name or option, files that are missing or damaged, a cache that cannot be written.
    """
    device = torch.device(device)
    folder = cache or cache_folder() / "data"
    choose = partial(without_damaged, folder=folder, workers=workers, report=report) if skip_damaged else None
    reading = Reading(exif, alpha)
    source = open_source(
        name, Path(root), options, classes=classes, val=val, select=select, reading=reading, choose=choose, test=test
    )
    source = source.limited(limit)
    ready = prepare(source, image_size, device, folder, report, stream)
    spec = DataSpec(
        name=name,
        num_classes=len(source.class_names),
        class_names=source.class_names,
        image_size=ready.image_size,
        labels=torch.from_numpy(source.train.labels[: None if source.class_names else 0]).to(device),
        mean=ready.mean,
        std=ready.std,
        superclasses=source.superclasses,
    )
    # The labels' device has its number, which ``device`` may lack: cuda:0.
    return Dataset(
        spec,
        ready.train,
        ready.test,
        device=spec.labels.device,
        fits=ready.fits,
        workers=workers,
        named=source.test_names,
    )


def outline(name: str) -> DataSpec:
    """Describe a data set by its number of classes and image size; open it only if its file lacks one."""
    found = image_set(name)
    if found.num_classes is None or found.image_size is None:
        return open_dataset(name).spec
    names = tuple(map(str, range(found.num_classes)))
    return DataSpec(name, found.num_classes, names, found.image_size, torch.zeros(0, dtype=torch.int64))
