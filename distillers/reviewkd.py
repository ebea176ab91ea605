"""ReviewKD: the student's maps, each fused with all deeper ones, repeat the teacher's at several scales."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from kdzoo import Batch, DataSpec, Distiller, Fidelity, Needs, Output
from kdzoo.connectors import BatchNorm2d, Pyramid, check_stages, resized
from kdzoo.errors import UserError
from kdzoo.keywords import one_of, share
from kdzoo.losses import context_loss, cross_entropy, warm_up


def conv_norm(inputs: int, outputs: int, kernel: int) -> nn.Sequential:
    """Make a convolution that keeps the height and width, and batch norm."""
    conv = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False)
    nn.init.kaiming_uniform_(conv.weight, a=1)
    return nn.Sequential(conv, BatchNorm2d(outputs))


class Fusion(nn.Module):
    """A student's map fused with the fusion of deeper ones, with weights at each position.

    Args:
        inputs: channels of the student's map.
        middle: channels of every fusion.
        outputs: channels of the teacher's map.
        deepest: whether no deeper fusion exists.
    """

    def __init__(self, inputs: int, middle: int, outputs: int, deepest: bool):
        super().__init__()
        self.enter, self.leave = conv_norm(inputs, middle, 1), conv_norm(middle, outputs, 3)
        self.weigh = None if deepest else nn.Sequential(nn.Conv2d(2 * middle, 2, 1), nn.Sigmoid())

    def forward(self, maps: Tensor, deeper: Tensor | None, grid: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Fuse (B, inputs, H, W) and (B, middle, h, w): (B, outputs, *grid), and the fusion (B, middle, *grid)."""
        fused = self.enter(maps)
        if self.weigh is not None and deeper is not None:
            deeper = resized(deeper, maps.shape[2:])
            own, other = self.weigh(torch.cat([fused, deeper], dim=1)).split(1, dim=1)
            fused = fused * own + deeper * other
        fused = resized(fused, grid)
        return self.leave(fused), fused


class ReviewKD(Distiller):
    r"""Distilling Knowledge via Knowledge Review.

    .. math:: L = w_{ce} H(y, p_s) + w_{review} r \sum_l \operatorname{HCL}(\Phi_l(f_s^l, \ldots, f_s^n), f_t^l)

    The maps are those of ``stages`` and, the deepest, the embedding as a map of one cell. Phi goes from deep to
    shallow: the student's map through a 1x1 convolution and batch norm, fused with what the deeper map left behind,
    by two attention maps of both; resized to the teacher's grid by nearest neighbours, and through a 3x3 convolution
    and batch norm. HCL is the MSE of the maps and of their averages over 4x4, 2x2 and 1x1 cells, where those are
    fewer, with weights that halve. r rises from 0 to 1 over ``warmup``. Student maps of any grid and width fit.

    The teacher's maps are those before the last ReLU of a stage, or before the ReLU that reads them in Wide ResNets,
    as in the authors' code for CIFAR-100; the student's are as it passes them on. Other forms:

    - ``preactivations=()``: the authors' ResNets for ImageNet, which rectify what they show in place.
    - ``preactivations=("student", "teacher")``: mdistiller's code.

    Args:
        ce: weight of the cross-entropy with the ground truth.
        review: weight of the sum over maps; the authors choose it by pair, from 0.6 (resnet56 to resnet20) and
            1 (resnet110 to resnet32) to 5 (most) and 8 (resnet32x4 to ShuffleNetV2).
        stages: which stages are matched. The default leaves out the first, which is the stem's map where networks
            have three stages; the authors match all four of VGGs, MobileNetV2 and ResNet-50.
        warmup: share of training over which r rises; the authors' rises once an epoch, from 0 in the first of 240, on
            average half an epoch behind ours, and mdistiller's from 1/20, half an epoch ahead.
        preactivations: whose maps are taken before the last ReLU: "student", "teacher", both or none.

    Source: Chen et al. 2021; the authors' ``reviewkd.py``, ``resnet_cifar.py`` and ``wide_resnet_cifar.py`` in
    ``CIFAR-100/model``, ``CIFAR-100/train.py``, ``CIFAR-100/script/reviewKD.sh`` and ``ImageNet/models/resnet.py``.
    """

    paper = "arXiv:2104.09044"
    fidelity = Fidelity.EXACT
    needs = Needs(logits=False)

    def __init__(
        self,
        *,
        ce: float = 1.0,
        review: float = 5.0,
        stages: tuple[int, ...] = (1, 2, 3),
        warmup: float = 20 / 240,
        preactivations: tuple[str, ...] = ("teacher",),
    ):
        super().__init__(ce=ce, review=review)
        self.stages = stages
        self.warmup = share(warmup=warmup)
        self.preactivations = tuple(one_of(("student", "teacher"), preactivations=role) for role in preactivations)

    def build(self, student: Output, teacher: Output, data: DataSpec) -> None:
        for role, output in (("student", student), ("teacher", teacher)):
            if role in self.preactivations and not output.preactivations:
                raise UserError(
                    f"reviewkd takes the {role}'s maps before the last ReLU of a stage, and the {role} does not show "
                    f"them; leave '{role}' out of distiller.preactivations, or let its stages end in torch.nn.ReLU"
                )
        self.needs = Needs(logits=False, preactivations=self.preactivations)
        self.stages = tuple(sorted(check_stages(self.stages, student, teacher), reverse=True))
        self.fusions, self.pyramids = nn.ModuleList(), nn.ModuleList()
        middle = min(512, student.embedding.shape[1])
        for f_s, f_t in zip(self.maps("student", student), self.maps("teacher", teacher), strict=True):
            self.fusions.append(Fusion(f_s.shape[1], middle, f_t.shape[1], deepest=not self.fusions))
            self.pyramids.append(Pyramid(f_t.shape[2:]))

    def maps(self, role: str, output: Output) -> list[Tensor]:
        """List the maps of a network that are matched, from deep to shallow, each (B, C, H, W)."""
        features = output.preactivations if role in self.preactivations else output.features
        return [output.embedding[:, :, None, None], *(features[l] for l in self.stages)]

    def loss(self, student: Output, teacher: Output, batch: Batch) -> dict[str, Tensor]:
        return self.weigh(
            ce=lambda: cross_entropy(student.logits, batch.targets),
            review=lambda: warm_up(batch.progress, self.warmup) * self.review(student, teacher),
        )

    def review(self, student: Output, teacher: Output) -> Tensor:
        """Sum the context losses of the fused maps: a scalar."""
        losses, deeper = [], None
        maps = self.maps("student", student), self.maps("teacher", teacher)
        for f_s, f_t, fuse, pyramid in zip(*maps, self.fusions, self.pyramids, strict=True):
            seen, deeper = fuse(f_s, deeper, f_t.shape[2:])
            losses.append(context_loss(seen, f_t, pyramid))
        return torch.stack(losses).sum()
