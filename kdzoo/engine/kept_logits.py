"""Keep the teacher's logits on disk: a later run with the same teacher, data, recipe and seed reads them."""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from kdzoo.data import Dataset, Loader
from kdzoo.distiller import Batch
from kdzoo.engine.graphs import Plain
from kdzoo.engine.lane import Lane
from kdzoo.engine.passes import TeacherPasses, why_unsteady
from kdzoo.errors import StorageError, UserError
from kdzoo.files import cache_folder, make_folder, write_atomically
from kdzoo.models import Network
from kdzoo.outputs import Output
from kdzoo.resolve import files_by_part
from kdzoo.settings import Run
from kdzoo.store.environment import environment

FORMAT = 1  # of a file; those of another are not read
DIGEST = 32  # bytes of the SHA-256 at the beginning of a file


class KeptLogits(Plain):
    """Plain steps in which the teacher's logits come from disk, or go there for later runs.

    Each epoch is a file: the SHA-256 of what follows, and float16 logits (S, B, K) of the epoch's S steps. A file that
    is damaged is computed again. An epoch of which a step is missing, since training was resumed in the midst of it or
    the teacher was not asked, is not written. Where writing fails, training continues and no more is written.

    Args:
        teacher: makes the passes whose logits are not kept yet.
        folder: of the files; it is made when it is needed.
        epochs: of the training that still begin.
        shape: S, B and K.
        say: takes a line for the user.
    """

    teacher: TeacherPasses

    def __init__(
        self,
        teacher: TeacherPasses,
        folder: Path,
        epochs: range,
        shape: tuple[int, int, int],
        say: Callable[[str], object],
    ):
        super().__init__(teacher)
        teacher.kept = rounded
        self.folder, self.shape, self.say = folder, shape, say
        self.bytes = DIGEST + 2 * shape[0] * shape[1] * shape[2]  # of a file
        self.missing = [epoch for epoch in epochs if not self.is_there(epoch)]
        self.asks_teacher = bool(self.missing)
        self.width = teacher.network.shapes().embedding.shape[1]
        self.epoch = -1  # that the steps are in
        self.read: Tensor | None = None  # (S, B, K) float16, of that epoch; None where it is computed
        self.noted = torch.empty(shape, dtype=torch.float16)
        self.count = 0  # of the epoch's steps that were noted, all from its first
        self.writes = True
        self.position = 0  # of the step in its epoch
        self.images = torch.empty(0)  # of the step

    def begin(self, batch: Batch, step: int) -> Batch:
        batch = super().begin(batch, step)
        epoch, self.position = divmod(step, self.shape[0])
        self.images = batch.images if batch.teacher_images is None else batch.teacher_images
        if epoch != self.epoch:
            self.epoch, self.read, self.count = epoch, self.opened(epoch), 0
        if self.read is not None:
            logits = self.read[self.position].to(self.images.device, torch.float32)
            nothing = torch.full((1, 1), torch.nan, device=logits.device)  # which shows if a method reads it
            self.teacher.remember(self.images, Output(logits, nothing.expand(len(logits), self.width)))
        return batch

    def end(self) -> None:
        super().end()
        output = self.teacher.output_of(self.images)
        if self.read is None and self.writes and output is not None and self.count == self.position:
            self.noted[self.position] = output.logits
            self.count += 1
            if self.count == self.shape[0]:
                self.write()

    def file(self, epoch: int) -> Path:
        """Name an epoch's file."""
        return self.folder / f"epoch-{epoch:06d}.float16"

    def is_there(self, epoch: int) -> bool:
        """Tell whether there is a file of an epoch, of the right size."""
        try:
            return self.file(epoch).stat().st_size == self.bytes
        except OSError:
            return False

    def opened(self, epoch: int) -> Tensor | None:
        """Open the logits of an epoch (S, B, K), float16; None where they are not there, or damaged."""
        file = self.file(epoch)
        try:
            with file.open("rb") as opened:
                known = opened.read(DIGEST)
                if hashlib.file_digest(opened, "sha256").digest() == known and opened.tell() == self.bytes:
                    return torch.from_numpy(np.memmap(opened, np.float16, "c", DIGEST, self.shape))
            why = "its checksum or its size differs"
        except FileNotFoundError:
            return None
        except OSError as error:
            why = error.strerror or str(error)
        self.say(f"the teacher's logits in {file} are damaged ({why}); computing them again")
        return None

    def write(self) -> None:
        """Write the epoch that was noted."""
        content = self.noted.numpy().data

        def fill(temporary: Path) -> None:
            with temporary.open("wb") as opened:
                opened.write(hashlib.sha256(content).digest())
                opened.write(content)

        try:
            if not self.noted.isfinite().all():
                raise StorageError("some are too large for float16")
            make_folder(self.folder)
            write_atomically(self.file(self.epoch), fill)
        except StorageError as error:
            self.say(f"no more of the teacher's logits are kept in this run: {error}")
            self.writes = False

    def announce(self) -> None:
        """Say what will be written, and where."""
        if self.missing:
            count = len(self.missing)
            self.say(
                f"teacher.keep=logits: {count * self.bytes:,} bytes will be written to {self.folder} "
                f"(epochs to compute: {count})"
            )
        else:
            self.say(f"teacher.keep=logits: reading all epochs from {self.folder}")


def rounded(output: Output) -> Output:
    """Round logits to float16, so that a training is the same whether it computes them or reads them.

    Those that are too large for float16, whose epoch is not written, stay as they are.
    """
    short = output.logits.to(torch.float16).float()
    return output._replace(logits=torch.where(short.isfinite(), short, output.logits.float()))


def steps(
    lanes: Sequence[Lane],
    teacher: TeacherPasses | None,
    dataset: Dataset,
    loader: Loader,
    start: int,
    say: Callable[[str], object],
) -> KeptLogits | None:
    """Make the steps of a training that keeps its teacher's logits, and announce that.

    Returns:
        None where ``teacher.keep`` or the methods ask for nothing, or where it cannot be done, which a line explains.
    """
    run = lanes[0].run
    readers = [lane for lane in lanes if lane.failure is None and lane.distillation.distiller.needs.teacher]
    if run.place.teacher.keep == "nothing" or teacher is None or not readers:
        return None
    try:
        if more := [lane.title for lane in readers if not lane.distillation.distiller.needs.logits_suffice]:
            raise UserError(f"{', '.join(more)} may read more of the teacher than these")
        if run.settings.engine.accumulate > 1:
            raise UserError("engine.accumulate cuts the batches")
        if lanes[0].ranks.world > 1:
            raise UserError("engine.devices shares the batches")
        if why := why_unsteady(teacher.fast, run.settings.engine.precision):
            raise UserError(f"{teacher.network.name} {why}")
        folder = cache_folder() / "logits" / identity(run, teacher.network, dataset, loader)
    except UserError as error:
        say(f"teacher.keep=logits keeps no logits in this run: {error}")
        return None
    per_epoch = loader.steps_per_epoch
    epochs = range(-(-start // per_epoch), run.last_epoch)
    shape = per_epoch, loader.batch_size, dataset.spec.num_classes
    kept = KeptLogits(teacher, folder, epochs, shape, say)
    kept.announce()
    return kept


def identity(run: Run, teacher: Network, dataset: Dataset, loader: Loader) -> str:
    """Hash all that decides the teacher's logits of a step.

    The student, the method, the number of epochs and the learning rate are not part of it.
    """
    settings, plain = run.settings, run.settings.plain()
    weights = hashlib.sha256()
    for name, tensor in chain(teacher.named_parameters(), teacher.named_buffers()):  # mean and std of images are there
        weights.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        weights.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().data)
    parts = files_by_part(settings)
    decisive = {
        "format": FORMAT,
        "teacher": [
            {key: plain["teacher"][key] for key in ("name", "options", "others", "combine")},
            teacher.image_size,
            weights.hexdigest(),
        ],
        "files": {name: settings.files.get(name) for part in ("teacher", "data") for name in parts[part]},
        "data": plain["data"],
        "image_size": dataset.spec.image_size,
        "batch_size": loader.batch_size,
        "augmentation": asdict(settings.protocol.augmentation),
        "view": settings.protocol.teacher_view,
        "seed": settings.seed,
        "precision": settings.engine.precision,
        "drawn": [dataset.device.type, dataset.fits],  # a GPU has other generators, and workers draw in other ways
        "packages": environment(run)["packages"],
    }
    return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()[:16]
