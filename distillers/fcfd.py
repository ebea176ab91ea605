"""FCFD: student and teacher exchange halves, and the mixed networks learn to answer as the teacher does."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kdzoo import Batch, DataSpec, Distiller, Fidelity, Needs, NetworkView, Output
from kdzoo.connectors import BatchNorm2d, Resize, check_stages
from kdzoo.keywords import at_least, fraction, one_of, positive
from kdzoo.losses import cross_entropy, softened_kl, warm_up

WAYS = {"both": (True, False), "student first": (True,), "teacher first": (False,)}


def bridge(source: Tensor, target: Tensor, leaky: bool) -> nn.Sequential:
    """Make a module from maps of ``source``'s shape to those of ``target``'s, of which only the shapes are read.

    A 3x3 convolution, with stride 2 where the target is half as large; a transposed 4x4 one where it is twice as large;
    other grids are resized before. Then a batch norm and, if ``leaky``, a ReLU of slope 0.1 below 0.
    """
    (c_s, *grid), (c_t, *size) = source.shape[1:], target.shape[1:]
    layers: list[nn.Module] = []
    if [2 * side for side in size] == grid:
        layers.append(nn.Conv2d(c_s, c_t, 3, 2, 1))
    elif [2 * side for side in grid] == size:
        layers.append(nn.ConvTranspose2d(c_s, c_t, 4, 2, 1))
    else:
        layers += [Resize(grid, size), nn.Conv2d(c_s, c_t, 3, 1, 1, bias=False)]
    if isinstance(layers[-1], nn.Conv2d):
        nn.init.kaiming_normal_(layers[-1].weight, mode="fan_out", nonlinearity="relu")
    return nn.Sequential(*layers, BatchNorm2d(c_t), *([nn.LeakyReLU(0.1)] if leaky else []))


def appearance_loss(maps: Tensor, target: Tensor, last: bool) -> Tensor:
    """Compute the mean squared error of maps (B, C, H, W), and of their rectified means too if they are the last."""
    loss = F.mse_loss(maps, target)
    return loss + F.mse_loss(maps.relu().mean((2, 3)), target.relu().mean((2, 3))) if last else loss


class FCFD(Distiller):
    r"""Function-Consistent Feature Distillation.

    .. math:: L = w_{ce} H(y, p_s) + w_{kd} K(z_s) + w_{function} \sum_m K(z_m)
        + w_{appearance} \min(1, t / t_w) \sum_l \sum_{f} \operatorname{MSE}(f, f_t^l),
        \quad K(z) = T^2 KL(p_t^{(T)} \| p_z^{(T)})

    m are mixed networks, drawn anew in each step: the student's stages to one of ``stages`` but the last, a bridge, and
    then the teacher's, or the teacher's first and then the student's. f are all maps that lie in the teacher's space at
    stage l: the student's, bridged, and those of the teacher's stages in mixed networks. At the last stage their
    rectified means count too.

    The teacher is frozen and in evaluation mode, where the authors' code leaves it in training mode: its batch norms
    use the statistics of the batch there, and go on learning. The student's use those of the batch, its own and the
    teacher's maps apart; only its own are remembered.

    Where grids differ by another factor than 2, bridges resize maps first (the authors' code refuses them).

    Memory: the graphs of the mixed networks are kept, 10 MB in all for each image of 32 pixels (resnet32x4 ->
    resnet8x4), where kd keeps 2.6 MB.

    Args:
        ce: weight of the cross-entropy with the ground truth.
        kd: weight of the distillation of the logits.
        function: weight of the sum of the mixed networks' terms.
        appearance: weight of the squared errors of maps; 0.02 for resnet56 -> resnet20 and on ImageNet.
        temperature: T; 8 for ShuffleNetV2 and for ShuffleNet under resnet32x4, 1 on ImageNet.
        paths: mixed networks in a step, at most all that there are, twice the number of ``stages`` but one. All of them
            need no drawing, so that a GPU can replay the step.
        ways: which are drawn from: "both", "student first", "teacher first".
        stages: the stages with a bridge. Those of the authors' networks of four stages and a stem are (0, 1, 2, 3).
        leaky: whose bridges end in a leaky ReLU: those to a network whose stages end in a ReLU.
        warmup: t_w as a share of training; 20 of 240 epochs.

    Source: Liu et al. 2023; the authors' ``classification/models/meta.py`` and ``classification/cifar/main.py``.
    """

    paper = "arXiv:2304.11832"
    fidelity = Fidelity.ADAPTED
    needs = Needs(stages=("student", "teacher"))
    expected_failures = {  # noqa: RUF012 (never written to)
        "check_compiles": "each step draws its mixed networks on the host; with paths=4 none is drawn"
    }

    def __init__(
        self,
        *,
        ce: float = 1.0,
        kd: float = 1.0,
        function: float = 1.0,
        appearance: float = 5.0,
        temperature: float = 4.0,
        paths: int = 2,
        ways: str = "both",
        stages: tuple[int, ...] = (1, 2, 3),
        leaky: tuple[str, ...] = ("student", "teacher"),
        warmup: float = 20 / 240,
    ):
        super().__init__(ce=ce, kd=kd, function=function, appearance=appearance)
        self.temperature = positive(temperature=temperature)
        self.paths = at_least(0, paths=paths)
        self.ways = one_of(WAYS, ways=ways)
        self.leaky = tuple(one_of(("student", "teacher"), leaky=role) for role in leaky)
        self.stages, self.warmup = stages, fraction(warmup=warmup)

    def build(self, student: Output, teacher: Output, data: DataSpec) -> None:
        self.stages = tuple(sorted(check_stages(self.stages, student, teacher)))
        # (whether the student is first, the place in ``stages`` after which the other takes over)
        self.mixed = [(first, place) for first in WAYS[self.ways] for place in range(len(self.stages) - 1)]
        maps = [(student.features[l], teacher.features[l]) for l in self.stages]
        self.to_teacher = nn.ModuleList(bridge(f_s, f_t, "teacher" in self.leaky) for f_s, f_t in maps)
        used = {place for first, place in self.mixed if not first}
        self.to_student = nn.ModuleList(
            bridge(f_t, f_s, "student" in self.leaky) if place in used else nn.Identity()
            for place, (f_s, f_t) in enumerate(maps)
        )

    def forward(self, student: NetworkView, teacher: NetworkView, batch: Batch) -> dict[str, Tensor]:
        t, s = teacher(batch.images), student(batch.images)
        if not self.is_active:
            return self.loss(s, t, batch)
        bridged = [to_teacher(s.features[l]) for l, to_teacher in zip(self.stages, self.to_teacher, strict=True)]
        alike = dict(zip(self.stages, ([maps] for maps in bridged), strict=True))  # in the teacher's space, by stage
        logits = []
        for student_first, place in self.drawn():
            after = self.stages[place] + 1
            if student_first:
                output = teacher.run_from(after, bridged[place])
                for stage, maps in enumerate(output.features, after):
                    alike.get(stage, []).append(maps)
            else:
                output = student.run_from(after, self.to_student[place](t.features[after - 1]))
            logits.append(output.logits)
        return {
            **self.loss(s, t, batch),
            **self.weigh(
                function=lambda: sum((self.kl(z, t) for z in logits), torch.zeros_like(batch.progress)),
                appearance=lambda: warm_up(batch.progress, self.warmup) * self.appearance(alike, t),
            ),
        }

    def loss(self, student: Output, teacher: Output, batch: Batch) -> dict[str, Tensor]:
        return self.weigh(
            ce=lambda: cross_entropy(student.logits, batch.targets), kd=lambda: self.kl(student.logits, teacher)
        )

    def drawn(self) -> list[tuple[bool, int]]:
        """Draw the mixed networks of a step, none twice."""
        if self.paths >= len(self.mixed):
            return self.mixed
        return [self.mixed[i] for i in torch.randperm(len(self.mixed), device="cpu")[: self.paths].tolist()]

    def kl(self, logits: Tensor, teacher: Output) -> Tensor:
        return softened_kl(logits, teacher.logits, self.temperature)

    def appearance(self, alike: dict[int, list[Tensor]], teacher: Output) -> Tensor:
        """Sum the losses of all maps, by stage, against the teacher's."""
        return torch.stack(
            [
                appearance_loss(maps, teacher.features[stage], stage == self.stages[-1])
                for stage, found in alike.items()
                for maps in found
            ]
        ).sum()
