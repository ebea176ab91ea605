"""Logit matching: the student repeats the teacher's logits up to a constant, by squared error."""

from torch import Tensor

from kdzoo import Batch, Distiller, Fidelity, Needs, Output
from kdzoo.losses import centred_mse, cross_entropy


class LogitMSE(Distiller):
    r"""Do Deep Nets Really Need to be Deep?

    .. math:: L = w_{ce} H(y, p_s) + w_{mse} \frac{1}{BK} \sum_{bk} (\tilde z_s - \tilde z_t)_{bk}^2,
        \quad \tilde z = z - \operatorname{mean}_k z

    It is the limit of knowledge distillation at high temperature, where T^2 KL tends to half this mean, and the
    average of FiGKD's Haar loss over all orders of the classes.

    Args:
        ce: weight of the cross-entropy with the ground truth.
        mse: weight of the squared error, a mean over batch and classes.

    Source: Ba and Caruana 2014, eq. 1; rows are centred, as in the limit of Hinton, Vinyals and Dean 2015, 2.1.
    """

    paper = "arXiv:1312.6184"
    fidelity = Fidelity.EXACT
    needs = Needs(features=False, embedding=False)

    def __init__(self, *, ce: float = 1.0, mse: float = 1.0):
        super().__init__(ce=ce, mse=mse)

    def loss(self, student: Output, teacher: Output, batch: Batch) -> dict[str, Tensor]:
        return self.weigh(
            ce=lambda: cross_entropy(student.logits, batch.targets),
            mse=lambda: centred_mse(student.logits, teacher.logits),
        )
