"""TTM: the student, at temperature 1, matches the teacher's probabilities raised to a power."""

from torch import Tensor
from torch.nn import functional as F

from kdzoo import Batch, Distiller, Fidelity, Needs, Output
from kdzoo.keywords import positive
from kdzoo.losses import cross_entropy, row_kl


def transformed_matching(student: Tensor, teacher: Tensor, gamma: float, weighted: bool = False) -> Tensor:
    """Compute KL(q || p_s) of logits (B, K), mean over B, where q is p_t^gamma made to sum to 1.

    ``weighted`` multiplies each image's divergence by sum_k p_t^gamma, which is largest where the teacher is unsure.
    """
    rows = row_kl(student, gamma * teacher)  # p^gamma, normalised, is softmax(gamma z)
    return (rows * (gamma * F.log_softmax(teacher, dim=1)).logsumexp(dim=1).exp() if weighted else rows).mean()


class TTM(Distiller):
    r"""Knowledge Distillation Based on Transformed Teacher Matching.

    .. math:: L = w_{ce} H(y, p_s) + w_{ttm} \operatorname{mean}_i \, U_i \, KL(q \| p_s),
        \quad q = \frac{p_t^\gamma}{\sum_k (p_t^k)^\gamma}

    U is 1, or sum_k p_t^gamma (WTTM). q is the softmax of gamma z_t, so TTM is classical distillation with
    T = 1 / gamma on the teacher's side alone, and without T^2.

    Args:
        ce: weight of the cross-entropy with the ground truth.
        ttm: weight of the matching; the authors choose it by pair, 45 for VGG13 and VGG8.
        gamma: the power, below 1 to soften the teacher.
        weighted: weigh each image by the teacher's doubt (WTTM).

    Source: Zheng and Yang 2024; ``distiller_zoo/ttm.py``, ``distiller_zoo/wttm.py`` and ``README.md`` of zkxufo/TTM.
    """

    paper = "arXiv:2402.11148"
    fidelity = Fidelity.EXACT
    needs = Needs(features=False, embedding=False)

    def __init__(self, *, ce: float = 1.0, ttm: float = 45.0, gamma: float = 0.1, weighted: bool = False):
        super().__init__(ce=ce, ttm=ttm)
        self.gamma, self.weighted = positive(gamma=gamma), weighted

    def loss(self, student: Output, teacher: Output, batch: Batch) -> dict[str, Tensor]:
        return self.weigh(
            ce=lambda: cross_entropy(student.logits, batch.targets),
            ttm=lambda: transformed_matching(student.logits, teacher.logits, self.gamma, self.weighted),
        )
