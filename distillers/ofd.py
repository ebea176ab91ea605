"""OFD: the student repeats the teacher's maps before their ReLU, whose negative numbers are cut off at a margin."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from kdzoo import Batch, DataSpec, Distiller, Fidelity, Needs, NetworkView, Output
from kdzoo.connectors import CommonGrid, CommonGrids, before_relu, connector, paired_features
from kdzoo.losses import cross_entropy, doubling_sum
from kdzoo.tensors import all_sum


def partial_distance(student: Tensor, teacher: Tensor, margin: Tensor) -> Tensor:
    """Compute the squared distance of maps (B, C, H, W) where it counts, summed over an image and averaged over B.

    The target is the larger of the teacher's number and the margin of its channel, ``margin`` (C,). Where it is
    negative, a student's number below it costs nothing.
    """
    target = torch.maximum(teacher, margin[:, None, None])
    counts = (student > target) | (target > 0)
    return ((student - target).square() * counts).sum() / len(student)


class OFD(Distiller):
    r"""A Comprehensive Overhaul of Feature Distillation.

    .. math:: L = w_{ce} H(y, p_s) + w_{ofd} \sum_{l=1}^{n} 2^{l-n} \frac{1}{B} \sum_{bchw}
        d\left(r(f_s^l), \max(f_t^l, m_c^l)\right),
        \quad d(s, t) = \begin{cases} 0 & s \le t \le 0 \\ (s - t)^2 & \text{else} \end{cases}

    f are the maps before the last ReLU of a stage, r a 1x1 convolution to the teacher's width and batch norm, and m_c
    the mean of the negative numbers of the teacher's channel c. As the distance is a sum over an image, its weight
    depends on the size of maps: the authors take 0.001 for CIFAR-100 and 0.0001 for ImageNet.

    Differs from the authors' code:

    - The margins are measured on one epoch before training. They derive them from the batch norm before each ReLU, as
      if its outputs were normal and no shortcut were added; networks without batch norm have none.
    - Where the grids of a stage differ, the larger map is average-pooled to the smaller height and width.

    Args:
        ce: weight of the cross-entropy with the ground truth.
        ofd: weight of the sum over stages.
        stages: which stages are matched, shallow to deep. The default leaves out the first, which is the stem's map
            where networks have three stages; the authors match all four of ResNets for ImageNet.

    Source: Heo et al. 2019; ``CIFAR-100/distiller.py`` and ``train_with_distillation.py`` of
    clovaai/overhaul-distillation; weight of mdistiller, ``mdistiller/distillers/OFD.py``.
    """

    paper = "arXiv:1904.01866"
    fidelity = Fidelity.ADAPTED
    needs = Needs(logits=False, preactivations=("student", "teacher"))

    def __init__(self, *, ce: float = 1.0, ofd: float = 1e-3, stages: tuple[int, ...] = (1, 2, 3)):
        super().__init__(ce=ce, ofd=ofd)
        self.stages = stages

    def build(self, student: Output, teacher: Output, data: DataSpec) -> None:
        student, teacher = before_relu(student, teacher)
        self.grids = CommonGrids(student, teacher, self.stages)
        self.connectors = nn.ModuleList()
        for stage, (f_s, f_t) in zip(self.stages, paired_features(student, teacher, self.stages), strict=True):
            self.connectors.append(connector(f_s.shape[1], f_t.shape[1]))
            self.register_buffer(f"margin{stage}", torch.full((f_t.shape[1],), torch.nan))  # measured in ``prepare``

    @torch.no_grad()
    def prepare(self, student: NetworkView, teacher: NetworkView, batches: Iterable[Batch]) -> None:
        """Average the negative numbers of each channel of the teacher's maps over an epoch."""
        if not self.is_active:
            return
        margins = [self.get_buffer(f"margin{stage}") for stage in self.stages]
        grids = [grid for grid in self.grids if isinstance(grid, CommonGrid)]
        sums, counts = ([torch.zeros_like(margin) for margin in margins] for _ in range(2))
        for batch in batches:
            shown = teacher(batch.images).preactivations
            for stage, grid, total, count in zip(self.stages, grids, sums, counts, strict=True):
                maps = grid.teacher(shown[stage])
                total += maps.clamp(max=0).sum(dim=(0, 2, 3))
                count += (maps < 0).sum(dim=(0, 2, 3))
        for margin, total, count in zip(margins, sums, counts, strict=True):
            margin.copy_(all_sum(total) / all_sum(count).clamp(min=1))

    def loss(self, student: Output, teacher: Output, batch: Batch) -> dict[str, Tensor]:
        return self.weigh(
            ce=lambda: cross_entropy(student.logits, batch.targets), ofd=lambda: self.distance(student, teacher)
        )

    def distance(self, student: Output, teacher: Output) -> Tensor:
        """Sum the distances of the stages, each counted twice as much as the one before it: a scalar."""
        pairs = zip(self.stages, self.grids(*before_relu(student, teacher)), self.connectors, strict=True)
        distances = [
            partial_distance(connect(f_s), f_t, self.get_buffer(f"margin{stage}"))
            for stage, (f_s, f_t), connect in pairs
        ]
        return doubling_sum(distances)
