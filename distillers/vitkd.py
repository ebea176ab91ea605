"""ViTKD: shallow maps of the student repeat the teacher's; its last map, half of it hidden, restores the teacher's."""

from typing import ClassVar

import torch
from torch import Tensor, nn

from kdzoo import Batch, DataSpec, Distiller, Fidelity, Needs, Output
from kdzoo.connectors import CommonGrids
from kdzoo.keywords import positive, share
from kdzoo.losses import cross_entropy


def squared_error(student: Tensor, teacher: Tensor) -> Tensor:
    """Compute the squared distance of maps (B, C, H, W), summed over an image and averaged over B."""
    return (student - teacher).square().sum() / len(student)


def hidden_positions(maps: Tensor, hidden: float) -> Tensor:
    """Draw which positions of maps (B, C, H, W) are hidden, all but int(HW (1 - hidden)) of an image: (B, 1, H, W)."""
    batch, _, *grid = maps.shape
    positions = grid[0] * grid[1]
    order = torch.rand(batch, positions, device=maps.device).argsort(dim=1)
    return (order >= int(positions * (1 - hidden))).view(batch, 1, *grid)


class ViTKD(Distiller):
    r"""ViTKD: Practical Guidelines for ViT Feature Knowledge Distillation.

    .. math:: L = w_{ce} H(y, p_s) + \frac{w_{mimic}}{B} \sum_{l \in shallow} \|r^l(f_s^l) - f_t^l\|_2^2
        + \frac{w_{generate}}{B \lambda} \sum_b \sum_{n \in M_b} \|g(\tilde f_{s,b})_n - f_{t,b,n}\|_2^2

    r is a linear map of tokens to the teacher's width, and nothing where the widths agree. In the last map of the
    student under such an r, the positions M_b, drawn anew for each image and step, are replaced by one learned token;
    g, two 3x3 convolutions with a ReLU between them, restores the teacher's map there. Both errors are sums over an
    image, so their weights suit the authors' 14 x 14 tokens of 384 to 1024 numbers.

    Differs from the authors' code, whose networks are all ViTs with the same tokens:

    - The shallow maps are those of two stages, which in a ViT end after a quarter and a half of the blocks; the authors
      take the first two blocks. The last map is as the last block leaves it; theirs has gone through the last norm.
    - Maps of any network fit. Where the grids of a stage differ, the larger map is average-pooled to the smaller
      height and width. No class token is read, as there.

    Args:
        ce: weight of the cross-entropy with the ground truth.
        mimic: weight of the shallow maps' error.
        generate: weight of the restored map's error.
        hidden: lambda, the share of positions that is hidden.
        shallow: which stages are repeated.
        deep: which stage is restored.

    Source: Yang et al. 2022; ``mmcls/models/dis_losses/vitkd.py``, ``mmcls/models/backbones/vision_transformer.py`` and
    ``configs/distillers/imagenet/deit-s3_distill_deit-t_img.py`` of yzd-v/cls_KD.
    """

    paper = "arXiv:2209.02432"
    fidelity = Fidelity.ADAPTED
    needs = Needs(logits=False)
    expected_failures: ClassVar[dict[str, str]] = {
        "check_gradients": "the toy's last map has one position, which has no neighbours to be restored from"
    }

    def __init__(
        self,
        *,
        ce: float = 1.0,
        mimic: float = 3e-5,
        generate: float = 3e-6,
        hidden: float = 0.5,
        shallow: tuple[int, ...] = (0, 1),
        deep: int = 3,
    ):
        super().__init__(ce=ce, mimic=mimic, generate=generate)
        self.hidden, self.shallow, self.deep = positive(hidden=share(hidden=hidden)), shallow, deep

    def build(self, student: Output, teacher: Output, data: DataSpec) -> None:
        def align(stage: int) -> nn.Module:
            inputs, outputs = (output.features[stage].shape[1] for output in (student, teacher))
            return nn.Identity() if inputs == outputs else nn.Conv2d(inputs, outputs, 1)

        if self.weights["mimic"]:
            self.shallow_grids = CommonGrids(student, teacher, self.shallow)
            self.shallow_aligns = nn.ModuleList(align(stage) for stage in self.shallow)
        if self.weights["generate"]:
            self.deep_grid = CommonGrids(student, teacher, (self.deep,))
            width = teacher.features[self.deep].shape[1]
            self.deep_align, self.token = align(self.deep), nn.Parameter(torch.zeros(width, 1, 1))
            convolutions = (nn.Conv2d(width, width, 3, padding=1) for _ in range(2))
            self.restore = nn.Sequential(next(convolutions), nn.ReLU(), next(convolutions))

    def loss(self, student: Output, teacher: Output, batch: Batch) -> dict[str, Tensor]:
        return self.weigh(
            ce=lambda: cross_entropy(student.logits, batch.targets),
            mimic=lambda: self.mimicked(student, teacher),
            generate=lambda: self.generated(student, teacher),
        )

    def mimicked(self, student: Output, teacher: Output) -> Tensor:
        """Sum the errors of the shallow maps: a scalar."""
        pairs = zip(self.shallow_grids(student, teacher), self.shallow_aligns, strict=True)
        return torch.stack([squared_error(align(f_s), f_t) for (f_s, f_t), align in pairs]).sum()

    def generated(self, student: Output, teacher: Output) -> Tensor:
        """Compute the error of the restored positions of the last map: a scalar."""
        ((f_s, f_t),) = self.deep_grid(student, teacher)
        seen = self.deep_align(f_s)
        mask = hidden_positions(seen, self.hidden)
        restored = self.restore(torch.where(mask, self.token, seen))
        return squared_error(restored * mask, f_t * mask) / self.hidden
