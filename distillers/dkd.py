"""DKD: the teacher's certainty of the true class, and its distribution over the others, are learned separately."""

from torch import Tensor
from torch.nn import functional as F

from kdzoo import Batch, Distiller, Fidelity, Needs, Output
from kdzoo.keywords import not_negative, positive, share
from kdzoo.losses import class_or_rest, cross_entropy, other_classes_loss, true_class, warm_up


def target_class_loss(student: Tensor, teacher: Tensor, target: Tensor, temperature: float) -> Tensor:
    """Compute T^2 KL between the networks' (p_y, 1 - p_y); logits (B, K), ``target`` (B, K) bool, mean over B."""
    log_s, log_t = (class_or_rest(logits / temperature, target) for logits in (student, teacher))
    return F.kl_div(log_s, log_t, reduction="batchmean", log_target=True) * temperature**2


class DKD(Distiller):
    r"""Decoupled Knowledge Distillation.

    .. math:: L = w_{ce} H(y, p_s) + w_{dkd} r \, (\alpha \, \mathrm{TCKD} + \beta \, \mathrm{NCKD})

    .. math:: \mathrm{TCKD} = T^2 KL((p_t^y, 1 - p_t^y) \| (p_s^y, 1 - p_s^y)),
        \quad \mathrm{NCKD} = T^2 KL(\hat p_t \| \hat p_s)

    p is softened by T, p-hat is p over all classes but the true one, which is the largest of the batch's targets,
    and r rises from 0 to 1. Classical distillation is TCKD + (1 - p_t^y) NCKD, sample by sample; with two classes NCKD
    is 0 and TCKD is ``kd``, so it takes three. Everything stays in logarithms, where the authors' code takes the log of
    a softmax that may have become 0.

    Args:
        ce: weight of the cross-entropy with the ground truth.
        dkd: weight of both parts of the distillation.
        alpha: weight of TCKD inside it.
        beta: weight of NCKD inside it; the authors choose it by pair, from 0.25 to 8.
        temperature: T, which softens all distributions.
        warmup: share of training over which r rises; the authors' rises once an epoch, from 1/20 in the first of 240,
            on average half an epoch ahead of ours.

    Source: Zhao et al. 2022; ``mdistiller/distillers/DKD.py`` and ``engine/cfg.py`` of megvii-research/mdistiller.
    """

    paper = "arXiv:2203.08679"
    fidelity = Fidelity.EXACT
    label_terms = ("ce", "dkd")
    fewest_classes = 3
    needs = Needs(features=False, embedding=False)

    def __init__(
        self,
        *,
        ce: float = 1.0,
        dkd: float = 1.0,
        alpha: float = 1.0,
        beta: float = 8.0,
        temperature: float = 4.0,
        warmup: float = 20 / 240,
    ):
        super().__init__(ce=ce, dkd=dkd)
        self.alpha, self.beta = not_negative(alpha=alpha), not_negative(beta=beta)
        self.temperature, self.warmup = positive(temperature=temperature), share(warmup=warmup)

    def loss(self, student: Output, teacher: Output, batch: Batch) -> dict[str, Tensor]:
        return self.weigh(
            ce=lambda: cross_entropy(student.logits, batch.targets),
            dkd=lambda: warm_up(batch.progress, self.warmup) * self.decoupled(student, teacher, batch),
        )

    def decoupled(self, student: Output, teacher: Output, batch: Batch) -> Tensor:
        """Sum both parts with their weights: a scalar."""
        given = student.logits, teacher.logits, true_class(batch.targets), self.temperature
        return self.alpha * target_class_loss(*given) + self.beta * other_classes_loss(*given)
