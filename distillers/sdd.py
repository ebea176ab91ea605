"""SDD: the classifier is applied to parts of the image too, and the student learns the teacher's logits of each."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kdzoo import Batch, DataSpec, Distiller, Fidelity, Needs, Output, Seen
from kdzoo.connectors import Positions
from kdzoo.errors import UserError
from kdzoo.losses import cross_entropy, full_precision
from kdzoo.spectral import pooling_basis


def cell_logits(cells: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The linear classifier (K, C), (K,) at each of the cells (B, C, N): logits (B, N, K)."""
    return F.linear(full_precision(cells).mT, weight, bias)


def scale_decoupled_loss(
    student: Tensor, teacher: Tensor, overall: Tensor, temperature: float, complementary: float
) -> Tensor:
    """T^2 KL of the cells' logits (B, N, K), mean over images and cells.

    A cell whose class, by the teacher, is another than that of the whole image counts ``complementary`` times;
    ``overall`` (B, K) are the teacher's logits of whole images.
    """
    log_s, log_t = (F.log_softmax(full_precision(logits) / temperature, dim=2) for logits in (student, teacher))
    divergence = F.kl_div(log_s, log_t, reduction="none", log_target=True).sum(dim=2)
    differs = teacher.argmax(dim=2) != overall.argmax(dim=1, keepdim=True)
    return (divergence * torch.where(differs, complementary, 1.0)).mean() * temperature**2


def with_cell_logits(output: Output, network: Seen, pool: nn.Module) -> Output:
    """The output with the logits (B, N, K) of the last map's cells for features."""
    head = network.classifier
    assert head is not None, "prepare comes before training"
    return output._replace(features=(cell_logits(pool(output.features[-1]), head.weight, head.bias),))


def pools_last_map(network: Seen, images: Tensor) -> bool:
    """Whether the embedding is the mean of the last stage's map; the network is left as it was."""
    modes = [(module, module.training) for module in network.modules()]
    network.eval()
    with torch.no_grad():
        seen = network(images)
    for module, mode in modes:
        module.training = mode
    difference = seen.embedding - seen.features[-1].mean(dim=(2, 3))
    return bool(difference.norm() <= 0.02 * seen.embedding.norm())  # bfloat16 rounds to less


def unsuited(role: str) -> UserError:
    """The error for a network whose cells have no logits; ``role`` is student or teacher."""
    return UserError(
        f"sdd needs logits that are one linear layer of the mean of the last stage's map, and the {role}'s are not; "
        f"choose another {role}, such as a ResNet, or another method"
    )


class SDD(Distiller):
    r"""Scale Decoupled Distillation.

    .. math:: L = w_{ce} H(y, p_s) + w_{sdd} \frac{1}{BN} \sum_{bn} w_{bn} T^2
        KL(\operatorname{softmax}(z_t^{bn} / T) \| \operatorname{softmax}(z_s^{bn} / T)),
        \quad z^{bn} = W \bar f^{bn} + b

    f-bar^n are means of the last stage's map over the n-th of N = 1 + 4 + 16 cells, and (W, b) is each network's own
    classifier, so at scale 1 z is the network's output. w = 1 where the teacher gives the cell the class that it
    gives the image, and ``complementary`` elsewhere; the authors' code compares right with wrong instead, and so
    counts a cell as consistent where cell and image are wrong in different ways.

    It is defined where a network's logits are a linear layer of the mean of its last stage's map, as in ResNets and
    VGGs; any other pair raises a ``UserError``, at the latest in ``prepare``. Tokens are such, and networks with
    layers between that map and the mean: Wide ResNets, MobileNetV2 and ShuffleNetV2, which the paper's tables have.

    Args:
        ce: weight of the cross-entropy with the ground truth.
        sdd: weight of the distillation of cells.
        temperature: T, which softens all distributions.
        complementary: weight of the cells that disagree with the image, in units of the others'.
        scales: the map is split into g x g cells for each g; a g finer than either map becomes that map's own grid.

    Source: Wei, Luo and Luo 2024; ``mdistiller/distillers/KD.py`` and ``models/cifar/utils.py`` of
    shicaiwei123/SDD-CVPR2024; weights of the distillation term as in mdistiller.
    """

    paper = "arXiv:2403.13512"
    fidelity = Fidelity.EXACT

    def __init__(
        self,
        student: Output,
        teacher: Output,
        data: DataSpec,
        *,
        ce: float = 0.1,
        sdd: float = 0.9,
        temperature: float = 4.0,
        complementary: float = 2.0,
        scales: tuple[int, ...] = (1, 2, 4),
    ):
        super().__init__()
        if not temperature > 0:
            raise UserError(f"temperature {temperature}: expected a number above 0; 4 is usual")
        if not scales or min(scales) < 1:
            raise UserError(f"scales {tuple(scales)}: expected numbers from 1; choose some, such as 1, 2, 4")
        self.ce, self.sdd, self.temperature, self.complementary = ce, sdd, temperature, complementary
        if not sdd:
            self.needs = Needs(features=False)
            return
        for role, output in (("student", student), ("teacher", teacher)):
            if output.features[-1].shape[1] != output.embedding.shape[1]:
                raise unsuited(role)
        grids = [output.features[-1].shape[2:] for output in (student, teacher)]
        limits = [min(sides) for sides in zip(*grids, strict=True)]
        sizes = dict.fromkeys((min(g, limits[0]), min(g, limits[1])) for g in scales)  # distinct, in order
        self.pool_student, self.pool_teacher = (
            Positions(torch.cat([pooling_basis(grid, size) for size in sizes])) for grid in grids
        )

    def prepare(self, student: Seen, teacher: Seen, batches: Iterable[Batch]) -> None:
        """Nothing but the check that cells have logits in both networks."""
        if not self.sdd:
            return
        images = next(iter(batches)).images
        for role, network in (("student", student), ("teacher", teacher)):
            if network.classifier is None or not pools_last_map(network, images):
                raise unsuited(role)

    def forward(self, student: Seen, teacher: Seen, batch: Batch) -> dict[str, Tensor]:
        """One pass each, then the networks' own classifiers on the cells of their last maps."""
        seen, reference = student(batch.images), teacher(batch.images)
        if self.sdd:
            seen = with_cell_logits(seen, student, self.pool_student)
            reference = with_cell_logits(reference, teacher, self.pool_teacher)
        return self.loss(seen, reference, batch)

    def loss(self, student: Output, teacher: Output, batch: Batch) -> dict[str, Tensor]:
        """Outputs whose one feature is the logits of the cells, (B, N, K)."""
        terms = {}
        if self.ce:
            terms["ce"] = self.ce * cross_entropy(student.logits, batch.targets)
        if self.sdd:
            given = student.features[0], teacher.features[0].detach(), teacher.logits
            terms["sdd"] = self.sdd * scale_decoupled_loss(*given, self.temperature, self.complementary)
        return terms
