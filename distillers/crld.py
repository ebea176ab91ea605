"""CRLD: student and teacher agree on a weak and a strong view of each image, within a view and across views."""

from torch import Tensor

from kdzoo import Batch, Distiller, Fidelity, Needs, NetworkView
from kdzoo.keywords import positive, share
from kdzoo.losses import cross_entropy, row_kl


def view_loss(
    students: tuple[Tensor, Tensor], teachers: tuple[Tensor, Tensor], sure: Tensor, temperature: float
) -> Tensor:
    """Sum T^2 KL of two pairs of logits (B, K) over the images that are ``sure`` (B,), then divide by B."""
    pairs = [row_kl(z_s / temperature, z_t / temperature) for z_s, z_t in zip(students, teachers, strict=True)]
    return ((pairs[0] + pairs[1]) * sure).mean() * temperature**2


def confident(teacher: Tensor, threshold: float) -> Tensor:
    """Mark the rows of logits (B, K) whose largest probability is at least ``threshold``: (B,) bool."""
    return teacher.softmax(dim=1).amax(dim=1) >= threshold


class CRLD(Distiller):
    r"""Cross-View Consistency Regularisation for Knowledge Distillation.

    .. math:: L = w_{ce} \sum_v H(y, p_s^v)
        + w_{within} \operatorname{mean}_i m_w \big( KL_T(p_t^w \| p_s^w) + KL_T(p_t^s \| p_s^s) \big)
        + w_{cross} \operatorname{mean}_i m_s \big( KL_T(p_t^w \| p_s^s) + KL_T(p_t^s \| p_s^w) \big)

    w and s are the weak and the strong view, and KL_T carries T^2. The mask m_w keeps images of whose weak view the
    teacher is sure, m_s those of whose strong view it is; as in the authors' code, the first is for both terms within a
    view and the second for both across views. Images left out count in the mean as 0. The views are the engine's; both
    networks run twice.

    Args:
        ce: weight of the cross-entropy with the ground truth, the sum of both views.
        within: weight of the agreement on the same view.
        cross: weight of the agreement on different views.
        temperature: T, which softens all distributions; the masks are taken at 1.
        weak_threshold: probability from which the teacher is sure of a weak view.
        strong_threshold: probability from which the teacher is sure of a strong view.

    Source: Zhang et al. 2024; the authors' ``mdistiller/distillers/CRLD.py`` and ``mdistiller/engine/cfg.py``, read in
    scx-822/CRLD-main.
    """

    paper = "arXiv:2412.16493"
    fidelity = Fidelity.EXACT
    needs = Needs(features=False, embedding=False, views=("weak", "strong"))

    def __init__(
        self,
        *,
        ce: float = 1.0,
        within: float = 2.0,
        cross: float = 0.5,
        temperature: float = 4.0,
        weak_threshold: float = 0.9,
        strong_threshold: float = 0.2,
    ):
        super().__init__(ce=ce, within=within, cross=cross)
        self.temperature = positive(temperature=temperature)
        self.weak_threshold = share(weak_threshold=weak_threshold)
        self.strong_threshold = share(strong_threshold=strong_threshold)

    def forward(self, student: NetworkView, teacher: NetworkView, batch: Batch) -> dict[str, Tensor]:
        """Run both networks once for each view."""
        views, targets, temperature = (batch.views["weak"], batch.views["strong"]), batch.view_targets, self.temperature
        t_weak, t_strong = (teacher(view).logits for view in views)
        s_weak, s_strong = (student(view).logits for view in views)
        sure_weak = confident(t_weak, self.weak_threshold)
        sure_strong = confident(t_strong, self.strong_threshold)
        return self.weigh(
            ce=lambda: cross_entropy(s_weak, targets) + cross_entropy(s_strong, targets),
            within=lambda: view_loss((s_weak, s_strong), (t_weak, t_strong), sure_weak, temperature),
            cross=lambda: view_loss((s_strong, s_weak), (t_weak, t_strong), sure_strong, temperature),
        )
