"""SP: images that are similar for the teacher are similar for the student."""

from torch import Tensor
from torch.nn import functional as F

from kdzoo import Batch, DataSpec, Distiller, Fidelity, Needs, Output
from kdzoo.connectors import check_stages
from kdzoo.losses import cross_entropy


def similarities(features: Tensor) -> Tensor:
    """Compute the rows of F F', each of length 1, where F (B, D) holds the flattened ``features`` (B, ...): (B, B)."""
    rows = features.flatten(1)
    return F.normalize(rows @ rows.mT, eps=1e-6)


def similarity_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Compute the squared Frobenius distance of the similarities of features (B, ...), over B^2."""
    return F.mse_loss(similarities(student), similarities(teacher))


class SP(Distiller):
    r"""Similarity-Preserving Knowledge Distillation.

    .. math:: L = w_{ce} H(y, p_s) + \frac{w_{sp}}{B^2} \|\tilde G_s - \tilde G_t\|_F^2,
        \quad \tilde G_{i:} = G_{i:} / \|G_{i:}\|_2, \quad G = F F^T

    F holds one flattened map of each image. G is B x B for all shapes, so nothing is resized.

    Args:
        ce: weight of the cross-entropy with the ground truth.
        sp: weight of the distance.
        stage: which stage is matched; 3 is the last.

    Source: Tung and Mori 2019; weight, ground truth beside it and the one stage of RepDistiller,
    ``distiller_zoo/SP.py``, which the author verified.
    """

    paper = "arXiv:1907.09682"
    fidelity = Fidelity.EXACT
    needs = Needs(logits=False)

    def __init__(self, *, ce: float = 1.0, sp: float = 3000.0, stage: int = 3):
        super().__init__(ce=ce, sp=sp)
        self.stage = stage

    def build(self, student: Output, teacher: Output, data: DataSpec) -> None:
        check_stages((self.stage,), student, teacher)

    def loss(self, student: Output, teacher: Output, batch: Batch) -> dict[str, Tensor]:
        return self.weigh(
            ce=lambda: cross_entropy(student.logits, batch.targets),
            sp=lambda: similarity_loss(student.features[self.stage], teacher.features[self.stage]),
        )
