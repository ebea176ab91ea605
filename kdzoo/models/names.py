"""The names of networks: short names for timm's, and the names of the 32x32 nets."""

from __future__ import annotations

import timm

# Where a short name is also timm's, the short name wins: vgg13 is the one of the CIFAR tables.
SHORT = {
    "vit_pico": "vit_pico_patch16_224",
    "vit_t": "vit_tiny_patch16_224",
    "vit_s": "vit_small_patch16_224",
    "vit_b": "vit_base_patch16_224",
    "deit_t": "deit_tiny_patch16_224",
    "deit_s": "deit_small_patch16_224",
    "deit_b": "deit_base_patch16_224",
    "swin_t": "swin_tiny_patch4_window7_224",
    "swin_s": "swin_small_patch4_window7_224",
    "swin_b": "swin_base_patch4_window7_224",
    "swin_nano": "swin_nano_patch4_window7_224",
    "swin_pico": "swin_pico_patch4_window7_224",
    "mixer_s16": "mixer_s16_224",
    "mixer_b16": "mixer_b16_224",
    "resmlp_s12": "resmlp_12_224",
    "resmlp_s24": "resmlp_24_224",
    "convnext_t": "convnext_tiny",
    "convnext_s": "convnext_small",
    "convnext_b": "convnext_base",
    "mobilenetv1": "mobilenetv1_100",
    "mobilenetv2": "mobilenetv2_100",
    "efficientnet_b0": "efficientnet_b0",
    "resnet18": "resnet18",
    "resnet34": "resnet34",
    "resnet50": "resnet50",
    "resnet101": "resnet101",
    "resnet152": "resnet152",
    "resnet8": "resnet8",
    "resnet14": "resnet14",
    "resnet20": "resnet20",
    "resnet32": "resnet32",
    "resnet44": "resnet44",
    "resnet56": "resnet56",
    "resnet110": "resnet110",
    "resnet8x4": "resnet8x4",
    "resnet32x4": "resnet32x4",
    "resnet50_cifar": "resnet50_cifar",
    "wrn_16_1": "wrn_16_1",
    "wrn_16_2": "wrn_16_2",
    "wrn_40_1": "wrn_40_1",
    "wrn_40_2": "wrn_40_2",
    "vgg8": "vgg8_cifar",
    "vgg11": "vgg11_cifar",
    "vgg13": "vgg13_cifar",
    "vgg16": "vgg16_cifar",
    "vgg19": "vgg19_cifar",
    "shufflenetv1": "shufflenetv1",
    "shufflenetv2": "shufflenetv2",
    "mobilenetv2_half": "mobilenetv2_half",
}


def short_names() -> dict[str, str]:
    """List the short names, with timm's name for each."""
    return dict(SHORT)


SOURCES = ("hf-hub", "local-dir")  # from which timm reads a network's name, its keywords and its weights


def resolve(name: str) -> str:
    """Return timm's name for a network; ``timm/NAME`` is timm's own where a short name is the same."""
    return SHORT.get(name, name.removeprefix("timm/"))


def is_timms(name: str) -> bool:
    """Tell whether timm makes the network: by a name, or from a folder or hub that says which it is."""
    origin, colon, _ = name.partition(":")
    return not colon or origin in SOURCES


def known() -> set[str]:
    """List all names that ``create`` takes without a colon."""
    return {*SHORT, *timm.list_models()}
