"""PAD: the student's embedding predicts the teacher's, and learns for which images this is too hard to insist on."""

import torch
from torch import Tensor, nn

from kdzoo import Batch, DataSpec, Distiller, Fidelity, Needs, Output
from kdzoo.keywords import share
from kdzoo.losses import cross_entropy


def uncertain_error(student: Tensor, teacher: Tensor, log_variance: Tensor) -> Tensor:
    """Average (s - t)^2 / variance + log variance over all numbers of embeddings (B, D); 1e-6 is added to variances."""
    return ((student - teacher).square() / (log_variance.exp() + 1e-6) + log_variance).mean()


class PAD(Distiller):
    r"""Prime-Aware Adaptive Distillation, the form with squared errors of embeddings.

    .. math:: L = w_{ce} H(y, p_s) + w_{pad} \operatorname{mean}_{bd}
        \frac{(e_{s,bd} - e_{t,bd})^2}{\sigma_{bd}^2 + 10^{-6}} + \log \sigma_{bd}^2

    log sigma^2 is linear in the student's embedding, then batch norm. An image with a large variance counts less, so
    "prime" ones count more. During ``warmup`` the variance is 1. Where the embeddings' widths differ, the student's is
    first brought to the teacher's by a linear map, which is ours.

    The authors first train on plain squared errors and then fine-tune with variances; torchdistill, whose form this is
    and which had the authors' code for reference, takes 30 epochs for the second part.

    Args:
        ce: weight of the cross-entropy with the ground truth.
        pad: weight of the embeddings' term.
        warmup: share of training with a variance of 1.

    Source: Zhang et al. 2020; form and weights of torchdistill, ``torchdistill/losses/mid_level.py``,
    ``torchdistill/models/wrapper.py`` and its configuration ``pad_l2-resnet18_from_resnet34.yaml``.
    """

    paper = "arXiv:2008.01458"
    fidelity = Fidelity.ADAPTED
    needs = Needs(logits=False, features=False)

    def __init__(self, *, ce: float = 1.0, pad: float = 1.0, warmup: float = 0.5):
        super().__init__(ce=ce, pad=pad)
        self.warmup = share(warmup=warmup)

    def build(self, student: Output, teacher: Output, data: DataSpec) -> None:
        inputs, width = student.embedding.shape[1], teacher.embedding.shape[1]
        self.embed = nn.Identity() if inputs == width else nn.Linear(inputs, width)
        self.log_variance = nn.Sequential(nn.Linear(inputs, width), nn.BatchNorm1d(width))

    def loss(self, student: Output, teacher: Output, batch: Batch) -> dict[str, Tensor]:
        return self.weigh(
            ce=lambda: cross_entropy(student.logits, batch.targets),
            pad=lambda: self.error(student.embedding, teacher.embedding, batch.progress),
        )

    def error(self, student: Tensor, teacher: Tensor, progress: Tensor) -> Tensor:
        """Compute the error of embeddings (B, D_s) and (B, D_t) at this share of training: a scalar."""
        predicted, log_variance = self.embed(student), self.log_variance(student)
        return uncertain_error(predicted, teacher, torch.where(progress < self.warmup, 0.0, log_variance))
