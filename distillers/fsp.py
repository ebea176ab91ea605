"""FSP: before training, the student learns how the teacher's maps of two following stages go together."""

from collections.abc import Iterable
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kdzoo import Batch, DataSpec, Distiller, Fidelity, NetworkView, Output
from kdzoo.connectors import Pool, check_stages, paired_features
from kdzoo.errors import UserError
from kdzoo.keywords import at_least, positive
from kdzoo.losses import cross_entropy, softened_kl
from kdzoo.phase import fit


class Flow(nn.Module):
    """The products of channels of maps (B, C, H, W) and (B, D, h, w), averaged over positions: (B, C, D).

    The finer map is first average-pooled to the coarser.

    Args:
        first: the first map, of which only the shape is read.
        second: the second.
    """

    def __init__(self, first: Tensor, second: Tensor):
        super().__init__()
        size = [min(sides) for sides in zip(first.shape[2:], second.shape[2:], strict=True)]
        self.first, self.second = Pool(first.shape[2:], size), Pool(second.shape[2:], size)

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        first, second = self.first(first).flatten(2), self.second(second).flatten(2)
        return first @ second.mT / first.shape[2]


class FSP(Distiller):
    r"""A Gift from Knowledge Distillation: Fast Optimization, Network Minimization and Transfer Learning.

    .. math:: L_{before} = w_{fsp} \sum_l \operatorname{MSE}(G_s^l, G_t^l),
        \quad G^l_{cd} = \operatorname{mean}_{hw} f^l_{chw} f^{l+1}_{dhw},
        \quad L = w_{ce} H(y, p_s) + w_{kd} T^2 KL(p_t^{(T)} \| p_s^{(T)})

    G says how the maps of two following stages go together, the "flow of solution procedure". For some epochs before
    training, the student up to its last map minimises the first loss by SGD with a constant learning rate; then it
    trains on L. These epochs come on top of the training's. G grows with the square of the maps, so gradients in that
    phase are cut to a length of 5 together.

    The finer of both maps in G is average-pooled to the coarser, as in RepDistiller; the paper takes maxima. G must be
    of one shape for both networks: where the widths of a stage differ, a 1x1 convolution, trained in that phase and
    then thrown away, first brings the student's map to the teacher's width. RepDistiller refuses such pairs.

    Args:
        ce: weight of the cross-entropy with the ground truth.
        kd: weight of the distillation of logits.
        fsp: weight of the loss before training; 0 leaves that phase out.
        temperature: T of the distillation of logits.
        epochs: how long the phase before training is; RepDistiller takes 30 before 240 of training.
        lr: its learning rate.
        stages: two or more stages, shallow to deep; each is compared with the next.

    Source: Yim et al. 2017, eq. 1 and 2; phase and defaults of RepDistiller, ``distiller_zoo/FSP.py``,
    ``helper/pretrain.py`` and ``train_student.py``.
    """

    paper = "doi:10.1109/CVPR.2017.754"
    fidelity = Fidelity.ADAPTED

    def __init__(
        self,
        *,
        ce: float = 1.0,
        kd: float = 0.0,
        fsp: float = 1.0,
        temperature: float = 4.0,
        epochs: int = 5,
        lr: float = 0.05,
        stages: tuple[int, ...] = (0, 1, 2, 3),
    ):
        super().__init__(ce=ce, kd=kd, fsp=fsp)
        if not kd:  # after the phase before training, labels alone are left to learn from
            self.label_terms = ("ce", "fsp")
        self.temperature, self.lr = positive(temperature=temperature), positive(lr=lr)
        self.epochs, self.stages = at_least(1, epochs=epochs), stages

    def build(self, student: Output, teacher: Output, data: DataSpec) -> None:
        self.stages = check_stages(self.stages, student, teacher)
        if len(self.stages) < 2:
            raise UserError(f"stages {self.stages}: expected at least two, of which each is compared with the next")
        self.widths = [(f_s.shape[1], f_t.shape[1]) for f_s, f_t in paired_features(student, teacher, self.stages)]
        self.student_flows, self.teacher_flows = (
            nn.ModuleList(Flow(output.features[a], output.features[b]) for a, b in pairwise(self.stages))
            for output in (student, teacher)
        )

    def prepare(self, student: NetworkView, teacher: NetworkView, batches: Iterable[Batch]) -> None:
        """Train the student up to its last map on the teacher's flows."""
        if not self.is_active:
            return
        weights = list(student.network.parameters())
        projectors = nn.ModuleList(nn.Conv2d(a, b, 1, bias=False) if a != b else nn.Identity() for a, b in self.widths)
        projectors.to(weights[0].device)

        def loss(batch: Batch) -> Tensor:
            reference = teacher(batch.images)
            return self.weights["fsp"] * self.error(student(batch.images), reference, projectors)

        fit([*weights, *projectors.parameters()], loss, batches, epochs=self.epochs, lr=self.lr)

    def error(self, student: Output, teacher: Output, projectors: Iterable[nn.Module]) -> Tensor:
        """Sum the mean squared errors of the flows: a scalar."""
        s_maps = [project(student.features[l]) for l, project in zip(self.stages, projectors, strict=True)]
        t_maps = [teacher.features[l] for l in self.stages]
        pairs = zip(pairwise(s_maps), pairwise(t_maps), self.student_flows, self.teacher_flows, strict=True)
        return torch.stack([F.mse_loss(flow_s(*s), flow_t(*t)) for s, t, flow_s, flow_t in pairs]).sum()

    def loss(self, student: Output, teacher: Output, batch: Batch) -> dict[str, Tensor]:
        return self.weigh(
            ce=lambda: cross_entropy(student.logits, batch.targets),
            kd=lambda: softened_kl(student.logits, teacher.logits, self.temperature),
        )
