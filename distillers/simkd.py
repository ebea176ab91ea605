"""SimKD: the student's last map is projected onto the teacher's and classified by the teacher's own classifier."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kdzoo import Batch, DataSpec, Distiller, Fidelity, NetworkView, Output, Show
from kdzoo.connectors import BatchNorm2d, CommonGrid, Pool, TeachersClassifier, check_stages
from kdzoo.errors import UserError
from kdzoo.outputs import LOGITS


class Projector(nn.Module):
    """Layers that make the teacher's map of the student's: (B, inputs, H, W) -> (B, outputs, *grid).

    Args:
        layers: (B, inputs, *grid) -> (B, outputs, *grid).
        pool: from the student's grid to the one that is matched.
    """

    rectified: Tensor  # () bool: whether a ReLU ends it

    def __init__(self, layers: nn.Module, pool: Pool):
        super().__init__()
        self.pool, self.layers = pool, layers
        self.register_buffer("rectified", torch.tensor(False))

    def forward(self, maps: Tensor) -> Tensor:
        maps = self.layers(self.pool(maps))
        return torch.where(self.rectified, maps.relu(), maps)


class WithTeachersHead(nn.Module):
    """The shipped network: student, projector and the teacher's classifier."""

    def __init__(self, student: nn.Module, projector: Projector, head: nn.Linear):
        super().__init__()
        self.student, self.projector, self.head = student, projector, head
        self.training = student.training

    def forward(self, images: Tensor, show: Show = LOGITS) -> Output:
        maps = self.student(images, Show(features=True)).features
        embedding = self.projector(maps[-1]).mean(dim=(2, 3))
        return Output(self.head(embedding), embedding, maps).only(show).float()


class SimKD(Distiller):
    r"""Knowledge Distillation with the Reused Teacher Classifier.

    .. math:: L = w_{simkd} \operatorname{MSE}(P(f_s), f_t)

    f are the last maps and P the projector. No label is read. What ships is the student, P, the mean over positions and
    the teacher's classifier, so their parameters and time count when the student is measured; the student's own
    classifier is not trained. Where the grids differ, the larger map is average-pooled to the smaller height and
    width, as in the authors' code.

    Differs from the authors' code, whose networks classify the mean of their last map, which ends in a ReLU. Others do
    not, so one batch of the teacher decides before training:

    - Where the teacher's embedding is not the mean of its last map (class tokens, last norms, layers after the last
      stage), the mean of P(f_s) is matched to the embedding instead.
    - P ends in a ReLU only where no number of what is matched is negative.

    Args:
        simkd: weight of the squared error, a mean over all numbers.
        factor: the teacher's width over that of the projector's bottleneck.

    Source: Chen et al. 2022; the authors' ``models/util.py``, ``helper/loops.py`` and ``train_student.py``.
    """

    paper = "arXiv:2203.14001"
    fidelity = Fidelity.EXACT

    pooled: Tensor  # () bool: whether the teacher's embedding is the mean of its last map

    def __init__(self, *, simkd: float = 1.0, factor: int = 2):
        super().__init__(simkd=simkd)
        self.factor = factor

    def build(self, student: Output, teacher: Output, data: DataSpec) -> None:
        (last,) = check_stages((len(student.features) - 1,), student, teacher)
        f_s, f_t = student.features[last], teacher.features[last]
        width = teacher.embedding.shape[1]
        self.grid = CommonGrid(f_s, f_t)
        self.projector = Projector(self.layers(f_s.shape[1], width, self.grid.size), self.grid.student)
        self.same_width = f_t.shape[1] == width
        self.register_buffer("pooled", torch.tensor(False))
        self.head = TeachersClassifier(width, data.num_classes)

    def layers(self, inputs: int, outputs: int, grid: tuple[int, int]) -> nn.Module:
        """Make the projector but for its last ReLU: (B, inputs, *grid) -> (B, outputs, *grid)."""
        if not 1 <= self.factor <= outputs:
            raise UserError(f"factor={self.factor}: expected a number from 1 to the teacher's width {outputs}")
        middle = outputs // self.factor
        return nn.Sequential(
            nn.Conv2d(inputs, middle, 1, bias=False),
            BatchNorm2d(middle),
            nn.ReLU(),
            nn.Conv2d(middle, middle, 3, padding=1, bias=False),
            BatchNorm2d(middle),
            nn.ReLU(),
            nn.Conv2d(middle, outputs, 1, bias=False),
            BatchNorm2d(outputs),
        )

    @torch.no_grad()
    def prepare(self, student: NetworkView, teacher: NetworkView, batches: Iterable[Batch]) -> None:
        """Copy the teacher's classifier, and check one batch of its outputs."""
        if not self.is_active:
            return
        self.head.copy_from(teacher)
        seen = teacher(next(iter(batches)).images)
        target = seen.embedding
        if self.same_width:
            mean = seen.features[-1].mean(dim=(2, 3))
            self.pooled.copy_((mean - target).norm() <= 0.02 * target.norm())  # bfloat16 rounds to 0.4 %
            target = seen.features[-1] if self.pooled else target
        self.projector.rectified.copy_((target >= 0).all())

    def loss(self, student: Output, teacher: Output, batch: Batch) -> dict[str, Tensor]:
        return self.weigh(simkd=lambda: self.error(student, teacher))

    def error(self, student: Output, teacher: Output) -> Tensor:
        """Compute the squared error of the last maps, or of embeddings if the teacher's is not the mean of its map."""
        maps = self.projector(student.features[-1])
        embeddings = F.mse_loss(maps.mean(dim=(2, 3)), teacher.embedding)
        if not self.same_width:
            return embeddings
        return torch.where(self.pooled, F.mse_loss(maps, self.grid.teacher(teacher.features[-1])), embeddings)

    def deploy(self, student: nn.Module) -> nn.Module:
        """Join the student, the projector and the teacher's classifier into one network."""
        return WithTeachersHead(student, self.projector, self.head) if self.is_active else student
