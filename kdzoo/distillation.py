"""Teacher, student and distiller as one module, for kdzoo's engine and for anybody's own training loop."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from kdzoo.distiller import Batch, Distiller, Needs, Seen, autocast, products
from kdzoo.products import FULL, current, switchable


def ask(network: nn.Module, role: str, needs: Iterable[Needs]) -> None:
    """Has a network show what any of these methods needs of it, and no more.

    Args:
        network: one that can be told by ``wants_features``, ``wants_preactivations`` and ``wants_final``, as those of
            ``kdzoo.models`` can; others show what they show.
        role: "student" or "teacher".
        needs: of all methods that look at it.
    """
    needs = list(needs)
    wanted = {
        "wants_features": any(need.features for need in needs),
        "wants_preactivations": any(role in need.preactivations for need in needs),
        "wants_final": any(need.final for need in needs),
    }
    for name, value in wanted.items():
        if hasattr(network, name):
            setattr(network, name, value)


class Distillation(nn.Module):
    """One training step's forward pass: from a batch to the loss terms, the frozen teacher included.

    Under ``torch.autocast`` the networks run in its precision; losses and the distiller's own modules stay
    in float32, on CUDA without TF32 whatever the networks do. Only the student and the distiller have parameters
    that require a gradient; the teacher stays in evaluation mode whatever ``train()`` says.

    Args:
        student: images (B, 3, H, W) in [0, 1] -> ``Output``; ``kdzoo.models.wrap`` makes one of any network.
        teacher: the same; None for a distiller that needs no teacher.
        distiller: the method.

    Example::

        distillation = Distillation(student, teacher, distiller)
        optimizer = torch.optim.SGD([p for p in distillation.parameters() if p.requires_grad], lr=0.05)
        for images, labels in loader:
            terms = distillation(Batch.of(images, labels, num_classes=10))
            sum(terms.values()).backward()
            optimizer.step()
            optimizer.zero_grad()
        shipped = distillation.deploy()
    """

    def __init__(self, student: nn.Module, teacher: nn.Module | None, distiller: Distiller):
        super().__init__()
        needs = distiller.needs
        if teacher is None and needs.teacher:
            raise ValueError(f"{type(distiller).__name__} needs a teacher and got None; pass one")
        self.student, self.teacher, self.distiller = student, teacher, distiller
        ask(student, "student", [needs])
        if teacher is not None:
            ask(teacher, "teacher", [needs])
            teacher.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> "Distillation":
        super().train(mode)
        if self.teacher is not None:
            self.teacher.eval()
        return self

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """The weighted loss terms, float32 scalars by name; minimise their sum."""
        device = batch.images.device.type
        networks = self._seen(device)
        with autocast(device, None), products(device, FULL):
            return self.distiller(*networks, batch)

    def prepare(self, batches: Iterable[Batch]) -> None:
        """Runs the method's phase before training, if it has one; an iteration of ``batches`` is an epoch."""
        device = next((p.device.type for p in self.student.parameters()), "cpu")
        networks = self._seen(device)
        with autocast(device, None), products(device, FULL):
            self.distiller.prepare(*networks, batches)

    def deploy(self) -> nn.Module:
        """What ships: usually the student."""
        return self.distiller.deploy(self.student)

    def _seen(self, device: str) -> tuple[Seen, Seen]:
        known = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
        precision = torch.get_autocast_dtype(device) if known else None
        rounding = current() if switchable(device) else None
        student = Seen(self.student, precision, rounding=rounding)
        if self.teacher is None:
            return student, student  # the method said that it never asks
        return student, Seen(self.teacher, precision, self.distiller.needs.teacher_grad, rounding)
