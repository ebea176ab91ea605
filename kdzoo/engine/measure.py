"""Accuracy of a network on the test images."""

import torch
from torch import Tensor, nn

from kdzoo.data import Dataset
from kdzoo.distiller import DataSpec
from kdzoo.engine.memory import check_reserve
from kdzoo.errors import UserError
from kdzoo.precision import PRECISIONS, autocast


def evaluate(
    network: nn.Module,
    dataset: Dataset,
    precision: str,
    test_crop: float = 1.0,
    batch_size: int | None = None,
    confusion: Tensor | None = None,
) -> tuple[float, float]:
    """Measure top-1 and top-5 accuracy on the test set, in percent; top-5 is top-K where there are fewer classes.

    The device is waited for once, at the end.

    Args:
        network: shows an ``Output`` of the images (B, 3, H, W).
        dataset: whose test images are shown.
        precision: of the network, by its name.
        test_crop: share of the resized side that the test crop keeps.
        batch_size: images of a pass; None: ``test_rows``.
        confusion: (K, K) int64 on the device, to which every test image adds one at its label's row and the column of
            the class that the network takes it for.
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
            answers = logits.topk(best).indices
            if confusion is not None:
                confusion.index_put_((labels, answers[:, 0]), torch.ones_like(labels), accumulate=True)
            found = answers == labels[:, None]
            hits += torch.stack([found[:, 0].sum(), found.sum()])
            count += len(labels)
    network.train(training)
    top1, top5 = (100 * hit / count for hit in hits.tolist())  # Apple's GPUs have no float64
    return top1, top5


def test_rows(spec: DataSpec) -> int:
    """Choose how many images are measured at once: more of small ones where there is a GPU to keep busy."""
    rows = 256 * 224**2 // spec.image_size**2
    return min(max(rows, 256), 2048) if spec.labels.device.type == "cuda" else 256
