"""WKD: moving probability from the student's classes to the teacher's costs most between unlike classes."""

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kdzoo import Batch, DataSpec, Distiller, Fidelity, Needs, NetworkView, Output
from kdzoo.connectors import BatchNorm2d, CommonGrid, check_stages
from kdzoo.errors import UserError
from kdzoo.keywords import at_least, not_negative, one_of, positive, share
from kdzoo.losses import cross_entropy, soft_target_loss, true_class
from kdzoo.spectral import apply_basis, pooling_basis
from kdzoo.tensors import all_sum

COSTS = ("maps", "logits", "classifier")


def class_distances(rows: Tensor) -> Tensor:
    """Compute 1 - linear CKA between classes, from the ``rows`` (K, N, D) of each: (K, K), 0 on the diagonal.

    Row n of one class is paired with row n of another.
    """
    rows = rows - rows.mean(dim=1, keepdim=True)
    similarity = torch.zeros(len(rows), len(rows), device=rows.device)
    for some in rows.split(16, dim=1):  # so that no more than 16 of a class's N x N products are held
        products = (some @ rows.mT).flatten(1)
        similarity += products @ products.mT
    own = similarity.diagonal().sqrt().clamp_min(1e-6)
    return (1 - similarity / own / own[:, None]).fill_diagonal_(0)


def transport_cost(student: Tensor, teacher: Tensor, start: Tensor, cost: Tensor, kernel: Tensor, steps: int) -> Tensor:
    """Compute the cost of the entropic optimal transport between distributions (B, K), by Sinkhorn's steps: (B,).

    Args:
        student: sums to 1; a class that is 0 in both takes no part.
        teacher: the same.
        start: (B, K), the scaling of the student's side before the first step.
        cost: (K, K), from the student's class to the teacher's.
        kernel: (K, K), exp(-cost / regulariser).
        steps: how often both sides are scaled.
    """
    u, v = start, start
    for _ in range(steps):
        v = teacher / (u @ kernel + 1e-8)
        u = student / (v @ kernel.mT + 1e-8)
    return (u * (v @ (kernel * cost).mT)).sum(dim=1)


def other_classes_cost(
    student: Tensor, teacher: Tensor, target: Tensor, temperature: float, cost: Tensor, kernel: Tensor, steps: int
) -> Tensor:
    """Compute the transport cost between softened distributions over the classes outside ``target`` (B, K) bool.

    Logits (B, K); mean over B.
    """
    p_s, p_t = ((z / temperature).masked_fill(target, -torch.inf).softmax(dim=1) for z in (student, teacher))
    start = (~target).to(p_s.dtype) / (p_s.shape[1] - 1)
    return transport_cost(p_s, p_t, start, cost, kernel, steps).mean()


class CellStatistics(nn.Module):
    """Mean and deviation of maps (B, C, H, W) in each of g x g cells: (B, C, g * g) each.

    Args:
        grid: H and W.
        size: g; fewer where the grid has fewer.
    """

    basis: Tensor
    unbiased: Tensor  # (g * g,) n / (n - 1) of a cell of n pixels, 1 of a single one

    def __init__(self, grid: Sequence[int], size: int):
        super().__init__()
        basis = pooling_basis(grid, [min(size, side) for side in grid])
        count = (basis > 0).sum(dim=1)
        self.register_buffer("basis", basis.float(), persistent=False)
        self.register_buffer("unbiased", count / (count - 1).clamp(min=1), persistent=False)

    def forward(self, maps: Tensor) -> tuple[Tensor, Tensor]:
        centre = maps.mean(dim=(2, 3), keepdim=True)  # so that squares stay small
        mean = apply_basis(maps - centre, self.basis)
        variance = (apply_basis((maps - centre).square(), self.basis) - mean.square()).clamp_min(0) * self.unbiased
        return mean + centre.flatten(2), (variance + 1e-5).sqrt()


def gaussian_distance(student: tuple[Tensor, Tensor], teacher: tuple[Tensor, Tensor], ratio: float) -> Tensor:
    """Compute ``ratio`` |mean_s - mean_t|^2 + |std_s - std_t|^2 of statistics (B, C, N), averaged over B and N."""
    mean, deviation = ((s - t).square().sum(dim=1).mean() for s, t in zip(student, teacher, strict=True))
    return ratio * mean + deviation


class Wasserstein(Distiller):
    r"""Wasserstein Distance Rivals Kullback-Leibler Divergence for Knowledge Distillation (WKD-L and WKD-F).

    .. math:: L = w_{ce} H(y, p_s) - w_{target} \, p_t^y \log p_s^y + w_{logit} d \sum_{ij} c_{ij} q_{ij}
        + w_{feature} d \operatorname{mean}_g \left(\rho \|\mu_s^g - \mu_t^g\|^2
        + \|\sigma_s^g - \sigma_t^g\|^2\right)

    q is the transport between both softened distributions over all classes but the true one (the largest of the batch's
    targets; so it takes three classes), by ``steps`` of Sinkhorn's iteration. c = 1 - exp(-kappa d_ij) is found before
    training from distances of the teacher's classes. mu and sigma are mean and standard deviation of each channel in
    each of g x g cells of the stage, of the student after a 1x1 convolution and batch norm, and a ReLU where the
    teacher's map has no negative number. d falls from 1 to 0 by a cosine after the share ``decay`` of training.

    As the true class has mass 0 on both sides, one matrix of costs serves all images: B K numbers for each of the
    steps, where the authors' code holds B (K - 1)^2.

    The distances of ``cost="maps"`` and ``"logits"`` pair the n-th image of one class with the n-th of another, which
    have nothing to do with each other. So what they tell is small: in the matrices that the authors publish, distances
    of different classes are 0.97 +- 0.005 on ImageNet and 0.68 +- 0.06 on CIFAR-100, where the class nearest to "bus"
    is "chair". ``"classifier"``, which their code offers too, compares the rows of the teacher's classifier.

    Differs from the authors' code:

    - Distances are of the first ``images`` images of each class, as training shows them; theirs of all, unaugmented.
    - Where grids differ, the larger map is average-pooled to the smaller height and width; theirs strides or stretches
      the convolution, and on ImageNet is a bottleneck of three.

    Args:
        ce: weight of the cross-entropy with the ground truth.
        target: weight of the true class's term, a part of WKD-L.
        logit: weight of the transport (WKD-L); the authors take 600 without WKD-F, and 25 to 30 on ImageNet.
        feature: weight of the statistics (WKD-F); the authors take 0.005 to 0.5 for maps of CNNs, whose numbers are
            small. Squares of a ViT's are thousands of times larger and need a lower weight.
        temperature: T, which softens the distributions; the authors take 2 on ImageNet.
        cost: "maps", by the positions of the last map, for which images x positions x channels x classes numbers are
            held before training; "logits", as the authors take on ImageNet; or "classifier", 1 - cosine of its rows.
        sharpness: kappa; 0 takes the distances themselves.
        regulariser: of the transport's entropy.
        steps: of Sinkhorn's iteration.
        images: of each class, that distances are computed from.
        ratio: rho, weight of the means against the deviations.
        grid: g; the authors take 4 for pairs of unlike networks.
        stage: whose maps are compared.
        decay: share of training after which both weights fall; the authors' fall once an epoch, on average half an
            epoch ahead of ours, and on ImageNet from the beginning.

    Source: Lv, Yang and Li 2024; ``mdistiller/distillers/WKD.py``, ``tools/generate_class_proto.py``,
    ``tools/generate_cost_matrix.py`` and ``configs/cifar100/wkd_lf`` of JiamingLv/WKD, resnet32x4 to resnet8x4.
    """

    paper = "arXiv:2412.08139"
    fidelity = Fidelity.EXACT
    label_terms = ("ce", "target", "logit")
    fewest_classes = 3
    logit_terms = ("ce", "target")

    costs: Tensor  # (K, K); nan before the phase that finds it, and so kernel
    kernel: Tensor  # (K, K)
    rectified: Tensor  # () bool: whether the student's map ends in a ReLU

    def __init__(
        self,
        *,
        ce: float = 1.0,
        target: float = 1.0,
        logit: float = 200.0,
        feature: float = 0.08,
        temperature: float = 8.0,
        cost: str = "maps",
        sharpness: float = 1.0,
        regulariser: float = 0.05,
        steps: int = 10,
        images: int = 10,
        ratio: float = 8.0,
        grid: int = 1,
        stage: int = 3,
        decay: float = 150 / 240,
    ):
        super().__init__(ce=ce, target=target, logit=logit, feature=feature)
        self.temperature, self.regulariser = positive(temperature=temperature), positive(regulariser=regulariser)
        self.cost, self.sharpness = one_of(COSTS, cost=cost), not_negative(sharpness=sharpness)
        self.steps, self.images = at_least(1, steps=steps), at_least(2, images=images)
        self.ratio, self.grid = not_negative(ratio=ratio), at_least(1, grid=grid)
        self.stage, self.decay = stage, share(decay=decay)
        if not feature and not (logit and cost == "maps"):
            self.needs = Needs(features=False, embedding=False)

    def build(self, student: Output, teacher: Output, data: DataSpec) -> None:
        if self.weights["logit"]:
            for name in ("costs", "kernel"):
                self.register_buffer(name, torch.full((data.num_classes, data.num_classes), torch.nan))
        if self.weights["feature"]:
            check_stages((self.stage,), student, teacher)
            f_s, f_t = student.features[self.stage], teacher.features[self.stage]
            self.pool = CommonGrid(f_s, f_t)
            self.statistics = CellStatistics(self.pool.size, self.grid)
            self.projector = nn.Sequential(nn.Conv2d(f_s.shape[1], f_t.shape[1], 1), BatchNorm2d(f_t.shape[1]))
            self.register_buffer("rectified", torch.tensor(False))

    @torch.no_grad()
    def prepare(self, student: NetworkView, teacher: NetworkView, batches: Iterable[Batch]) -> None:
        """Find the costs between classes, and whether the teacher's map has negative numbers."""
        if self.weights["logit"]:
            distances = self.cosines(teacher) if self.cost == "classifier" else self.measured(teacher, batches)
            bent = 1 - (-self.sharpness * distances).exp() if self.sharpness else distances
            self.costs.copy_(bent.relu() + 1e-8)
            self.kernel.copy_((-self.costs / self.regulariser).exp())
        if self.weights["feature"]:
            self.rectified.copy_((teacher(next(iter(batches)).images).features[self.stage] >= 0).all())

    def cosines(self, teacher: NetworkView) -> Tensor:
        """Compute 1 - the cosine of each two rows of the teacher's classifier: (K, K)."""
        if teacher.classifier is None:
            raise UserError(
                "cost=classifier reads the rows of a linear classifier, and the teacher has none; choose cost=logits"
            )
        rows = F.normalize(teacher.classifier.weight.float())
        return 1 - rows @ rows.mT

    def measured(self, teacher: NetworkView, batches: Iterable[Batch]) -> Tensor:
        """Compute the distances between classes from the teacher's outputs for some images of each: (K, K).

        A class without images is as far from all others as can be.
        """
        kept: list[list[Tensor]] = [[] for _ in self.costs]  # by class, an entry (N, D) for each image
        for batch in batches:
            seen = teacher(batch.images)
            rows = seen.logits[:, None] if self.cost == "logits" else seen.features[-1].flatten(2).mT
            for row, label in zip(rows, batch.labels.tolist(), strict=True):
                if len(kept[label]) < self.images:
                    kept[label].append(row.clone())
            if min(map(len, kept)) == self.images:
                break
        fewest = min(len(found) for found in kept if found)
        empty = [torch.zeros_like(row)] * fewest
        distances = class_distances(torch.stack([torch.cat((found or empty)[:fewest]) for found in kept]))
        return all_sum(distances) / all_sum(torch.ones((), device=distances.device))

    def loss(self, student: Output, teacher: Output, batch: Batch) -> dict[str, Tensor]:
        late = (batch.progress - self.decay).clamp(min=0) / max(1 - self.decay, 1e-9)
        decay = (1 + (math.pi * late).cos()) / 2
        return self.weigh(
            ce=lambda: cross_entropy(student.logits, batch.targets),
            target=lambda: soft_target_loss(student.logits, teacher.logits, true_class(batch.targets)),
            logit=lambda: decay * self.transport(student.logits, teacher.logits, true_class(batch.targets)),
            feature=lambda: decay * self.gap(student.features[self.stage], teacher.features[self.stage]),
        )

    def transport(self, student: Tensor, teacher: Tensor, target: Tensor) -> Tensor:
        """Compute the transport cost of logits (B, K) outside ``target`` (B, K) bool: a scalar."""
        return other_classes_cost(student, teacher, target, self.temperature, self.costs, self.kernel, self.steps)

    def gap(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Compare the statistics of maps (B, C_s, H, W) and (B, C_t, H, W): a scalar."""
        f_s, f_t = self.pool(student, teacher)
        f_s = self.projector(f_s)
        f_s = torch.where(self.rectified, f_s.relu(), f_s)
        return gaussian_distance(self.statistics(f_s), self.statistics(f_t), self.ratio)
