"""CC: the student's differences from the teacher must not point the same way for neighbouring images of a batch."""

from torch import Tensor, nn

from kdzoo import Batch, DataSpec, Distiller, Fidelity, Needs, Output
from kdzoo.keywords import at_least
from kdzoo.losses import cross_entropy


def correlation_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Compute the dot product of |student - teacher| (B, D) of neighbouring rows, mean over B - 1; 0 for one row."""
    gap = (student - teacher).abs()
    return (gap[:-1] * gap[1:]).sum() / max(len(gap) - 1, 1)


class CC(Distiller):
    r"""Correlation Congruence for Knowledge Distillation.

    .. math:: L = w_{ce} H(y, p_s) + \frac{w_{cc}}{B - 1} \sum_{i < B} \sum_c \delta_{ic} \delta_{i+1,c},
        \quad \delta = |A_s e_s - A_t e_t|

    A_s and A_t are linear with bias, and both are trained. Embeddings of any two widths compare; no map is read.

    The paper compares the kernel matrices of the two batches of embeddings. This is the form of the authors' own code
    as RepDistiller has it, which its tables were made with: it depends on the order of the batch, and nothing keeps
    both maps from shrinking to 0 together.

    Args:
        ce: weight of the cross-entropy with the ground truth.
        cc: weight of the correlation.
        width: numbers that A_s and A_t give.

    Source: Peng et al. 2019; form, width and weight of RepDistiller, ``distiller_zoo/CC.py`` and
    ``train_student.py``.
    """

    paper = "arXiv:1904.01802"
    fidelity = Fidelity.EXACT
    needs = Needs(logits=False, features=False)

    def __init__(self, *, ce: float = 1.0, cc: float = 0.02, width: int = 128):
        super().__init__(ce=ce, cc=cc)
        self.width = at_least(1, width=width)

    def build(self, student: Output, teacher: Output, data: DataSpec) -> None:
        self.embed_s = nn.Linear(student.embedding.shape[1], self.width)
        self.embed_t = nn.Linear(teacher.embedding.shape[1], self.width)

    def loss(self, student: Output, teacher: Output, batch: Batch) -> dict[str, Tensor]:
        return self.weigh(
            ce=lambda: cross_entropy(student.logits, batch.targets),
            cc=lambda: correlation_loss(self.embed_s(student.embedding), self.embed_t(teacher.embedding)),
        )
