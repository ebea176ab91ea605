"""FBT: a network of the student's first stages and the teacher's last stands between the two."""

from math import gcd, log

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kdzoo import Batch, DataSpec, Distiller, Fidelity, Needs, NetworkView, Output
from kdzoo.connectors import Resize, check_stages
from kdzoo.keywords import one_of, positive
from kdzoo.losses import cross_entropy, info_nce, ofa_loss, true_class

THIRD, LAST = 2, 3  # the stage after which the other network takes over, and the one that it begins with
SHARPEST = log(100)  # of the learned scale of similarities, as CLIP has it


class Local2Global(nn.Module):
    """From the map of one network to another's: embedded patches, one transformer block that mixes them, a norm.

    (B, C, H, W) -> (B, C', H', W').

    Args:
        source: the map, of which only the shape is read.
        target: the other network's, of which only the shape is read.
    """

    def __init__(self, source: Tensor, target: Tensor):
        super().__init__()
        (inputs, *grid), (width, *self.size) = source.shape[1:], target.shape[1:]
        patch = max(1, grid[0] // self.size[0]), max(1, grid[1] // self.size[1])
        self.resize = Resize(grid, [patch[0] * self.size[0], patch[1] * self.size[1]])
        self.patches = nn.Conv2d(inputs, width, patch, patch)
        heads = gcd(width, max(1, width // 32))
        self.block = nn.TransformerEncoderLayer(
            width, heads, 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.norm = nn.LayerNorm(width)

    def forward(self, maps: Tensor) -> Tensor:
        tokens = self.patches(self.resize(maps)).flatten(2).mT
        return self.norm(self.block(tokens)).mT.unflatten(2, self.size)


class FBT(Distiller):
    r"""Fuse Before Transfer: Knowledge Fusion for Heterogeneous Distillation.

    .. math:: L = w_{ce} H(y, p_s) + w_{fused} H(y, p_f) + w_{transfer} D(t, s) + w_{fuse} D(t, f) + w_{hand} D(f, s),
        \quad D(i, j) = \operatorname{InfoNCE}(e_j, e_i; \tau) + A(p_i, p_j)

    f is the fused network: the student's first three stages, a projector, and the teacher's last stage and classifier,
    frozen, which are the very modules of both. e are embeddings; the student's goes through a linear layer where widths
    differ. InfoNCE pulls the two embeddings of an image together and pushes those of other images apart, with a learned
    temperature. A is the loss of OFA, in which the true class is raised by the power ``eps``.

    The paper's text and code could not be read; two notes on it agree on the formula. These pieces are choices: what
    teaches in D carries no gradient (the fused network too, when it teaches); the projector mixes all patches, where
    the paper's block has windows, and ends with a layer norm, as the frozen stage behind it bounds nothing (without it
    the loss grew beyond all numbers, resnet8x4 -> resnet8, SGD at 0.05); maps are resized to whole patches; which
    network comes first is a keyword (the paper lets convolutions come before attention and MLPs); temperature, eps and
    weights are those of relatives.

    Memory: the graph of the fused network's last stage is kept too, 6 MB in all for each image of 32 pixels (resnet32x4
    -> resnet8x4), where kd keeps 2.6 MB.

    Args:
        ce: weight of the student's cross-entropy with the ground truth.
        fused: weight of the fused network's.
        transfer: weight of D from teacher to student.
        fuse: weight of D from the teacher to the fused network.
        hand: weight of D from the fused network to the student.
        eps: the power that raises the true class.
        tau: the temperature of InfoNCE at first.
        first: whose first three stages the fused network has: "student", or "teacher", for a student of tokens under a
            convolutional teacher.

    Source: Li et al. 2025, as described in notes on the paper.
    """

    paper = "arXiv:2410.12342"
    fidelity = Fidelity.RECONSTRUCTED
    label_terms = ("ce", "fused", "transfer", "fuse", "hand")

    def __init__(
        self,
        *,
        ce: float = 1.0,
        fused: float = 1.0,
        transfer: float = 1.0,
        fuse: float = 1.0,
        hand: float = 1.0,
        eps: float = 1.0,
        tau: float = 0.07,
        first: str = "student",
    ):
        super().__init__(ce=ce, fused=fused, transfer=transfer, fuse=fuse, hand=hand)
        self.eps, self.tau = positive(eps=eps), positive(tau=tau)
        self.first = one_of(("student", "teacher"), first=first)
        if self.is_active:
            self.needs = Needs(stages=("teacher" if first == "student" else "student",))

    def build(self, student: Output, teacher: Output, data: DataSpec) -> None:
        check_stages((THIRD, LAST), student, teacher)
        early, late = (student, teacher) if self.first == "student" else (teacher, student)
        self.projector = Local2Global(early.features[THIRD], late.features[THIRD])
        widths = student.embedding.shape[1], teacher.embedding.shape[1]
        self.embed = nn.Identity() if widths[0] == widths[1] else nn.Linear(*widths)
        self.log_scale = nn.Parameter(torch.tensor(-log(self.tau)))

    def forward(self, student: NetworkView, teacher: NetworkView, batch: Batch) -> dict[str, Tensor]:
        t, s = teacher(batch.images), student(batch.images)
        terms = self.loss(s, t, batch)
        if not self.is_active:
            return terms
        if self.first == "student":
            f = teacher.run_from(LAST, self.projector(s.features[THIRD]))
        else:
            f = student.run_from(LAST, self.projector(t.features[THIRD]))
            f = f._replace(embedding=self.embed(f.embedding))
        s = s._replace(embedding=self.embed(s.embedding))
        given = true_class(batch.targets), self.scale()

        return terms | self.weigh(
            fused=lambda: cross_entropy(f.logits, batch.targets),
            transfer=lambda: self.teach(t, s, *given),
            fuse=lambda: self.teach(t, f, *given),
            hand=lambda: self.teach(f, s, *given),
        )

    def loss(self, student: Output, teacher: Output, batch: Batch) -> dict[str, Tensor]:
        return self.weigh(ce=lambda: cross_entropy(student.logits, batch.targets))

    def scale(self) -> Tensor:
        """Compute 1 / tau: a scalar, at most 100."""
        return self.log_scale.clamp(max=SHARPEST).exp()

    def teach(self, source: Output, learner: Output, target: Tensor, scale: Tensor) -> Tensor:
        """Compute D from ``source`` to ``learner``, given the true classes (B, K) bool."""
        keys = F.normalize(source.embedding.detach(), dim=1)
        contrast = info_nce(scale * F.normalize(learner.embedding, dim=1), keys, 1.0)
        return contrast + ofa_loss(learner.logits, source.logits.detach(), target, self.eps)
