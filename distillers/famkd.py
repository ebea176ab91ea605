"""FAM-KD: the student's stages, filtered by learned weights of their frequencies, match the teacher's."""

from functools import reduce

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kdzoo import Batch, DataSpec, Distiller, Fidelity, Needs, Output
from kdzoo.connectors import BatchNorm2d, CommonGrid, check_stages, conv_batch_norm
from kdzoo.keywords import one_of, positive, share
from kdzoo.losses import cross_entropy, softened_kl, warm_up
from kdzoo.spectral import frequency_filter, high_pass

LARGEST = 2**24  # complex weights of one stage, above which "auto" goes depthwise


def local_attention(query: Tensor, key: Tensor, value: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Let each position and channel of a query (B, C, H, W) attend to the 3x3 around it: (B, C, H, W).

    ``rows`` (C // 2, 3) are added to the keys of the first channels, by the neighbour's row, and ``columns`` to
    those of the rest.
    """
    height, width = query.shape[2:]
    padded = [F.pad(maps, (1, 1, 1, 1)) for maps in (key, value)]
    neighbours = []
    for y in range(3):
        for x in range(3):
            k, v = (maps[..., y : y + height, x : x + width] for maps in padded)
            offset = torch.cat([rows[:, y], columns[:, x]])[:, None, None]
            neighbours.append((query * (k + offset), v))
    # A softmax over the nine, whose maps are never stacked: nine times a map is more than caches hold.
    with torch.no_grad():
        highest = reduce(torch.maximum, (score for score, _ in neighbours))
    weighted, total = torch.zeros_like(query), torch.zeros_like(query)
    for score, v in neighbours:
        weight = (score - highest).exp()
        weighted, total = weighted + weight * v, total + weight
    return weighted / total


class FrequencyAttention(nn.Module):
    """Filtered maps plus a 1x1 convolution of them, with learned weights: (B, C, H, W) -> the same shape."""

    mask: Tensor

    def __init__(self, channels: int, grid: tuple[int, int], cutoff: float, mixing: str):
        super().__init__()
        full = (channels, channels, *grid, 2)
        if mixing == "auto":
            mixing = "full" if channels**2 * grid[0] * grid[1] <= LARGEST else "depthwise"
        scale = 1 / channels**2 if mixing == "full" else 1.0
        self.weight = nn.Parameter(scale * torch.rand(full if mixing == "full" else full[1:]))
        self.convolve = nn.Conv2d(channels, channels, 1)
        self.shares = nn.Parameter(torch.full((2,), 0.5))
        self.register_buffer("mask", high_pass(*grid, cutoff), persistent=False)

    def forward(self, maps: Tensor) -> Tensor:
        filtered = frequency_filter(maps, self.weight, self.mask)
        return self.shares[0] * filtered + self.shares[1] * self.convolve(maps)


class Review(nn.Module):
    """The fusion of one student stage with the deeper ones, on the teacher's grid.

    Args:
        student: the student's maps, of which only the shape is read.
        teacher: the teacher's.
        deeper: channels of what the stage below sends up; 0 for the deepest.
        cutoff: of the high-pass, in cycles per image.
        mixing: of the filter.
    """

    def __init__(self, student: Tensor, teacher: Tensor, deeper: int, cutoff: float, mixing: str):
        super().__init__()
        channels, *grid = teacher.shape[1:]

        def widen(fan_in: int) -> nn.Module:
            return nn.Sequential(*conv_batch_norm(fan_in, channels), nn.ReLU())

        self.grid = (grid[0], grid[1])
        self.pool = CommonGrid(student, teacher).student
        self.enter = widen(student.shape[1])
        self.receive = widen(deeper) if deeper and deeper != channels else nn.Identity()
        if deeper:
            self.query, self.key, self.value = (nn.Conv2d(channels, channels, 1, bias=False) for _ in range(3))
            self.rows = nn.Parameter(torch.randn(channels // 2, 3))
            self.columns = nn.Parameter(torch.randn(channels - channels // 2, 3))
        self.leave = nn.Sequential(FrequencyAttention(channels, self.grid, cutoff, mixing), BatchNorm2d(channels))

    def forward(self, maps: Tensor, deeper: Tensor | None) -> tuple[Tensor, Tensor]:
        maps = F.interpolate(self.enter(self.pool(maps)), self.grid, mode="nearest")
        if deeper is not None:
            asked = self.query(F.interpolate(self.receive(deeper), self.grid, mode="nearest"))
            maps = local_attention(asked, self.key(maps), self.value(maps), self.rows, self.columns)
        return self.leave(maps), maps


class FAMKD(Distiller):
    r"""Frequency Attention for Knowledge Distillation, with its review of stages.

    .. math:: L = w_{ce} H(y, p_s) + w_{kd} T^2 KL(p_t^{(T)} \| p_s^{(T)})
        + w_{fam} \min(progress / warmup, 1) \sum_l \operatorname{MSE}(A_l(h_l), f_t^l)

    h_l is the student's stage on the teacher's grid, after a 1x1 convolution, BN and ReLU, attending in 3x3 windows,
    queried by h_l+1; the deepest is the embedding as a 1x1 map. A_l h is batch norm of a Re(F^-1 M W F h) + b V h,
    where F is the orthonormal Fourier transform, W learned complex weights that mix channels at each frequency, M a
    high-pass mask, V a 1x1 convolution, and a and b begin at 1/2.

    Differs from the authors' code:

    - The published mask clears a square of a tenth of the map's half, rounded down, around DC: nothing at all under
      20 pixels, frequencies -1 and 0 of each axis at 32, -2 to 1 at 56. Ours clears what is not above ``cutoff``
      cycles per image on any grid, 1 as the published one at 32; a map too coarse for more keeps its highest
      frequency.
    - Complex weights are pairs of real ones. Where a stage would need more than 2^24 of them (a ViT's some 10^8),
      each frequency scales its channel and does not mix, and the 1x1 convolution is left to mix.
    - Any width is accepted, as the attention's groups did nothing.
    - The last ReLU is gone, as features of transformers are negative too.
    - A 1x1 convolution leads to the teacher's channels at every stage.
    - A finer grid is averaged to the teacher's first, not thinned out at the end.
    - The student's maps are as it passes them on for every pair, where the authors' configuration of one,
      resnet32x4 to resnet8x4, takes those before the last ReLU.

    Args:
        ce: weight of the cross-entropy with the ground truth.
        fam: weight of the features' term, a sum over stages and embedding.
        kd: weight of the distillation of logits.
        temperature: T of the distillation of logits.
        warmup: over which share of training the features' term grows from 0; the authors' grows once an epoch, from
            1/20 in the first of 240, on average half an epoch ahead of ours.
        cutoff: the highest frequency that the mask clears, in cycles per image; below 0 it clears none.
        mixing: "full"; "depthwise"; or "auto", by the number of weights.
        stages: which stages are matched, beside the embedding. The authors leave out the stem's map, which is the
            first where networks have three stages.

    Source: Pham et al. 2024, section 3; distillers/FAM_KD.py and engine/cfg.py of the authors' repository,
    cuong-pv/FAM-KD.
    """

    paper = "arXiv:2403.05894"
    fidelity = Fidelity.ADAPTED
    needs = Needs(logits=False)

    def __init__(
        self,
        *,
        ce: float = 1.0,
        fam: float = 1.0,
        kd: float = 0.0,
        temperature: float = 4.0,
        warmup: float = 20 / 240,
        cutoff: float = 1.0,
        mixing: str = "auto",
        stages: tuple[int, ...] = (0, 1, 2, 3),
    ):
        super().__init__(ce=ce, fam=fam, kd=kd)
        self.temperature, self.warmup = positive(temperature=temperature), share(warmup=warmup)
        self.cutoff, self.mixing = cutoff, one_of(("auto", "full", "depthwise"), mixing=mixing)
        self.stages = stages

    def build(self, student: Output, teacher: Output, data: DataSpec) -> None:
        self.stages = tuple(sorted(check_stages(self.stages, student, teacher), reverse=True))
        self.reviews, deeper = nn.ModuleList(), 0
        for f_s, f_t in zip(self.deep_first(student), self.deep_first(teacher), strict=True):
            self.reviews.append(Review(f_s, f_t, deeper, self.cutoff, self.mixing))
            deeper = f_t.shape[1]

    def deep_first(self, output: Output) -> list[Tensor]:
        """List the embedding as a 1x1 map, then the stages from the deepest to the first: (B, C, H, W) each."""
        return [output.embedding[:, :, None, None], *(output.features[stage] for stage in self.stages)]

    def loss(self, student: Output, teacher: Output, batch: Batch) -> dict[str, Tensor]:
        return self.weigh(
            ce=lambda: cross_entropy(student.logits, batch.targets),
            fam=lambda: warm_up(batch.progress, self.warmup) * self.review(student, teacher),
            kd=lambda: softened_kl(student.logits, teacher.logits, self.temperature),
        )

    def review(self, student: Output, teacher: Output) -> Tensor:
        """Sum the errors of the reviewed stages, from the deepest to the first: a scalar."""
        errors, deeper = [], None
        for f_s, f_t, review in zip(self.deep_first(student), self.deep_first(teacher), self.reviews, strict=True):
            seen, deeper = review(f_s, deeper)
            errors.append(F.mse_loss(seen, f_t))
        return torch.stack(errors).sum()
