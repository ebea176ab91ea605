"""SRRL: the student's last map, brought to the teacher's width, gives the teacher's logits in its classifier."""

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn import functional as F

from kdzoo import Batch, DataSpec, Distiller, Fidelity, NetworkView, Output
from kdzoo.connectors import TeachersClassifier, connector
from kdzoo.keywords import positive
from kdzoo.losses import cross_entropy, softened_kl


class SRRL(Distiller):
    r"""Knowledge Distillation via Softmax Regression Representation Learning.

    .. math:: L = w_{ce} H(y, p_s) + w_{mean} \operatorname{MSE}(h, e_t)
        + w_{regression} \operatorname{MSE}(W_t h + b_t, z_t) + w_{kd} T^2 KL(p_t^{(T)} \| p_s^{(T)}),
        \quad h = \operatorname{mean}_{hw} r(f_s)

    f_s is the student's last map and r a 1x1 convolution to the width of the teacher's embedding e_t, batch norm and
    ReLU. W_t and b_t are the teacher's classifier, frozen. Grids of any size fit.

    Differs from the authors' code, whose teachers' embeddings are the mean of a map that ends in a ReLU. Others do
    not, so the embedding itself is matched, and one batch of the teacher decides before training: r ends in a ReLU
    only where no number of its embedding is negative.

    Args:
        ce: weight of the cross-entropy with the ground truth.
        mean: weight of the embeddings' term.
        regression: weight of the term of logits that the teacher's classifier gives.
        kd: weight of the distillation of logits; the CIFAR-100 table of SimKD takes 1 for it.
        temperature: T of the distillation of logits.

    Source: Yang et al. 2021; ``distiller_zoo/AIN.py`` and ``train_imagenet_distillation.py`` of jingyang2017/KD_SRRL.
    """

    paper = "https://openreview.net/forum?id=ZzwDy_wiWv"
    fidelity = Fidelity.EXACT

    rectified: Tensor  # () bool: whether a ReLU ends r

    def __init__(
        self,
        *,
        ce: float = 1.0,
        mean: float = 1.0,
        regression: float = 1.0,
        kd: float = 0.0,
        temperature: float = 4.0,
    ):
        super().__init__(ce=ce, mean=mean, regression=regression, kd=kd)
        self.temperature = positive(temperature=temperature)

    def build(self, student: Output, teacher: Output, data: DataSpec) -> None:
        width = teacher.embedding.shape[1]
        self.connector = connector(student.features[-1].shape[1], width)
        self.classifier = TeachersClassifier(width, data.num_classes)
        self.register_buffer("rectified", torch.tensor(False))

    @torch.no_grad()
    def prepare(self, student: NetworkView, teacher: NetworkView, batches: Iterable[Batch]) -> None:
        """Copy the teacher's classifier, and look at one batch of its embeddings."""
        if self.is_active:
            self.classifier.copy_from(teacher)
            self.rectified.copy_((teacher(next(iter(batches)).images).embedding >= 0).all())

    def loss(self, student: Output, teacher: Output, batch: Batch) -> dict[str, Tensor]:
        embedding = self.embedding(student) if self.is_active else student.embedding
        return self.weigh(
            ce=lambda: cross_entropy(student.logits, batch.targets),
            mean=lambda: F.mse_loss(embedding, teacher.embedding),
            regression=lambda: F.mse_loss(self.classifier(embedding), teacher.logits),
            kd=lambda: softened_kl(student.logits, teacher.logits, self.temperature),
        )

    def embedding(self, student: Output) -> Tensor:
        """Make of the student's last map an embedding of the teacher's width: (B, D_t)."""
        maps = self.connector(student.features[-1])
        return torch.where(self.rectified, maps.relu(), maps).mean(dim=(2, 3))
