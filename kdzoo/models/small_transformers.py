"""Transformers smaller than timm's: the Swins of the heterogeneous-distillation tables, and a ViT for small images."""

from functools import partial

from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer

from kdzoo.models.staged import register

# Source: Hao et al. 2023 (OFAKD, custom_model/swin_transformer.py).
for size, width in {"pico": 48, "nano": 64}.items():
    register(
        f"swin_{size}_patch4_window7_224",
        partial(SwinTransformer, embed_dim=width, depths=(2, 2, 2, 2), num_heads=(2, 4, 8, 16), window_size=7),
        image_size=224,
    )

# Ours: a third of vit_tiny's blocks at half their width, so that many methods can be compared on few cores.
register(
    "vit_pico_patch16_224",
    partial(VisionTransformer, embed_dim=96, depth=4, num_heads=3, patch_size=16),
    image_size=224,
)
