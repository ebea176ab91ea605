"""NormKD: knowledge distillation whose temperature is, image by image, the deviation of the logits."""

from torch import Tensor

from kdzoo import Batch, Distiller, Fidelity, Output
from kdzoo.keywords import positive
from kdzoo.losses import cross_entropy, row_kl, standardised


def normalised_kl(student: Tensor, teacher: Tensor, scale: float) -> Tensor:
    """Compute T_t^2 KL(softmax(z_t / T_t) || softmax(z_s / T_s)) of logits (B, K), mean over B.

    T is ``scale`` times the unbiased deviation of the row of logits. A constant row gives equal probabilities.
    """
    classes = student.shape[1]
    divisor = scale * (classes / (classes - 1)) ** 0.5  # from the biased deviation, which standardises, to the other
    rows = row_kl(*(standardised(logits, 1, 1e-12) / divisor for logits in (student, teacher)))
    return (rows * scale**2 * teacher.var(dim=1)).mean()


class NormKD(Distiller):
    r"""NormKD: Normalized Logits for Knowledge Distillation.

    .. math:: L = w_{ce} H(y, p_s) + w_{kd} \operatorname{mean}_i T_t^2
        KL(\operatorname{softmax}(z_t / T_t) \| \operatorname{softmax}(z_s / T_s)), \quad T = c \, \sigma(z)

    sigma is the deviation of one image's logits, of either network. This is ``lskd``, whose images count by their
    squared T. Two logits over their deviation are always the same two, so it takes three classes.

    Args:
        ce: weight of the cross-entropy with the ground truth.
        kd: weight of the distillation term.
        scale: c, which multiplies the deviation; the authors take 2 on CIFAR-100 and 1 on ImageNet.

    Source: Chi et al. 2023; ``mdistiller/distillers/NormKD.py`` and ``engine/cfg.py`` of gizi1/NormKD.
    """

    paper = "arXiv:2308.00520"
    fidelity = Fidelity.EXACT
    fewest_classes = 3

    def __init__(self, *, ce: float = 0.1, kd: float = 0.9, scale: float = 2.0):
        super().__init__(ce=ce, kd=kd)
        self.scale = positive(scale=scale)

    def loss(self, student: Output, teacher: Output, batch: Batch) -> dict[str, Tensor]:
        return self.weigh(
            ce=lambda: cross_entropy(student.logits, batch.targets),
            kd=lambda: normalised_kl(student.logits, teacher.logits, self.scale),
        )
