"""DiffKD: the student's features are denoised by a diffusion model of the teacher's before they are matched."""

import math
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kdzoo import Batch, DataSpec, Distiller, Fidelity, Needs, Output
from kdzoo.connectors import BatchNorm2d, CommonGrid, check_stages
from kdzoo.keywords import at_least, between, positive
from kdzoo.losses import cross_entropy, softened_kl

TIMES = 1000  # of the diffusion


def signal_shares() -> Tensor:
    """Compute the share of the signal's variance that is left at each time: (TIMES,), from almost 1 to almost 0."""
    return (1 - torch.linspace(1e-4, 0.02, TIMES, dtype=torch.float64)).cumprod(dim=0)


def noisy(clean: Tensor, noise: Tensor, signal: Tensor) -> Tensor:
    """Mix maps and noise (B, C, H, W) so that ``signal`` (B,) is the share of the maps' variance."""
    signal = signal[:, None, None, None]
    return signal.sqrt() * clean + (1 - signal).sqrt() * noise


def less_noisy(maps: Tensor, noise: Tensor, signal: float, after: float) -> Tensor:
    """Take maps whose ``noise`` (B, C, H, W) is known from one share of the signal to a larger one (DDIM, eta 0)."""
    clean = (maps - math.sqrt(1 - signal) * noise) / math.sqrt(signal)
    return math.sqrt(after) * clean + math.sqrt(1 - after) * noise


class Bottleneck(nn.Module):
    """A residual block of 1x1, 3x3 and 1x1 convolutions: (B, C, H, W) -> the same shape."""

    def __init__(self, channels: int, reduction: int):
        super().__init__()
        middle = max(channels // reduction, 1)
        layers: list[nn.Module] = []
        for inputs, outputs, kernel in ((channels, middle, 1), (middle, middle, 3), (middle, channels, 1)):
            layers += [nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2), BatchNorm2d(outputs), nn.ReLU()]
        self.layers = nn.Sequential(*layers[:-1])

    def forward(self, maps: Tensor) -> Tensor:
        return maps + self.layers(maps)


def pointwise(*widths: int) -> list[nn.Module]:
    """Make 1x1 convolutions between ``widths``, each with batch norm."""
    return [layer for a, b in pairwise(widths) for layer in (nn.Conv2d(a, b, 1), BatchNorm2d(b))]


class Diffusion(nn.Module):
    """A diffusion model of the teacher's features, which denoises the student's: (B, inputs, H, W) -> (B, C, H, W).

    Args:
        inputs: the student's channels.
        channels: C, the teacher's.
        steps: how many of the times the denoising visits.
        spatial: whether the maps have places; logits, maps of one pixel, have none.
    """

    shares: Tensor  # (TIMES,)

    def __init__(self, inputs: int, channels: int, steps: int, spatial: bool):
        super().__init__()
        c = channels
        self.align = nn.Conv2d(inputs, c, 1)
        self.times = nn.Embedding(TIMES, c)
        if spatial:
            self.noise = nn.Sequential(Bottleneck(c, 4), Bottleneck(c, 4), *pointwise(c, c))
            seen: list[nn.Module] = [Bottleneck(c, 8), nn.AdaptiveAvgPool2d(1)]
        else:
            layers = pointwise(c, 4 * c, c, 4 * c, c)
            self.noise = nn.Sequential(*layers[:2], nn.ReLU(), *layers[2:6], nn.ReLU(), layers[6])
            layers = pointwise(c, 2 * c, c)
            seen = [*layers[:2], nn.ReLU(), *layers[2:]]
        self.clean_share = nn.Sequential(*seen, nn.Flatten(), nn.Linear(c, 2))
        self.refine = nn.Sequential(*pointwise(c, c))
        shares, every = signal_shares(), TIMES // (2 * steps)
        self.register_buffer("shares", shares.float(), persistent=False)
        visited = [every * i for i in reversed(range(steps))]  # the less noisy half
        after = [*visited[1:], None]
        self.steps = [
            (t, shares[t].item(), 1.0 if u is None else shares[u].item()) for t, u in zip(visited, after, strict=True)
        ]

    def forward(self, student: Tensor) -> Tensor:
        maps = self.align(student)
        share = self.clean_share(maps).softmax(dim=1)[:, :1, None, None]
        maps = share * maps + (1 - share) * torch.randn_like(maps)  # shares of the numbers, not of the variance
        for time, signal, after in self.steps:
            maps = less_noisy(maps, self.noise(maps + self.times.weight[time][:, None, None]), signal, after)
        return self.refine(maps)

    def error(self, teacher: Tensor) -> Tensor:
        """Compute how well the noise in noised features of the teacher (B, C, H, W) is predicted: a scalar."""
        noise, time = torch.randn_like(teacher), torch.randint(TIMES, (len(teacher),), device=teacher.device)
        maps = noisy(teacher, noise, self.shares[time])
        return F.mse_loss(self.noise(maps + self.times(time)[:, :, None, None]), noise)


class DiffKD(Distiller):
    r"""Knowledge Diffusion for Distillation.

    .. math:: L = w_{ce} H(y, p_s) + w_{feature} \operatorname{MSE}(R(f_s), h) + w_{logit} T^2 KL(p_t \| R(z_s))
        + w_{diffusion} \sum \operatorname{MSE}(\epsilon, \epsilon_\theta(\sqrt{a_t} h + \sqrt{1 - a_t} \epsilon, t))
        + w_{autoencoder} \operatorname{MSE}(D h, f_t)

    h = E f_t is the teacher's map in the space of an autoencoder, a 1x1 convolution with batch norm and one back; only
    D and E learn of its error. R takes the student's map by a 1x1 convolution to h's channels, mixes it with noise in
    shares that it reads from the map, denoises it by five steps of DDIM (times 400, 300, 200, 100 and 0 of 1000), and
    ends in a 1x1 convolution and batch norm. The noise is predicted by a network that learns from the teacher's
    features, noised to a random time. Logits have a diffusion of their own, as maps of one pixel.

    Memory: gradients run through all steps, so six passes of the noise network are kept. Counted, these are 56 numbers
    for each image, position and channel of h, and 141 for each image and class: with 1024 channels, 7 x 7 positions and
    1000 classes 12 MB for each image.

    Differs from the authors' code:

    - Where the grids differ, the larger map is average-pooled to the smaller height and width.
    - The 280 rows of their table of times that no time reads are left out.

    Args:
        ce: weight of the cross-entropy with the ground truth.
        feature: weight of the denoised map's error; 0 leaves its diffusion out, too.
        logit: weight of the denoised logits' divergence; 0 leaves their diffusion out, too.
        diffusion: weight of the noise's errors.
        autoencoder: weight of the autoencoder's error.
        temperature: T of the logits' divergence.
        channels: of h; None takes twice the teacher's, as the authors' 1024 are of a ResNet-34's 512.
        steps: of the denoising.
        stage: whose map is matched.

    Source: Huang et al. 2023; ``lib/models/losses/diffkd``, ``lib/models/losses/kd_loss.py`` and
    ``configs/strategies/distill/diffkd/diffkd_b1.yaml`` of hunto/image_classification_sota.
    """

    paper = "arXiv:2305.15712"
    fidelity = Fidelity.EXACT

    def __init__(
        self,
        *,
        ce: float = 1.0,
        feature: float = 1.0,
        logit: float = 1.0,
        diffusion: float = 1.0,
        autoencoder: float = 1.0,
        temperature: float = 1.0,
        channels: int | None = None,
        steps: int = 5,
        stage: int = 3,
    ):
        super().__init__(ce=ce, feature=feature, logit=logit, diffusion=diffusion, autoencoder=autoencoder)
        self.temperature, self.stage = positive(temperature=temperature), stage
        self.channels = None if channels is None else at_least(1, channels=channels)
        self.steps = between(1, TIMES // 2, steps=steps)
        if not feature:
            self.needs = Needs(features=False, embedding=False)

    def build(self, student: Output, teacher: Output, data: DataSpec) -> None:
        if self.weights["feature"]:
            check_stages((self.stage,), student, teacher)
            f_s, f_t = student.features[self.stage], teacher.features[self.stage]
            channels = self.channels or 2 * f_t.shape[1]
            self.grid = CommonGrid(f_s, f_t)
            self.encoder = nn.Sequential(*pointwise(f_t.shape[1], channels))
            self.decoder = nn.Conv2d(channels, f_t.shape[1], 1)
            self.map_diffusion = Diffusion(f_s.shape[1], channels, self.steps, spatial=True)
        if self.weights["logit"]:
            self.logit_diffusion = Diffusion(data.num_classes, data.num_classes, self.steps, spatial=False)

    def loss(self, student: Output, teacher: Output, batch: Batch) -> dict[str, Tensor]:
        terms = {"ce": lambda: cross_entropy(student.logits, batch.targets)}
        learned: list[tuple[Diffusion, Tensor]] = []  # each diffusion, and what it learns to denoise
        if self.weights["feature"]:
            f_s, f_t = self.grid(student.features[self.stage], teacher.features[self.stage])
            code = self.encoder(f_t)
            terms["feature"] = lambda: F.mse_loss(self.map_diffusion(f_s), code.detach())
            terms["autoencoder"] = lambda: F.mse_loss(self.decoder(code), f_t)
            learned.append((self.map_diffusion, code.detach()))
        if self.weights["logit"]:
            z_s, z_t = (output.logits[:, :, None, None] for output in (student, teacher))
            terms["logit"] = lambda: softened_kl(self.logit_diffusion(z_s).flatten(1), teacher.logits, self.temperature)
            learned.append((self.logit_diffusion, z_t))
        if learned:
            terms["diffusion"] = lambda: torch.stack([diffusion.error(clean) for diffusion, clean in learned]).sum()
        return self.weigh(**terms)
