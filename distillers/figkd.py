"""FiGKD: the student matches the fine-grained detail of the teacher's logits, as wavelets see it."""

from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch
from scipy.cluster.hierarchy import leaves_list, linkage
from scipy.spatial.distance import squareform
from torch import Tensor
from torch.nn import functional as F

from kdzoo import Batch, DataSpec, Distiller, Fidelity, Needs, NetworkView, Output
from kdzoo.errors import UserError
from kdzoo.keywords import one_of, positive
from kdzoo.losses import cross_entropy, softened_kl
from kdzoo.spectral import largest_level, wavelet_basis
from kdzoo.tensors import all_sum

ORDERS = ("dataset", "confusion", "superclass", "random")
DISTANCES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mse": F.mse_loss,
    "l1": F.l1_loss,
    "smooth_l1": F.smooth_l1_loss,
    "cosine": lambda student, teacher: (1 - F.cosine_similarity(student, teacher, dim=1, eps=1e-6)).mean(),
}


def wavelet_coefficients(logits: Tensor, basis: Tensor, temperature: float, standardize: bool = False) -> Tensor:
    """Transform logits (B, K) / T by ``basis`` (N, K) to (B, N); ``standardize`` first normalises each row."""
    if standardize:
        logits = F.layer_norm(logits, logits.shape[1:])
    return logits / temperature @ basis.to(logits.dtype).mT


def confusion_order(predictions: np.ndarray) -> np.ndarray:
    """Order classes so that those with similar ``predictions`` (K, K; any scale) are neighbours: (K,).

    Leaves of average linkage on the correlation distance, ordered so that neighbours are nearest. A class
    whose row is constant, say because no image shows it, counts as uncorrelated with every other.
    """
    centred = predictions - predictions.mean(axis=1, keepdims=True)
    norm = np.linalg.norm(centred, axis=1, keepdims=True)
    unit = centred / np.where(norm > 1e-12, norm, np.inf)
    apart = squareform(np.clip(1 - unit @ unit.T, 0, 2), checks=False)
    return leaves_list(linkage(apart, "average", optimal_ordering=True))


def class_permutation(class_order: str | Sequence[int], data: DataSpec) -> Tensor:
    """Choose the order of classes, (K,) int64, as far as it is known before the teacher is asked."""
    classes = range(data.num_classes)
    if class_order == "random":
        return torch.randperm(data.num_classes)
    if class_order == "superclass":
        if not data.superclasses:
            raise UserError(f"class_order=superclass: {data.name} defines no superclasses; choose confusion")
        return torch.tensor(sorted(classes, key=data.superclasses.__getitem__))
    if isinstance(class_order, str):
        return torch.arange(data.num_classes)
    if sorted(class_order) != list(classes):
        raise UserError(f"class_order={class_order}: expected each of 0 to {len(classes) - 1} once; correct the list")
    return torch.tensor(class_order)


class FiGKD(Distiller):
    r"""Fine-Grained Knowledge Distillation by wavelet detail of logits, reconstructed.

    .. math:: L = w_{ce} H(y, p_s) + w_{detail} \operatorname{MSE}(D z_s / T, D z_t / T)
        + w_{kd} T^2 KL(p_t^{(T)} \| p_s^{(T)})

    D takes the detail coefficients of a discrete wavelet transform over the class axis, of all levels. For Haar and
    level 1 they are (z_2k - z_2k+1) / sqrt 2: differences of neighbouring classes. Averaged over all orders of the
    classes this is K / (K - 1) times the MSE of centred logits (``logitmse``), so what FiGKD adds comes from the
    order alone; and each level leaves out less of what ``logitmse`` compares.

    Of two classes there is one difference. Standardised, or by its cosine, it is a sign, and their content is what no
    softmax sees; these variants take three classes.

    The full text was not available. Known are the split of logits by a wavelet transform, the transfer of detail
    only, and the cross-entropy beside it. Ours are the wavelet, the level, T, the distance, the padding (with odd K
    the last class is paired with the one before it) and every order but the data set's own.

    Args:
        ce: weight of the cross-entropy with the ground truth.
        detail: weight of the wavelet term, whichever band it compares.
        kd: weight of the distillation of logits.
        wavelet: a discrete wavelet that PyWavelets knows.
        level: how often the logits are split; None is three times, or as often as the classes allow.
        temperature: T, which divides the logits of both terms.
        standardize: each row of logits is taken to mean 0 and variance 1 before T divides it.
        distance: "mse", "l1", "smooth_l1" or "cosine".
        padding: how logits continue past the first and last class: a signal extension mode of PyWavelets.
        class_order: "dataset"; "confusion", by what the teacher confuses; "superclass"; "random"; or a permutation.
        band: "detail", or as controls "content" or "all".

    Source: the abstract of arXiv 2505.11897; formulas reconstructed.
    """

    paper = "arXiv:2505.11897"
    fidelity = Fidelity.RECONSTRUCTED
    needs = Needs(features=False, embedding=False)

    basis: Tensor  # (N, K): the band's rows of the transform
    order: Tensor  # (K,) int64: which class stands where

    def __init__(
        self,
        *,
        ce: float = 1.0,
        detail: float = 1.0,
        kd: float = 0.0,
        wavelet: str = "haar",
        level: int | None = None,
        temperature: float = 1.0,
        standardize: bool = False,
        distance: str = "mse",
        padding: str = "periodization",
        class_order: str | tuple[int, ...] = "dataset",
        band: str = "detail",
    ):
        super().__init__(ce=ce, detail=detail, kd=kd)
        self.temperature = positive(temperature=temperature)
        self.distance = one_of(DISTANCES, distance=distance)
        self.band = one_of(("detail", "content", "all"), band=band)
        self.class_order = one_of(ORDERS, class_order=class_order) if isinstance(class_order, str) else class_order
        if class_order == "confusion":  # of true classes, counted before training
            self.label_terms = ("ce", "detail")
        self.fewest_classes = 3 if standardize or distance == "cosine" or band == "content" else 2
        self.wavelet, self.level, self.padding, self.standardize = wavelet, level, padding, standardize

    def build(self, student: Output, teacher: Output, data: DataSpec) -> None:
        level = max(1, min(3, largest_level((data.num_classes,), self.wavelet))) if self.level is None else self.level
        content, detail = wavelet_basis(data.num_classes, self.wavelet, level, self.padding)
        rows = {"detail": detail, "content": content, "all": torch.cat([content, detail])}
        self.register_buffer("basis", rows[self.band].float(), persistent=False)
        self.register_buffer("order", class_permutation(self.class_order, data))

    @property
    def has_phase(self) -> bool:
        return self.is_active and self.class_order == "confusion"

    def prepare(self, student: NetworkView, teacher: NetworkView, batches: Iterable[Batch]) -> None:
        """Average the teacher's predictions by class over an epoch, if the order of classes comes from them."""
        if not self.has_phase:
            return
        sums = torch.zeros(len(self.order), len(self.order), device=self.order.device)
        for batch in batches:
            sums += batch.targets.mT @ teacher(batch.images).logits.softmax(dim=1)
        self.order.copy_(torch.from_numpy(confusion_order(all_sum(sums).cpu().numpy().astype(np.float64))))

    def loss(self, student: Output, teacher: Output, batch: Batch) -> dict[str, Tensor]:
        return self.weigh(
            ce=lambda: cross_entropy(student.logits, batch.targets),
            detail=lambda: DISTANCES[self.distance](self.coefficients(student), self.coefficients(teacher)),
            kd=lambda: softened_kl(student.logits, teacher.logits, self.temperature),
        )

    def coefficients(self, output: Output) -> Tensor:
        """Transform the logits of the ordered classes: (B, N)."""
        return wavelet_coefficients(output.logits[:, self.order], self.basis, self.temperature, self.standardize)
