"""DIST+: correlations as in DIST, and those of the last stage, channel by channel and place by place."""

from torch import Tensor, nn

from kdzoo import Batch, DataSpec, Distiller, Fidelity, Output
from kdzoo.connectors import CommonGrid, conv_batch_norm
from kdzoo.keywords import not_negative, positive
from kdzoo.losses import cross_entropy, dist_loss, pearson_distance


def channel_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Compute 1 - the correlation over channels at each place of maps (B, C, H, W), mean over images and places."""
    return pearson_distance(*(maps.flatten(2).mT.flatten(0, 1) for maps in (student, teacher)))


def spatial_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Compute 1 - the correlation over images of the channels' sum at each place of maps (B, C, H, W), mean of places.

    The widths may differ.
    """
    return pearson_distance(*(maps.sum(dim=1).flatten(1).mT for maps in (student, teacher)))


class DISTPlus(Distiller):
    r"""DIST+: Knowledge Distillation From a Stronger Adaptive Teacher, without the adaption of the teacher.

    .. math:: L = w_{ce} H(y, p_s) + w_{dist} L_{DIST}
        + w_{channel} \frac{1}{B N} \sum_{b, n} (1 - \rho(r(f_s)_{b, :, n}, (f_t)_{b, :, n}))
        + w_{spatial} \frac{1}{N} \sum_n (1 - \rho(a_s^{:, n}, a_t^{:, n}))

    f: the last stage at N places; a: its sum over channels; rho: Pearson's correlation, over channels at a place of an
    image, then over the images at a place. r: 1x1 convolution and batch norm to the teacher's width.

    The paper could not be read, and the terms are those of torchdistill, except that its channel term is the
    correlation itself, which training would lower; here it is the distance, as in the other terms. There both maps
    have equal shapes; the connector r is ours, and so is average pooling of the larger map where grids differ. The
    paper also trains the teacher towards the student, which would give each method of a comparison another teacher.

    Args:
        ce: weight of the cross-entropy with the ground truth.
        dist: weight of both relations of DIST.
        channel: weight of the relation between channels.
        spatial: weight of the relation between images, place by place.
        inter: weight of the relation between classes, image by image, inside ``dist``.
        intra: weight of the relation between images, class by class, inside ``dist``.
        temperature: T of DIST.

    Source: Huang et al. 2025, doi 10.1109/TPAMI.2025.3554235; ``torchdistill/losses/mid_level.py`` of
    yoshitomo-matsubara/torchdistill@3e4373c, ``DISTPlusLoss``, with its weights.
    """

    paper = "doi:10.1109/TPAMI.2025.3554235"
    fidelity = Fidelity.ADAPTED
    logit_terms = ("ce", "dist")

    def __init__(
        self,
        *,
        ce: float = 1.0,
        dist: float = 2.0,
        channel: float = 1.0,
        spatial: float = 1.0,
        inter: float = 1.0,
        intra: float = 1.0,
        temperature: float = 4.0,
    ):
        super().__init__(ce=ce, dist=dist, channel=channel, spatial=spatial)
        self.inter, self.intra = not_negative(inter=inter), not_negative(intra=intra)
        self.temperature = positive(temperature=temperature)

    def build(self, student: Output, teacher: Output, data: DataSpec) -> None:
        f_s, f_t = student.features[-1], teacher.features[-1]
        self.grid = CommonGrid(f_s, f_t)
        self.connector = nn.Sequential(*conv_batch_norm(f_s.shape[1], f_t.shape[1]))

    def loss(self, student: Output, teacher: Output, batch: Batch) -> dict[str, Tensor]:
        return self.weigh(
            ce=lambda: cross_entropy(student.logits, batch.targets),
            dist=lambda: dist_loss(student.logits, teacher.logits, self.inter, self.intra, self.temperature),
            channel=lambda: self.channel_error(student, teacher),
            spatial=lambda: spatial_distance(*self.grid(student.features[-1], teacher.features[-1])),
        )

    def channel_error(self, student: Output, teacher: Output) -> Tensor:
        """Compute the distance of the connector's map from the teacher's: a scalar."""
        f_s, f_t = self.grid(student.features[-1], teacher.features[-1])
        return channel_distance(self.connector(f_s), f_t)
