"""CAT-KD: the student finds each class at the same places of the image as the teacher."""

from torch import Tensor
from torch.nn import functional as F

from kdzoo import Batch, DataSpec, Distiller, Fidelity, Needs, NetworkView, Output
from kdzoo.connectors import CellLogits
from kdzoo.keywords import at_least
from kdzoo.losses import cross_entropy


def attention_transfer(student: Tensor, teacher: Tensor, normalise: bool) -> Tensor:
    """Compute the MSE of class activation maps (B, N, K); ``normalise`` takes each to length 1 over its N cells."""
    if normalise:
        student, teacher = F.normalize(student, dim=1), F.normalize(teacher, dim=1)
    return F.mse_loss(student, teacher)


class CATKD(Distiller):
    r"""Class Attention Transfer Based Knowledge Distillation.

    .. math:: L = w_{ce} H(y, p_s) + w_{cat} \frac{1}{BNK} \sum_{bnk} (A_s^{bnk} - A_t^{bnk})^2

    A^n is what a network's own head makes of the mean over the n-th of N = size x size cells of the map that it
    averages, so at size 1 A is its logits. The paper draws a class's map before it is averaged; for a linear head both
    orders give the same. Defined where logits are made of the mean of a map; any other network raises a ``UserError``.

    Differs from the authors' code:

    - Their heads have no bias, and they leave out the teacher's when they convert it. Here A holds each head's bias,
      the same number in every cell of a class.

    Args:
        ce: weight of the cross-entropy with the ground truth.
        cat: weight of the class activation maps.
        size: cells on a side.
        normalise: takes each class's map to length 1 over its cells, which the authors' code offers too.

    Source: Guo et al. 2023; ``mdistiller/distillers/CAT_KD.py`` and ``configs/cifar100/CAT_KD`` of
    GzyAftermath/CAT-KD, weights of resnet32x4 to resnet8x4.
    """

    paper = "arXiv:2304.12777"
    fidelity = Fidelity.EXACT
    needs = Needs(features=False, final=True)

    def __init__(self, *, ce: float = 1.0, cat: float = 15.0, size: int = 2, normalise: bool = False):
        super().__init__(ce=ce, cat=cat)
        self.size = at_least(1, size=size)
        self.normalise = normalise

    def build(self, student: Output, teacher: Output, data: DataSpec) -> None:
        self.student_maps = CellLogits("student", student, (self.size,))
        self.teacher_maps = CellLogits("teacher", teacher, (self.size,))

    def forward(self, student: NetworkView, teacher: NetworkView, batch: Batch) -> dict[str, Tensor]:
        """Run each network once, then its head on the cells of its final map."""
        reference, seen = teacher(batch.images), student(batch.images)
        return self.weigh(
            ce=lambda: cross_entropy(seen.logits, batch.targets),
            cat=lambda: attention_transfer(
                self.student_maps(seen, student), self.teacher_maps(reference, teacher), self.normalise
            ),
        )
