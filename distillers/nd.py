"""ND: the student's embedding grows long in the direction of the teacher's mean for the class."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kdzoo import Batch, DataSpec, Distiller, Fidelity, Needs, NetworkView, Output
from kdzoo.keywords import fraction, positive, share
from kdzoo.losses import cross_entropy, softened_kl, warm_up
from kdzoo.tensors import all_sum


def norm_direction_loss(student: Tensor, teacher: Tensor, directions: Tensor) -> Tensor:
    """Compute 1 - <e_s, c> / max(|e_s|, |e_t|) of embeddings (B, D) and directions c (B, D), mean over the batch."""
    longest = torch.maximum(student.norm(dim=1), teacher.norm(dim=1)).clamp_min(1e-6)
    return (1 - (student * directions).sum(dim=1) / longest).mean()


class ND(Distiller):
    r"""Improving Knowledge Distillation via Regularizing Feature Norm and Direction (KD++).

    .. math:: L = w_{ce} H(y, p_s) + w_{kd} r \, T^2 KL(p_t^{(T)} \| p_s^{(T)})
        + w_{nd} \operatorname{mean}_i \left(1 - \frac{\langle P e_{s,i}, \hat c_{y_i} \rangle}
        {\max(\|P e_{s,i}\|, \|e_{t,i}\|)}\right)

    e is the embedding and c-hat the direction of the teacher's mean embedding of a class, by one epoch over the
    training images before training; y is the largest of the batch's targets. The term is a cosine once the student's
    embedding is as long as the teacher's, and rewards length before. P is batch norm, dropout and a linear map where
    the widths differ, and nothing where they agree. r rises from 0 to 1 over ``warmup``. A class without images has no
    direction, and a term of 1.

    The authors add the same term to other methods too (DKD++, DIST++, ReviewKD++).

    Args:
        ce: weight of the cross-entropy with the ground truth.
        nd: weight of the norm and direction term; the authors choose it by pair, from 0.5 to 4.
        kd: weight of the distillation of logits; the authors take 1 (resnet56 to resnet20) to 4, and 3.5 for resnet32x4
            to resnet8x4.
        temperature: T of the distillation of logits.
        warmup: share of training over which r rises; the authors' rises once an epoch, from 0 in the first of 240, on
            average half an epoch behind ours.
        dropout: share of the student's numbers that P drops.

    Source: Wang et al. 2023; ``CIFAR/utils.py``, ``train_cifar_kd.py``, ``train_cifar.sh``,
    ``emb_fea_distribution.py`` and ``Models/embtrans_cifar.py`` of WangYZ1608/Knowledge-Distillation-via-ND.
    """

    paper = "arXiv:2305.17007"
    fidelity = Fidelity.EXACT
    label_terms = ("ce", "nd")
    needs = Needs(features=False)

    directions: Tensor  # (K, D_t), of length 1; nan before the phase that finds them

    def __init__(
        self,
        *,
        ce: float = 1.0,
        nd: float = 2.0,
        kd: float = 1.0,
        temperature: float = 4.0,
        warmup: float = 20 / 240,
        dropout: float = 0.5,
    ):
        super().__init__(ce=ce, nd=nd, kd=kd)
        self.temperature, self.warmup = positive(temperature=temperature), share(warmup=warmup)
        self.dropout = fraction(dropout=dropout)

    def build(self, student: Output, teacher: Output, data: DataSpec) -> None:
        inputs, outputs = student.embedding.shape[1], teacher.embedding.shape[1]
        widen = nn.Sequential(nn.BatchNorm1d(inputs), nn.Dropout(self.dropout), nn.Linear(inputs, outputs))
        self.projector = nn.Identity() if inputs == outputs else widen
        self.register_buffer("directions", torch.full((data.num_classes, outputs), torch.nan))

    @torch.no_grad()
    def prepare(self, student: NetworkView, teacher: NetworkView, batches: Iterable[Batch]) -> None:
        """Sum the teacher's embeddings of each class over one epoch; of a sum only the direction counts."""
        if not self.is_active:
            return
        sums = torch.zeros_like(self.directions)
        for batch in batches:
            sums += F.one_hot(batch.labels, len(sums)).float().mT @ teacher(batch.images).embedding
        self.directions.copy_(F.normalize(all_sum(sums), eps=1e-6))

    def loss(self, student: Output, teacher: Output, batch: Batch) -> dict[str, Tensor]:
        return self.weigh(
            ce=lambda: cross_entropy(student.logits, batch.targets),
            nd=lambda: norm_direction_loss(
                self.projector(student.embedding), teacher.embedding, self.directions[batch.targets.argmax(dim=1)]
            ),
            kd=lambda: (
                warm_up(batch.progress, self.warmup) * softened_kl(student.logits, teacher.logits, self.temperature)
            ),
        )
