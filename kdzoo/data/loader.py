"""Make training batches as a pure function of seed and step: runs resume to the bit, comparisons are paired."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import repeat

import torch
from torch import Tensor

from kdzoo.data import augment
from kdzoo.data.pictures import Pictures
from kdzoo.data.stream import DRAWN_AS, PLAIN, Streamed, left_for_the_device, side_needed, stream, worker_transform
from kdzoo.data.targets import Targets
from kdzoo.distiller import VIEWS, Batch, DataSpec
from kdzoo.errors import UserError, unknown
from kdzoo.quantities import counted
from kdzoo.randomness import seed_of
from kdzoo.recipe import Augmentation, Protocol


def share(rows: int, rank: int, world: int) -> Tensor:
    """Choose the rows of a batch that belong to one of ``world`` processes: (rows / world,) int64.

    Half of them from the front and half from the back, so that rows which are mixed, i and rows - 1 - i, stay together.
    """
    own = rows // world
    front, back = own - own // 2, own // 2
    first = torch.arange(rank * front, (rank + 1) * front)
    return torch.cat([first, torch.arange(rows - (rank + 1) * back, rows - rank * back)])


@dataclass(frozen=True)
class Plan:
    """The way one view of the images is drawn: all on the device, or first by workers and the rest there."""

    recipe: Augmentation
    streamed: bool  # whether workers decode the images and draw the part of the recipe that is theirs

    @property
    def on_device(self) -> Augmentation:
        """The part of the recipe that is drawn on the device."""
        return left_for_the_device(self.recipe) if self.streamed else self.recipe


def plans(augmentation: Augmentation, views: Sequence[str], kept: bool) -> dict[str, Plan]:
    """Plan the images, and those views that are further draws of them; ``kept`` pixels lie on the device."""
    plain = Augmentation(crop=augmentation.crop, flip=augmentation.flip, resized_crop=augmentation.resized_crop)
    strong = replace(plain, rand_augment=augmentation.rand_augment or "rand-m9")
    recipes = {"images": augmentation, "weak": plain, "strong": strong, PLAIN: replace(augmentation, jitter=0.0)}
    return {
        name: Plan(recipes[name], streamed=not kept or bool(recipes[name].rand_augment))  # RandAugment is Pillow's work
        for name in ("images", *views)
        if name in recipes
    }


class Loader:
    """The batches of one training, addressed by step.

    An epoch is a permutation of the training set, its incomplete last batch dropped; a set smaller than a
    batch is one batch. Neither the order nor any draw reads or changes a global random state.

    Args:
        spec: the data set.
        protocol: epochs, batch size, augmentation, smoothing.
        seed: of the order and of every draw.
        device: where batches lie.
        views: further views in ``batch.views``; asking for them leaves the images as they are.
            ``weak``: a second draw of crop and flip, (B, 3, H, W), unmixed;
            ``strong``: a third with RandAugment on top (the protocol's, else rand-m9), (B, 3, H, W), unmixed;
            ``rotations``: the batch's images by 0, 90, 180 and 270 degrees, (B, 4, 3, H, W).
        pixels: (N, S, S, 3) uint8 on the device; None streams the images.
        pictures: the same images, one by one.
        workers: processes that decode and augment streamed images; 0: this process does.
        rank: of this process among those that share every batch; its rows are drawn as in the whole batch.
        world: how many processes share a batch.
    """

    def __init__(
        self,
        spec: DataSpec,
        protocol: Protocol,
        *,
        seed: int,
        device: torch.device,
        views: tuple[str, ...],
        pixels: Tensor | None,
        pictures: Pictures,
        workers: int,
        rank: int = 0,
        world: int = 1,
    ):
        for view in views:
            if view not in VIEWS:
                raise unknown("view", view, VIEWS)
        augmentation = protocol.augmentation
        if augmentation.resized_crop and augmentation.crop:
            raise UserError("augmentation.crop and augmentation.resized_crop are both set; keep one of them")
        self.images = len(pictures)
        self.batch_size = min(protocol.batch_size, self.images)
        self.mixes = augmentation.mixup > 0 or augmentation.cutmix > 0
        if self.batch_size % world:
            raise UserError(
                f"a batch of {counted(self.batch_size, 'image')} cannot be shared evenly by {world} devices; "
                f"set protocol.batch_size to a multiple of {world}"
            )
        self.rows = self.batch_size // world  # of a batch that are given here
        if self.mixes and self.rows % 2:
            raise UserError(
                f"mixup and cutmix pair the images of a batch, and each device gets {self.rows}; "
                f"set protocol.batch_size to a multiple of {2 * world}, at most {self.images}"
            )
        self.steps_per_epoch = self.images // self.batch_size
        self.total_steps = self.steps_per_epoch * protocol.epochs
        self._spec, self._seed, self._device, self.views = spec, seed, device, views
        self._augmentation = augmentation
        self._pixels = pixels
        self._workers = workers
        self._targets = Targets(protocol, spec.num_classes)
        self._generator = torch.Generator(device)
        self._here = share(self.batch_size, rank, world).to(device) if world > 1 else None
        self._teachers = "" if protocol.teacher_view == "same" else protocol.teacher_view
        self._plans = plans(augmentation, [*views, self._teachers], kept=pixels is not None)
        recipes = {name: plan.recipe for name, plan in self._plans.items() if plan.streamed}
        transforms = {
            name: worker_transform(recipe, spec.image_size, spec.mean, whole=name != PLAIN)
            for name, recipe in recipes.items()
        }
        side = max((side_needed(recipe, spec.image_size) for recipe in recipes.values()), default=spec.image_size)
        self._streamed = Streamed(pictures, transforms, side, seed) if transforms else None

    def batches(self, start: int = 0, stop: int | None = None) -> Iterator[Batch]:
        """Yield the batches of steps ``start`` to ``stop - 1`` of the whole training, across epochs."""
        stop = self.total_steps if stop is None else min(stop, self.total_steps)
        steps = self._schedule(start, stop, self._device)
        streamed: Iterator[dict[str, Tensor]] = repeat({})
        if self._streamed is not None:
            keys = (
                [(epoch, row) for row in rows.tolist()]
                for _, epoch, rows in self._schedule(start, stop, torch.device("cpu"))
            )
            streamed = stream(self._streamed, keys, self._workers, self._device)
        for (step, _, rows), drawn in zip(steps, streamed, strict=False):
            yield self._batch(step, rows, drawn)

    @property
    def teacher_sees_the_same(self) -> bool:
        """Whether the teacher is shown the same pixels of an image in every epoch."""
        plan = self._plans[self._teachers or "images"]
        recipe = replace(plan.recipe, erasing=0.0) if self._teachers else plan.recipe  # its view is never erased
        return recipe == Augmentation() and not plan.streamed and not self.mixes

    def teachers_images(self) -> Iterator[Tensor]:
        """Yield what the teacher sees of all training images in their order, (B, 3, S, S); nothing is drawn."""
        name = self._teachers or "images"
        for rows in torch.arange(self.images, device=self._device).split(self.batch_size):
            yield self._draw(name, self._plans[name].on_device, 0, self._kept(rows))

    def _schedule(self, start: int, stop: int, device: torch.device) -> Iterator[tuple[int, int, Tensor]]:
        """Yield (step, epoch, this process's rows (B,)); drawn on the CPU, so the same on every device."""
        order, current = torch.empty(0, dtype=torch.int64), -1
        here = None if self._here is None else self._here.to(device)
        for step in range(start, stop):
            epoch, position = divmod(step, self.steps_per_epoch)
            if epoch != current:
                generator = torch.Generator().manual_seed(seed_of(self._seed, epoch, "order"))
                order, current = torch.randperm(self.images, generator=generator), epoch
                if device.type == "cuda":
                    order = order.pin_memory()  # else the copy would wait
                order = order.to(device, non_blocking=True)
            rows = order[position * self.batch_size : (position + 1) * self.batch_size]
            yield step, epoch, rows if here is None else rows[here]

    def _batch(self, step: int, rows: Tensor, streamed: dict[str, Tensor]) -> Batch:
        drawn = {
            name: self._draw(name, plan.on_device, step, streamed[name] if plan.streamed else self._kept(rows))
            for name, plan in self._plans.items()
        }
        images, seen = drawn["images"], drawn.get(self._teachers)
        if self._augmentation.erasing:
            draws = self._seeded(step, "erasing")
            images = augment.erase(images, draws, self._augmentation.erasing, self._spec.mean, self._spec.std)
        labels = self._spec.labels[rows] if len(self._spec.labels) else None
        images, targets = self._targets(images, labels, seed_of(self._seed, step, "mix"))
        if seen is not None and self.mixes:  # as the student's are
            seen, _ = self._targets(seen.clone(), labels, seed_of(self._seed, step, "mix"))
        if "rotations" in self.views:
            drawn["rotations"] = augment.rotations(images)
        return Batch(
            images,
            labels,  # type: ignore[arg-type]  # absent where the data have none
            targets,  # type: ignore[arg-type]
            rows,
            torch.full((), step / self.total_steps, device=self._device),  # filled there: no copy to wait for
            {view: drawn[view] for view in self.views},
            torch.arange(len(rows) - 1, -1, -1, device=self._device) if self.mixes else None,
            seen,
        )

    def _seeded(self, step: int, name: str) -> augment.Draws:
        generator = self._generator.manual_seed(seed_of(self._seed, step, DRAWN_AS.get(name, name)))
        return augment.Draws(generator, self.batch_size, self._here)

    def _kept(self, rows: Tensor) -> Tensor:
        assert self._pixels is not None
        return self._pixels[rows]

    def _draw(self, name: str, recipe: Augmentation, step: int, pixels: Tensor) -> Tensor:
        """Crop, mirror and jitter pixels (B, H, W, 3) uint8: (B, 3, S, S) float in [0, 1], channels last."""
        draws, size = self._seeded(step, name), self._spec.image_size
        if recipe.resized_crop:
            images = augment.resized_crop(augment.floats(pixels), draws, size, recipe.resized_crop, flip=recipe.flip)
        elif pixels.shape[1] == size:  # crop while it is a byte per value
            images = augment.floats(augment.crop_and_flip(pixels, draws, recipe.crop, recipe.flip))
        else:
            shown = augment.resize(augment.floats(pixels), size).permute(0, 2, 3, 1)
            images = augment.crop_and_flip(shown, draws, recipe.crop, recipe.flip).permute(0, 3, 1, 2)
        return augment.jitter(images, draws, recipe.jitter) if recipe.jitter else images
