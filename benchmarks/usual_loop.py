"""Distillation written the usual way: PIL transforms in loader workers, float32, contiguous, a read each step.

The yardstick of ``benchmarks/engine.py``; run that.
"""

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms


class Pictures(Dataset[tuple[Tensor, int]]):
    """CIFAR as torchvision has it: an array in memory, one PIL image at a time."""

    def __init__(
        self,
        array: NDArray[np.uint8],
        labels: NDArray[np.int64],
        mean: tuple[float, ...],
        std: tuple[float, ...],
    ):
        self.array, self.labels = array, labels
        self.transform = transforms.Compose(
            [
                transforms.RandomCrop(32, padding=4),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize(mean, std),
            ]
        )

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, row: int) -> tuple[Tensor, int]:
        return self.transform(Image.fromarray(self.array[row])), int(self.labels[row])


def train(teacher: nn.Module, student: nn.Module, pictures: Pictures, batch_size: int) -> Iterator[float]:
    """Trains for ever, one step at a time, yielding the loss that it read from the device."""
    loader = DataLoader(pictures, batch_size, shuffle=True, num_workers=2, drop_last=True, persistent_workers=True)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    teacher.eval()
    student.train()
    while True:
        for images, labels in loader:
            with torch.no_grad():
                reference = teacher(images)
            logits = student(images)
            hard = F.cross_entropy(logits, labels)
            soft = F.kl_div(F.log_softmax(logits / 4, 1), F.softmax(reference / 4, 1), reduction="batchmean") * 16
            loss = 0.1 * hard + 0.9 * soft
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            yield loss.item()
