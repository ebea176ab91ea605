"""LDRLD: each two of the student's likeliest classes are told apart as the teacher does, near pairs above all."""

import torch
from torch import Tensor
from torch.nn import functional as F

from kdzoo import Batch, DataSpec, Distiller, Fidelity, Needs, Output
from kdzoo.keywords import at_least, positive
from kdzoo.losses import cross_entropy, other_classes_loss, row_kl


def pair_weights(depth: int) -> tuple[Tensor, Tensor]:
    """List the pairs of ranks below ``depth``, (2, P) int64, and their weights, (P,).

    With ranks r from 1 a weight is 2 exp(-0.05 (r + r')) / (\\|r - r'\\| + 1.5).
    """
    pairs = torch.triu_indices(depth, depth, offset=1)
    low, high = pairs.double() + 1
    return pairs, 2 * (-0.05 * (low + high)).exp() / (high - low + 1.5)


def pair_loss(student: Tensor, teacher: Tensor, pairs: Tensor, weights: Tensor) -> Tensor:
    """Sum the weighted KL between softmaxes over two classes: logits (B, d), pairs (2, P), weights (P,) -> (B,)."""
    s, t = (logits[:, pairs[0]] - logits[:, pairs[1]] for logits in (student, teacher))
    divergence = torch.zeros_like(s)
    for sign in (1, -1):
        log_s, log_t = F.logsigmoid(sign * s), F.logsigmoid(sign * t)
        divergence = divergence + log_t.exp() * (log_t - log_s)
    return divergence @ weights.to(s.dtype)


class LDRLD(Distiller):
    r"""Local Dense Logit Relations for Enhanced Knowledge Distillation, reconstructed.

    .. math:: L = w_{ce} H(y, p_s) + w_{local} T^2 \Big( \sum_{i < j \le d} \Omega_{ij} KL(p_t^{ij} \| p_s^{ij})
        + KL(p_t^{\le d} \| p_s^{\le d}) \Big) + w_{rest} T^2 KL(p_t^{> d} \| p_s^{> d}), \quad
        \Omega_{ij} = \frac{2 e^{-0.05 (i + j)}}{|i - j| + 1.5}

    i and j are ranks among the student's logits; the distributions are softmaxes over two classes, over the d that the
    student takes for likeliest, and over all others. All are means over the batch. With two classes there is one
    distribution, and the ranks only weigh it.

    The formulas and the numbers of Omega are read in a note on the paper, which has no public code. Ours are d, T with
    its square, and both weights. Ranks carry no gradient.

    Args:
        ce: weight of the cross-entropy with the ground truth.
        local: weight of the pairs and of the likeliest classes together.
        rest: weight of the distribution over the other classes.
        depth: d, or all classes where there are fewer.
        temperature: T, which softens all distributions.

    Source: Xu et al. 2025, by a note on the paper.
    """

    paper = "arXiv:2507.15911"
    fidelity = Fidelity.RECONSTRUCTED
    needs = Needs(features=False, embedding=False)

    pairs: Tensor  # (2, P) int64 ranks from 0
    pair_weights: Tensor  # (P,)

    def __init__(
        self, *, ce: float = 1.0, local: float = 1.0, rest: float = 1.0, depth: int = 7, temperature: float = 4.0
    ):
        super().__init__(ce=ce, local=local, rest=rest)
        self.depth, self.temperature = at_least(2, depth=depth), positive(temperature=temperature)

    def build(self, student: Output, teacher: Output, data: DataSpec) -> None:
        pairs, weights = pair_weights(min(self.depth, data.num_classes))
        self.register_buffer("pairs", pairs, persistent=False)
        self.register_buffer("pair_weights", weights.float(), persistent=False)

    def loss(self, student: Output, teacher: Output, batch: Batch) -> dict[str, Tensor]:
        z_s, z_t = student.logits, teacher.logits
        likeliest = z_s.topk(min(self.depth, z_s.shape[1]), dim=1).indices  # (B, d)
        return self.weigh(
            ce=lambda: cross_entropy(z_s, batch.targets),
            local=lambda: self.local_loss(z_s.gather(1, likeliest), z_t.gather(1, likeliest)),
            rest=lambda: other_classes_loss(
                z_s, z_t, torch.zeros_like(z_s, dtype=torch.bool).scatter(1, likeliest, True), self.temperature
            ),
        )

    def local_loss(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Compare the logits (B, d) of the likeliest classes, by pairs and together."""
        s, t = student / self.temperature, teacher / self.temperature
        rows = pair_loss(s, t, self.pairs, self.pair_weights) + row_kl(s, t)
        return rows.mean() * self.temperature**2
