"""Data sets by name: what is known of them, and batches on the device.

>>> data = open_dataset("digits")
>>> batch = next(data.loader(Protocol(), seed=0).batches())
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from kdzoo.data.dataset import Dataset
from kdzoo.data.loader import Loader
from kdzoo.data.prepare import prepare
from kdzoo.data.sources import image_set, open_source, option_settings
from kdzoo.distiller import DataSpec
from kdzoo.files import cache_folder

__all__ = ["Dataset", "Loader", "open_dataset", "option_settings", "outline"]


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
    workers: int = 0,
) -> Dataset:
    """Opens a data set.

    Args:
        name: one of ``kdzoo list data``, such as ``cifar100`` or ``folder:PATH``, or the path of a Python file that
            holds a ``kdzoo.ImageSet``.
        root: the folder of sets that are files; torchvision's are downloaded to it.
        image_size: the side in pixels images are shown at; None: the set's own where all its images have one
            size, else 224.
        limit: keep this many training images, each class with its share; the test set stays whole.
        device: where batches lie.
        cache: folder of decoded images; None: ``data`` in $KDZOO_CACHE, else in ~/.cache/kdzoo.
        report: is called again and again with what is being done, while images are decoded.
        stream: True decodes at every use, False keeps the set on the device; None: sets that fit are kept.
        options: keywords of the set's constructor, where it has any.
        workers: processes that decode what is streamed; 0: none but this one.

    Raises:
        UserError: an unknown name or option, files that are missing or damaged, a cache that cannot be written.
    """
    device = torch.device(device)
    source = open_source(name, Path(root), options).limited(limit)
    ready = prepare(source, image_size, device, cache or cache_folder() / "data", report, stream)
    spec = DataSpec(
        name=name,
        num_classes=len(source.class_names),
        class_names=source.class_names,
        image_size=ready.image_size,
        labels=torch.from_numpy(source.train.labels).to(device),
        mean=ready.mean,
        std=ready.std,
        superclasses=source.superclasses,
    )
    return Dataset(spec, ready.train, ready.test, ready.fits, workers)


def outline(name: str) -> DataSpec:
    """Describe a data set by its number of classes and image size; it is opened only if its file tells neither."""
    found = image_set(name)
    if found.num_classes is None or found.image_size is None:
        return open_dataset(name).spec
    names = tuple(map(str, range(found.num_classes)))
    return DataSpec(name, found.num_classes, names, found.image_size, torch.zeros(0, dtype=torch.int64))
