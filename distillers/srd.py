"""SRD: a linear map of the student's embedding repeats the teacher's, by the logarithm of a sum of fourth powers."""

from torch import Tensor, nn

from kdzoo import Batch, DataSpec, Distiller, Fidelity, Needs, Output
from kdzoo.keywords import at_least, positive
from kdzoo.losses import cross_entropy, softened_kl, standardised


def log_power_distance(student: Tensor, teacher: Tensor, power: float) -> Tensor:
    """Compute log sum |z_s - z_t|^power of embeddings (B, D), each column standardised over the batch.

    1e-5 is added to the sum, so that equal embeddings have a gradient of 0.
    """
    z_s, z_t = (standardised(embedding, 0, 1e-4) for embedding in (student, teacher))
    return ((z_s - z_t).abs().pow(power).sum() + 1e-5).log()


class SRD(Distiller):
    r"""Understanding the Role of the Projector in Knowledge Distillation.

    .. math:: L = w_{ce} H(y, p_s) + w_{kd} T^2 KL(p_t^{(T)} \| p_s^{(T)})
        + w_{srd} \log \sum_{b, c} \big|Z(P e_s) - Z(e_t)\big|_{bc}^{\alpha}

    e is the embedding, P a linear map, and Z standardises each number over the batch. The sum is over the batch, too:
    twice the images add log 2 and change no gradient's direction. As a logarithm the term may be negative.

    Differs from the authors' code:

    - 1e-5 is added to the sum, as in their code for DeiT. That has another distance: log sum_c |C_c - 1|^4 with C_c
      the correlation of both embeddings' c-th number.

    Args:
        ce: weight of the cross-entropy with the ground truth.
        srd: weight of the embeddings' term.
        kd: weight of the distillation of logits.
        temperature: T of the distillation of logits.
        power: alpha.

    Source: Miles and Mikolajczyk 2024; ``imagenet/torchdistill/losses/single.py`` of
    roymiles/Simple-Recipe-Distillation, ResNet-34 to ResNet-18.
    """

    paper = "arXiv:2303.11098"
    fidelity = Fidelity.EXACT
    needs = Needs(logits=False, features=False)

    def __init__(
        self, *, ce: float = 1.0, srd: float = 2.0, kd: float = 1.0, temperature: float = 1.0, power: float = 4.0
    ):
        super().__init__(ce=ce, srd=srd, kd=kd)
        self.temperature = positive(temperature=temperature)
        self.power = at_least(1.0, power=power)  # below 1 the gradient at 0 is not finite

    def build(self, student: Output, teacher: Output, data: DataSpec) -> None:
        self.projector = nn.Linear(student.embedding.shape[1], teacher.embedding.shape[1])

    def loss(self, student: Output, teacher: Output, batch: Batch) -> dict[str, Tensor]:
        return self.weigh(
            ce=lambda: cross_entropy(student.logits, batch.targets),
            srd=lambda: log_power_distance(self.projector(student.embedding), teacher.embedding, self.power),
            kd=lambda: softened_kl(student.logits, teacher.logits, self.temperature),
        )
