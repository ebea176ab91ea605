"""The base of the 32x32 networks: a stem, stages, a linear classifier, and timm's interface to them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn
from torch.nn import functional as F

default_cfgs: dict[str, Any] = {}  # where timm looks for the facts of the models of this module


class StagedNet(nn.Module):
    """A stem, some stages and a linear classifier of the last map's mean.

    Args:
        stem: images (B, 3, H, W) -> the first map.
        stages: each from the map before to its own.
        neck: from the last map to the one that is averaged.
        widths: channels of the stem's map, of each stage's and of the neck's.
        reductions: image side over map side, for the stem and each stage.
        num_classes: K; 0 for no classifier.
        drop_rate: dropout before the classifier.
    """

    def __init__(
        self,
        stem: nn.Module,
        stages: Sequence[nn.Module],
        neck: nn.Module,
        widths: Sequence[int],
        reductions: Sequence[int],
        num_classes: int,
        drop_rate: float = 0.0,
    ):
        super().__init__()
        self.stem, self.stages, self.neck = stem, nn.ModuleList(stages), neck
        self.num_classes, self.drop_rate = num_classes, drop_rate
        self.num_features = self.head_hidden_size = widths[-1]
        modules = ["stem", *(f"stages.{i}" for i in range(len(stages)))]
        self.feature_info = [
            {"num_chs": width, "reduction": reduction, "module": module}
            for width, reduction, module in zip(widths, reductions, modules, strict=False)
        ]
        self.fc: nn.Module = nn.Identity()
        self.reset_classifier(num_classes)

    def forward_features(self, x: Tensor) -> Tensor:
        """Compute the last map (B, D, h, w) of images (B, 3, H, W)."""
        x = self.stem(x)
        for stage in self.stages:
            x = stage(x)
        return self.neck(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Compute logits (B, K), or the embedding (B, D), from the last map (B, D, h, w)."""
        x = F.dropout(x.mean((2, 3)), self.drop_rate, self.training)
        return x if pre_logits else self.fc(x)

    def forward(self, x: Tensor) -> Tensor:
        """Compute logits (B, K) of images (B, 3, H, W)."""
        return self.forward_head(self.forward_features(x))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """Return the last map, and those of stem and stages at ``indices`` (all, the last n, a list), as timm does."""
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt is '{output_fmt}', expected 'NCHW'")
        count = len(self.feature_info)
        if indices is None:
            indices = count
        wanted = range(count - indices, count) if isinstance(indices, int) else [i % count for i in indices]
        maps = []
        x = self.stem(x)
        if 0 in wanted:
            maps.append(x)
        for index, stage in enumerate(self.stages, start=1):
            if stop_early and index > max(wanted):
                return maps if intermediates_only else (x, maps)
            x = stage(x)
            if index in wanted:
                maps.append(x)
        return maps if intermediates_only else (self.neck(x), maps)

    def get_classifier(self) -> nn.Module:
        """Return the linear classifier."""
        return self.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier by a new one for ``num_classes``; 0 removes it."""
        self.num_classes = num_classes
        self.fc = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()


def init_weights(net: nn.Module) -> None:
    """Initialise convolutions by He's rule with their fan-out (grouped ones too)."""
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels
            nn.init.normal_(module.weight, 0, (2 / fan_out) ** 0.5)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def init_classifier(net: nn.Module, std: float | None = None) -> None:
    """Set the biases of linear layers to 0 and, if ``std`` is given, draw their weights from a normal distribution."""
    for module in net.modules():
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)
            if std is not None:
                nn.init.normal_(module.weight, 0, std)


def conv_norm(
    inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1, relu: bool = True, bias: bool = False
) -> nn.Sequential:
    """Make a convolution with padding, its batch norm and, by default, a ReLU."""
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=bias)
    norm = nn.BatchNorm2d(outputs)
    return nn.Sequential(conv, norm, nn.ReLU(inplace=True)) if relu else nn.Sequential(conv, norm)


def register(name: str, build: Callable[..., nn.Module], image_size: int = 32) -> None:
    """Register a network with timm, so that ``timm.create_model(name, ...)`` calls ``build``."""
    facts = {"input_size": (3, image_size, image_size), "fixed_input_size": False}
    default_cfgs.update(generate_default_cfgs({name: facts}))

    def entry(pretrained: bool = False, **options: Any) -> nn.Module:
        return build_model_with_cfg(build, name, pretrained, **options)

    entry.__name__ = name
    register_model(entry)
