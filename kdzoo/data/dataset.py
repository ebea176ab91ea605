"""Give the batches of an open data set: a loader for training, and all test images in order."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kdzoo.data import augment
from kdzoo.data.loader import Loader
from kdzoo.data.pictures import Pictures, Pixels
from kdzoo.data.sources import places_of, stratified
from kdzoo.data.stream import Streamed, stream, whole_transform
from kdzoo.distiller import DataSpec
from kdzoo.recipe import Protocol


class Dataset:
    """Give the training and test images of a data set as batches on a device.

    Args:
        spec: the description of the set.
        train: the training images.
        test: the test images.
        device: where batches lie, and the labels of ``spec``.
        fits: whether both are arrays of square images that are kept on the device, as ``train_pixels`` and
            ``test_pixels`` (N, S, S, 3) uint8; these are None where images are streamed.
        workers: processes that decode streamed images; 0: this process does.
        named: the classes of the test images' labels; empty where these have none.
    """

    def __init__(
        self,
        spec: DataSpec,
        train: Pictures,
        test: Pictures,
        *,
        device: torch.device,
        fits: bool,
        workers: int = 0,
        named: tuple[str, ...] = (),
    ):
        self.spec, self.fits, self.workers, self.named = spec, fits, workers, named
        self._train, self._test, self.device = train, test, device
        self.train_pixels = self._on_device(train) if fits else None
        self.test_pixels = self._on_device(test) if fits else None

    @property
    def is_labelled(self) -> bool:
        """Whether training images have labels."""
        return len(self.spec.labels) > 0

    @property
    def is_judged(self) -> bool:
        """Whether test images have labels; else their answers are the teacher's, see ``answered_by``."""
        return bool(self.named)

    def name_outputs(self, names: Sequence[str]) -> None:
        """Say what the outputs of networks stand for, where training images have no labels that do.

        Raises:
            UserError: test images are of other classes.
        """
        self.spec = self.spec._replace(num_classes=len(names), class_names=tuple(names))
        if self.named and names:
            places = np.array(places_of(self.named, names), np.int64)
            self._test = replace(self._test, labels=places[self._test.labels])
            self.named = tuple(names)

    def answered_by(self, answers: NDArray[np.int64]) -> None:
        """Take what a teacher answers for each test image (N,) as what is right for it."""
        self._test = replace(self._test, labels=answers)

    @property
    def test_size(self) -> int:
        """The number of test images."""
        return len(self._test)

    @property
    def untested(self) -> tuple[str, ...]:
        """The classes of which there is no test image."""
        tested = set(self._test.labels.tolist()) if self.is_judged else set(range(self.spec.num_classes))
        return tuple(name for label, name in enumerate(self.spec.class_names) if label not in tested)

    def loader(
        self, protocol: Protocol, *, seed: int, views: tuple[str, ...] = (), rank: int = 0, world: int = 1
    ) -> Loader:
        """Make the training batches of this protocol, see ``Loader``."""
        return Loader(
            self.spec,
            protocol,
            seed=seed,
            device=self.device,
            views=views,
            pixels=self.train_pixels,
            pictures=self._train,
            workers=self.workers,
            rank=rank,
            world=world,
        )

    def test_batches(self, batch_size: int, test_crop: float = 1.0) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield all test images in order, (B, 3, H, W) float in [0, 1], channels last, and labels (B,) int64.

        Args:
            batch_size: of all batches but the last.
            test_crop: share of the resized side that the centre crop keeps.
        """
        return self._batches(self._test, self.test_pixels, batch_size, test_crop)

    def sample(
        self, split: Literal["train", "test"], count: int, batch_size: int, test_crop: float = 1.0
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield ``count`` images of a split, spread over its classes, as ``test_batches`` does; 0 yields all."""
        pictures, pixels = (self._train, self.train_pixels) if split == "train" else (self._test, self.test_pixels)
        rows = stratified(pictures.labels, count or len(pictures))
        chosen = None if pixels is None else pixels[torch.from_numpy(rows).to(self.device)]
        return self._batches(pictures.take(rows), chosen, batch_size, test_crop)

    def _batches(
        self, pictures: Pictures, pixels: Tensor | None, batch_size: int, test_crop: float
    ) -> Iterator[tuple[Tensor, Tensor]]:
        labels = torch.from_numpy(pictures.labels).to(self.device)
        size = self.spec.image_size
        starts = range(0, len(labels), batch_size)
        if pixels is not None:
            resized = int(size / test_crop)
            margin = round((resized - size) / 2)
            for start in starts:
                images = augment.floats(pixels[start : start + batch_size])
                images = augment.resize(images, resized)[:, :, margin : margin + size, margin : margin + size]
                images = images.contiguous(memory_format=torch.channels_last)
                yield images, labels[start : start + batch_size]
            return
        whole = {"images": whole_transform(size, test_crop)}
        dataset = Streamed(pictures, whole, int(size / test_crop), seed=0)
        keys = ([(0, row) for row in range(start, min(start + batch_size, len(labels)))] for start in starts)
        for start, drawn in zip(starts, stream(dataset, keys, self.workers, self.device), strict=True):
            yield augment.floats(drawn["images"]), labels[start : start + batch_size]

    def test_pictures(self, rows: NDArray[np.int64], side: int) -> tuple[NDArray[np.uint8], tuple[str, ...]]:
        """Show some test images, uncropped but square: (N, S, S, 3), S at most ``side``, and their names."""
        side = min(side, self.spec.image_size)
        square = whole_transform(side, test_crop=1.0)
        shown = [np.asarray(square(self._test.decoded(row, side))) for row in rows.tolist()]
        pictures = np.stack(shown) if shown else np.zeros((0, side, side, 3), np.uint8)
        return pictures, tuple(self._test.title(row) for row in rows.tolist())

    def _on_device(self, pictures: Pictures) -> Tensor:
        assert isinstance(pictures, Pixels)
        return torch.from_numpy(pictures.array).to(self.device)
