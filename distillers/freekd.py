"""FreeKD: the student matches wavelet details of the teacher's maps, mostly where trained prompts point."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kdzoo import Batch, DataSpec, Distiller, Fidelity, NetworkView, Output
from kdzoo.connectors import CommonGrid, Wavelets, check_stages, paired_features
from kdzoo.keywords import at_least, positive
from kdzoo.losses import cross_entropy, softened_kl
from kdzoo.spectral import largest_level
from kdzoo.tensors import all_sum


def prompt_masks(band: Tensor, prompts: Tensor) -> Tensor:
    """Compute where each of ``prompts`` (P, C) points to in bands (B, C, H, W) or (B, C, 3, H, W): (B, P, H, W)."""
    summed = band.sum(dim=2) if band.ndim == 5 else band
    return (prompts @ summed.flatten(2)).unflatten(2, summed.shape[2:]).sigmoid()


def overlap(masks: Tensor) -> Tensor:
    """Average the Dice coefficient of different masks (B, P, H, W) of one image; 0 if there is one mask only."""
    flat = masks.flatten(2)
    energy = flat.square().sum(dim=2)
    dice = 2 * (flat @ flat.mT) / (energy[:, :, None] + energy[:, None] + 1e-12)
    count = masks.shape[1]
    apart = 1 - torch.eye(count, dtype=dice.dtype, device=dice.device)
    return (dice * apart).sum(dim=(1, 2)).mean() / max(count * (count - 1), 1)


def masked_distance(student: Tensor, teacher: Tensor, masks: Tensor) -> Tensor:
    """Average the absolute difference of bands (B, C, H, W) or (B, C, 3, H, W) under each mask (B, P, H, W)."""
    weight = masks.mean(dim=1)[:, None]  # masks are positive, so the mean over P may come first
    difference = (student - teacher).abs()
    return (difference * (weight[:, :, None] if difference.ndim == 5 else weight)).mean()


class FreeKD(Distiller):
    r"""FreeKD: Knowledge Distillation via Semantic Frequency Prompt, carried over to classification.

    .. math:: L = w_{ce} H(y, p_s) + w_{kd} T^2 KL(p_t^{(T)} \| p_s^{(T)})
        + w_{detail} \operatorname{mean}_l \sum_j \operatorname{mean}_p
        \operatorname{mean} |\sigma(q_p \cdot b_j) (D_j P f_s^l - D_j f_t^l)| + w_{mse} \operatorname{mean}_l
        \operatorname{MSE}(P f_s^l, f_t^l)

    D_j are the three detail bands of level j of a Haar transform, b_j their sum for the teacher, q_p the prompts of
    the stage and level, and P a 1x1 convolution to the teacher's channels.

    The prompts are trained before, on the frozen teacher: bands under the sum of their masks, put together again,
    must still tell the classes, and the masks of one level must not overlap (Dice). A map that cannot be split, such
    as 1x1, is compared as it is, under the masks of its content.

    The code names the three *levels* of its transform horizontal, vertical and diagonal and so has one set of
    prompts for each level, as here. The paper's relational loss serves dense prediction only, and is not in it.

    Differs from the authors' code:

    - They let the rest of the teacher, a detector, judge the repaired maps. Here a linear reading judges that is thrown
      away afterwards: of the mean over positions of max(x, 0) and of max(-x, 0), as a mean of x itself would not see
      detail.
    - Ours are the mean over stages, the averaging of the finer of two grids to the coarser, and the optimiser of the
      prompts (Adam, learning rate 0.01).

    Args:
        ce: weight of the cross-entropy with the ground truth.
        detail: weight of the bands' term.
        mse: weight of the error of the maps themselves; the authors' detectors take 5 beside it.
        kd: weight of the distillation of logits.
        temperature: T of the distillation of logits.
        levels: how often maps are split, at most.
        prompts: how many prompts each level has.
        epochs: how long prompts are trained; 0 leaves them nearly uniform.
        stages: which stages are matched.

    Source: mmrazor/models/losses/freekd.py and configs/distill/freekd of the authors' repository, Gumpest/FreeKD.
    """

    paper = "arXiv:2311.12079"
    fidelity = Fidelity.ADAPTED

    def __init__(
        self,
        *,
        ce: float = 1.0,
        detail: float = 1.0,
        mse: float = 0.0,
        kd: float = 0.0,
        temperature: float = 4.0,
        levels: int = 3,
        prompts: int = 6,
        epochs: int = 1,
        stages: tuple[int, ...] = (0, 1, 2, 3),
    ):
        super().__init__(ce=ce, detail=detail, mse=mse, kd=kd)
        self.temperature, self.stages = positive(temperature=temperature), stages
        self.levels, self.prompts = at_least(1, levels=levels), at_least(1, prompts=prompts)
        self.epochs = at_least(0, epochs=epochs)
        if self.epochs:  # the masks are learned from labels before training
            self.label_terms = ("ce", "detail")

    def build(self, student: Output, teacher: Output, data: DataSpec) -> None:
        self.stages = check_stages(self.stages, student, teacher)
        self.grids, self.projectors, self.bands = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        for stage, (f_s, f_t) in zip(self.stages, paired_features(student, teacher, self.stages), strict=True):
            grid = CommonGrid(f_s, f_t)
            self.grids.append(grid)
            self.projectors.append(nn.Conv2d(f_s.shape[1], f_t.shape[1], 1))
            if self.weights["detail"]:
                level = min(self.levels, largest_level(grid.size, "haar"))
                self.bands.append(Wavelets(grid.size, "haar", level, "reflect"))
                # of content first, then of each level, fine to coarse
                self.register_buffer(f"prompts{stage}", torch.randn(1 + level, self.prompts, f_t.shape[1]) * 0.01)

    def prepare(self, student: NetworkView, teacher: NetworkView, batches: Iterable[Batch]) -> None:
        """Train the prompts on the teacher alone, ``epochs`` times over the batches."""
        if not self.weights["detail"] or not self.epochs:
            return
        grids = [grid for grid in self.grids if isinstance(grid, CommonGrid)]
        transforms = [bands for bands in self.bands if isinstance(bands, Wavelets)]
        kept = [self.get_buffer(f"prompts{stage}") for stage in self.stages]
        trained = [prompts.clone().requires_grad_() for prompts in kept]
        readings: list[nn.Linear] = []
        optimizer = torch.optim.Adam(trained, lr=0.01)
        for batch in (batch for _ in range(self.epochs) for batch in batches):
            seen = teacher(batch.images)
            maps = [grid.teacher(seen.features[n]) for n, grid in zip(self.stages, grids, strict=True)]
            if not readings:
                classes = seen.logits.shape[1]
                readings = [nn.Linear(2 * m.shape[1], classes, device=m.device) for m in maps]
                optimizer.add_param_group({"params": [p for reading in readings for p in reading.parameters()]})
            losses = []
            for whole, bands, prompts, reading in zip(maps, transforms, trained, readings, strict=True):
                content, details = bands(whole)
                masks = [prompt_masks(b, q) for b, q in zip([content, *details], prompts, strict=True)]
                sums = [mask.sum(dim=1)[:, None] for mask in masks]
                parts = [band * mask[:, :, None] for band, mask in zip(details, sums[1:], strict=True)]
                repaired = bands.inverse(content * sums[0], parts)
                halves = [side.relu().mean(dim=(2, 3)) for side in (repaired, -repaired)]
                losses.append(cross_entropy(reading(torch.cat(halves, dim=1)), batch.targets))
                losses += [overlap(mask) for mask in masks]
            optimizer.zero_grad()
            torch.stack(losses).sum().backward()
            optimizer.step()
        for buffer, prompts in zip(kept, trained, strict=True):
            ranks = all_sum(torch.ones((), device=prompts.device))
            buffer.copy_(all_sum(prompts.detach()) / ranks)

    def loss(self, student: Output, teacher: Output, batch: Batch) -> dict[str, Tensor]:
        pairs = self.pairs(student, teacher) if self.is_active else []
        return self.weigh(
            ce=lambda: cross_entropy(student.logits, batch.targets),
            detail=lambda: self.detail(pairs),
            mse=lambda: torch.stack([F.mse_loss(f_s, f_t) for f_s, f_t in pairs]).mean(),
            kd=lambda: softened_kl(student.logits, teacher.logits, self.temperature),
        )

    def pairs(self, student: Output, teacher: Output) -> list[tuple[Tensor, Tensor]]:
        """Bring both maps of each stage to one shape, (B, C_t, H, W) each."""
        maps = []
        for f_s, f_t, grid, project in paired_features(student, teacher, self.stages, self.grids, self.projectors):
            f_s, f_t = grid(f_s, f_t)
            maps.append((project(f_s), f_t))
        return maps

    def detail(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        """Average the distances of masked details over the stages: a scalar."""
        distances = []
        for stage, bands, (f_s, f_t) in zip(self.stages, self.bands, pairs, strict=True):
            (content_s, details_s), (content_t, details_t) = bands(f_s), bands(f_t)
            prompts = self.get_buffer(f"prompts{stage}")
            if details_s:
                compared = list(zip(details_s, details_t, prompts[1:], strict=True))
            else:
                compared = [(content_s, content_t, prompts[0])]
            levels = [masked_distance(s, t, prompt_masks(t, q)) for s, t, q in compared]
            distances.append(torch.stack(levels).sum())
        return torch.stack(distances).mean()
