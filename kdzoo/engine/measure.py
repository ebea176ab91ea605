"""Measure networks on the test images: what share they get right, how alike they are, what an embedding is worth."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kdzoo.data import Dataset
from kdzoo.distiller import DataSpec
from kdzoo.engine import neighbours
from kdzoo.engine.memory import check_reserve
from kdzoo.errors import UserError
from kdzoo.modes import evaluating
from kdzoo.outputs import Output
from kdzoo.precision import PRECISIONS, autocast

TEMPERATURES = tuple(2.0 ** (k / 2) for k in range(-16, 17))  # of logits, from 1/256 to 256


class Measures(NamedTuple):
    """How often a network is right on the test images, and how likely it takes the right answers to be."""

    top1: float  # percent
    top5: float  # percent
    nll: float | None  # mean, in nats; None: it has no classifier, or a logit is no number


class Answers(NamedTuple):
    """What a network takes test images for, on their device."""

    labels: Tensor  # (N,) int64, the right answers
    classes: Tensor  # (N,) int64, those of the highest logits
    confidence: Tensor  # (N,) float32, their probabilities


def evaluate(
    network: nn.Module,
    dataset: Dataset,
    precision: str,
    test_crop: float = 1.0,
    batch_size: int | None = None,
    answers: list[Answers] | None = None,
) -> Measures:
    """Measure the share of test images whose first answer is right, that of those with one right of five, and the NLL.

    A network answers with classes, and right is the image's label or, where test images have none, the teacher's
    answer; of fewer than five classes all count. A network without a classifier answers by the nearest embeddings: with
    the classes of labelled images, or with the test images that lie nearest. The device is waited for once, at the end.

    The NLL, the negative log-likelihood of the right answers, is that at the temperature of the logits that suits the
    network best (Guo et al. 2017, "On calibration of modern neural networks"): their scale alone changes nothing.

    Args:
        network: shows an ``Output`` of the images (B, 3, H, W).
        dataset: whose test images are shown.
        precision: of the network, by its name.
        test_crop: share of the resized side that the test crop keeps.
        batch_size: images of a pass; None: ``test_rows``.
        answers: a list that gets the answers of each batch, see ``joined``.
    """
    check_reserve()
    best = min(5, dataset.spec.num_classes)
    hits = torch.zeros(2, device=dataset.device, dtype=torch.int64)
    surprise = torch.zeros(len(TEMPERATURES), device=dataset.device)  # sums of negative log-likelihoods
    count = 0
    embedded: list[tuple[Tensor, Tensor]] = []

    def note(labels: Tensor, classes: Tensor, confidence: Tensor) -> None:
        nonlocal count
        if answers is not None:
            answers.append(Answers(labels, classes[:, 0], confidence))
        found = classes == labels[:, None]
        hits.add_(torch.stack([found[:, 0].sum(), found.sum()]))
        count += len(labels)

    with evaluating(network), torch.inference_mode():
        for images, labels in dataset.test_batches(batch_size or test_rows(dataset.spec), test_crop=test_crop):
            output = show(network, images, precision, dataset.spec.num_classes)
            if not output.logits.shape[1]:
                embedded.append((output.embedding, labels))
                continue
            logits = output.logits.float()
            classes = output.logits.topk(best).indices
            each = [F.cross_entropy(logits / scale, labels, reduction="sum") for scale in TEMPERATURES]
            surprise += torch.stack(each)
            note(labels, classes, logits.softmax(dim=1).gather(1, classes[:, :1])[:, 0])
        if embedded:
            rows, labels = (torch.cat(parts) for parts in zip(*embedded, strict=True))
            if dataset.is_judged:
                known = reference(network, dataset, precision, test_crop) if dataset.is_labelled else (rows, labels)
                kinds = len(dataset.named)
                note(labels, *neighbours.vote(rows, *known, kinds, min(5, kinds), own=not dataset.is_labelled))
            else:
                note(labels, *neighbours.nearest(rows, 5))
    (right, among), sums = hits.tolist(), surprise.tolist()  # Apple's GPUs have no float64
    nll = None if embedded or not all(map(math.isfinite, sums)) else least(sums) / count
    return Measures(100 * right / count, 100 * among / count, nll)


def least(values: Sequence[float]) -> float:
    """Return the least of a curve of numbers from 0 that is known at even steps.

    It is that of the parabola through the logarithms of the three lowest points. A parabola through the numbers
    themselves falls below 0 where the curve comes near it, and rises by factors from one step to the next.
    """
    k = values.index(min(values))
    if not 0 < k < len(values) - 1 or values[k] <= 0:
        return values[k]
    before, here, after = map(math.log, values[k - 1 : k + 2])
    bend = before - 2 * here + after
    return math.exp(here - (before - after) ** 2 / (8 * bend)) if bend > 0 else values[k]


def show(network: nn.Module, images: Tensor, precision: str, classes: int) -> Output:
    """Show images to a network.

    Raises:
        UserError: it gives something else than an ``Output`` with a logit for each class, or with none at all.
    """
    with autocast(images.device.type, PRECISIONS[precision]):
        output = network(images)
    logits, expected = getattr(output, "logits", None), (len(images), classes)
    if not isinstance(logits, Tensor) or logits.shape not in (expected, (len(images), 0)):
        given = "no logits" if not isinstance(logits, Tensor) else f"logits of shape {tuple(logits.shape)}"
        raise UserError(f"{type(network).__name__} shows {given}; expected an Output with logits {expected}")
    return output


def reference(network: nn.Module, dataset: Dataset, precision: str, test_crop: float) -> tuple[Tensor, Tensor]:
    """Embed labelled training images, without augmentation: (M, D), and their classes (M,)."""
    found = [
        (show(network, images, precision, dataset.spec.num_classes).embedding, labels)
        for images, labels in dataset.sample("train", neighbours.REFERENCE, test_rows(dataset.spec), test_crop)
    ]
    rows, labels = (torch.cat(parts) for parts in zip(*found, strict=True))
    return rows, labels


def measured(dataset: Dataset, network: nn.Module) -> str:
    """Name what ``evaluate`` finds of a network, as ``Result.measured`` does."""
    has_classifier = getattr(network, "has_classifier", True)
    if dataset.is_judged:
        return "accuracy" if has_classifier else "knn"
    return "agreement" if has_classifier else "neighbours"


class Likeness(NamedTuple):
    """How much a student is like its teacher on test images, and what its embedding is worth; None: not measured."""

    agreement: float | None = None  # percent of the images that both take for the same class
    kl: float | None = None  # mean divergence of the student's probabilities from the teacher's; None too if not finite
    knn: float | None = None  # top-1 in percent, by the nearest neighbours of the embedding
    probe: float | None = None  # top-1 in percent, of a linear classifier of the embedding


def compare(
    student: nn.Module, teacher: nn.Module | None, dataset: Dataset, precision: str, test_crop: float
) -> Likeness:
    """Measure what a student took over from its teacher, by one pass of both over the test images."""
    alike, divergence, count = 0, 0.0, 0
    embedded: list[tuple[Tensor, Tensor]] = []
    compares = teacher is not None
    with evaluating(student), torch.inference_mode():
        for images, labels in dataset.test_batches(test_rows(dataset.spec), test_crop=test_crop):
            ours = show(student, images, precision, dataset.spec.num_classes)
            embedded.append((ours.embedding.float(), labels))
            if teacher is not None:
                theirs = show(teacher, images, precision, dataset.spec.num_classes)
                compares = compares and ours.logits.shape[1] > 0 < theirs.logits.shape[1]
                if compares:
                    alike += int((ours.logits.argmax(1) == theirs.logits.argmax(1)).sum())
                    p, q = (output.logits.float().log_softmax(1) for output in (theirs, ours))
                    divergence += float(F.kl_div(q, p, reduction="sum", log_target=True))
            count += len(images)
        kl = max(0.0, divergence / count) if math.isfinite(divergence) else None  # of equal ones it may round below 0
        found = Likeness(100 * alike / count, kl) if compares else Likeness()
        if not dataset.is_judged or (dataset.test_size < 2 and not dataset.is_labelled):
            return found
        rows, labels = (torch.cat(parts) for parts in zip(*embedded, strict=True))
        known = reference(student, dataset, precision, test_crop) if dataset.is_labelled else None
        classes, _ = neighbours.vote(rows, *(known or (rows, labels)), len(dataset.named), 1, known is None)
    knn = 100 * float((classes[:, 0] == labels).float().mean())
    return found._replace(knn=knn, probe=neighbours.probe(rows, labels, *(known or ())))


def joined(answers: list[Answers]) -> Answers:
    """Join the answers of batches to those of the whole test set, on the CPU."""
    return Answers(*(torch.cat(parts).cpu() for parts in zip(*answers, strict=True)))


def test_rows(spec: DataSpec) -> int:
    """Choose how many images are measured at once: more of small ones where there is a GPU to keep busy."""
    rows = 256 * 224**2 // spec.image_size**2
    return min(max(rows, 256), 2048) if spec.labels.device.type == "cuda" else 256
