"""PAT: prompts adapt the teacher's maps to the student, whose stages look at each other before they are matched."""

from collections.abc import Sequence
from math import ceil, gcd, log

import torch
from torch import Tensor, nn

from kdzoo import Batch, DataSpec, Distiller, Fidelity, Needs, NetworkView, Output
from kdzoo.connectors import BatchNorm2d, Pyramid, check_stages, resized
from kdzoo.errors import UserError
from kdzoo.keywords import at_least, positive
from kdzoo.losses import context_loss, cross_entropy, softened_kl
from kdzoo.outputs import STAGES
from kdzoo.tensors import all_sum

SIDE = 4  # of the grid of regions of each stage


def sinusoids(count: int, width: int) -> Tensor:
    """Make the sinusoidal encoding of ``count`` positions: (count, width), sines and cosines in turn."""
    rates = torch.exp(torch.arange(0, width, 2) * (-log(10000.0) / width))
    angles = torch.arange(count)[:, None] * rates
    return torch.stack([angles.sin(), angles.cos()], dim=2).flatten(1)[:, :width]


class Regions(nn.Module):
    """Attention among the regions of all stages: four maps (B, C_l, H_l, W_l) -> four (B, width, 4, 4).

    Patches of each map are embedded as 4x4 regions; all regions of all stages attend to each other.

    Args:
        features: the student's maps, of which only shapes are read.
        width: of the regions; ``heads`` divides it.
        heads: of the attention.
    """

    positions: Tensor

    def __init__(self, features: Sequence[Tensor], width: int, heads: int):
        super().__init__()
        self.sizes = [(ceil(maps.shape[2] / SIDE), ceil(maps.shape[3] / SIDE)) for maps in features]
        self.patches = nn.ModuleList(
            nn.Conv2d(maps.shape[1], width, size, size) for maps, size in zip(features, self.sizes, strict=True)
        )
        self.norm = nn.LayerNorm(width)
        self.query, self.key_value = nn.Linear(width, width), nn.Linear(width, 2 * width)
        self.heads = heads
        self.register_buffer("positions", sinusoids(len(features) * SIDE**2, width), persistent=False)

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        tokens = torch.cat(
            [
                patch(resized(maps, [SIDE * side for side in size])).flatten(2)
                for maps, patch, size in zip(features, self.patches, self.sizes, strict=True)
            ],
            dim=2,
        ).mT  # (B, 4 * 16, width)
        normed = self.norm(tokens)
        key, value = self.key_value(normed).chunk(2, dim=2)
        q, k, v = (
            part.unflatten(2, (self.heads, -1)).transpose(1, 2)
            for part in (self.query(normed) + self.positions, key + self.positions, value)
        )
        mixed = (q @ k.mT * q.shape[-1] ** -0.5).softmax(dim=-1) @ v
        regions = mixed.transpose(1, 2).flatten(2).mT  # (B, width, 4 * 16)
        return [part.unflatten(2, (SIDE, SIDE)) for part in regions.chunk(len(features), dim=2)]


class Aligner(nn.Module):
    """Regions (B, width, 4, 4) at a teacher's stage: nearest neighbours, batch norm, 1x1 convolution.

    Args:
        width: of the regions.
        target: the teacher's map, of which only the shape is read.
    """

    def __init__(self, width: int, target: Tensor):
        super().__init__()
        self.grid = target.shape[2:]
        self.norm, self.conv = BatchNorm2d(width), nn.Conv2d(width, target.shape[1], 1, bias=False)

    def forward(self, regions: Tensor) -> Tensor:
        return self.conv(self.norm(resized(regions, self.grid)))


def gate(width: int) -> list[nn.Module]:
    """Make a squeeze-and-excitation gate without what it gates: (B, C, H, W) -> (B, C, 1, 1) in [0, 1]."""
    hidden = max(4, width // 16)
    layers = [nn.AdaptiveAvgPool2d(1), nn.Conv2d(width, hidden, 1), nn.ReLU(), nn.Conv2d(hidden, width, 1)]
    return [*layers, nn.Sigmoid()]


class Prompt(nn.Module):
    """What is added to a teacher's map before a stage: one number for each channel of each image.

    Args:
        maps: what enters the stage, of which only the shape is read.
        feedback: what the stage gives, likewise.
    """

    def __init__(self, maps: Tensor, feedback: Tensor):
        super().__init__()
        width, self.grid = maps.shape[1], maps.shape[2:]
        groups = gcd(4, width)
        same = maps.shape[1:] == feedback.shape[1:]
        self.align = nn.Identity() if same else nn.Conv2d(feedback.shape[1], width, 1, bias=False)
        self.fuse = nn.Sequential(
            nn.Conv2d(2 * width, width, 1),
            nn.Conv2d(width, width, 5, padding=2),
            nn.Conv2d(width, width, 1),
            *gate(width),
            nn.Conv2d(width, width, 1),
        )
        self.prompt = nn.Sequential(
            nn.Conv2d(width, width, 1, groups=groups),
            nn.Conv2d(width, width, 5, padding=2, groups=width),
            nn.Conv2d(width, width, 1),
            *gate(width),
            nn.Conv2d(width, width, 1, groups=groups),
        )
        self.beta = nn.Parameter(torch.zeros(1))

    def forward(self, maps: Tensor, feedback: Tensor) -> Tensor:
        told = self.align(resized(feedback, self.grid)).expand(len(maps), -1, -1, -1)
        return maps + self.beta * self.prompt(self.fuse(torch.cat([maps, told], dim=1)))


class PAT(Distiller):
    r"""Perspective-Aware Teaching: Adapting Knowledge for Heterogeneous Distillation.

    .. math:: L = w_{ce} H(y, p_s) + w_{kd} T^2 KL(p_t^{(T)} \| p_s^{(T)}) + w_{feature} \sum_l C(A_l R_l f_s, f_{t'}^l)
        + w_{prompt} KL(p_t \| p_{t'})

    t' is the teacher with a prompt before each stage but the first: x + beta P(x, u), beta learned from 0, u what the
    last step told (the student's aligned map minus the prompted teacher's). R lets 4x4 regions of all four stages of
    the student attend to each other, A brings them to the teacher's shape, and C is ReviewKD's context loss. The
    prompts are pulled towards the student, and the last term holds them. As in the authors' code, the gates of
    squeeze-and-excitation stand for gated maps, so a prompt is one number for each channel of an image.

    Differs from the authors' code:

    - No prompt stands before the first stage, which is one part with the stem.
    - u is the mean over the last batch, whose rows are other images; theirs is added row by row. It starts at 0, and is
      brought to another stage's shape without a batch norm.
    - Positions encode the place of a region; theirs, by a slip, that of an image in its batch. Class tokens pass beside
      prompts; theirs takes the last token for the class token.
    - Gates have at least 4 hidden numbers, as narrow teachers would have one or none.
    - Aligners are those of their convolutional teachers, for tokens too, which lie on a grid here.

    Memory: the graph of the teacher's stages behind the first is kept, without its weights' gradients. With all else
    these are 26 MB for each image of 32 pixels (resnet32x4 -> resnet8x4), where kd keeps 2.6 MB.

    Args:
        ce: weight of the cross-entropy with the ground truth.
        kd: weight of the distillation of the logits, from the teacher without prompts.
        feature: weight of the context losses, summed over stages.
        prompt: weight of the divergence of the prompted teacher from the teacher.
        temperature: T.
        width: of the regions.
        heads: of the attention; they divide the width.

    Source: Lin et al. 2025; ``distillers/pat.py`` and ``train.py`` of jimmylin0979/PAT.
    """

    paper = "arXiv:2501.08885"
    fidelity = Fidelity.ADAPTED
    needs = Needs(stages=("teacher",))
    toy_settings = {"width": 64}  # noqa: RUF012 (never written to)
    expected_failures = {  # noqa: RUF012 (never written to)
        "check_gradients": "prompts are multiplied by a learned factor that starts at 0, and so are their gradients"
    }

    def __init__(
        self,
        *,
        ce: float = 1.0,
        kd: float = 1.0,
        feature: float = 1.0,
        prompt: float = 1.0,
        temperature: float = 1.0,
        width: int = 512,
        heads: int = 8,
    ):
        super().__init__(ce=ce, kd=kd, feature=feature, prompt=prompt)
        self.temperature = positive(temperature=temperature)
        self.width, self.heads = at_least(1, width=width), at_least(1, heads=heads)
        if self.width % self.heads:
            raise UserError(f"heads={heads}: expected a divisor of width={width}")

    def build(self, student: Output, teacher: Output, data: DataSpec) -> None:
        check_stages(range(STAGES), student, teacher)
        self.regions = Regions(student.features, self.width, self.heads)
        self.aligners = nn.ModuleList(Aligner(self.width, maps) for maps in teacher.features)
        self.pyramids = nn.ModuleList(Pyramid(maps.shape[2:]) for maps in teacher.features)
        pairs = zip(teacher.features, teacher.features[1:], strict=False)
        self.prompts = nn.ModuleList(Prompt(before, after) for before, after in pairs)
        for stage, maps in enumerate(teacher.features[1:], 1):
            self.register_buffer(f"told{stage}", torch.zeros(1, *maps.shape[1:]))

    def forward(self, student: NetworkView, teacher: NetworkView, batch: Batch) -> dict[str, Tensor]:
        t, s = teacher(batch.images), student(batch.images)
        terms = self.loss(s, t, batch)
        if not self.is_active:
            return terms
        prompted = self.prompted(teacher, batch.images)
        seen = [align(maps) for align, maps in zip(self.aligners, self.regions(s.features), strict=True)]
        self.remember(seen, prompted)
        return terms | self.weigh(
            feature=lambda: torch.stack(
                [context_loss(*each) for each in zip(seen, prompted.features, self.pyramids, strict=True)]
            ).sum(),
            prompt=lambda: softened_kl(prompted.logits, t.logits, 1.0),
        )

    def loss(self, student: Output, teacher: Output, batch: Batch) -> dict[str, Tensor]:
        return self.weigh(
            ce=lambda: cross_entropy(student.logits, batch.targets),
            kd=lambda: softened_kl(student.logits, teacher.logits, self.temperature),
        )

    def prompted(self, teacher: NetworkView, images: Tensor) -> Output:
        """Run the teacher with a prompt before each stage but the first."""
        maps, prefix = teacher.stage(0, images)
        features = [maps]
        for stage, prompt in enumerate(self.prompts, 1):
            told = self.get_buffer(f"told{stage}").clone()  # the backward pass reads it after ``remember`` has written
            maps, prefix = teacher.stage(stage, prompt(maps, told), prefix)
            features.append(maps)
        return teacher.run_from(STAGES, maps, prefix)._replace(features=tuple(features))

    @torch.no_grad()
    def remember(self, seen: Sequence[Tensor], prompted: Output) -> None:
        """Keep what the next step is told: the mean gap between student and prompted teacher at each stage."""
        ranks = all_sum(torch.ones((), device=prompted.logits.device))
        for stage in range(1, STAGES):
            gap = (seen[stage] - prompted.features[stage]).mean(dim=0, keepdim=True)
            self.get_buffer(f"told{stage}").copy_(all_sum(gap) / ranks)
