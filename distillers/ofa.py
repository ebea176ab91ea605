"""OFA: each stage of the student learns to give logits of its own, with the true class raised in the teacher's."""

from torch import Tensor, nn
from torch.nn import functional as F

from kdzoo import Batch, DataSpec, Distiller, Fidelity, Needs, Output
from kdzoo.connectors import check_stages
from kdzoo.errors import UserError
from kdzoo.losses import cross_entropy, true_class
from kdzoo.tensors import full_precision


def ofa_loss(student: Tensor, teacher: Tensor, target: Tensor, eps: float, temperature: float = 1.0) -> Tensor:
    """-sum_k ((p_t + m)^eps - m) log p_s of logits (B, K), m = ``target`` (B, K) bool, mean over B."""
    p_t = (full_precision(teacher) / temperature).softmax(dim=1)
    log_p = F.log_softmax(full_precision(student) / temperature, dim=1)
    raised = (p_t + target.to(p_t.dtype)) ** eps - target.to(p_t.dtype)
    return -(raised * log_p).sum(dim=1).mean()


def separable(inputs: int, outputs: int) -> list[nn.Module]:
    """Two depthwise separable 3x3 convolutions with batch norm and ReLU, the first of which halves the grid."""
    layers: list[nn.Module] = []
    for stride, width in ((2, inputs), (1, outputs)):
        layers += [
            nn.Conv2d(inputs, inputs, 3, stride, padding=1, groups=inputs, bias=False),
            nn.Conv2d(inputs, width, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
        ]
    return layers


def projector(inputs: int, halvings: int, width: int, classes: int) -> nn.Sequential:
    """Maps (B, inputs, H, W) -> logits (B, classes); widths double at each halving and end in ``width``."""
    layers: list[nn.Module] = []
    for step in range(halvings):
        layers += separable(inputs << step, width if step == halvings - 1 else inputs << (step + 1))
    if not halvings:
        layers.append(nn.Conv2d(inputs, width, 1))
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, classes))


class OFA(Distiller):
    r"""One-for-All: Bridge the Gap Between Heterogeneous Architectures in Knowledge Distillation.

    .. math:: L = w_{ce} H(y, p_s) + w_{kd} A(p_s) + w_{ofa} \sum_l A(\operatorname{softmax} P_l f_l),
        \quad A(p) = -\sum_k \big((p_t^k + m^k)^\varepsilon - m^k\big) \log p^k

    m is 1 at the true class (the largest of the batch's targets) and 0 elsewhere. The projector P_l takes one pair
    of separable convolutions for each stage that is still to come, the last stage a 1x1 convolution; then global
    average and a linear layer. It reads maps, and here every stage of every student is one: for students of tokens
    the authors merge patches down to a 7 x 7 grid, add transformer blocks and read the class token. Weights start as
    PyTorch's do. log p is a log-softmax, where the authors' code takes the log of a softmax.

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

    def __init__(
        self,
        student: Output,
        teacher: Output,
        data: DataSpec,
        *,
        ce: float = 1.0,
        kd: float = 1.0,
        ofa: float = 1.0,
        eps: float = 1.0,
        temperature: float = 1.0,
        stages: tuple[int, ...] = (0, 1, 2, 3),
    ):
        super().__init__()
        for name, value in (("temperature", temperature), ("eps", eps)):
            if not value > 0:
                raise UserError(f"{name} {value}: expected a number above 0; 1 is usual")
        self.ce, self.kd, self.ofa, self.eps, self.temperature = ce, kd, ofa, eps, temperature
        if not ofa:
            self.needs = Needs(features=False)
            return
        self.stages = check_stages(stages, student, student)  # of the teacher only logits are read
        last = len(student.features) - 1
        width = max(student.embedding.shape[1], teacher.embedding.shape[1])
        self.projectors = nn.ModuleList(
            projector(student.features[stage].shape[1], last - stage, width, data.num_classes) for stage in self.stages
        )

    def loss(self, student: Output, teacher: Output, batch: Batch) -> dict[str, Tensor]:
        terms = {}
        given = teacher.logits.detach(), true_class(batch.targets), self.eps, self.temperature
        if self.ce:
            terms["ce"] = self.ce * cross_entropy(student.logits, batch.targets)
        if self.kd:
            terms["kd"] = self.kd * ofa_loss(student.logits, *given)
        if self.ofa:
            staged = [
                ofa_loss(project(student.features[stage]), *given)
                for stage, project in zip(self.stages, self.projectors, strict=True)
            ]
            terms["ofa"] = self.ofa * sum(staged[1:], staged[0])
        return terms
