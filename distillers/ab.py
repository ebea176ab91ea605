"""AB: before training, the student's neurons learn to be active for the same inputs as the teacher's."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from kdzoo import Batch, DataSpec, Distiller, Fidelity, Needs, NetworkView, Output
from kdzoo.connectors import CommonGrids, before_relu, connector, paired_features
from kdzoo.keywords import at_least, positive
from kdzoo.losses import cross_entropy, doubling_sum, softened_kl
from kdzoo.phase import fit


def boundary_loss(student: Tensor, teacher: Tensor, margin: float) -> Tensor:
    """Compute the squared hinge loss of the signs of maps (B, C, H, W), summed over an image and averaged over B.

    It is 0 where the student's number lies on the side of 0 of the teacher's, ``margin`` or further away from it.
    """
    side = torch.where(teacher > 0, 1.0, -1.0)
    return (margin - side * student).clamp(min=0).square().sum() / len(student)


class AB(Distiller):
    r"""Knowledge Transfer via Distillation of Activation Boundaries Formed by Hidden Neurons.

    .. math:: L_{before} = w_{ab} \frac{3}{1000} \sum_{l=1}^{n} 2^{l-n} \frac{1}{B} \sum_{bchw}
        \max\left(0, m - \operatorname{sgn}(f_{t,bchw}^l) \, r(f_s^l)_{bchw}\right)^2,
        \quad L = w_{ce} H(y, p_s) + w_{kd} T^2 KL(p_t^{(T)} \| p_s^{(T)})

    f are the maps before the last ReLU of a stage; r is a 1x1 convolution to the teacher's width and batch norm, and
    nothing where the widths agree. For some epochs before training, the student up to its last map and r minimise the
    first loss by SGD with a constant learning rate and gradients of a length of 5 at most; then r is thrown away, and
    the student trains on L. These epochs come on top of the training's.

    The defaults are RepDistiller's but for a shorter phase. It trains on the ground truth alone after it; the authors'
    code for CIFAR-10 trains on the teacher's logits alone (``ce=0``, ``kd=1``, temperature 3, without the factor T^2).
    Where the grids of a stage differ, the larger map is average-pooled to the smaller height and width; RepDistiller's
    connectors stride.

    Args:
        ce: weight of the cross-entropy with the ground truth.
        kd: weight of the distillation of logits.
        ab: weight of the loss before training; 0 leaves that phase out.
        temperature: T of the distillation of logits.
        margin: m, how far from 0 the student's numbers are pushed.
        epochs: how long the phase before training is; RepDistiller takes 30 before 240 of training.
        lr: its learning rate.
        stages: which stages are matched, shallow to deep. The default leaves out the first, which is the stem's map
            where networks have three stages.

    Source: Heo et al. 2019; ``cifar10_AB_distillation.py`` of bhheo/AB_distillation; phase and defaults of
    RepDistiller, ``distiller_zoo/AB.py`` and ``helper/pretrain.py``.
    """

    paper = "arXiv:1811.03233"
    fidelity = Fidelity.EXACT
    needs = Needs(preactivations=("student", "teacher"))

    def __init__(
        self,
        *,
        ce: float = 1.0,
        kd: float = 0.0,
        ab: float = 1.0,
        temperature: float = 3.0,
        margin: float = 1.0,
        epochs: int = 5,
        lr: float = 0.05,
        stages: tuple[int, ...] = (1, 2, 3),
    ):
        super().__init__(ce=ce, kd=kd, ab=ab)
        if not kd:  # after the phase before training, labels alone are left to learn from
            self.label_terms = ("ce", "ab")
        self.temperature, self.margin = positive(temperature=temperature), positive(margin=margin)
        self.epochs, self.lr, self.stages = at_least(1, epochs=epochs), positive(lr=lr), stages

    def build(self, student: Output, teacher: Output, data: DataSpec) -> None:
        student, teacher = before_relu(student, teacher)
        self.grids = CommonGrids(student, teacher, self.stages)
        maps = paired_features(student, teacher, self.stages)
        self.widths = [(f_s.shape[1], f_t.shape[1]) for f_s, f_t in maps]

    def prepare(self, student: NetworkView, teacher: NetworkView, batches: Iterable[Batch]) -> None:
        """Train the student up to its last map, and connectors that are thrown away, on the teacher's signs."""
        if not self.is_active:
            return
        weights = list(student.network.parameters())
        connectors = nn.ModuleList(connector(a, b) if a != b else nn.Identity() for a, b in self.widths)
        connectors.to(weights[0].device)

        def loss(batch: Batch) -> Tensor:
            reference = teacher(batch.images)
            return self.weights["ab"] * self.boundaries(student(batch.images), reference, connectors)

        fit([*weights, *connectors.parameters()], loss, batches, epochs=self.epochs, lr=self.lr)

    def boundaries(self, student: Output, teacher: Output, connectors: Iterable[nn.Module]) -> Tensor:
        """Sum the losses of the stages, each counted twice as much as the one before it: a scalar."""
        pairs = zip(self.grids(*before_relu(student, teacher)), connectors, strict=True)
        return 3e-3 * doubling_sum([boundary_loss(connect(f_s), f_t, self.margin) for (f_s, f_t), connect in pairs])

    def loss(self, student: Output, teacher: Output, batch: Batch) -> dict[str, Tensor]:
        return self.weigh(
            ce=lambda: cross_entropy(student.logits, batch.targets),
            kd=lambda: softened_kl(student.logits, teacher.logits, self.temperature),
        )
