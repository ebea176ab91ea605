"""No distillation: the student learns from the labels alone."""

from torch import Tensor

from kdzoo import Batch, Distiller, Fidelity, Needs, Output
from kdzoo.losses import cross_entropy


class NoDistillation(Distiller):
    r"""Supervised training, the row that every method must beat.

    .. math:: L = w_{ce} H(y, p_s)

    Args:
        ce: weight of the cross-entropy with the ground truth.
    """

    paper = "-"
    fidelity = Fidelity.EXACT
    needs = Needs(teacher=False, features=False)

    def __init__(self, *, ce: float = 1.0):
        super().__init__(ce=ce)

    def loss(self, student: Output, teacher: Output, batch: Batch) -> dict[str, Tensor]:
        return self.weigh(ce=lambda: cross_entropy(student.logits, batch.targets))
