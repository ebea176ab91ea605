"""FitNet: a middle map of the student, through a small connector, repeats the teacher's map by squared error."""

from torch import Tensor, nn
from torch.nn import functional as F

from kdzoo import Batch, DataSpec, Distiller, Fidelity, Needs, Output
from kdzoo.connectors import CommonGrid, check_stages
from kdzoo.losses import cross_entropy
from kdzoo.tensors import full_precision


def hint_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared error of maps (B, C, H, W), over all numbers."""
    return F.mse_loss(full_precision(student), full_precision(teacher))


class FitNet(Distiller):
    r"""FitNets: Hints for Thin Deep Nets.

    .. math:: L = w_{ce} H(y, p_s) + w_{hint} \operatorname{MSE}(r(f_s), f_t)

    r: 1x1 convolution to the teacher's width, batch norm and, where asked, ReLU. Where the grids differ, the
    larger map is first average-pooled to the smaller height and width; the authors' and RepDistiller's code
    stretch or stride the connector instead, and have none for most pairs of unlike networks.

    The paper trains the student's first half by the hint alone and then distils logits; as in RepDistiller, the
    hint here goes along with the cross-entropy from beginning to end.

    Args:
        ce: weight of the cross-entropy with the ground truth.
        hint: weight of the squared error, a mean over all numbers of the map.
        stage: which stage is matched. 2 is the hint layer of the CIFAR-100 tables where networks have three stages,
            whose first map is the stem's; with four stages that layer is 1.
        relu: ends the connector with a ReLU, as RepDistiller does. It suits teachers whose maps have no negative
            numbers and no others, so it is off.

    Source: Romero et al. 2015, eq. 3; connector, weight and joint training of RepDistiller, ``models/util.py`` and
    ``train_student.py``.
    """

    paper = "arXiv:1412.6550"
    fidelity = Fidelity.EXACT

    def __init__(
        self,
        student: Output,
        teacher: Output,
        data: DataSpec,
        *,
        ce: float = 1.0,
        hint: float = 100.0,
        stage: int = 2,
        relu: bool = False,
    ):
        super().__init__()
        self.ce, self.hint = ce, hint
        if not hint:
            self.needs = Needs(features=False)
            return
        (self.stage,) = check_stages((stage,), student, teacher)
        f_s, f_t = student.features[stage], teacher.features[stage]
        self.grid = CommonGrid(f_s, f_t)
        layers = [nn.Conv2d(f_s.shape[1], f_t.shape[1], 1, bias=False), nn.BatchNorm2d(f_t.shape[1])]
        self.connector = nn.Sequential(*layers, *([nn.ReLU()] if relu else []))

    def loss(self, student: Output, teacher: Output, batch: Batch) -> dict[str, Tensor]:
        terms = {}
        if self.ce:
            terms["ce"] = self.ce * cross_entropy(student.logits, batch.targets)
        if self.hint:
            f_s, f_t = self.grid(student.features[self.stage], teacher.features[self.stage])
            terms["hint"] = self.hint * hint_loss(self.connector(f_s), f_t)
        return terms
