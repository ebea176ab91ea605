"""MLLD: predictions, similarities of images and similarities of classes agree at several temperatures."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from kdzoo import Batch, Distiller, Fidelity, Needs, NetworkView, Output
from kdzoo.keywords import each, one_of, positive
from kdzoo.losses import cross_entropy

LEVELS = ("instance", "batch", "class")


def lower_half(values: Tensor) -> Tensor:
    """Mark the ``values`` (N,) that are at most their median: (N,) bool."""
    ordered, middle = values.sort().values, len(values) // 2
    return values <= (ordered[(len(values) - 1) // 2] + ordered[middle]) / 2


def instance_loss(student: Tensor, teacher: Tensor, temperature: float, mask: Tensor | None = None) -> Tensor:
    """Compute T^2 KL of logits (B, K), mean over B, where rows outside ``mask`` (B,) count as 0."""
    log_s, log_t = (F.log_softmax(logits / temperature, dim=1) for logits in (student, teacher))
    rows = F.kl_div(log_s, log_t, reduction="none", log_target=True).sum(dim=1)
    return (rows if mask is None else rows * mask).mean() * temperature**2


def batch_loss(student: Tensor, teacher: Tensor, temperature: float, mask: Tensor) -> Tensor:
    """Compute the squared distance of Gram matrices p p' (B, B) of logits (B, K), columns in ``mask`` (B,), over B."""
    p_s, p_t = ((logits / temperature).softmax(dim=1) for logits in (student, teacher))
    return ((p_t @ p_t.mT - p_s @ p_s.mT).square() * mask).sum() / len(mask)


def class_loss(student: Tensor, teacher: Tensor, temperature: float, mask: Tensor) -> Tensor:
    """Compute the squared distance of matrices p' p (K, K) of logits (B, K), columns in ``mask`` (K,), over K."""
    p_s, p_t = ((logits / temperature).softmax(dim=1) for logits in (student, teacher))
    return ((p_t.mT @ p_t - p_s.mT @ p_s).square() * mask).sum() / len(mask)


def multi_level_loss(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    temperatures: Sequence[float],
    levels: Sequence[str] = LEVELS,
    published: bool = False,
) -> Tensor:
    """Sum the losses of all levels and temperatures, for logits (B, K) of the weak and of the strong view.

    ``published`` sums what the authors' code does: each mask is one number, the share that it keeps, and at
    temperatures 2 and 6 the weak view stands for the strong one.
    """
    certainty = teacher[0].softmax(dim=1)
    masks = [lower_half(certainty.amax(dim=1)), lower_half(certainty.sum(dim=0))]
    images, classes = (mask.to(certainty.dtype).mean().expand(len(mask)) for mask in masks) if published else masks
    parts = []
    for temperature in temperatures:
        weak, strong = (student[0], teacher[0], temperature), (student[1], teacher[1], temperature)
        if "instance" in levels:
            slips = published and temperature in (2.0, 6.0)
            parts += [instance_loss(*weak, images), instance_loss(*(weak if slips else strong))]
        if "batch" in levels:
            parts.append(batch_loss(*weak, images))
        if "class" in levels:
            parts.append(class_loss(*weak, classes))
    return torch.stack(parts).sum()


def stacked(outputs: Sequence[Output]) -> Output:
    """Join the outputs of several passes into one, along the batch."""
    return Output(torch.cat([o.logits for o in outputs]), torch.cat([o.embedding for o in outputs]), ())


class MLLD(Distiller):
    r"""Multi-level Logit Distillation.

    .. math:: L = w_{ce} \sum_v H(y, p_s^v) + w_{kd} \sum_T \Big( T^2 KL_m(p_t \| p_s)^{weak}
        + T^2 KL(p_t \| p_s)^{strong} + \tfrac{1}{B} \|G_t - G_s\|_m^2 + \tfrac{1}{K} \|M_t - M_s\|_m^2 \Big)

    G = p p' compares the images of a batch, M = p' p its classes, both of the weak view, softened by each T. The
    mask m keeps the images of whose class the teacher is less sure than the median, and the classes with less than
    the median of its probability.

    Differs from the authors' code, with which their tables were made, unless ``published`` is set:

    - It multiplies its masks with sums that are scalars already, so that they halve every term and choose nothing. We
      mask rows and columns before the sums, as the text says.
    - It takes the weak view for the strong one at T = 2 and 6. We keep the strong view.

    It adds up the other two levels of the strong view and leaves them out of the loss, and so do we.

    Args:
        ce: weight of the cross-entropy with the ground truth, the sum of both views.
        kd: weight of all levels together.
        temperatures: every T of the sum.
        levels: which of "instance", "batch" and "class" count.
        published: whether to compute what the authors' code does, for a comparison with their tables.

    Source: Jin, Wang and Lin 2023; ``mdistiller/distillers/KD_ours.py`` of Jin-Ying/Multi-Level-Logit-Distillation.
    """

    paper = "doi:10.1109/CVPR52729.2023.02325"
    fidelity = Fidelity.EXACT
    needs = Needs(features=False, embedding=False, views=("weak", "strong"))

    def __init__(
        self,
        *,
        ce: float = 0.1,
        kd: float = 0.9,
        temperatures: tuple[float, ...] = (2.0, 3.0, 4.0, 5.0, 6.0),
        levels: tuple[str, ...] = LEVELS,
        published: bool = False,
    ):
        super().__init__(ce=ce, kd=kd)
        self.temperatures = each(positive, temperatures=temperatures)
        self.levels, self.published = each(one_of, LEVELS, levels=levels), published

    def forward(self, student: NetworkView, teacher: NetworkView, batch: Batch) -> dict[str, Tensor]:
        """Run both networks once for each view; ``loss`` gets the views one below the other."""
        views = batch.views["weak"], batch.views["strong"]
        reference = stacked([teacher(view) for view in views])
        return self.loss(stacked([student(view) for view in views]), reference, batch)

    def loss(self, student: Output, teacher: Output, batch: Batch) -> dict[str, Tensor]:
        """Compare outputs of 2 B rows: the weak views of the batch, then the strong ones."""
        s, t = student.logits.chunk(2), teacher.logits.chunk(2)
        targets = batch.view_targets
        return self.weigh(
            ce=lambda: cross_entropy(s[0], targets) + cross_entropy(s[1], targets),
            kd=lambda: multi_level_loss(s, t, self.temperatures, self.levels, self.published),
        )
