"""Teacher-free KD: a hand-made teacher, right and nearly as sure of every class, takes the place of a network."""

from torch import Tensor
from torch.nn import functional as F

from kdzoo import Batch, Distiller, Fidelity, Needs, Output
from kdzoo.keywords import positive, share
from kdzoo.losses import cross_entropy


def virtual_teacher(targets: Tensor, certainty: float, temperature: float) -> Tensor:
    """Make the hand-made teacher's log-probabilities from targets (B, K): (B, K).

    They are the log-softmax, over T, of probabilities that give ``certainty`` to the true class and the rest to the
    others in equal shares.
    """
    others = (1 - certainty) / (targets.shape[1] - 1)
    return F.log_softmax((others + (certainty - others) * targets) / temperature, dim=1)


class TfKD(Distiller):
    r"""Revisiting Knowledge Distillation via Label Smoothing Regularization: the virtual teacher.

    .. math:: L = w_{ce} H(y, p_s) + w_{tfkd} KL(u \| p_s), \quad
        u = \operatorname{softmax}(v / T), \quad v_y = a, \; v_k = \frac{1 - a}{K - 1}

    The softmax is taken of probabilities, so with T = 20 and 100 classes u gives the true one 0.0105 and each other
    0.0100: label smoothing, whose smooth part knows the class a little. As in the authors' code, T softens the teacher
    only. They take a mean over images and classes times 100 for ResNet18 on CIFAR-100, which is a mean over images.
    Mixed targets mix v.

    The authors' other form, self-training, has a network as its teacher: train the student's architecture, then ``kd``
    with it (``--teacher resnet18 --student resnet18``, ``ce`` 0.05, ``kd`` 0.475, ``temperature`` 6 are theirs).

    Args:
        ce: weight of the cross-entropy with the ground truth.
        tfkd: weight of the divergence from the virtual teacher.
        certainty: a, the virtual teacher's probability of the true class before T softens it.
        temperature: T; the authors take 20 for ResNet18, 10 or 40 for others.

    Source: Yuan et al. 2020, section 5; ``my_loss_function.py`` and ``base_resnet18/params.json`` of
    yuanli2333/Teacher-free-Knowledge-Distillation.
    """

    paper = "arXiv:1909.11723"
    fidelity = Fidelity.EXACT
    label_terms = ("ce", "tfkd")
    needs = Needs(teacher=False, features=False)

    def __init__(self, *, ce: float = 0.9, tfkd: float = 0.1, certainty: float = 0.99, temperature: float = 20.0):
        super().__init__(ce=ce, tfkd=tfkd)
        self.certainty = share(certainty=certainty)
        self.temperature = positive(temperature=temperature)

    def loss(self, student: Output, teacher: Output, batch: Batch) -> dict[str, Tensor]:
        return self.weigh(
            ce=lambda: cross_entropy(student.logits, batch.targets),
            tfkd=lambda: self.divergence(student.logits, batch.targets),
        )

    def divergence(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Compute KL(u || p_s) of logits (B, K), mean over B."""
        log_u = virtual_teacher(targets.to(logits.dtype), self.certainty, self.temperature)
        return F.kl_div(F.log_softmax(logits, dim=1), log_u, reduction="batchmean", log_target=True)
