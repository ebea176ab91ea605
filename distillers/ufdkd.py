"""UFD-KD: the means of the last stage, and the rest, are matched separately, over positions and over channels."""

from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kdzoo import Batch, DataSpec, Distiller, Fidelity, Needs, Output
from kdzoo.connectors import BatchNorm2d, check_stages
from kdzoo.keywords import at_least, positive
from kdzoo.losses import cross_entropy, softened_kl

AXES = {"spatial": 1, "channel": 2}  # of tokens (B, N, C)


def decoupled(tokens: Tensor, axis: int) -> tuple[Tensor, Tensor]:
    """Split tokens (B, N, C) into mean and rest along ``axis``, 1 for positions or 2 for channels: (B, N, C) each.

    An orthogonal transform of which all but the constant is dropped, and its inverse, leave the mean.
    """
    dc = tokens.mean(dim=axis, keepdim=True).expand_as(tokens)
    return dc, tokens - dc


def direction_distance(student: Tensor, teacher: Tensor, axis: int) -> Tensor:
    """Compute the squared distance of the directions of tokens (B, N, C) along ``axis``; summed, mean over B."""
    s, t = (F.normalize(tokens, dim=axis, eps=1e-6) for tokens in (student, teacher))
    return (s - t).square().sum(dim=(1, 2)).mean()


class AttentionProjector(nn.Module):
    """Cross-attention from student maps (B, C_s, H_s, W_s) to tokens of the teacher (B, H_t * W_t, C_t).

    The queries are learned. A student of one position leaves attention nothing to choose, so there are none then.
    """

    def __init__(self, student: Tensor, teacher: Tensor, head_width: int, sharpness: float):
        super().__init__()
        (inputs, height, width), (outputs, *grid) = student.shape[1:], teacher.shape[1:]
        self.heads = next(h for h in range(max(outputs // head_width, 1), 0, -1) if outputs % h == 0)
        self.scale = sharpness * (outputs // self.heads) ** -0.5
        self.tokens = grid[0] * grid[1]
        self.convolve = nn.Sequential(nn.Conv2d(inputs, inputs, 3, padding=1), BatchNorm2d(inputs), nn.ReLU())
        self.position = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, inputs, height, width), std=0.02))
        self.value, self.project = nn.Linear(inputs, outputs), nn.Linear(outputs, outputs)
        self.chooses = height * width > 1
        if self.chooses:
            self.queries = nn.Parameter(torch.randn(1, self.tokens, outputs))
            self.ask = nn.Sequential(nn.Linear(outputs, outputs), nn.ReLU(), nn.Linear(outputs, outputs))
            self.key = nn.Linear(inputs, outputs)
        self.norm = nn.LayerNorm(outputs)
        self.mlp = nn.Sequential(nn.Linear(outputs, 4 * outputs), nn.ReLU(), nn.Linear(4 * outputs, outputs))

    def forward(self, maps: Tensor) -> Tensor:
        seen = (self.convolve(maps) + self.position).flatten(2).mT
        value = self.value(seen)
        if self.chooses:
            query, key, value = (  # (B, heads, tokens, C / heads)
                x.unflatten(2, (self.heads, -1)).transpose(1, 2)
                for x in (self.ask(self.queries).expand(len(seen), -1, -1), self.key(seen), value)
            )
            chosen = (query @ key.mT * self.scale).softmax(dim=-1)
            answer = (chosen @ value).transpose(1, 2).flatten(2)
        else:
            answer = value.expand(-1, self.tokens, -1)
        tokens = self.norm(self.project(answer))
        return tokens + self.mlp(tokens)


class UFDKD(Distiller):
    r"""Unified Frequency Decoupling Knowledge Distillation.

    .. math:: L = w_{ce} H(y, p_s) + w_{kd} T^2 KL(p_t^{(T)} \| p_s^{(T)}) + \operatorname{mean}_i
        \sum_{a \in \{space, channel\}} \sum_{b \in \{dc, ac\}} w_{a\_b} \|u(b_a(P_a f_s)) - u(b_a(f_t))\|^2

    dc_a is the constant coefficient of a DCT-II along a, transformed back, which is the mean along a; ac_a is the
    rest. So no transform is computed. u normalises the spatial parts over channels and the channel parts over
    space, as the code does (over channels too where a map has one position, of which only a sign would be left).
    P_a are two projectors: a 3x3 convolution, BN and ReLU, a position embedding, attention by learned queries of
    the teacher's grid, layer norm and a residual MLP.

    Differs from the authors' code:

    - Their projector today doubles the student's map by bilinear upsampling before it adds the position embedding.
      Their own configuration, MobileNetV2 with 7x7 maps and 7x7 positions, does not run with it. Ours adds positions of
      the student's own grid, without upsampling.
    - Their DCT needs square maps and their heads a width of the teacher that is a multiple of 32. The mean needs
      neither, and the number of heads here is the largest that gives each at least ``head_width`` channels.

    Args:
        ce: weight of the cross-entropy with the ground truth.
        kd: weight of the distillation of logits.
        spatial_dc: weight of the means over space.
        spatial_ac: weight of what varies over space.
        channel_dc: weight of the means over channels.
        channel_ac: weight of what varies over channels.
        temperature: T of the distillation of logits.
        stage: which stage is matched.
        head_width: channels of each head of attention.
        sharpness: multiplies the attention's scores, beyond the usual 1 / sqrt(head width).

    Source: ufd.py, attention.py and kd.py (which halves the cross-entropy too) in mmcls/models/dis_losses of the
    authors' repository, lusilili/UFD-KD; weights of its
    configs/distillers/swin/fmdv2_swin-t_distill_mobilenetv2_cifar100.py. Their paper was not available.
    """

    paper = "github:lusilili/UFD-KD"
    fidelity = Fidelity.EXACT
    needs = Needs(logits=False)

    def __init__(
        self,
        *,
        ce: float = 0.5,
        kd: float = 0.5,
        spatial_dc: float = 0.03,
        spatial_ac: float = 0.065,
        channel_dc: float = 0.003,
        channel_ac: float = 0.0065,
        temperature: float = 1.0,
        stage: int = 3,
        head_width: int = 32,
        sharpness: float = 5.0,
    ):
        super().__init__(
            ce=ce, kd=kd, spatial_dc=spatial_dc, spatial_ac=spatial_ac, channel_dc=channel_dc, channel_ac=channel_ac
        )
        self.temperature, self.head_width = positive(temperature=temperature), at_least(1, head_width=head_width)
        self.stage, self.sharpness = stage, sharpness
        self.projectors = nn.ModuleDict()  # one for each kind of term that has a weight

    def build(self, student: Output, teacher: Output, data: DataSpec) -> None:
        check_stages((self.stage,), student, teacher)
        f_s, f_t = student.features[self.stage], teacher.features[self.stage]
        self.dot = f_t.shape[2:].numel() == 1
        for kind in AXES:
            if self.weights[f"{kind}_dc"] or self.weights[f"{kind}_ac"]:
                self.projectors[kind] = AttentionProjector(f_s, f_t, self.head_width, self.sharpness)

    def loss(self, student: Output, teacher: Output, batch: Batch) -> dict[str, Tensor]:
        distances = {}
        for kind, project in self.projectors.items():
            axis = AXES[kind]
            parts_s = decoupled(project(student.features[self.stage]), axis)
            parts_t = decoupled(teacher.features[self.stage].flatten(2).mT, axis)
            for part, s, t in zip(("dc", "ac"), parts_s, parts_t, strict=True):
                distances[f"{kind}_{part}"] = partial(direction_distance, s, t, 2 if self.dot else 3 - axis)
        return self.weigh(
            ce=lambda: cross_entropy(student.logits, batch.targets),
            kd=lambda: softened_kl(student.logits, teacher.logits, self.temperature),
            **distances,
        )
