"""Knowledge distillation: the student learns from the teacher's softened class probabilities."""

from torch import Tensor

from kdzoo import Batch, Distiller, Fidelity, Output
from kdzoo.keywords import positive
from kdzoo.losses import cross_entropy, softened_kl


class KD(Distiller):
    r"""Distilling the Knowledge in a Neural Network.

    .. math:: L = w_{ce} H(y, p_s) + w_{kd} T^2 KL(p_t^{(T)} \| p_s^{(T)})

    Args:
        ce: weight of the cross-entropy with the ground truth.
        kd: weight of the distillation term.
        temperature: T, which softens both distributions.

    Source: Hinton, Vinyals and Dean 2015, eq. 1; weights of the CIFAR-100 tables (RepDistiller).
    """

    paper = "arXiv:1503.02531"
    fidelity = Fidelity.EXACT

    def __init__(self, *, ce: float = 0.1, kd: float = 0.9, temperature: float = 4.0):
        super().__init__(ce=ce, kd=kd)
        self.temperature = positive(temperature=temperature)

    def loss(self, student: Output, teacher: Output, batch: Batch) -> dict[str, Tensor]:
        return self.weigh(
            ce=lambda: cross_entropy(student.logits, batch.targets),
            kd=lambda: softened_kl(student.logits, teacher.logits, self.temperature),
        )
