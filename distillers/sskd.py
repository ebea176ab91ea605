"""SSKD: the student learns, beside the teacher's logits, which turned image the teacher takes for which upright one."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kdzoo import Batch, DataSpec, Distiller, Fidelity, Needs, NetworkView, Output
from kdzoo.keywords import at_least, positive, share
from kdzoo.losses import cross_entropy, row_kl, softened_kl


def similarities(embeddings: Tensor) -> Tensor:
    """Compute cosines between turned and upright images, embedded as (B, 4, D): (3 B, B)."""
    unit = F.normalize(embeddings, dim=2, eps=1e-6)
    return unit[:, 1:].flatten(0, 1) @ unit[:, 0].mT


def trusted(scores: Tensor, truth: Tensor, kept: float) -> Tensor:
    """Choose the rows of scores (N, M) whose ``truth`` (N,) is on top, and the share ``kept`` of the others: (N,) bool.

    Of the others, those stay whose truth stands highest.
    """
    rank = (scores > scores.gather(1, truth[:, None])).sum(dim=1)
    right = (rank == 0).sum()
    place = rank.argsort(stable=True).argsort()  # the right ones come first
    return place < right + ((len(rank) - right) * kept).floor()


def trusted_kl(student: Tensor, teacher: Tensor, rows: Tensor, temperature: float) -> Tensor:
    """Compute T^2 KL of scores (N, M), a mean over the ``rows`` (N,) bool; 0 if there are none."""
    divergence = row_kl(student / temperature, teacher / temperature) * temperature**2
    return (divergence * rows).sum() / rows.sum().clamp_min(1)


def head(width: int) -> nn.Sequential:
    """Make two linear layers with a ReLU between, all of one width."""
    return nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width))


class SSKD(Distiller):
    r"""Knowledge Distillation Meets Self-Supervision.

    .. math:: L = w_{ce} H(y, p_s) + w_{kd} T^2 KL(p_t \| p_s) + w_{turned} T^2 KL_m(p_t' \| p_s')
        + w_{similarity} \tau^2 KL_m(\operatorname{softmax}(A_t / \tau) \| \operatorname{softmax}(A_s / \tau))

    p are of the upright images, p' of each turned by 90, 180 and 270 degrees, and A the cosines of each turned image
    with all upright ones of the batch, between embeddings under a head. The teacher's head is trained before the
    student, for ``head_epochs``, to find the partner of each turned image; the student's is trained with it. m keeps
    the images for which the teacher puts the right class or partner first, and of the others those where it comes
    soonest.

    Both networks read four images for each of the batch, and the student normalises over all. The authors' images are
    cropped without flips, by the protocol; mixed images keep the class of their larger part.

    Args:
        ce: weight of the cross-entropy of upright images with the ground truth.
        kd: weight of the distillation of upright images.
        turned: weight of the distillation of turned images.
        similarity: weight of the similarities.
        temperature: T, which softens the distributions over classes.
        similarity_temperature: tau, which sharpens those over partners.
        kept_turned: share of the wrongly classified turned images that is kept.
        kept_similarity: share of the turned images with a wrong partner that is kept.
        head_epochs: epochs for the teacher's head, a quarter of the training's in the authors' runs.

    Source: Xu et al. 2020; ``student.py`` and ``wrapper.py`` of xuguodong03/SSKD.
    """

    paper = "arXiv:2006.07114"
    fidelity = Fidelity.EXACT
    label_terms = ("ce", "turned")
    needs = Needs(features=False, views=("rotations",))

    def __init__(
        self,
        *,
        ce: float = 0.1,
        kd: float = 0.9,
        turned: float = 2.7,
        similarity: float = 10.0,
        temperature: float = 4.0,
        similarity_temperature: float = 0.5,
        kept_turned: float = 1.0,
        kept_similarity: float = 0.75,
        head_epochs: int = 60,
    ):
        super().__init__(ce=ce, kd=kd, turned=turned, similarity=similarity)
        self.temperature = positive(temperature=temperature)
        self.similarity_temperature = positive(similarity_temperature=similarity_temperature)
        self.kept_turned, self.kept_similarity = share(kept_turned=kept_turned), share(kept_similarity=kept_similarity)
        self.head_epochs = at_least(1, head_epochs=head_epochs)

    def build(self, student: Output, teacher: Output, data: DataSpec) -> None:
        if self.weights["similarity"]:
            self.head_s = head(student.embedding.shape[1])
            self.head_t = head(teacher.embedding.shape[1]).requires_grad_(False)

    def prepare(self, student: NetworkView, teacher: NetworkView, batches: Iterable[Batch]) -> None:
        """Train the teacher's head to find the upright partner of each turned image."""
        if not self.weights["similarity"]:
            return
        self.head_t.requires_grad_(True)
        optimizer = torch.optim.SGD(self.head_t.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
        for epoch in range(self.head_epochs):
            for group in optimizer.param_groups:  # a tenth from half of the epochs on, a hundredth from three quarters
                group["lr"] = 0.05 * 0.1 ** ((2 * epoch >= self.head_epochs) + (4 * epoch >= 3 * self.head_epochs))
            for batch in batches:
                scores = similarities(self.head_t(four_views(teacher, batch).embedding))
                optimizer.zero_grad()
                F.cross_entropy(scores, partners(scores)).backward()
                optimizer.step()
        optimizer.zero_grad()
        self.head_t.requires_grad_(False)

    def forward(self, student: NetworkView, teacher: NetworkView, batch: Batch) -> dict[str, Tensor]:
        """Run both networks once, on the four views of each image."""
        reference, seen = four_views(teacher, batch), four_views(student, batch)
        (z_s, turned_s), (z_t, turned_t) = (
            (o.logits[:, 0], o.logits[:, 1:].flatten(0, 1)) for o in (seen, reference)
        )  # (B, K) and (3 B, K)
        return self.weigh(
            ce=lambda: cross_entropy(z_s, batch.targets),
            kd=lambda: softened_kl(z_s, z_t, self.temperature),
            turned=lambda: trusted_kl(
                turned_s,
                turned_t,
                trusted(turned_t, batch.targets.argmax(dim=1).repeat_interleave(3), self.kept_turned),
                self.temperature,
            ),
            similarity=lambda: self.compare(seen.embedding, reference.embedding),
        )

    def compare(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Compute the similarity term of embeddings (B, 4, D_s) and (B, 4, D_t)."""
        s, t = similarities(self.head_s(student)), similarities(self.head_t(teacher))
        rows = trusted(t, partners(t), self.kept_similarity)
        return trusted_kl(s, t, rows, self.similarity_temperature)


def four_views(network: NetworkView, batch: Batch) -> Output:
    """Run a network on the rotations of a batch: logits (B, 4, K), embedding (B, 4, D)."""
    views = batch.views["rotations"]
    output = network(views.flatten(0, 1))
    return Output(*(rows.unflatten(0, views.shape[:2]) for rows in (output.logits, output.embedding)))


def partners(scores: Tensor) -> Tensor:
    """List the upright image that each row of similarities (3 B, B) was made of: (3 B,) int64."""
    return torch.arange(len(scores), device=scores.device) // 3
