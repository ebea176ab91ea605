"""Adapt networks to image sizes they were not made for: patch size, window size, CIFAR stem."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from math import log2
from typing import Any

from timm.layers.patch_embed import PatchEmbed
from torch import nn

SMALL = 64  # pixels, up to which an ImageNet stem throws away too much
LARGE = 160  # pixels, from which token networks keep their patches

# Where strided layers belong to the stem, by the names that timm and torchvision give them.
STEM = re.compile(
    r"^(conv1|maxpool|pool0|conv_stem|conv0|layer0|stem\w*|patch_embed\w*|features\.(0|conv0|pool0|conv1_1|conv1_pool)"
    r"|Conv2d_1a\w*)(\.|$)"
)


def _power_of_two(value: float, low: int, high: int) -> int:
    return int(max(low, min(high, 2 ** round(log2(max(value, 1))))))


def _side(value: Any) -> int | None:
    side = value[0] if isinstance(value, tuple | list) and value else value
    return side if isinstance(side, int) else None


def _native(bare: nn.Module, attribute: str) -> int | None:
    """The patch or window size of a network, read from the first module that has one."""
    return next((s for m in bare.modules() if (s := _side(getattr(m, attribute, None)))), None)


def constructor_keywords(bare: nn.Module) -> set[str]:
    """List the keywords of a network's constructor, including those of its base classes."""
    classes = (cls for cls in type(bare).__mro__ if issubclass(cls, nn.Module) and cls is not nn.Module)
    return {keyword for cls in classes for keyword in inspect.signature(cls.__init__).parameters}


def native_patch(bare: nn.Module) -> int:
    """Return the side of a token network's patches; 0 if it has none."""
    return _native(bare, "patch_size") or 0


def token_options(
    bare: nn.Module, size: int, given: Mapping[str, Any], keep_patches: bool = False
) -> tuple[dict[str, Any], list[str]]:
    """Choose constructor keywords with which a timm network reads ``size`` pixels, and say what they change.

    Token networks get patches that leave a grid of about 8x8; those with stages and patches of their own,
    patches that leave the last stage 2x2.

    Args:
        bare: the network as its name says, on any device; only read.
        size: side in pixels.
        given: the user's keywords, which win.
        keep_patches: whether patches stay as they are, for weights that were trained with them.
    """
    accepted = constructor_keywords(bare)
    native_size = _side(tuple(getattr(bare, "pretrained_cfg", {}).get("input_size", ()))[1:])
    options: dict[str, Any] = {}
    adapted: list[str] = []
    if "img_size" in accepted:
        options["img_size"] = size
    patch = native_patch(bare)
    if "patch_size" in accepted and patch:
        # One resolution throughout, or four halvings.
        info = getattr(bare, "feature_info", None) or [{}, {}]
        staged = len({stage.get("reduction") for stage in list(info)}) > 1
        smaller = _power_of_two(size / (16 if staged else 8), 1 if staged else 2, patch)
        if size < LARGE and "patch_size" not in given and not keep_patches:
            options["patch_size"] = smaller
            if smaller != patch:
                adapted.append(f"patch size {patch} -> {smaller}")
            patch = smaller
    window = _native(bare, "window_size")
    if "window_size" in accepted and "window_size" not in given and window and size != native_size:
        grid = size // (patch or 4)
        fitting = max((w for w in range(1, window + 1) if grid % w == 0), default=1)
        if fitting != window:
            options["window_size"] = fitting
            adapted.append(f"window size {window} -> {fitting}")
    return {**options, **given}, adapted


def shrink_patches(body: nn.Module, size: int, patch: int) -> None:
    """Replace the patch layer of a network built for larger images, in place, so that it reads ``size`` pixels.

    For constructors that fix the patch size: the grid, which shapes the weights, is the same.
    """
    for module in body.modules():
        if isinstance(module, PatchEmbed) and isinstance(module.proj, nn.Conv2d):
            _resize_conv(module.proj, patch)
            module.img_size, module.patch_size = (size, size), (patch, patch)


def shrink_stem(body: nn.Module) -> list[str]:
    """Reduce the downsampling of an ImageNet stem, in place: stride 2 becomes 1, 4 becomes 2, pooling is removed.

    The first two such layers change; stems that reduce sixteenfold keep the others. Kernels of 7 become 3, and
    patches shrink with their stride. A smaller kernel is the centre of the larger, scaled to keep the variance
    of its output, so the family's own initialisation stays.
    """
    adapted = []
    changed: list[str] = []  # layers by the first two parts of their names: branches of a block go together
    for name, module in list(body.named_modules()):
        layer = ".".join(name.split(".")[:2])
        if not STEM.match(name) or (len(changed) == 2 and layer not in changed):
            continue
        stride = _side(getattr(module, "stride", 1))
        if isinstance(module, nn.Conv2d) and stride in (2, 4) and isinstance(module.padding, tuple):
            kernel = module.kernel_size[0]
            _resize_conv(module, stride // 2)
            now = f"{module.kernel_size[0]}x{module.kernel_size[0]} stride {module.stride[0]}"
            adapted.append(f"stem convolution {kernel}x{kernel} stride {stride} -> {now}")
        elif name == "maxpool" or ("pool" in type(module).__name__.lower() and stride == 2):
            parent, _, child = name.rpartition(".")
            setattr(body.get_submodule(parent), child, nn.Identity())
            adapted.append("stem pooling removed")
        else:
            continue
        if layer not in changed:
            changed.append(layer)
    return adapted


def unfuse_attention(network: nn.Module) -> None:
    """Compute attention as two products and a softmax, in place, which trains faster on CPUs.

    There torch's fused attention is slow in the backward pass, several times so in bfloat16.
    """
    for module in network.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False  # type: ignore[assignment]  # timm's own switch


def _resize_conv(conv: nn.Conv2d, stride: int) -> None:
    kernel = conv.kernel_size[0]
    smaller = stride if kernel == conv.stride[0] > 1 else 3 if kernel == 7 and stride == 1 else kernel
    if smaller != kernel:
        start = (kernel - smaller) // 2
        centre = conv.weight.detach()[:, :, start : start + smaller, start : start + smaller]
        conv.weight = nn.Parameter(centre.clone() * (kernel / smaller))
        conv.kernel_size = (smaller, smaller)
        if conv.padding[0] == kernel // 2:  # others pad in their forward, or not at all
            conv.padding = (smaller // 2, smaller // 2)
    conv.stride = (stride, stride)
