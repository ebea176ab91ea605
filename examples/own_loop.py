"""Distil in a training loop of your own: bare networks, your optimiser, your data loader.

python examples/own_loop.py
"""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import kdzoo


def network(width: int) -> nn.Module:
    """Make a small convolutional network for digits of 8 x 8 pixels."""
    stages = [
        nn.Sequential(nn.Conv2d(fan_in, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        for fan_in, stride in ((3, 1), (width, 1), (width, 2), (width, 2))
    ]
    return nn.Sequential(*stages, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10))


def top1(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> float:
    """Measure the accuracy in percent of a module that gives logits."""
    with torch.no_grad():
        return 100 * (model.eval()(images).argmax(1) == labels).float().mean().item()


def main(epochs: int = 3) -> float:
    """Train a teacher on its labels, distil a narrow student from it, and return the student's accuracy."""
    torch.manual_seed(0)
    digits = load_digits()
    images = torch.tensor(digits.images / 16, dtype=torch.float32)[:, None].repeat(1, 3, 1, 1)
    labels = torch.tensor(digits.target)
    loader = DataLoader(TensorDataset(images[300:], labels[300:]), batch_size=64, shuffle=True)

    teacher = network(width=32)
    optimizer = torch.optim.AdamW(teacher.parameters(), lr=3e-3)
    for _ in range(epochs):
        for x, y in loader:
            nn.functional.cross_entropy(teacher(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
    print(f"teacher: {top1(teacher, images[:300], labels[:300]):.1f} %")

    # The student is trained in place; the method adds its own modules where it needs some.
    student = network(width=8)
    distillation = kdzoo.distill(student, teacher, "lfcc", num_classes=10, image_size=8, contrast=3.0)
    optimizer = torch.optim.AdamW([p for p in distillation.parameters() if p.requires_grad], lr=3e-3)
    for _ in range(epochs):
        distillation.train()
        for x, y in loader:
            terms = distillation(kdzoo.Batch.of(x, y, num_classes=10))
            sum(terms.values()).backward()
            optimizer.step()
            optimizer.zero_grad()
        print("  ".join(f"{name} {term.item():.3f}" for name, term in terms.items()))

    found = top1(student, images[:300], labels[:300])
    print(f"student: {found:.1f} %")
    return found


if __name__ == "__main__":
    main()
