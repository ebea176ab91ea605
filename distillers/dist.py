"""DIST: the student's probabilities correlate with the teacher's, image by image and class by class."""

from torch import Tensor

from kdzoo import Batch, Distiller, Fidelity, Needs, Output
from kdzoo.keywords import not_negative, positive
from kdzoo.losses import cross_entropy, dist_loss


class DIST(Distiller):
    r"""Knowledge Distillation from A Stronger Teacher.

    .. math:: L = w_{ce} H(y, p_s) + w_{dist} T^2 \Big( w_{inter} \frac{1}{B} \sum_b (1 - \rho(p_s^b, p_t^b))
        + w_{intra} \frac{1}{K} \sum_k (1 - \rho(p_s^k, p_t^k)) \Big)

    p^b: the softened probabilities of image b; p^k: those of class k over the batch; rho: Pearson's correlation. With
    two classes rho(p_s^b, p_t^b) is 1 or -1 for all networks, which leaves the relation between images.

    Args:
        ce: weight of the cross-entropy with the ground truth.
        dist: weight of both relations.
        inter: weight of the relation between classes, image by image, inside it.
        intra: weight of the relation between images, class by class, inside it.
        temperature: T; the authors take 4 on CIFAR-100 and 1 on ImageNet.

    Source: Huang et al. 2022; ``lib/models/losses/dist_kd.py`` of hunto/image_classification_sota
    (T = 1 there; the factor T^2 as in ``distillers/dist.py`` of Hao840/OFAKD).
    """

    paper = "arXiv:2205.10536"
    fidelity = Fidelity.EXACT
    needs = Needs(features=False, embedding=False)

    def __init__(
        self,
        *,
        ce: float = 1.0,
        dist: float = 2.0,
        inter: float = 1.0,
        intra: float = 1.0,
        temperature: float = 4.0,
    ):
        super().__init__(ce=ce, dist=dist)
        self.inter, self.intra = not_negative(inter=inter), not_negative(intra=intra)
        self.temperature = positive(temperature=temperature)
        self.fewest_classes = 2 if intra else 3

    def loss(self, student: Output, teacher: Output, batch: Batch) -> dict[str, Tensor]:
        return self.weigh(
            ce=lambda: cross_entropy(student.logits, batch.targets),
            dist=lambda: dist_loss(student.logits, teacher.logits, self.inter, self.intra, self.temperature),
        )
