"""NORM: the student's last map, widened by a linear transform, holds the teacher's several times over."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kdzoo import Batch, DataSpec, Distiller, Fidelity, Needs, NetworkView, Output, Show
from kdzoo.connectors import Pool, check_stages, conv_batch_norm
from kdzoo.errors import UserError
from kdzoo.keywords import at_least, not_negative, positive
from kdzoo.losses import cross_entropy, softened_kl, standardised
from kdzoo.outputs import LOGITS

BOUNDS = (10 / 240, 20 / 240, 180 / 240, 210 / 240)  # of progress, where the term's factor changes
FACTORS = (0.1, 0.5, 1.0, 0.5, 0.1)


def n_to_one_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Sum the mean squared errors between each of N maps in (B, N C, H, W) and the teacher's (B, C, H, W)."""
    copies = student.unflatten(1, (-1, teacher.shape[1]))
    return (copies - teacher[:, None]).square().mean() * copies.shape[1]


def scaled_logits(logits: Tensor, scale: float) -> Tensor:
    """Take logits (B, K) to mean 0 and variance ``scale``^2 over the classes; 0 leaves them as they are."""
    return standardised(logits, 1, 1e-7) * scale if scale else logits


def affine(layers: nn.Sequential) -> tuple[Tensor, Tensor]:
    """Return the matrix (O, I) and the offset (O,) of a 1x1 convolution and its batch norm in evaluation mode."""
    conv, norm = layers
    assert isinstance(conv, nn.Conv2d)
    assert isinstance(norm, nn.BatchNorm2d)
    assert norm.running_var is not None
    assert norm.running_mean is not None
    scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
    return scale[:, None] * conv.weight.flatten(1), norm.bias - scale * norm.running_mean


class Transformed(nn.Module):
    """The shipped network: the student, the transform as one linear layer, and the student's own classifier.

    The layer may read the map's mean instead of the map, as 1x1 convolutions commute with the mean over positions.
    """

    def __init__(self, student: nn.Module, layer: nn.Linear, scale: float):
        super().__init__()
        self.student, self.layer, self.scale = student, layer, scale
        self.training = student.training

    def forward(self, images: Tensor, show: Show = LOGITS) -> Output:
        seen = self.student(images, show._replace(final=True))
        assert seen.final is not None, "the method is built for networks that have it"
        embedding = self.layer(seen.final.mean(dim=(2, 3)))
        logits = scaled_logits(self.student.classify(embedding), self.scale)  # type: ignore[operator]  # as above
        return Output(logits, embedding, seen.features, seen.preactivations).float()


class Norm(Distiller):
    r"""Knowledge Distillation via N-to-One Representation Matching.

    .. math:: L = w_{ce} H(y, \bar p_s) + w_{kd} T^2 KL(\bar p_t^{(T)} \| \bar p_s^{(T)})
        + w_{norm} r \sum_{n=1}^{N} \operatorname{MSE}((A f_s)_n, f_t),
        \quad z_s = h(\operatorname{mean}(f_s + B A f_s))

    f_s is the map that the student averages and h its own classifier, f_t the teacher's last stage. A and B are 1x1
    convolutions with batch norm, from the student's channels to N times the teacher's and back, and are a part of the
    student: with h it sees f_s + B A f_s. Nothing bends between them, so what ships is the student and one linear
    layer, which the paper merges into the classifier; ours stays before it, as heads may begin with a norm. p-bar is
    made of logits that are normalised over the classes and multiplied by ``scale``, in training and in what ships; two
    classes would leave no gradient of that, so it takes three. r is 0.1, 0.5, 1, 0.5 and 0.1, and changes after 10, 20,
    180 and 210 of 240 parts of training. A f_s has N C_t H W numbers for each image.

    Differs from the authors' code:

    - A and B read the map that is averaged; in Wide ResNets theirs read the one before its last norm and ReLU.
    - A finer map of the student is average-pooled to the teacher's height and width, where their code for ImageNet
      takes maxima. A finer one of the teacher is max-pooled, as in theirs, between any two sizes.
    - One stage is matched; their code for ImageNet inserts several transforms.

    Args:
        ce: weight of the cross-entropy with the ground truth; the authors choose it by pair, from 1/16 to 1/2.
        norm: weight of the term, which the schedule multiplies; at 0 the student has no transform, and ships
            as it is.
        kd: weight of the distillation of logits.
        temperature: T of the distillation of logits.
        copies: N.
        scale: deviation of an image's logits; 0 leaves logits as they are.

    Source: Liu et al. 2023 (ICLR); ``helper/loops.py``, ``models/cifar/resnet_student.py`` and README of OSVAI/NORM,
    resnet32x4 to resnet8x4.
    """

    paper = "arXiv:2305.13803"
    fidelity = Fidelity.EXACT
    needs = Needs(final=True)

    bounds: Tensor
    factors: Tensor

    def __init__(
        self,
        *,
        ce: float = 0.1,
        norm: float = 1.0,
        kd: float = 0.0,
        temperature: float = 4.0,
        copies: int = 8,
        scale: float = 2.5,
    ):
        super().__init__(ce=ce, norm=norm, kd=kd)
        self.temperature, self.copies = positive(temperature=temperature), at_least(1, copies=copies)
        self.scale = not_negative(scale=scale)
        self.fewest_classes = 3 if scale else 2

    def build(self, student: Output, teacher: Output, data: DataSpec) -> None:
        if student.final is None:
            raise UserError(
                "norm transforms the map whose mean the student classifies, and this student has none; choose another "
                "student, such as a ResNet, or another method"
            )
        (last,) = check_stages((len(student.features) - 1,), student, teacher)
        (inputs, *s_grid), (outputs, *t_grid) = student.final.shape[1:], teacher.features[last].shape[1:]
        self.grid = [min(sides) for sides in zip(s_grid, t_grid, strict=True)]
        self.pool = Pool(s_grid, self.grid)
        self.widen = nn.Sequential(*conv_batch_norm(inputs, self.copies * outputs))
        self.narrow = nn.Sequential(*conv_batch_norm(self.copies * outputs, inputs))
        self.register_buffer("bounds", torch.tensor(BOUNDS), persistent=False)
        self.register_buffer("factors", torch.tensor(FACTORS), persistent=False)

    def forward(self, student: NetworkView, teacher: NetworkView, batch: Batch) -> dict[str, Tensor]:
        """Run each network once, the student's classifier on its transformed map."""
        reference, seen = teacher(batch.images), student(batch.images)
        logits, wide = seen.logits, seen.logits
        if self.is_active:
            assert seen.final is not None, "the method's needs name it"
            wide = self.widen(seen.final)
            logits = student.classify((seen.final + self.narrow(wide)).mean(dim=(2, 3)))
        z_s, z_t = (scaled_logits(z, self.scale) for z in (logits, reference.logits))
        return self.weigh(
            ce=lambda: cross_entropy(z_s, batch.targets),
            norm=lambda: self.factor(batch.progress) * self.match(wide, reference.features[-1]),
            kd=lambda: softened_kl(z_s, z_t, self.temperature),
        )

    def match(self, wide: Tensor, teacher: Tensor) -> Tensor:
        """Compare maps (B, N C_t, H_s, W_s) with the teacher's (B, C_t, H_t, W_t) on their common grid: a scalar."""
        return n_to_one_loss(self.pool(wide), F.adaptive_max_pool2d(teacher, self.grid))

    def factor(self, progress: Tensor) -> Tensor:
        """Compute r at a share of training: a scalar."""
        return self.factors[torch.bucketize(progress[None], self.bounds, right=True)][0]

    @torch.no_grad()
    def deploy(self, student: nn.Module) -> nn.Module:
        """Join the student and its transform, folded into one linear layer."""
        if not self.is_active:
            return student
        (first, offset), (second, shift) = affine(self.widen), affine(self.narrow)
        layer = nn.Linear(first.shape[1], len(second)).to(first)
        layer.weight.copy_(torch.eye(len(second)).to(first) + second @ first)
        layer.bias.copy_(second @ offset + shift)
        return Transformed(student, layer, self.scale)
