"""FitNet: a middle map of the student, through a small connector, repeats the teacher's by squared error."""

from torch import Tensor, nn
from torch.nn import functional as F

from kdzoo import Batch, DataSpec, Distiller, Fidelity, Needs, Output
from kdzoo.connectors import BatchNorm2d, CommonGrid, check_stages
from kdzoo.losses import cross_entropy


class FitNet(Distiller):
    r"""FitNets: Hints for Thin Deep Nets.

    .. math:: L = w_{ce} H(y, p_s) + w_{hint} \operatorname{MSE}(r(f_s), f_t)

    r: 1x1 convolution to the teacher's width, batch norm and, where asked, ReLU.

    Differs from the authors' code:

    - As in RepDistiller, the hint and the cross-entropy train together from beginning to end; the paper trains the
      student's first half by the hint alone and then distils logits.
    - Where the grids differ, the larger map is first average-pooled to the smaller height and width; the authors' and
      RepDistiller's code stretch or stride the connector instead, and have none for most pairs of unlike networks.
    - RepDistiller's connector ends in a ReLU, with which the CIFAR-100 tables were made; ours does not unless ``relu``
      is set.

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
    needs = Needs(logits=False)

    def __init__(self, *, ce: float = 1.0, hint: float = 100.0, stage: int = 2, relu: bool = False):
        super().__init__(ce=ce, hint=hint)
        self.stage, self.relu = stage, relu

    def build(self, student: Output, teacher: Output, data: DataSpec) -> None:
        check_stages((self.stage,), student, teacher)
        f_s, f_t = student.features[self.stage], teacher.features[self.stage]
        self.grid = CommonGrid(f_s, f_t)
        layers = [nn.Conv2d(f_s.shape[1], f_t.shape[1], 1, bias=False), BatchNorm2d(f_t.shape[1])]
        self.connector = nn.Sequential(*layers, *([nn.ReLU()] if self.relu else []))

    def loss(self, student: Output, teacher: Output, batch: Batch) -> dict[str, Tensor]:
        return self.weigh(
            ce=lambda: cross_entropy(student.logits, batch.targets), hint=lambda: self.error(student, teacher)
        )

    def error(self, student: Output, teacher: Output) -> Tensor:
        """Compute the mean squared error of the connector's map: a scalar."""
        f_s, f_t = self.grid(student.features[self.stage], teacher.features[self.stage])
        return F.mse_loss(self.connector(f_s), f_t)
