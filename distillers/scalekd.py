"""ScaleKD: the student's maps, brought to the teacher by cross-attention, pass the teacher's last stage."""

from collections.abc import Callable
from math import gcd

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kdzoo import Batch, DataSpec, Distiller, Fidelity, Needs, NetworkView, Output
from kdzoo.connectors import BatchNorm2d, check_stages
from kdzoo.keywords import at_least, positive
from kdzoo.losses import cross_entropy, softened_kl

THIRD, FOURTH = 2, 3  # the stages that are matched, counted from 0


def centred(maps: Tensor) -> Tensor:
    """Subtract each channel's mean over the positions of maps (B, C, H, W): their DCT without its first coefficient."""
    return maps - maps.mean(dim=(2, 3), keepdim=True)


def direction_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Compute the squared distance of maps (B, C, H, W) with channels of norm 1 at each position.

    It is summed over channels and positions, with the mean over B.
    """
    return (F.normalize(student, dim=1) - F.normalize(teacher, dim=1)).square().sum() / len(student)


class AttentionProjector(nn.Module):
    """Cross-attention from a student's map to a teacher's: (B, C_s, H_s, W_s) -> (B, C_t, H, W).

    Keys and values are the student's map after a 3x3 convolution, with learned positions; queries are a learned table
    or another map in the teacher's space. The grids need not be equal.

    Args:
        student: the student's map, of which only the shape is read.
        teacher: the teacher's.
        heads: of the attention, reduced to a divisor of C_t.
        sharpness: what the softmax's logits are multiplied by, beside 1 / sqrt(width of a head).
        asked: whether queries are given; a table is learned if not.
    """

    def __init__(self, student: Tensor, teacher: Tensor, heads: int, sharpness: float, asked: bool):
        super().__init__()
        (c_s, *seen), (c_t, *grid) = student.shape[1:], teacher.shape[1:]
        self.enter = nn.Sequential(nn.Conv2d(c_s, c_s, 3, padding=1), BatchNorm2d(c_s), nn.ReLU())
        self.positions = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, c_s, *seen), std=0.02))
        self.queries = None if asked else nn.Parameter(torch.randn(1, c_t, *grid))
        self.ask = nn.Sequential(nn.Conv2d(c_t, c_t, 1), nn.ReLU())
        self.q, self.k, self.v, self.out = (nn.Linear(width, c_t) for width in (c_t, c_s, c_s, c_t))
        self.norm = nn.LayerNorm(c_t)
        self.mlp = nn.Sequential(nn.Linear(c_t, 4 * c_t), nn.ReLU(), nn.Linear(4 * c_t, c_t))
        self.heads = gcd(heads, c_t)
        self.scale = sharpness * (c_t // self.heads) ** -0.5

    def forward(self, maps: Tensor, queries: Tensor | None = None) -> Tensor:
        asked = self.ask(self.queries if queries is None else queries)
        seen = (self.enter(maps) + self.positions).flatten(2).mT  # (B, H_s W_s, C_s)
        q = self.q(asked.flatten(2).mT).expand(len(maps), -1, -1)
        q, k, v = (tokens.unflatten(2, (self.heads, -1)).transpose(1, 2) for tokens in (q, self.k(seen), self.v(seen)))
        mixed = (self.scale * q @ k.mT).softmax(dim=-1) @ v  # (B, heads, H W, C_t / heads)
        tokens = self.norm(self.out(mixed.transpose(1, 2).flatten(2)))
        return (tokens + self.mlp(tokens)).mT.unflatten(2, asked.shape[2:])


class View(nn.Module):
    """The projectors of one view of the maps: of the third stage, and of the fourth, which the third asks."""

    def __init__(self, student: Output, teacher: Output, heads: int, sharpness: float):
        super().__init__()
        pairs = [(student.features[l], teacher.features[l]) for l in (THIRD, FOURTH)]
        self.third, self.fourth = (
            AttentionProjector(f_s, f_t, heads, sharpness, asked)
            for (f_s, f_t), asked in zip(pairs, (False, True), strict=True)
        )

    def forward(self, student: Output, teacher: NetworkView) -> tuple[Tensor, Tensor]:
        """Bring the student's third and fourth maps to where the teacher's fourth is: twice (B, C_t, H, W)."""
        deeper, _ = teacher.stage(FOURTH, self.third(student.features[THIRD]))
        return deeper, self.fourth(student.features[FOURTH], deeper)


class ScaleKD(Distiller):
    r"""ScaleKD: Strong Vision Transformers Could Be Excellent Teachers.

    .. math:: L = w_{ce} H(y, p_s) + w_{kd} T^2 KL(p_t^{(T)} \| p_s^{(T)}) + w_{spatial} \big(D(T_4 P_3 f_s^3, f_t^4)
        + D(P_4 f_s^4, f_t^4)\big) + w_{frequency} \big(D(c\, T_4 P'_3 f_s^3, c f_t^4) + D(c\, P'_4 f_s^4, c f_t^4)\big)

    P are cross-attention projectors, T_4 is the teacher's frozen last stage, c subtracts the mean over positions, and
    D is the squared distance of channels of norm 1 at each position, summed over positions. Queries of P_3 are learned,
    those of P_4 are T_4 P_3 f_s^3. At a grid of one position c leaves nothing, and the frequency term is 0.

    The authors' frequency view is a DCT without its first coefficient and its inverse, which together are c. Its
    projectors are others than the spatial view's.

    Differs from the authors' code: f_t^4 is taken before norms that follow the stage, the number of heads does not
    depend on the teacher, and a student's map may have another grid than the teacher's, as keys need no common one.

    Memory: four projectors and two passes of the teacher's last stage are kept, 16 MB in all for each image of 32
    pixels (resnet32x4 -> resnet8x4), where kd keeps 2.6 MB.

    Args:
        ce: weight of the cross-entropy with the ground truth.
        kd: weight of the distillation of the logits.
        spatial: weight of the distances of whole maps.
        frequency: weight of the distances of maps without their mean.
        temperature: T.
        heads: of the attention; 3 to 24 in the authors' configurations. Reduced to a divisor of the teacher's width.
        sharpness: what the attention's logits are multiplied by.

    Source: Fan et al. 2024; the authors' ``mmcls/models/dis_losses/fmdv2.py``, ``attention.py`` and
    ``classifiers/distiller.py``, with ``configs/distillers/traditional_traning_strategy``.
    """

    paper = "arXiv:2411.06786"
    fidelity = Fidelity.ADAPTED
    needs = Needs(logits=False, stages=("teacher",))
    expected_failures = {  # noqa: RUF012 (never written to)
        "check_gradients": "the toy networks end in one position, between which attention does not choose"
    }

    def __init__(
        self,
        *,
        ce: float = 0.5,
        kd: float = 0.5,
        spatial: float = 0.08,
        frequency: float = 0.06,
        temperature: float = 1.0,
        heads: int = 8,
        sharpness: float = 5.0,
    ):
        super().__init__(ce=ce, kd=kd, spatial=spatial, frequency=frequency)
        self.temperature = positive(temperature=temperature)
        self.heads, self.sharpness = at_least(1, heads=heads), positive(sharpness=sharpness)

    def build(self, student: Output, teacher: Output, data: DataSpec) -> None:
        check_stages((THIRD, FOURTH), student, teacher)
        wanted = [name for name in ("spatial", "frequency") if self.weights[name]]
        self.views = nn.ModuleDict({name: View(student, teacher, self.heads, self.sharpness) for name in wanted})

    def forward(self, student: NetworkView, teacher: NetworkView, batch: Batch) -> dict[str, Tensor]:
        t, s = teacher(batch.images), student(batch.images)
        terms = {
            "spatial": lambda: self.distance(self.views["spatial"], s, t, teacher),
            "frequency": lambda: self.distance(self.views["frequency"], s, t, teacher, centred),
        }
        built = self.views if self.is_active else ()
        return self.loss(s, t, batch) | self.weigh(**{name: terms[name] for name in built})

    def distance(
        self,
        view: nn.Module,
        student: Output,
        teacher: Output,
        network: NetworkView,
        seen: Callable[[Tensor], Tensor] = lambda maps: maps,
    ) -> Tensor:
        """Sum the losses of both stages in one view, of maps through ``seen``."""
        target = seen(teacher.features[FOURTH])
        return torch.stack([direction_loss(seen(maps), target) for maps in view(student, network)]).sum()

    def loss(self, student: Output, teacher: Output, batch: Batch) -> dict[str, Tensor]:
        return self.weigh(
            ce=lambda: cross_entropy(student.logits, batch.targets),
            kd=lambda: softened_kl(student.logits, teacher.logits, self.temperature),
        )
