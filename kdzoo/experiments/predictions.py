"""Classify image files by the student of a finished run, decoding some while others are classified."""

import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset as TorchDataset

from kdzoo.data.augment import floats
from kdzoo.data.pictures import Files, Reading, reason_of
from kdzoo.data.stream import stream, whole_transform
from kdzoo.data.trees import walk
from kdzoo.engine.device import find_device
from kdzoo.errors import UserError, out_of_memory_told, unknown
from kdzoo.experiments.students import load
from kdzoo.files import path_of
from kdzoo.models import Network, Student, channels_last, frozen
from kdzoo.precision import PRECISIONS, autocast
from kdzoo.store.folder import RunFolder

BATCH = 64
MOST_WORKERS = 16


class Prediction(NamedTuple):
    """The classes that a student takes an image for, the likeliest first; none where the image cannot be read."""

    image: str  # its path, as it was given
    classes: tuple[str, ...] = ()
    probabilities: tuple[float, ...] = ()
    failure: str = ""  # why it cannot be read


@out_of_memory_told(lambda: "classifying images")
def predict(
    run: str | Path,
    images: Sequence[str | Path],
    *,
    top: int = 1,
    device: str = "auto",
    precision: str | None = None,
    workers: int | None = None,
    trust_code: bool = False,
) -> Iterator[Prediction]:
    """Classify image files, which are read as the run read its own.

    Args:
        run: the folder of a finished run.
        images: files, and folders whose images are all taken.
        top: classes for each image.
        device: to compute on; ``auto`` is the first GPU, else the CPU.
        precision: of the network; None: the run's, or float32 where this device lacks it.
        workers: processes that decode images beside the network; None: one for each core where a GPU computes, else
            none, and threads of this process decode between two batches.
        trust_code: as in ``load``.

    Returns:
        A prediction for each image in order; damaged images have a reason instead.

    Raises:
        UserError: a path is not there, a folder has no images, or the run cannot be read.
    """
    paths = list(files_of(images))
    student, place = load(run, trust_code=trust_code), find_device(device)
    if not getattr(student.network, "has_classifier", True):
        raise UserError(f"{run}: its student has no classifier to name classes by; kdzoo.load gives its embedding")
    config = RunFolder(path_of(run).resolve()).read_config()
    if precision is None:
        precision = str(config.get("engine", {}).get("precision", "float32"))
        precision = (
            "float32" if precision not in PRECISIONS or (precision == "tf32" and place.type != "cuda") else precision
        )
    if precision not in PRECISIONS:
        raise unknown("precision", precision, PRECISIONS)
    reading = Reading(config["data"].get("exif", True), config["data"].get("alpha", "white"))
    channels_last(student.to(place))
    if workers is None:
        batches = len(paths) // BATCH
        workers = 0 if place.type == "cpu" else min(os.cpu_count() or 1, MOST_WORKERS, batches // 2)
    return _predictions(student, paths, reading, top, place, precision, workers)


def files_of(given: Iterable[str | Path]) -> Iterator[str]:
    """List image files, and those below folders in order.

    Raises:
        UserError: a path is not there, or a folder has no images.
    """
    for one in given:
        path = path_of(one)
        if path.is_dir():
            found = walk(path).images
            if not found:
                raise UserError(f"no image below {path}; expected files that Pillow decodes, such as .jpg and .png")
            yield from (os.path.join(path, name) for name in found)
        elif path.exists():
            yield str(path)
        else:
            raise UserError(f"no file or folder {path}; expected images, or folders of images")


class _Shown(TorchDataset[Any]):
    """Images by their rows as the run was measured with, (S, S, 3) uint8, and whether each can be read."""

    def __init__(self, pictures: Files, student: Student, threads: int):
        self.pictures, self.side, self.threads = pictures, student.image_size, threads
        self.resized = int(self.side / student.test_crop)
        self.cut = whole_transform(self.side, student.test_crop)

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        try:
            pixels = np.array(self.cut(self.pictures.decoded(row, self.resized)))
        except UserError:
            return {"images": torch.zeros(self.side, self.side, 3, dtype=torch.uint8), "is_read": torch.tensor(False)}
        return {"images": torch.from_numpy(pixels), "is_read": torch.tensor(True)}

    def __getitems__(self, rows: list[int]) -> list[dict[str, Tensor]]:
        with ThreadPoolExecutor(self.threads) as pool:  # Pillow decodes and resizes without Python's lock
            return list(pool.map(self.__getitem__, rows))


def _predictions(
    student: Student, paths: list[str], reading: Reading, top: int, device: torch.device, precision: str, workers: int
) -> Iterator[Prediction]:
    names = np.array([os.fsencode(os.path.abspath(path)) for path in paths])
    pictures = Files(Path(), names, np.zeros(len(paths), np.int64), "images", reading)
    # Where the CPU computes too, decoding and the network take turns, each on all cores: side by side they are slower.
    dataset = _Shown(pictures, student, threads=1 if workers else torch.get_num_threads())
    starts = range(0, len(paths), BATCH)
    keys = [list(range(start, min(start + BATCH, len(paths)))) for start in starts]
    top = min(top, len(student.classes))
    network = student.network
    if isinstance(network, Network):  # and not what a method ships in its place
        network = frozen(network, PRECISIONS[precision])
    waiting: list[tuple[int, Any]] = []  # one batch is read while the device computes the next
    for start, drawn in zip(starts, stream(dataset, keys, workers, device), strict=True):
        with torch.inference_mode(), autocast(device.type, PRECISIONS[precision]):
            shares = network(floats(drawn["images"])).logits.float().softmax(1).topk(top)
        waiting.append((start, (*shares, drawn["is_read"])))
        if len(waiting) > 1:
            yield from _read(student, paths, pictures, *waiting.pop(0))
    for start, found in waiting:
        yield from _read(student, paths, pictures, start, found)


def _read(student: Student, paths: list[str], pictures: Files, start: int, found: Any) -> Iterator[Prediction]:
    shares, answers, is_read = (part.tolist() for part in found)
    for row, (share, answer, read) in enumerate(zip(shares, answers, is_read, strict=True), start):
        if read:
            yield Prediction(paths[row], tuple(student.classes[k] for k in answer), tuple(share))
            continue
        try:
            pictures.decoded(row, student.image_size)
            why = ""
        except UserError as error:  # it names a setting of training, which this command has not
            why = f" ({reason_of(error.__cause__ or error)})"
        yield Prediction(paths[row], failure=f"cannot read image '{paths[row]}'{why}")
