"""VkD: the student's embedding, turned by an orthogonal map, repeats the teacher's normalised one."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kdzoo import Batch, DataSpec, Distiller, Fidelity, Needs, Output
from kdzoo.keywords import positive
from kdzoo.losses import cross_entropy, softened_kl


def orthonormal(weight: Tensor) -> Tensor:
    """Replace the columns of ``weight`` (M, N), M >= N, by orthonormal ones with the same spans (Gram-Schmidt)."""
    q, r = torch.linalg.qr(weight)
    return q * r.diagonal().sign()  # QR leaves the signs open, and they must not jump between steps


class OrthogonalMap(nn.Module):
    """A linear map of embeddings (B, inputs) -> (B, outputs) by a matrix whose shorter side is orthonormal."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.narrows = outputs < inputs
        self.weight = nn.Parameter(torch.empty(max(inputs, outputs), min(inputs, outputs)))
        nn.init.orthogonal_(self.weight)

    def forward(self, embedding: Tensor) -> Tensor:
        columns = orthonormal(self.weight)
        return embedding @ (columns if self.narrows else columns.mT)


class VKD(Distiller):
    r"""VkD: Improving Knowledge Distillation using Orthogonal Projections.

    .. math:: L = w_{ce} H(y, p_s) + w_{kd} T^2 KL(p_t^{(T)} \| p_s^{(T)})
        + w_{vkd} \operatorname{mean}_{bc} h\big(P e_s - \operatorname{LN}(e_t)\big), \quad P^\top P = I

    e is the embedding, LN a layer norm without weights, and h(x) = x^2 / 2 where abs x < 1, else abs x - 1/2. P keeps
    all inner products of the student's embeddings where the teacher's are at least as wide; else P P' = I, and P
    projects.

    Differs from the authors' code:

    - P is made orthonormal by QR, which takes one backward pass; theirs multiplies Householder reflections.
    - Their students, DeiTs with two heads, are compared by the mean of their patch tokens, and the second head alone is
      distilled. Ours is the embedding that the classifier reads, and all logits.

    Args:
        ce: weight of the cross-entropy with the ground truth.
        vkd: weight of the embeddings' term.
        kd: weight of the distillation of logits.
        temperature: T of the distillation of logits.

    Source: Miles, Elezi and Deng 2024; ``engine.py``, ``train.py`` and ``main_distributed.py`` of roymiles/vkd.
    """

    paper = "arXiv:2403.06213"
    fidelity = Fidelity.EXACT
    needs = Needs(logits=False, features=False)

    def __init__(self, *, ce: float = 1.0, vkd: float = 1.0, kd: float = 1.0, temperature: float = 1.0):
        super().__init__(ce=ce, vkd=vkd, kd=kd)
        self.temperature = positive(temperature=temperature)

    def build(self, student: Output, teacher: Output, data: DataSpec) -> None:
        self.projector = OrthogonalMap(student.embedding.shape[1], teacher.embedding.shape[1])

    def loss(self, student: Output, teacher: Output, batch: Batch) -> dict[str, Tensor]:
        return self.weigh(
            ce=lambda: cross_entropy(student.logits, batch.targets),
            vkd=lambda: self.distance(student.embedding, teacher.embedding),
            kd=lambda: softened_kl(student.logits, teacher.logits, self.temperature),
        )

    def distance(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Compute the smooth L1 distance of embeddings (B, D_s) and (B, D_t): a scalar."""
        return F.smooth_l1_loss(self.projector(student), F.layer_norm(teacher, teacher.shape[1:]))
