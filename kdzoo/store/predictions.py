"""What a student and its teacher take each test image for, kept beside the student so that reports can show it."""

import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from kdzoo.errors import UserError, is_shortage
from kdzoo.files import LARGEST, is_file, write_atomically

PICTURES = 12  # mistakes whose pictures are kept
SIDE = 64  # pixels of a picture, at most
LONGEST_TITLE = 300  # characters


@dataclass(frozen=True)
class Predictions:
    """The classes of N test images, in the order of the test set, and the mistakes that the student is surest of.

    Where test images have no labels, the teacher's answers stand in their place. Where there is no classifier either,
    all of these are rows of the test set: of the image that lies nearest in the embedding.
    """

    labels: NDArray[np.integer]  # (N,) the true classes
    student: NDArray[np.integer]  # (N,) the classes of the student's highest logits
    confidence: NDArray[np.floating]  # (N,) their probabilities; written as 0 where a logit is no number
    teacher: NDArray[np.integer]  # (N,) the classes of the teacher's highest logits; empty where there is no teacher
    worst: NDArray[np.integer]  # (M,) rows of the surest mistakes, surest first
    pictures: NDArray[np.uint8]  # (M, S, S, 3) of these rows
    titles: tuple[str, ...]  # M names of these images

    def write(self, file: Path) -> None:
        """Write the file completely or not at all."""
        arrays = {key.name: getattr(self, key.name) for key in fields(self) if key.name != "titles"}
        compact = {name: np.ascontiguousarray(_compact(array)) for name, array in arrays.items()}
        metadata = {"titles": json.dumps([title[:LONGEST_TITLE] for title in self.titles])}
        write_atomically(file, lambda temporary: temporary.write_bytes(save(compact, metadata)))


def mistakes(labels: NDArray[Any], classes: NDArray[Any], confidence: NDArray[Any]) -> NDArray[np.int64]:
    """Find the rows of the surest mistakes, surest first; of equal ones the first row counts as surer."""
    wrong = np.flatnonzero(labels != classes)
    return wrong[np.argsort(-confidence[wrong], kind="stable")][:PICTURES]


def read(file: Path, num_classes: int) -> Predictions:
    """Read a file of predictions over so many classes; with 0 they are rows of the test set.

    Raises:
        UserError: it is damaged, or another version of kdzoo wrote it.
    """
    try:
        if not is_file(file) or file.stat().st_size > LARGEST:
            raise ValueError(f"expected a file of at most {LARGEST:,} bytes")
        with safe_open(file, "np") as content:
            names = {key.name for key in fields(Predictions)} - {"titles"}
            if missing := names - set(content.keys()):
                raise ValueError(f"it has no {min(missing)}")
            arrays = {name: content.get_tensor(name) for name in names}
            titles = json.loads((content.metadata() or {}).get("titles", "[]"))
        _check(arrays, titles, num_classes)
    except (SafetensorError, OSError, ValueError, TypeError, RecursionError) as error:
        if is_shortage(error):
            raise
        raise UserError(f"{file} cannot be read ({' '.join(str(error).split())}); remove it") from error
    return Predictions(**arrays, titles=tuple(titles))


def _compact(array: NDArray[Any]) -> NDArray[Any]:
    """Keep whole numbers in 16 bits where they fit, and probabilities in 16 too."""
    if array.dtype.kind == "f":
        return np.nan_to_num(array).astype(np.float16)
    if array.dtype == np.uint8:
        return array
    return array.astype(np.int16 if array.max(initial=0) < 2**15 else np.int32)


def _check(arrays: dict[str, NDArray[Any]], titles: Any, num_classes: int) -> None:
    """Check shapes, types and ranges of what a file holds."""
    count, shown = len(arrays["labels"]), len(arrays["worst"])
    shapes = {"labels": (count,), "student": (count,), "confidence": (count,), "worst": (shown,)}
    if len(arrays["teacher"]):
        shapes["teacher"] = (count,)
    for name, shape in shapes.items():
        if arrays[name].shape != shape:
            raise ValueError(f"{name} has the shape {arrays[name].shape}, not {shape}")
    classes = num_classes or count
    for name, limit in (("labels", classes), ("student", classes), ("teacher", classes), ("worst", count)):
        array = arrays[name]
        if array.dtype.kind != "i" or (array.size and not 0 <= array.min() <= array.max() < limit):
            raise ValueError(f"{name} are no numbers from 0 to {limit - 1}")
    confidence, pictures = arrays["confidence"], arrays["pictures"]
    if confidence.dtype.kind != "f" or not np.all((confidence >= 0) & (confidence <= 1)):
        raise ValueError("confidence holds no probabilities")
    side = pictures.shape[1] if pictures.ndim == 4 else 0
    if pictures.dtype != np.uint8 or pictures.shape != (shown, side, side, 3) or side > SIDE or shown > PICTURES:
        raise ValueError(f"pictures are {pictures.dtype} {pictures.shape}")
    if not isinstance(titles, list) or len(titles) != shown or not all(isinstance(title, str) for title in titles):
        raise ValueError("titles are not those of the pictures")
