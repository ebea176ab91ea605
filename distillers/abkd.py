"""ABKD: an alpha-beta divergence, which lies between several others, takes the place of the KL divergence."""

from torch import Tensor
from torch.nn import functional as F

from kdzoo import Batch, Distiller, Fidelity, Needs, Output
from kdzoo.keywords import not_negative, positive
from kdzoo.losses import cross_entropy


def alpha_beta_divergence(log_p: Tensor, log_q: Tensor, alpha: float, beta: float) -> Tensor:
    """Compute the alpha-beta divergence of q from p, given as log-probabilities (B, K), row by row: (B,).

    Where alpha, beta or both are 0 it is the limit.
    """
    if alpha == 0 == beta:
        return (log_p - log_q).square().sum(dim=1) / 2
    if alpha == 0:
        return alpha_beta_divergence(log_q, log_p, beta, alpha)
    if beta == 0:
        gap = alpha * (log_p - log_q)
        return ((alpha * log_p).exp() * (gap - 1) + (alpha * log_q).exp()).sum(dim=1) / alpha**2
    both = alpha + beta
    ends = alpha * (both * log_p).exp() + beta * (both * log_q).exp()
    return (ends / both - (alpha * log_p + beta * log_q).exp()).sum(dim=1) / (alpha * beta)


class ABKD(Distiller):
    r"""ABKD: Pursuing a Proper Allocation of the Probability Mass in Knowledge Distillation.

    .. math:: L = w_{ce} H(y, p_s) + w_{abkd} \operatorname{mean}_i D(p_t \| p_s), \quad
        D = -\frac{1}{\alpha \beta} \sum_k \Big( p_t^\alpha p_s^\beta - \tfrac{\alpha}{\alpha + \beta}
        p_t^{\alpha + \beta} - \tfrac{\beta}{\alpha + \beta} p_s^{\alpha + \beta} \Big)

    p is softened by T, without T^2. D is KL(p_t || p_s) at alpha = 1, beta = 0, the reverse at 0 and 1, four times the
    squared Hellinger distance at 1/2 and 1/2, and half the squared error of probabilities at 1 and 1.

    Where one of them is 0, the authors' code divides by the other once, which agrees with the limit at 1 only; ours is
    the limit. Negative powers of probabilities near 0 have no finite value, so both are from 0.

    Args:
        ce: weight of the cross-entropy with the ground truth.
        abkd: weight of the divergence.
        alpha: power of the teacher's probabilities; larger values put weight on classes with the largest error.
        beta: power of the student's probabilities; larger values put weight on classes that the student is sure of.
        temperature: T, which softens both distributions.

    Source: Wang et al. 2025; ``standard_classification/distiller_zoo/abkl.py`` and ``train_ab.sh`` of ghwang-s/abkd.
    """

    paper = "arXiv:2505.04560"
    fidelity = Fidelity.EXACT
    needs = Needs(features=False, embedding=False)

    def __init__(
        self, *, ce: float = 1.0, abkd: float = 64.0, alpha: float = 0.8, beta: float = 0.3, temperature: float = 4.0
    ):
        super().__init__(ce=ce, abkd=abkd)
        self.alpha, self.beta = not_negative(alpha=alpha), not_negative(beta=beta)
        self.temperature = positive(temperature=temperature)

    def loss(self, student: Output, teacher: Output, batch: Batch) -> dict[str, Tensor]:
        return self.weigh(
            ce=lambda: cross_entropy(student.logits, batch.targets),
            abkd=lambda: self.divergence(student.logits, teacher.logits).mean(),
        )

    def divergence(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Compute D of logits (B, K), row by row: (B,)."""
        log_s, log_t = (F.log_softmax(logits / self.temperature, dim=1) for logits in (student, teacher))
        return alpha_beta_divergence(log_t, log_s, self.alpha, self.beta)
