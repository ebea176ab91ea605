"""FD-CMKD: slow changes along the embedding are matched closely, fast ones loosely, and both share a classifier."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kdzoo import Batch, DataSpec, Distiller, Fidelity, Needs, Output
from kdzoo.keywords import one_of, share
from kdzoo.losses import cross_entropy

BANDS = ("low", "high")


def bands(embedding: Tensor, cut: float) -> tuple[Tensor, Tensor]:
    """Split embeddings (B, D) into the low and the high frequencies along D, without their mean: (B, D) each.

    ``cut`` is the share of frequencies that is low, rounded up.
    """
    width, spectrum = embedding.shape[1], torch.fft.rfft(embedding)
    frequency, highest = torch.arange(spectrum.shape[1], device=embedding.device), math.ceil(width // 2 * cut)
    masks = (frequency > 0) & (frequency <= highest), frequency > highest
    low, high = (torch.fft.irfft(spectrum * mask, width) for mask in masks)
    return low, high


def direction_error(student: Tensor, teacher: Tensor, loose: bool) -> Tensor:
    """Compute the mean squared error of vectors (B, D) of length 1, or of sign(x) log(1 + |x|) of their numbers."""
    s, t = (F.normalize(vectors, eps=1e-6) for vectors in (student, teacher))
    if loose:
        s, t = (x.sign() * x.abs().log1p() for x in (s, t))
    return F.mse_loss(s, t)


class FDCMKD(Distiller):
    r"""Distilling Cross-Modal Knowledge via Feature Disentanglement (FD-CMKD), carried over to one modality.

    .. math:: L = w_{ce} H(y, p_s) + w_{low} \operatorname{MSE}(u(l_s), u(l_t))
        + w_{high} \operatorname{MSE}(\log u(h_s), \log u(h_t))
        + \sum_{b \in \{l, h\}} w_{shared} \big(H(y, C_b b_s) + H(y, C_b b_t)\big) + w_{own} H(y, D_b b_s)

    l and h are the low and high half of the frequencies of the embedding along its own numbers, without their mean; u
    takes a vector to length 1, log x = sign(x) log(1 + abs x), and C and D are ReLU and a linear layer. The first error
    is (2 - 2 cos) / D, a mean over D numbers, so both are small; the authors give every term the weight 1.

    The order of an embedding's numbers means nothing, so a frequency along it means no more. docs/frequency.md shows
    that over all orders either half is the centred embedding's, in its share; ``order="random"`` is the control.

    Carried over from networks that hear and see:

    - Where the widths differ, a linear map takes the student's embedding to the teacher's first.
    - Embeddings are those that the classifiers read, where the authors pool the last map before its ReLU.
    - One teacher teaches one student, where theirs teach each other's student.

    Args:
        ce: weight of the cross-entropy with the ground truth.
        low: weight of the slow changes' error.
        high: weight of the fast changes' error.
        shared: weight of the classifiers that both networks share, one for each band.
        own: weight of the student's own classifiers of its bands.
        cut: share of the frequencies that is low.
        order: of an embedding's numbers, "network" or "random", drawn once for each network.

    Source: Liu et al. 2026 (AAAI); ``main_fd_cmkd.py`` and ``utils/utils.py`` of zxn0710/re-FD-CMKD-main, a copy of
    the authors' code, as theirs was not available.
    """

    paper = "arXiv:2511.19887"
    fidelity = Fidelity.ADAPTED
    label_terms = ("ce", "shared", "own")
    needs = Needs(features=False)

    def __init__(
        self,
        *,
        ce: float = 1.0,
        low: float = 1.0,
        high: float = 1.0,
        shared: float = 1.0,
        own: float = 1.0,
        cut: float = 0.5,
        order: str = "network",
    ):
        super().__init__(ce=ce, low=low, high=high, shared=shared, own=own)
        self.cut, self.order = share(cut=cut), one_of(("network", "random"), order=order)

    def build(self, student: Output, teacher: Output, data: DataSpec) -> None:
        inputs, width = student.embedding.shape[1], teacher.embedding.shape[1]
        self.projector = nn.Identity() if inputs == width else nn.Linear(inputs, width)
        for role in ("student", "teacher"):
            order = torch.randperm(width) if self.order == "random" else torch.arange(width)
            self.register_buffer(f"{role}_order", order)
        for kind in ("shared", "own"):
            if self.weights[kind]:
                heads = {band: nn.Sequential(nn.ReLU(), nn.Linear(width, data.num_classes)) for band in BANDS}
                self.add_module(kind, nn.ModuleDict(heads))

    def loss(self, student: Output, teacher: Output, batch: Batch) -> dict[str, Tensor]:
        if not self.is_active:
            return self.weigh(ce=lambda: cross_entropy(student.logits, batch.targets))
        low_s, high_s = bands(self.projector(student.embedding)[:, self.get_buffer("student_order")], self.cut)
        low_t, high_t = bands(teacher.embedding[:, self.get_buffer("teacher_order")], self.cut)
        return self.weigh(
            ce=lambda: cross_entropy(student.logits, batch.targets),
            low=lambda: direction_error(low_s, low_t, loose=False),
            high=lambda: direction_error(high_s, high_t, loose=True),
            shared=lambda: (
                self.classified("shared", (low_s, high_s), batch.targets)
                + self.classified("shared", (low_t, high_t), batch.targets)
            ),
            own=lambda: self.classified("own", (low_s, high_s), batch.targets),
        )

    def classified(self, kind: str, seen: tuple[Tensor, Tensor], targets: Tensor) -> Tensor:
        """Sum the cross-entropies of both classifiers of this ``kind``, for the low and the high band (B, D)."""
        heads = (self.get_submodule(f"{kind}.{band}") for band in BANDS)
        return torch.stack([cross_entropy(head(band), targets) for head, band in zip(heads, seen, strict=True)]).sum()
