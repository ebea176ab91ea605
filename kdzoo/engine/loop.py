"""The training loop: one teacher pass and one batch for all lanes, read from top to bottom."""

import time
from collections.abc import Callable, Sequence

import torch
from torch import nn

from kdzoo.data import Dataset, Loader
from kdzoo.distiller import DataSpec
from kdzoo.engine import graphs
from kdzoo.engine.lane import Lane, TeacherPasses
from kdzoo.engine.memory import out_of_memory
from kdzoo.engine.parts import check_parts
from kdzoo.engine.progress import Progress
from kdzoo.errors import StorageError, UserError
from kdzoo.precision import PRECISIONS, autocast
from kdzoo.store import checkpoint

READ_EVERY = 0.5  # seconds between two looks at the terms, which make the host wait for the device


def train(
    lanes: Sequence[Lane], teacher: TeacherPasses | None, dataset: Dataset, loader: Loader, progress: Progress
) -> None:
    """Trains every lane from its newest common checkpoint to the end of the protocol.

    All lanes share data, protocol, seed and engine settings. A lane that fails stops alone, with its reason in
    ``lane.failure``; the others continue.

    Raises:
        UserError: batches cannot be cut as ``engine.accumulate`` asks.
    """
    settings = lanes[0].settings
    check_parts(loader, settings.engine.accumulate)
    per_epoch, batch_size = loader.steps_per_epoch, settings.protocol.batch_size
    start = resume(lanes, progress)
    if start is None:
        start = 0
        for lane in lanes:
            with progress.doing(f"phase of {lane.title} before training"):
                attempt(lane, lane.prepare, loader, teacher)
    running = [lane for lane in lanes if lane.failure is None]
    begun = saved = shown = time.monotonic()
    epoch_begun, epoch_start = begun, start
    progress.begin(describe(lanes), per_epoch, loader.total_steps, start, [lane.title for lane in lanes])
    steps = graphs.steps(lanes[0].device, settings.engine, teacher, progress.say)

    for step, batch in enumerate(loader.batches(start), start):
        batch = steps.begin(batch)
        for lane in running:
            attempt(lane, steps.step, lane, batch, step)
        steps.end()
        progress.step(step + 1)

        now = time.monotonic()
        if now - shown >= READ_EVERY:
            speed = (step + 1 - epoch_start) * batch_size / (now - epoch_begun)
            for lane in running:
                attempt(lane, show, lane, step + 1, speed, progress)
            shown = now

        if (step + 1) % per_epoch == 0:
            for lane in running:
                attempt(lane, lane.meter.read)  # waits for the device, so that the speed is true
            speed = (step + 1 - epoch_start) * batch_size / (time.monotonic() - epoch_begun)
            for lane in running:
                attempt(lane, finish_epoch, lane, dataset, step, speed, progress)
            epoch_begun, epoch_start = time.monotonic(), step + 1

        if lanes[0].ranks.agree(time.monotonic() - saved >= settings.engine.checkpoint_seconds):
            for lane in running:
                attempt(lane, save, lane, step + 1, now - begun)
            saved = time.monotonic()

        running = [lane for lane in running if lane.failure is None]
        if not running:
            break
    for lane in running:
        lane.seconds += time.monotonic() - begun


def describe(lanes: Sequence[Lane]) -> str:
    """Say what is trained, for people."""
    first = lanes[0].settings
    student, teacher, method = first.student.name, first.teacher.name, first.distiller["name"]
    if len(lanes) > 1:
        what = f"training {len(lanes)} runs side by side"
    elif method == "none":
        what = f"training {student}"
    else:
        what = f"distilling {student} from {teacher} with {method}" if teacher else f"training {student} with {method}"
    return f"{what} on {first.data.name}"


def attempt(lane: Lane, work: Callable[..., object], *arguments: object) -> None:
    """Do one lane's ``work``. An error is this lane's failure alone, except a full disk, which stops all."""
    if lane.failure is not None:
        return
    try:
        work(*arguments)
    except StorageError:
        raise
    except UserError as error:
        lane.failure = error
    except (torch.OutOfMemoryError, RuntimeError) as error:
        lane.failure = out_of_memory(error, lane.settings)
        if lane.failure is None:
            raise


def show(lane: Lane, step: int, speed: float, progress: Progress) -> None:
    """Shows the terms' means so far, which waits for the device."""
    progress.show(step, lane.meter.read(), speed, lane.title)


def finish_epoch(lane: Lane, dataset: Dataset, step: int, speed: float, progress: Progress) -> None:
    """Measures the student, where it is due, and writes the epoch down."""
    settings, terms = lane.settings, lane.meter.read()
    epoch = (step + 1) // lane.steps_per_epoch
    top1 = top5 = None
    if epoch % settings.output.measure_every == 0 or epoch == settings.protocol.epochs:
        with progress.doing(f"measuring {settings.student.name} ({lane.title}) after epoch {epoch}"):
            top1, top5 = evaluate(lane.deployed(), dataset, settings.engine.precision, settings.protocol.test_crop)
    record = {
        "epoch": epoch,
        "step": step + 1,
        "lr": lane.rate(step),
        "loss": terms,
        "top1": top1,
        "top5": top5,
        "images_per_second": round(speed, 1),
    }
    lane.record(record)
    progress.epoch(record, lane.title)


def test_rows(spec: DataSpec) -> int:
    """How many images are measured at once: more of small ones where there is a GPU to keep busy."""
    rows = 256 * 224**2 // spec.image_size**2
    return min(max(rows, 256), 2048) if spec.labels.device.type == "cuda" else 256


def evaluate(
    network: nn.Module, dataset: Dataset, precision: str, test_crop: float = 1.0, batch_size: int | None = None
) -> tuple[float, float]:
    """Top-1 and top-5 accuracy on the test set, in percent; top-5 is top-K where there are fewer classes.

    The device is waited for once, at the end.
    """
    training = network.training
    network.eval()
    best = min(5, dataset.spec.num_classes)
    hits = torch.zeros(2, device=dataset.spec.labels.device, dtype=torch.int64)
    count = 0
    with torch.inference_mode():
        for images, labels in dataset.test_batches(batch_size or test_rows(dataset.spec), test_crop=test_crop):
            with autocast(images.device.type, PRECISIONS[precision]):
                logits = network(images).logits
            found = logits.topk(best).indices == labels[:, None]
            hits += torch.stack([found[:, 0].sum(), found.sum()])
            count += len(labels)
    network.train(training)
    top1, top5 = (100 * hits.double() / count).tolist()
    return top1, top5


def save(lane: Lane, step: int, seconds: float) -> None:
    """Writes a checkpoint, unless a term has gone bad since the last."""
    lane.meter.read()
    state = {**lane.state_dict(), "seconds": lane.seconds + seconds}
    lane.ranks.once(checkpoint.save, lane.folder.checkpoints, step, state)


def resume(lanes: Sequence[Lane], progress: Progress) -> int | None:
    """Restores all lanes from the newest checkpoint that each of them has; its step, None where there is none.

    Lanes are saved one after the other, so a kill between two of them leaves the newest step to some only.
    """
    whole = []
    for lane in lanes:
        steps, damaged = checkpoint.survey(lane.folder.checkpoints)
        whole.append(steps)
        for line in damaged:
            progress.say(line)
    common = set.intersection(*(set(steps) for steps in whole))
    if not common:
        if any(whole):
            raise UserError("the lanes' checkpoints stand at different steps; start anew with --fresh")
        return None
    start = max(common)
    for lane, steps in zip(lanes, whole, strict=True):
        lane.load_state_dict(checkpoint.load(steps[start]))
        lane.ranks.once(lane.folder.write_history, lane.history)
    progress.say(f"resumed at step {start}")
    return start
