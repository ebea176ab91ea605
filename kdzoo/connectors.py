"""Modules that make the features of two networks comparable: pooling, transforms, checks of stages."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kdzoo.errors import UserError
from kdzoo.outputs import NetworkView, Output
from kdzoo.spectral import apply_basis, average_rows, dwt2, dwt_basis, idwt2, idwt_basis, pooling_basis, separable
from kdzoo.tensors import full_precision


def check_stages(stages: Sequence[int], student: Output, teacher: Output) -> tuple[int, ...]:
    """Check that both networks have these stages, and return them as a tuple.

    Raises:
        UserError: none is given, one is given twice, or a network lacks one.
    """
    count = min(len(student.features), len(teacher.features))
    if not stages or len(set(stages)) < len(stages) or not set(stages) <= set(range(count)):
        raise UserError(f"stages {tuple(stages)}: expected distinct numbers from 0 to {count - 1}; choose of these")
    return tuple(stages)


def paired_features(student: Output, teacher: Output, stages: Sequence[int], *modules: Iterable[Any]) -> Iterator[Any]:
    """Iterate over the stages: the student's map, the teacher's map, and one item of each of ``modules``."""
    for stage, *items in zip(stages, *modules, strict=True):
        yield student.features[stage], teacher.features[stage], *items


class _LayoutKept(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, maps: Tensor, layout: torch.memory_format) -> Tensor:
        ctx.layout = layout
        return maps.view_as(maps)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0].contiguous(memory_format=ctx.layout), None


def keep_layout(maps: Tensor) -> Tensor:
    """Return a map (B, C, H, W) whose gradient will lie in memory as the map does, where that is one piece.

    Losses flatten maps, and give gradients back in the usual layout, not in the channels-last one of the networks; maps
    that are joined get parts of a larger gradient. On a CPU torch's backward pass of a batch norm takes four to ten
    times longer then.
    """
    for layout in (torch.channels_last, torch.contiguous_format):
        if maps.requires_grad and maps.is_contiguous(memory_format=layout):
            return _LayoutKept.apply(maps, layout)
    return maps


class BatchNorm2d(nn.BatchNorm2d):
    """Normalise a map over batch and positions, with a gradient that lies in memory as the map does."""

    def forward(self, maps: Tensor) -> Tensor:
        return keep_layout(super().forward(maps))


def conv_batch_norm(inputs: int, outputs: int, kernel: int = 1, groups: int = 1) -> tuple[nn.Conv2d, nn.BatchNorm2d]:
    """Make a convolution that keeps the height and width, without bias, and its batch norm."""
    conv = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, groups=groups, bias=False)
    return conv, BatchNorm2d(outputs)


class Positions(nn.Module):
    """A fixed linear map over the positions of a feature map, such as a pooling: (B, C, H, W) -> (B, C, N).

    Args:
        basis: (N, H * W), of ``kdzoo.spectral``.
    """

    basis: Tensor

    def __init__(self, basis: Tensor):
        super().__init__()
        self.register_buffer("basis", basis.float(), persistent=False)

    def forward(self, maps: Tensor) -> Tensor:
        return apply_basis(keep_layout(maps), self.basis)


class CellLogits(nn.Module):
    """The logits that a network's own classifier gives for each cell of its final map: (B, N, K).

    At scale 1 they are the network's own logits.

    Args:
        role: "student" or "teacher", for the error.
        output: the network's, of which only the final map's shape is read.
        scales: the map is split into g x g cells for each g, N in all; cells of a map that is coarser share its pixels.

    Raises:
        UserError: its logits are not made of the mean of a map.
    """

    def __init__(self, role: str, output: Output, scales: Sequence[int]):
        super().__init__()
        if output.final is None:
            raise UserError(
                f"this method needs logits that are made of the mean of a map, and the {role}'s are not; choose "
                f"another {role}, such as a ResNet, or another method"
            )
        grid = output.final.shape[2:]
        self.pool = Positions(torch.cat([pooling_basis(grid, (g, g)) for g in scales]))

    def forward(self, output: Output, network: NetworkView) -> Tensor:
        assert output.final is not None, "the method's needs name it"
        means = self.pool(output.final).mT  # (B, N, D)
        return network.classify(means.flatten(0, 1)).unflatten(0, means.shape[:2])


class Pool(nn.Module):
    """Adaptive average pooling to ``size``, with a backward pass that is deterministic on every device.

    (B, C, H, W) -> (B, C, *size).

    Args:
        grid: H and W.
        size: height and width after pooling, neither above the grid's.
    """

    rows: Tensor
    columns: Tensor

    def __init__(self, grid: Sequence[int], size: Sequence[int]):
        super().__init__()
        self.window = (grid[0] // size[0], grid[1] // size[1])
        self.even = grid[0] % size[0] == 0 and grid[1] % size[1] == 0
        if not self.even:
            self.register_buffer("rows", average_rows(grid[0], size[0]).float(), persistent=False)
            self.register_buffer("columns", average_rows(grid[1], size[1]).float(), persistent=False)

    def forward(self, maps: Tensor) -> Tensor:
        maps = full_precision(maps)
        if not self.even:
            return self.rows.to(maps.dtype) @ maps @ self.columns.to(maps.dtype).mT
        return maps if self.window == (1, 1) else F.avg_pool2d(maps, self.window)


class CommonGrid(nn.Module):
    """Average pooling of two networks' maps to the same grid: the smaller height by the smaller width.

    Maps (B, C_s, H_s, W_s) and (B, C_t, H_t, W_t) -> (B, C_s, H, W) and, detached, (B, C_t, H, W).

    Args:
        student: the student's map, of which only the shape is read.
        teacher: the teacher's.
    """

    def __init__(self, student: Tensor, teacher: Tensor):
        super().__init__()
        s_grid, t_grid = student.shape[2:], teacher.shape[2:]
        self.size = (min(s_grid[0], t_grid[0]), min(s_grid[1], t_grid[1]))
        self.student, self.teacher = Pool(s_grid, self.size), Pool(t_grid, self.size)

    def forward(self, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        return self.student(keep_layout(student)), self.teacher(teacher.detach())


class CommonGrids(nn.ModuleList):
    """A ``CommonGrid`` for each of several stages of two networks.

    Args:
        student: the student's output, of which only shapes are read.
        teacher: the teacher's.
        stages: which stages are matched.

    Raises:
        UserError: the stages are not distinct stages of both networks.
    """

    def __init__(self, student: Output, teacher: Output, stages: Sequence[int]):
        stages = check_stages(stages, student, teacher)
        grids = [CommonGrid(f_s, f_t) for f_s, f_t in paired_features(student, teacher, stages)]
        super().__init__(grids)
        self.stages, self.sizes = stages, [grid.size for grid in grids]

    def forward(self, student: Output, teacher: Output) -> list[tuple[Tensor, Tensor]]:
        """Pool the maps of each stage: (B, C_s, H, W) and (B, C_t, H, W)."""
        return [grid(f_s, f_t) for f_s, f_t, grid in paired_features(student, teacher, self.stages, self)]


class Wavelets(nn.Module):
    """The wavelet transform of maps (B, C, H, W), with its matrices kept: low frequencies, and details by level.

    Args:
        grid: H and W.
        wavelet: a discrete wavelet that PyWavelets knows.
        level: how often content is split; 0 leaves the maps whole, with no detail.
        padding: one of PyWavelets' signal extension modes.
    """

    def __init__(self, grid: Sequence[int], wavelet: str, level: int, padding: str):
        super().__init__()
        self.level = level
        for name, n in zip(("rows", "columns"), grid, strict=True):
            for step in range(level):
                forward, inverse = (basis(n, wavelet, level, padding)[step] for basis in (dwt_basis, idwt_basis))
                self.register_buffer(f"{name}{step}", forward.float(), persistent=False)
                self.register_buffer(f"inverse_{name}{step}", inverse.float(), persistent=False)

    def forward(self, maps: Tensor) -> tuple[Tensor, list[Tensor]]:
        return dwt2(full_precision(maps), self._matrices("rows"), self._matrices("columns"))

    def inverse(self, content: Tensor, details: Sequence[Tensor]) -> Tensor:
        """Rebuild maps (B, C, H, W) from their low frequencies and details."""
        return idwt2(content, details, self._matrices("inverse_rows"), self._matrices("inverse_columns"))

    def _matrices(self, name: str) -> list[Tensor]:
        return [self.get_buffer(f"{name}{step}") for step in range(self.level)]


def separable_convolutions(inputs: int, outputs: int) -> list[nn.Module]:
    """Make two depthwise separable 3x3 convolutions with batch norm and ReLU; the first halves the grid."""
    layers: list[nn.Module] = []
    for stride, width in ((2, inputs), (1, outputs)):
        layers += [
            nn.Conv2d(inputs, inputs, 3, stride, padding=1, groups=inputs, bias=False),
            nn.Conv2d(inputs, width, 1, bias=False),
            BatchNorm2d(width),
            nn.ReLU(),
        ]
    return layers


def stage_projector(inputs: int, halvings: int, width: int) -> nn.Sequential:
    """Make a module that summarises a stage's map in one vector: (B, inputs, H, W) -> (B, width).

    Each halving of the grid is a pair of separable convolutions that doubles the channels, and the last ends in
    ``width``; without one it is a 1x1 convolution. The mean over positions follows. Source: ``distillers/ofa.py`` of
    Hao840/OFAKD.
    """
    layers: list[nn.Module] = []
    for step in range(halvings):
        layers += separable_convolutions(inputs << step, width if step == halvings - 1 else inputs << (step + 1))
    if not halvings:
        layers.append(nn.Conv2d(inputs, width, 1))
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())


def connector(inputs: int, outputs: int, kernel: int = 1) -> nn.Sequential:
    """Make a convolution and batch norm that bring maps to another width, with He's initialisation by fan-out."""
    conv, norm = conv_batch_norm(inputs, outputs, kernel)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out")
    return nn.Sequential(conv, norm)


def before_relu(student: Output, teacher: Output) -> tuple[Output, Output]:
    """Return both outputs with the maps before the last ReLU of each stage as their features.

    Raises:
        UserError: a network does not show them.
    """
    for role, output in (("student", student), ("teacher", teacher)):
        if not output.preactivations:
            raise UserError(
                f"this method compares maps before the last ReLU of a stage, and the {role} does not show them; let "
                f"its stages end in torch.nn.ReLU, or choose another {role} or method"
            )
    return student._replace(features=student.preactivations), teacher._replace(features=teacher.preactivations)


class TeachersClassifier(nn.Linear):
    """A frozen linear layer, (B, width) -> (B, classes), that ``copy_from`` fills with the teacher's classifier."""

    def __init__(self, width: int, classes: int):
        super().__init__(width, classes)
        for parameter in self.requires_grad_(False).parameters():
            nn.init.constant_(parameter, torch.nan)  # so that no one takes it for the teacher's before it is

    @torch.no_grad()
    def copy_from(self, teacher: NetworkView) -> None:
        """Copy the weights of the teacher's classifier.

        Raises:
            UserError: the teacher's classifier is not linear.
        """
        classifier = teacher.classifier
        if classifier is None:
            raise UserError(
                "this method reuses a linear classifier, but the teacher has none; choose another teacher or method"
            )
        self.weight.copy_(classifier.weight)
        self.bias.copy_(torch.zeros_like(self.bias) if classifier.bias is None else classifier.bias)


class Resize(nn.Module):
    """Bring maps to another height and width, with a backward pass that is deterministic on every device.

    (B, C, H, W) -> (B, C, *size): average pooling along a side that shrinks, and along one that grows copies, or means
    of two neighbours where a cell lies over both.

    Args:
        grid: H and W.
        size: height and width afterwards.
    """

    rows: Tensor
    columns: Tensor

    def __init__(self, grid: Sequence[int], size: Sequence[int]):
        super().__init__()
        self.same = tuple(grid) == tuple(size)
        if not self.same:
            self.register_buffer("rows", average_rows(grid[0], size[0]).float(), persistent=False)
            self.register_buffer("columns", average_rows(grid[1], size[1]).float(), persistent=False)

    def forward(self, maps: Tensor) -> Tensor:
        return maps if self.same else separable(maps, self.rows.to(maps.dtype), self.columns.to(maps.dtype))


def resized(maps: Tensor, grid: Sequence[int]) -> Tensor:
    """Resize maps (B, C, H, W) to another grid, by nearest neighbours."""
    return maps if tuple(maps.shape[2:]) == tuple(grid) else F.interpolate(maps, tuple(grid), mode="nearest")


class Pyramid(nn.Module):
    """Maps (B, C, H, W) and their averages over 4x4, 2x2 and 1x1 cells, where both sides have more.

    Args:
        grid: H and W.
    """

    def __init__(self, grid: Sequence[int]):
        super().__init__()
        self.pools = nn.ModuleList(Pool(grid, (cells, cells)) for cells in (4, 2, 1) if cells < min(grid))

    def forward(self, maps: Tensor) -> list[Tensor]:
        return [maps, *(pool(maps) for pool in self.pools)]
