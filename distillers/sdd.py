"""SDD: the classifier is applied to parts of the image too, and the student learns the teacher's logits of each."""

import torch
from torch import Tensor
from torch.nn import functional as F

from kdzoo import Batch, DataSpec, Distiller, Fidelity, Needs, NetworkView, Output
from kdzoo.connectors import CellLogits
from kdzoo.keywords import at_least, each, not_negative, positive
from kdzoo.losses import cross_entropy


def scale_decoupled_loss(
    student: Tensor, teacher: Tensor, overall: Tensor, temperature: float, complementary: float
) -> Tensor:
    """Compute T^2 KL of the cells' logits (B, N, K), mean over images and cells.

    A cell whose class, by the teacher, is another than that of the whole image counts ``complementary`` times;
    ``overall`` (B, K) are the teacher's logits of whole images.
    """
    log_s, log_t = (F.log_softmax(logits / temperature, dim=2) for logits in (student, teacher))
    divergence = F.kl_div(log_s, log_t, reduction="none", log_target=True).sum(dim=2)
    differs = teacher.argmax(dim=2) != overall.argmax(dim=1, keepdim=True)
    return (divergence * torch.where(differs, complementary, 1.0)).mean() * temperature**2


class SDD(Distiller):
    r"""Scale Decoupled Distillation.

    .. math:: L = w_{ce} H(y, p_s) + w_{sdd} \frac{1}{BN} \sum_{bn} w_{bn} T^2
        KL(\operatorname{softmax}(z_t^{bn} / T) \| \operatorname{softmax}(z_s^{bn} / T)),
        \quad z^{bn} = h(\bar f^{bn})

    f-bar^n is the mean, over the n-th of N = 1 + 4 + 16 cells, of the map that a network averages over positions, and
    h is its own head on that, so at scale 1 z is its output. w = 1 where the teacher gives the cell the class that it
    gives the image, and ``complementary`` elsewhere.

    It is defined where logits are made of such a mean, with any layers between the last stage and it: the norm of
    Wide ResNets, the convolution of MobileNetV2 and ShuffleNetV2, the norms of Swins and Mixers. Class tokens and
    learned poolings are none, as in most ViTs; nor does a head fit that normalises over the batch. Such a network
    raises a ``UserError``.

    Differs from the authors' code:

    - Their w compares right with wrong, and so counts a cell as consistent where cell and image are wrong in
      different ways.
    - Their code pools cells of 4x4 on to 2x2 and 1x1, which is the same for maps of 2x2, 4x4 and 8x8; here every
      scale pools the map.

    Args:
        ce: weight of the cross-entropy with the ground truth.
        sdd: weight of the distillation of cells.
        temperature: T, which softens all distributions.
        complementary: weight of the cells that disagree with the image, in units of the others'.
        scales: the map is split into g x g cells for each g; cells of a map that is coarser share its pixels.

    Source: Wei, Luo and Luo 2024; ``mdistiller/distillers/KD.py`` and ``models/cifar/utils.py`` of
    shicaiwei123/SDD-CVPR2024; weights of the distillation term as in mdistiller.
    """

    paper = "arXiv:2403.13512"
    fidelity = Fidelity.EXACT
    needs = Needs(features=False, final=True)

    def __init__(
        self,
        *,
        ce: float = 0.1,
        sdd: float = 0.9,
        temperature: float = 4.0,
        complementary: float = 2.0,
        scales: tuple[int, ...] = (1, 2, 4),
    ):
        super().__init__(ce=ce, sdd=sdd)
        self.temperature = positive(temperature=temperature)
        self.complementary = not_negative(complementary=complementary)
        self.scales = each(at_least, 1, scales=scales)

    def build(self, student: Output, teacher: Output, data: DataSpec) -> None:
        self.student_cells = CellLogits("student", student, self.scales)
        self.teacher_cells = CellLogits("teacher", teacher, self.scales)

    def forward(self, student: NetworkView, teacher: NetworkView, batch: Batch) -> dict[str, Tensor]:
        """Run each network once, then its head on the cells of its final map."""
        reference, seen = teacher(batch.images), student(batch.images)
        return self.weigh(
            ce=lambda: cross_entropy(seen.logits, batch.targets),
            sdd=lambda: scale_decoupled_loss(
                self.student_cells(seen, student),
                self.teacher_cells(reference, teacher),
                reference.logits,
                self.temperature,
                self.complementary,
            ),
        )
