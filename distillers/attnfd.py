"""AttnFD: the student's maps, refined by learned gates, point the way of the teacher's, refined by plain gates."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kdzoo import Batch, DataSpec, Distiller, Fidelity, Needs, Output
from kdzoo.connectors import BatchNorm2d, CommonGrids, before_relu, connector, paired_features
from kdzoo.keywords import at_least
from kdzoo.losses import cross_entropy


def plain_gates(maps: Tensor) -> Tensor:
    """Refine maps (B, C, H, W) by gates without parameters, first of channels and then of positions."""
    maps = maps * (maps.mean(dim=(2, 3), keepdim=True) + maps.amax(dim=(2, 3), keepdim=True)).sigmoid()
    return maps * (maps.mean(dim=1, keepdim=True) + maps.amax(dim=1, keepdim=True)).sigmoid()


class Gates(nn.Module):
    """Refine maps (B, C, H, W) by learned gates, first of channels and then of positions (CBAM).

    Args:
        width: C.
        reduction: C over the width between both layers of the channels' gate.
    """

    def __init__(self, width: int, reduction: int):
        super().__init__()
        middle = max(width // reduction, 1)
        self.channels = nn.Sequential(nn.Linear(width, middle), nn.ReLU(), nn.Linear(middle, width))
        self.positions = nn.Sequential(
            nn.Conv2d(2, 1, 7, padding=3, bias=False),
            BatchNorm2d(1, momentum=0.01),
            nn.Sigmoid(),
        )

    def forward(self, maps: Tensor) -> Tensor:
        # Not amax, whose backward pass shares the gradient among equal numbers and takes several times as long.
        gate = self.channels(maps.mean(dim=(2, 3))) + self.channels(maps.flatten(2).max(dim=2).values)
        maps = maps * gate.sigmoid()[:, :, None, None]
        highest, mean = maps.max(dim=1, keepdim=True).values, maps.mean(dim=1, keepdim=True)
        return maps * self.positions(torch.cat([highest, mean], dim=1))


def direction_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Compute the squared distance of each image's maps (B, C, H, W), taken to length 1, mean over B: 2 - 2 cosine."""
    a, b = (F.normalize(maps.flatten(1), eps=1e-6) for maps in (student, teacher))
    return (a - b).square().sum(dim=1).mean()


class AttnFD(Distiller):
    r"""Attention-guided Feature Distillation, carried over from segmentation to classification.

    .. math:: L = w_{ce} H(y, p_s) + w_{attnfd} \sum_l \operatorname{mean}_b
        \left\| \frac{r(a_{s,b}^l)}{\|r(a_{s,b}^l)\|_2} - \frac{a_{t,b}^l}{\|a_{t,b}^l\|_2} \right\|_2^2

    a are the maps before the last ReLU of a stage under two gates, first of channels and then of positions: the
    student's are CBAM's, whose parameters are trained, the teacher's have none: the sigmoid of mean plus maximum. r
    is a 1x1 convolution to the teacher's width and batch norm. The gates stand beside the student, not in it, and
    are not shipped.

    Differs from the authors' code:

    - It matches the last map of the backbone and two of the decoder; here the four stages are.
    - It divides by the norm of the whole batch's maps and then by B once more, so that its loss shrinks as the batch
      grows: 6 images there. Here each image has its own norm, and images are averaged.
    - Where the grids of a stage differ, the larger map is average-pooled to the smaller height and width.

    Args:
        ce: weight of the cross-entropy with the ground truth.
        attnfd: weight of the sum over stages.
        reduction: width of a stage over that within the gate of channels.
        stages: which stages are matched.

    Source: Mansurian et al. 2024; ``distiller.py`` and ``cbam.py`` of AmirMansurian/AttnFD.
    """

    paper = "arXiv:2403.05451"
    fidelity = Fidelity.ADAPTED
    needs = Needs(logits=False, preactivations=("student", "teacher"))

    def __init__(
        self, *, ce: float = 1.0, attnfd: float = 2.0, reduction: int = 16, stages: tuple[int, ...] = (0, 1, 2, 3)
    ):
        super().__init__(ce=ce, attnfd=attnfd)
        self.reduction, self.stages = at_least(1, reduction=reduction), stages

    def build(self, student: Output, teacher: Output, data: DataSpec) -> None:
        student, teacher = before_relu(student, teacher)
        self.grids = CommonGrids(student, teacher, self.stages)
        self.refine = nn.ModuleList(
            nn.Sequential(Gates(f_s.shape[1], self.reduction), connector(f_s.shape[1], f_t.shape[1]))
            for f_s, f_t in paired_features(student, teacher, self.stages)
        )

    def loss(self, student: Output, teacher: Output, batch: Batch) -> dict[str, Tensor]:
        return self.weigh(
            ce=lambda: cross_entropy(student.logits, batch.targets), attnfd=lambda: self.match(student, teacher)
        )

    def match(self, student: Output, teacher: Output) -> Tensor:
        """Sum the distances of the stages: a scalar."""
        pairs = zip(self.grids(*before_relu(student, teacher)), self.refine, strict=True)
        return torch.stack([direction_loss(refine(f_s), plain_gates(f_t)) for (f_s, f_t), refine in pairs]).sum()
