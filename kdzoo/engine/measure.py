"""Accuracy of a network on the test images, and what it takes each of them for."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from kdzoo.data import Dataset
from kdzoo.distiller import DataSpec
from kdzoo.engine.memory import check_reserve
from kdzoo.errors import UserError
from kdzoo.precision import PRECISIONS, autocast


class Answers(NamedTuple):
    """What a network takes test images for, on their device."""

    labels: Tensor  # (N,) int64, the true classes
    classes: Tensor  # (N,) int64, those of the highest logits
    confidence: Tensor  # (N,) float32, their probabilities


def evaluate(
    network: nn.Module,
    dataset: Dataset,
    precision: str,
    test_crop: float = 1.0,
    batch_size: int | None = None,
    answers: list[Answers] | None = None,
) -> tuple[float, float]:
    """Measure top-1 and top-5 accuracy on the test set, in percent; top-5 is top-K where there are fewer classes.

    The device is waited for once, at the end.

    Args:
        network: shows an ``Output`` of the images (B, 3, H, W).
        dataset: whose test images are shown.
        precision: of the network, by its name.
        test_crop: share of the resized side that the test crop keeps.
        batch_size: images of a pass; None: ``test_rows``.
        answers: a list that gets the answers of each batch, see ``joined``.
    """
    check_reserve()
    training = network.training
    network.eval()
    best = min(5, dataset.spec.num_classes)
    hits = torch.zeros(2, device=dataset.device, dtype=torch.int64)
    count = 0
    with torch.inference_mode():
        for images, labels in dataset.test_batches(batch_size or test_rows(dataset.spec), test_crop=test_crop):
            with autocast(images.device.type, PRECISIONS[precision]):
                logits = getattr(network(images), "logits", None)
            expected = len(images), dataset.spec.num_classes
            if not isinstance(logits, Tensor) or logits.shape != expected:
                given = "no logits" if not isinstance(logits, Tensor) else f"logits of shape {tuple(logits.shape)}"
                raise UserError(f"{type(network).__name__} shows {given}; expected an Output with logits {expected}")
            classes = logits.topk(best).indices
            if answers is not None:
                confidence = logits.float().softmax(dim=1).gather(1, classes[:, :1])
                answers.append(Answers(labels, classes[:, 0], confidence[:, 0]))
            found = classes == labels[:, None]
            hits += torch.stack([found[:, 0].sum(), found.sum()])
            count += len(labels)
    network.train(training)
    top1, top5 = (100 * hit / count for hit in hits.tolist())  # Apple's GPUs have no float64
    return top1, top5


def joined(answers: list[Answers]) -> Answers:
    """Join the answers of batches to those of the whole test set, on the CPU."""
    return Answers(*(torch.cat(parts).cpu() for parts in zip(*answers, strict=True)))


def test_rows(spec: DataSpec) -> int:
    """Choose how many images are measured at once: more of small ones where there is a GPU to keep busy."""
    rows = 256 * 224**2 // spec.image_size**2
    return min(max(rows, 256), 2048) if spec.labels.device.type == "cuda" else 256
