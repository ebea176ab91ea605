"""ICKD: channels of the last map that go together for the teacher go together for the student, image by image."""

from torch import Tensor, nn
from torch.nn import functional as F

from kdzoo import Batch, DataSpec, Distiller, Fidelity, Needs, Output
from kdzoo.connectors import check_stages, conv_batch_norm
from kdzoo.keywords import positive
from kdzoo.losses import cross_entropy, softened_kl


def correlations(maps: Tensor) -> Tensor:
    """Compute the rows of F F', each of length 1, where F (C, HW) holds the channels of an image: (B, C, C)."""
    channels = maps.flatten(2)
    return F.normalize(channels @ channels.mT, dim=2, eps=1e-6)


def correlation_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Compute the squared distance of the correlations of maps (B, C, h, w) and (B, C, H, W), over B C."""
    gap = correlations(student) - correlations(teacher)
    return gap.square().sum(dim=2).mean()


class ICKD(Distiller):
    r"""Inter-Channel Correlation for Knowledge Distillation, the form for classification.

    .. math:: L = w_{ce} H(y, p_s) + w_{kd} T^2 KL(p_t^{(T)} \| p_s^{(T)})
        + \frac{w_{ickd}}{B C} \sum_b \|\tilde G_s - \tilde G_t\|_F^2,
        \quad \tilde G_{c:} = G_{c:} / \|G_{c:}\|_2, \quad G = F F^T

    F holds the channels of one image's last map; the student's map first goes through a 1x1 convolution to the
    teacher's width C and batch norm. G is C x C for all grids, so nothing is resized. Memory is two times C^2 numbers
    for an image: 0.5 GB for 2048 channels and 32 images.

    The authors give their table without (``kd=0``) and with the distillation of logits, the default. For ImageNet they
    divide by B once more and take 500.

    Args:
        ce: weight of the cross-entropy with the ground truth.
        kd: weight of the distillation of logits.
        ickd: weight of the channels' term.
        temperature: T of the distillation of logits.
        stage: which stage is matched; 3 is the last.

    Source: Liu et al. 2021, eq. 6; ``Cifar100/distiller_zoo/ICKD.py``, ``train_student.py`` and ``README.md`` of
    ADLab-AutoDrive/ICKD.
    """

    paper = "arXiv:2202.03680"
    fidelity = Fidelity.EXACT
    needs = Needs(logits=False)

    def __init__(
        self, *, ce: float = 1.0, kd: float = 1.0, ickd: float = 2.5, temperature: float = 4.0, stage: int = 3
    ):
        super().__init__(ce=ce, kd=kd, ickd=ickd)
        self.temperature, self.stage = positive(temperature=temperature), stage

    def build(self, student: Output, teacher: Output, data: DataSpec) -> None:
        check_stages((self.stage,), student, teacher)
        widths = (output.features[self.stage].shape[1] for output in (student, teacher))
        self.embed = nn.Sequential(*conv_batch_norm(*widths))

    def loss(self, student: Output, teacher: Output, batch: Batch) -> dict[str, Tensor]:
        return self.weigh(
            ce=lambda: cross_entropy(student.logits, batch.targets),
            kd=lambda: softened_kl(student.logits, teacher.logits, self.temperature),
            ickd=lambda: correlation_loss(self.embed(student.features[self.stage]), teacher.features[self.stage]),
        )
