"""HCD: stages of the student, joined with the teacher's embedding, make several targets that differ from each other."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kdzoo import Batch, DataSpec, Distiller, Fidelity, Output
from kdzoo.connectors import check_stages, stage_projector
from kdzoo.keywords import at_least, between, positive
from kdzoo.losses import cross_entropy, row_kl, softened_kl, true_class


def overlap(logits: Tensor, target: Tensor, threshold: float) -> Tensor:
    """Penalise cosines above ``threshold`` between rows of logits (..., B, k, K), squared, mean over pairs and B.

    The true class, ``target`` (B, K) bool, is set to 0 before.
    """
    unit = F.normalize(logits.masked_fill(target[:, None], 0), dim=-1, eps=1e-6)
    parts = unit.shape[-2]
    same = torch.eye(parts, dtype=torch.bool, device=unit.device)
    excess = (unit @ unit.mT - threshold).relu().square().masked_fill(same, 0)
    return excess.mean() * (parts / (parts - 1))


class Mapper(nn.Module):
    """Maps a stage of the student and the teacher's embedding to logits: (B, C, H, W), (B, D) -> (B, parts, classes).

    Args:
        inputs: C.
        halvings: stages that are still to come.
        width: numbers of the student's half.
        embedding: D, also the width of the hidden layer.
        parts: how many logits each class gets.
        classes: K.
    """

    def __init__(self, inputs: int, halvings: int, width: int, embedding: int, parts: int, classes: int):
        super().__init__()
        self.shape = (parts, classes)
        self.project = stage_projector(inputs, halvings, width)
        self.layers = nn.Sequential(
            nn.Linear(width + embedding, embedding), nn.ReLU(), nn.Linear(embedding, parts * classes)
        )

    def forward(self, maps: Tensor, embedding: Tensor) -> Tensor:
        return self.layers(torch.cat([self.project(maps), embedding], dim=1)).unflatten(1, self.shape)


class HCD(Distiller):
    r"""Heterogeneous Complementary Distillation.

    .. math:: L = w_{ce} H(y, p_s) + w_{kd} T^2 KL(p_t \| p_s) + \sum_l \operatorname{mean}_j \big(
        w_{fused} H(y, \operatorname{softmax} v_{lj}) + w_{hcd} T^2 KL(\operatorname{softmax}(v_{lj} / T) \| p_s) \big)
        + w_{diversity} \sum_l \operatorname{mean}_{j \ne j'} \max(0, \cos(v_{lj}, v_{lj'}) - \theta)^2

    v_lj = u_lj + z_t are the teacher's logits with a part added that a mapper makes of the student's stage l (as
    ``ofa``'s projectors do, without their classifier) and the teacher's embedding: one hidden layer, as wide as that
    embedding. Cosines leave the true class out, which is the largest of the batch's targets.

    As in the authors' code, stages are summed, and the gradient of ``hcd`` reaches the mappers too, so that the targets
    move towards the student. Differs from it in that weights start as PyTorch's do, and that every student has maps, as
    in ``ofa``.

    Args:
        ce: weight of the cross-entropy with the ground truth.
        kd: weight of the distillation of the teacher's own logits.
        hcd: weight of the distillation of the fused logits; the authors choose it by pair.
        fused: weight of the cross-entropy of the fused logits with the ground truth.
        diversity: weight of the penalty on fused logits that resemble each other.
        temperature: T, which softens the distributions of ``kd`` and ``hcd``.
        parts: how many fused logits a stage has.
        threshold: theta, the cosine from which fused logits resemble each other.
        detach_target: whether ``hcd`` trains the student alone, and not the mappers.
        stages: which stages have a mapper.

    Source: Xu et al. 2025, read in a third party's port that names yema-web/HCD as its source.
    """

    paper = "arXiv:2511.10942"
    fidelity = Fidelity.ADAPTED
    label_terms = ("ce", "fused", "diversity")

    def __init__(
        self,
        *,
        ce: float = 1.0,
        kd: float = 1.0,
        hcd: float = 6.0,
        fused: float = 1.0,
        diversity: float = 1.0,
        temperature: float = 1.0,
        parts: int = 4,
        threshold: float = 0.5,
        detach_target: bool = False,
        stages: tuple[int, ...] = (0, 1, 2, 3),
    ):
        super().__init__(ce=ce, kd=kd, hcd=hcd, fused=fused, diversity=diversity)
        self.temperature, self.parts = positive(temperature=temperature), at_least(2, parts=parts)
        self.threshold = between(-1.0, 1.0, threshold=threshold)
        self.detach_target, self.stages = detach_target, stages

    def build(self, student: Output, teacher: Output, data: DataSpec) -> None:
        check_stages(self.stages, student, student)  # of the teacher only logits and embedding are read
        last, embedding = len(student.features) - 1, teacher.embedding.shape[1]
        width = max(student.embedding.shape[1], embedding)
        self.mappers = nn.ModuleList(
            Mapper(student.features[stage].shape[1], last - stage, width, embedding, self.parts, data.num_classes)
            for stage in self.stages
        )

    def loss(self, student: Output, teacher: Output, batch: Batch) -> dict[str, Tensor]:
        z_s, targets = student.logits, batch.targets
        terms = self.weigh(
            ce=lambda: cross_entropy(z_s, targets),
            kd=lambda: softened_kl(z_s, teacher.logits, self.temperature),
        )
        if not self.is_active:
            return terms
        logits, stages = self.fuse(student, teacher), len(self.stages)  # stages are summed: so many times the mean
        return terms | self.weigh(
            hcd=lambda: stages * self.divergence(z_s, logits.detach() if self.detach_target else logits),
            fused=lambda: stages * cross_entropy(*alike(logits, targets)),
            diversity=lambda: stages * overlap(logits, true_class(targets), self.threshold),
        )

    def fuse(self, student: Output, teacher: Output) -> Tensor:
        """Add the mappers' logits to the teacher's: (L, B, k, K)."""
        maps = [student.features[stage] for stage in self.stages]
        made = [mapper(each, teacher.embedding) for each, mapper in zip(maps, self.mappers, strict=True)]
        return torch.stack(made) + teacher.logits[:, None]

    def divergence(self, student: Tensor, logits: Tensor) -> Tensor:
        """Compute T^2 KL of the student's logits (B, K) from each of (L, B, k, K), mean over all."""
        target, own = alike(logits / self.temperature, student / self.temperature)
        return row_kl(own, target).mean() * self.temperature**2


def alike(logits: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Repeat ``rows`` (B, K) for all logits (L, B, k, K): both (L * B * k, K)."""
    return logits.flatten(0, 2), rows[:, None].expand_as(logits).flatten(0, 2)
