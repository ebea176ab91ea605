"""PKT: images are neighbours of each other with the same probability for student and teacher."""

from torch import Tensor
from torch.nn import functional as F

from kdzoo import Batch, Distiller, Fidelity, Needs, Output
from kdzoo.losses import cross_entropy

EPS = 1e-7


def neighbour_probabilities(embeddings: Tensor) -> Tensor:
    """Compute (1 + cosine) / 2 of all pairs of rows (B, D), divided by the sum of each row: (B, B)."""
    unit = F.normalize(embeddings, eps=EPS)
    similarity = ((unit @ unit.mT + 1) / 2).clamp_min(0)  # rounding may take a cosine below -1
    return similarity / similarity.sum(dim=1, keepdim=True)


def neighbour_divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """Compute the KL of the neighbours' probabilities of embeddings (B, D_s) and (B, D_t), over B^2."""
    p_s, p_t = neighbour_probabilities(student), neighbour_probabilities(teacher)
    return (p_t * ((p_t + EPS).log() - (p_s + EPS).log())).mean()


class PKT(Distiller):
    r"""Probabilistic Knowledge Transfer.

    .. math:: L = w_{ce} H(y, p_s) + \frac{w_{pkt}}{B^2} \sum_{ij} p^t_{ij} \log \frac{p^t_{ij}}{p^s_{ij}},
        \quad p_{ij} = \frac{1 + \cos(e_i, e_j)}{\sum_k 1 + \cos(e_i, e_k)}

    The paper's sum runs over different images; the authors' code, which is followed, lets i = j in and takes the
    mean over B^2, hence the large weight. Embeddings of any two widths compare; no map is read.

    Args:
        ce: weight of the cross-entropy with the ground truth.
        pkt: weight of the divergence.

    Source: Passalis and Tefas 2018; the authors' ``nn/pkt.py``; weight of RepDistiller.
    """

    paper = "arXiv:1803.10837"
    fidelity = Fidelity.EXACT
    needs = Needs(logits=False, features=False)

    def __init__(self, *, ce: float = 1.0, pkt: float = 30000.0):
        super().__init__(ce=ce, pkt=pkt)

    def loss(self, student: Output, teacher: Output, batch: Batch) -> dict[str, Tensor]:
        return self.weigh(
            ce=lambda: cross_entropy(student.logits, batch.targets),
            pkt=lambda: neighbour_divergence(student.embedding, teacher.embedding),
        )
