"""OFA: each stage of the student learns to classify as the teacher does, with the true class raised."""

import torch
from torch import Tensor, nn

from kdzoo import Batch, DataSpec, Distiller, Fidelity, Output
from kdzoo.connectors import check_stages, stage_projector
from kdzoo.keywords import positive
from kdzoo.losses import cross_entropy, ofa_loss, true_class


def projector(inputs: int, halvings: int, width: int, classes: int) -> nn.Sequential:
    """Make a classifier (B, inputs, H, W) -> (B, classes) whose last layer reads ``width`` numbers."""
    return nn.Sequential(*stage_projector(inputs, halvings, width), nn.Linear(width, classes))


class OFA(Distiller):
    r"""One-for-All: Bridge the Gap Between Heterogeneous Architectures in Knowledge Distillation.

    .. math:: L = w_{ce} H(y, p_s) + w_{kd} A(p_s) + w_{ofa} \sum_l A(\operatorname{softmax} P_l f_l),
        \quad A(p) = -\sum_k \big((p_t^k + m^k)^\varepsilon - m^k\big) \log p^k

    m is 1 at the true class (the largest of the batch's targets) and 0 elsewhere. The projector P_l takes one pair
    of separable convolutions for each stage that is still to come, the last stage a 1x1 convolution; then global
    average and a linear layer.

    Differs from the authors' code:

    - The projector reads maps, and every stage of every student is one; for students of tokens the authors merge
      patches down to a 7 x 7 grid, add transformer blocks and read the class token.
    - Weights start as PyTorch's do.
    - log p is a log-softmax, where the authors' code takes the log of a softmax.

    Args:
        ce: weight of the cross-entropy with the ground truth.
        kd: weight of A on the student's own logits.
        ofa: weight of A on the logits of the stages, summed over them.
        eps: the power that raises the true class; the authors take 1 on CIFAR-100, which is the cross-entropy
            with the teacher, and 1.5 on ImageNet.
        temperature: divides all logits; no factor T^2.
        stages: which stages have a projector.

    Source: Hao et al. 2023; ``distillers/ofa.py``, ``distillers/utils.py`` and ``train.py`` of Hao840/OFAKD.
    """

    paper = "arXiv:2310.19444"
    fidelity = Fidelity.EXACT
    label_terms = ("ce", "kd", "ofa")

    def __init__(
        self,
        *,
        ce: float = 1.0,
        kd: float = 1.0,
        ofa: float = 1.0,
        eps: float = 1.0,
        temperature: float = 1.0,
        stages: tuple[int, ...] = (0, 1, 2, 3),
    ):
        super().__init__(ce=ce, kd=kd, ofa=ofa)
        self.eps = positive(eps=eps)
        self.temperature = positive(temperature=temperature)
        self.stages = stages

    def build(self, student: Output, teacher: Output, data: DataSpec) -> None:
        check_stages(self.stages, student, student)  # of the teacher only logits are read
        last = len(student.features) - 1
        width = max(student.embedding.shape[1], teacher.embedding.shape[1])
        self.projectors = nn.ModuleList(
            projector(student.features[stage].shape[1], last - stage, width, data.num_classes) for stage in self.stages
        )

    def loss(self, student: Output, teacher: Output, batch: Batch) -> dict[str, Tensor]:
        given = teacher.logits, true_class(batch.targets), self.eps, self.temperature
        return self.weigh(
            ce=lambda: cross_entropy(student.logits, batch.targets),
            kd=lambda: ofa_loss(student.logits, *given),
            ofa=lambda: torch.stack([ofa_loss(logits, *given) for logits in self.stage_logits(student)]).sum(),
        )

    def stage_logits(self, student: Output) -> list[Tensor]:
        """Compute the logits (B, K) of each stage's projector."""
        return [project(student.features[stage]) for stage, project in zip(self.stages, self.projectors, strict=True)]
