"""SemCKD: each stage of the student learns from all stages of the teacher, most from those that see images alike."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kdzoo import Batch, DataSpec, Distiller, Fidelity, Needs, Output
from kdzoo.connectors import CommonGrid, check_stages, conv_batch_norm
from kdzoo.keywords import at_least, positive
from kdzoo.losses import cross_entropy, softened_kl


class ImageCode(nn.Module):
    """The similarities of each image to the batch's, made into a short vector of length 1: (B, ...) -> (B, D).

    Args:
        images: how many images similarities are taken to: the first of the batch; absent ones count as 0.
    """

    def __init__(self, images: int):
        super().__init__()
        self.images, width = images, max(images // 4, 1)
        self.layers = nn.Sequential(nn.Linear(images, 2 * width), nn.ReLU(), nn.Linear(2 * width, width))

    def forward(self, maps: Tensor) -> Tensor:
        rows = maps.flatten(1)
        similar = rows @ rows.mT
        return F.normalize(self.layers(F.pad(similar, (0, self.images - len(rows)))), eps=1e-6)


def projector(inputs: int, outputs: int) -> nn.Sequential:
    """Make 1x1, 3x3 and 1x1 convolutions from a student's map to a teacher's width."""
    middle = 2 * outputs
    return nn.Sequential(
        *conv_batch_norm(inputs, middle),
        nn.ReLU(),
        *conv_batch_norm(middle, middle, kernel=3),
        nn.ReLU(),
        nn.Conv2d(middle, outputs, 1, bias=False),
    )


class SemCKD(Distiller):
    r"""Cross-Layer Distillation with Semantic Calibration.

    .. math:: L = w_{ce} H(y, p_s) + w_{kd} T^2 KL(p_t^{(T)} \| p_s^{(T)}) + \frac{w_{semckd}}{S} \operatorname{mean}_b
        \sum_{l=1}^{S} \sum_m \alpha_b^{lm} \operatorname{MSE}(r^{lm}(f_{s,b}^l), f_{t,b}^m),
        \quad \alpha_b^{l:} = \operatorname{softmax}_m (q_b^l \cdot k_b^m / \gamma)

    The query q of a student's stage and the key k of a teacher's are made of the image's row of F F', where F holds
    the flattened maps of the batch, by two linear layers with a ReLU between them, and have length 1. r: convolutions
    of 1x1, 3x3 and 1x1, one projector for each pair of stages. Where the grids of a pair differ, the larger map is
    average-pooled to the smaller height and width.

    The row has as many numbers as the batch has images, so the authors' layers know one batch size and other batches
    are skipped. Here it has ``images`` numbers: a smaller batch's row is filled up with zeros, and only similarities to
    the first images of a larger one are read.

    Args:
        ce: weight of the cross-entropy with the ground truth.
        kd: weight of the distillation of logits.
        semckd: weight of the maps' term; the authors take 400 for resnet32x4 to resnet8x4 and 50 for ImageNet.
        temperature: T of the distillation of logits.
        gamma: divides the dot products of queries and keys.
        images: numbers of a row of similarities; the authors' batch size.
        stages: which stages of both networks take part. The default leaves out the first, which is the stem's map
            where networks have three stages.

    Source: Chen et al. 2021; ``distiller_zoo/SemCKD.py``, ``models/util.py``, ``helper/loops.py`` and ``README.md`` of
    DefangChen/SemCKD; gamma of DefangChen/SimKD.
    """

    paper = "arXiv:2012.03236"
    fidelity = Fidelity.EXACT
    needs = Needs(logits=False)

    def __init__(
        self,
        *,
        ce: float = 1.0,
        kd: float = 1.0,
        semckd: float = 400.0,
        temperature: float = 4.0,
        gamma: float = 1.0,
        images: int = 64,
        stages: tuple[int, ...] = (1, 2, 3),
    ):
        super().__init__(ce=ce, kd=kd, semckd=semckd)
        self.temperature, self.gamma = positive(temperature=temperature), positive(gamma=gamma)
        self.images, self.stages = at_least(1, images=images), stages

    def build(self, student: Output, teacher: Output, data: DataSpec) -> None:
        self.stages = check_stages(self.stages, student, teacher)
        self.queries = nn.ModuleList(ImageCode(self.images) for _ in self.stages)
        self.keys = nn.ModuleList(ImageCode(self.images) for _ in self.stages)
        self.grids, self.projectors = nn.ModuleList(), nn.ModuleList()
        for f_s in (student.features[l] for l in self.stages):
            for f_t in (teacher.features[m] for m in self.stages):
                self.grids.append(CommonGrid(f_s, f_t))
                self.projectors.append(projector(f_s.shape[1], f_t.shape[1]))

    def loss(self, student: Output, teacher: Output, batch: Batch) -> dict[str, Tensor]:
        return self.weigh(
            ce=lambda: cross_entropy(student.logits, batch.targets),
            kd=lambda: softened_kl(student.logits, teacher.logits, self.temperature),
            semckd=lambda: self.calibrated_error(student, teacher),
        )

    def calibrated_error(self, student: Output, teacher: Output) -> Tensor:
        """Average the errors of all pairs of stages under their attention: a scalar."""
        s_maps, t_maps = ([output.features[l] for l in self.stages] for output in (student, teacher))
        queries = torch.stack([code(maps) for code, maps in zip(self.queries, s_maps, strict=True)], dim=1)
        keys = torch.stack([code(maps) for code, maps in zip(self.keys, t_maps, strict=True)], dim=1)
        attention = (queries @ keys.mT / self.gamma).softmax(dim=2)  # (B, S, S)
        pairs = zip([(f_s, f_t) for f_s in s_maps for f_t in t_maps], self.grids, self.projectors, strict=True)
        errors = []
        for maps, grid, project in pairs:
            f_s, f_t = grid(*maps)
            errors.append((project(f_s) - f_t).square().mean(dim=(1, 2, 3)))
        return (attention.flatten(1) * torch.stack(errors, dim=1)).sum() / (len(attention) * len(s_maps))
