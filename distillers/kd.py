"""Knowledge distillation: the student learns from the teacher's softened class probabilities."""

from torch import Tensor

from kdzoo import Batch, DataSpec, Distiller, Fidelity, Needs, Output
from kdzoo.errors import UserError
from kdzoo.losses import cross_entropy, softened_kl


class KD(Distiller):
    r"""Distilling the Knowledge in a Neural Network.

    .. math:: L = w_{ce} H(y, p_s) + w_{kd} T^2 KL(p_t^{(T)} \| p_s^{(T)})

    Args:
        ce: weight of the cross-entropy with the ground truth.
        kd: weight of the distillation term.
        temperature: T, which softens both distributions.

    Source: Hinton, Vinyals and Dean 2015, section 2; weights of the CIFAR-100 tables (RepDistiller).
    """

    paper = "arXiv:1503.02531"
    fidelity = Fidelity.EXACT
    needs = Needs(features=False)

    def __init__(
        self,
        student: Output,
        teacher: Output,
        data: DataSpec,
        *,
        ce: float = 0.1,
        kd: float = 0.9,
        temperature: float = 4.0,
    ):
        super().__init__()
        if not temperature > 0:
            raise UserError(f"temperature {temperature}: expected a number above 0; 1 softens nothing, 4 is usual")
        self.ce, self.kd, self.temperature = ce, kd, temperature

    def loss(self, student: Output, teacher: Output, batch: Batch) -> dict[str, Tensor]:
        terms = {}
        if self.ce:
            terms["ce"] = self.ce * cross_entropy(student.logits, batch.targets)
        if self.kd:
            terms["kd"] = self.kd * softened_kl(student.logits, teacher.logits, self.temperature)
        return terms
