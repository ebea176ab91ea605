"""CRD: embeddings of one image by student and teacher agree, and differ from those of other classes' images."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kdzoo import Batch, DataSpec, Distiller, Fidelity, Needs, Output
from kdzoo.errors import UserError
from kdzoo.keywords import at_least, positive, share
from kdzoo.losses import cross_entropy
from kdzoo.tensors import gather


def nce_loss(positive: Tensor, negatives: Tensor, noise: float) -> Tensor:
    """Compute the noise-contrastive loss of log-probabilities of positives (B,) and negatives (B, M), mean over B.

    -log h(positive) - sum log(1 - h(negative)), where h(p) = p / (p + noise) is the chance that p is no noise.
    """
    return (F.softplus(math.log(noise) - positive) + F.softplus(negatives - math.log(noise)).sum(dim=1)).mean()


def draw_others(group: Tensor, counts: Tensor, starts: Tensor, number: int) -> Tensor:
    """Draw for each row as many places outside its group, all different while there are enough: (B, number).

    The places of all groups lie one after the other. Of those outside, in order and from a random place on, one is
    drawn from each of ``number`` equal stretches, so each is drawn with the same chance. Where there are fewer,
    each is drawn about equally often.

    Args:
        group: (B,) int64, the group of each row.
        counts: (G,) int64, the places of each group.
        starts: (G,) int64, the first of them.
        number: how many to draw.
    """
    count, start = counts[group, None], starts[group, None]
    others = counts.sum() - count
    stretch = torch.arange(number + 1, device=group.device) * others // number
    first, size = stretch[:, :-1], stretch.diff(dim=1)
    place = first + (torch.rand(first.shape, device=group.device) * size).long()
    turn = (torch.rand(others.shape, device=group.device) * others).long()
    place = (place + turn) % others
    return torch.where(place < start, place, place + count)


class CRD(Distiller):
    r"""Contrastive Representation Distillation.

    .. math:: L = w_{ce} H(y, p_s) - w_{crd} \sum_{(u, m)} \operatorname{mean}_i \left[\log h(u_i \cdot m_i)
        + \sum_{j \in N_i} \log(1 - h(u_i \cdot m_j))\right],
        \quad h(x) = \frac{e^{x / \tau} / Z}{e^{x / \tau} / Z + M / N}

    u are the batch's embeddings under a trained linear map, of length 1; m, a memory of the other network's, one row
    for each of the N images of training, which u enters by a moving average after each step. The sum has both
    directions. N_i are M images of other classes. Z is N times the mean of exp(x / tau) over the first batch.
    Embeddings of any two widths compare; no map is read.

    As the authors' loader does, negatives are drawn without repetition from other classes, where there are that many;
    ours are spread evenly over these classes. Scores against all N rows are computed, which costs less than to copy
    M rows for each image. ``batch.index`` must be the images' rows of the training set.

    Args:
        ce: weight of the cross-entropy with the ground truth.
        crd: weight of the contrast of both directions.
        negatives: M.
        tau: divides the dot products.
        momentum: share of the old row where the memory is renewed.
        width: numbers of an embedding.

    Source: Tian, Krishnan and Isola 2020, eq. 18; the authors' RepDistiller, ``crd/memory.py``,
    ``crd/criterion.py`` and ``dataset/cifar100.py``.
    """

    paper = "arXiv:1910.10699"
    fidelity = Fidelity.EXACT
    needs = Needs(logits=False, labels=True, features=False)
    toy_settings = {"negatives": 64}  # noqa: RUF012 (never written to)

    memory_s: Tensor  # (N, width), and so memory_t
    memory_t: Tensor
    log_z: Tensor  # (2,): of the student's scores against memory_t and the reverse; -inf before the first batch
    labels: Tensor  # (N,)
    order: Tensor  # (N,) rows sorted by class
    counts: Tensor  # (K,) rows of each class
    starts: Tensor  # (K,) where they start in that order

    def __init__(
        self,
        *,
        ce: float = 1.0,
        crd: float = 0.8,
        negatives: int = 16384,
        tau: float = 0.07,
        momentum: float = 0.5,
        width: int = 128,
    ):
        super().__init__(ce=ce, crd=crd)
        self.negatives, self.width = at_least(1, negatives=negatives), at_least(1, width=width)
        self.tau, self.momentum = positive(tau=tau), share(momentum=momentum)
        if momentum == 1:
            raise UserError("momentum=1: expected a share below 1, or the memory never changes; 0.5 is usual")

    def build(self, student: Output, teacher: Output, data: DataSpec) -> None:
        counts = torch.bincount(data.labels, minlength=data.num_classes)
        if counts.max() == len(data.labels):
            raise UserError(f"all images of {data.name} are of one class; crd needs others to contrast them with")
        self.embed_s = nn.Linear(student.embedding.shape[1], self.width)
        self.embed_t = nn.Linear(teacher.embedding.shape[1], self.width)
        bound = math.sqrt(3 / self.width)  # of a uniform distribution whose rows have length 1 on average
        for name in ("memory_s", "memory_t"):
            self.register_buffer(name, torch.empty(len(data.labels), self.width).uniform_(-bound, bound))
        self.register_buffer("log_z", torch.full((2,), -torch.inf))
        self.register_buffer("labels", data.labels, persistent=False)
        self.register_buffer("order", data.labels.argsort(stable=True), persistent=False)
        self.register_buffer("counts", counts, persistent=False)
        self.register_buffer("starts", counts.cumsum(0) - counts, persistent=False)

    def loss(self, student: Output, teacher: Output, batch: Batch) -> dict[str, Tensor]:
        return self.weigh(
            ce=lambda: cross_entropy(student.logits, batch.targets),
            crd=lambda: self.agree(student, teacher, batch.index),
        )

    def agree(self, student: Output, teacher: Output, index: Tensor) -> Tensor:
        """Compare the batch with both memories, then update these: a scalar."""
        u_s = F.normalize(self.embed_s(student.embedding), eps=1e-6)
        u_t = F.normalize(self.embed_t(teacher.embedding), eps=1e-6)
        contrast = self.contrast(u_s, u_t, index)
        self.remember(u_s, u_t, index)
        return contrast

    def contrast(self, u_s: Tensor, u_t: Tensor, index: Tensor) -> Tensor:
        """Compute the loss in both directions, for normalised embeddings (B, width) of the images ``index`` (B,)."""
        others = self.order[draw_others(self.labels[index], self.counts, self.starts, self.negatives)]
        rows = torch.cat([index[:, None], others], dim=1)
        images = len(self.labels)
        # The copies are what the backward pass reads: the memory itself is written before.
        scores = [u_s @ self.memory_t.clone().mT / self.tau, u_t @ self.memory_s.clone().mT / self.tau]
        scores = [each.gather(1, rows) for each in scores]
        sums = gather(torch.stack([each.detach().logsumexp(dim=(0, 1)) for each in scores])[None])
        sums = sums.sort(dim=0).values  # in one order, so that every rank gets the same bits
        mean = sums.logsumexp(dim=0) - math.log(len(sums) * rows.numel())
        self.log_z.copy_(torch.where(self.log_z.isinf(), mean + math.log(images), self.log_z))
        logs = [each - log_z for each, log_z in zip(scores, self.log_z.clone(), strict=True)]
        return torch.stack([nce_loss(p[:, 0], p[:, 1:], self.negatives / images) for p in logs]).sum()

    @torch.no_grad()
    def remember(self, u_s: Tensor, u_t: Tensor, index: Tensor) -> None:
        """Move the memory of the rows ``index`` (B,), on every rank, towards embeddings (B, width)."""
        index = gather(index)
        for memory, u in ((self.memory_s, u_s), (self.memory_t, u_t)):
            mixed = self.momentum * memory[index] + (1 - self.momentum) * gather(u.detach())
            memory.index_copy_(0, index, F.normalize(mixed))
