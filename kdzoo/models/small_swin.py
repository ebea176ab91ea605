"""The Swin transformers smaller than tiny of the heterogeneous-distillation tables."""

from functools import partial

from timm.models.swin_transformer import SwinTransformer

from kdzoo.models.staged import register

# Source: Hao et al. 2023 (OFAKD, custom_model/swin_transformer.py).
for size, width in {"pico": 48, "nano": 64}.items():
    register(
        f"swin_{size}_patch4_window7_224",
        partial(SwinTransformer, embed_dim=width, depths=(2, 2, 2, 2), num_heads=(2, 4, 8, 16), window_size=7),
        image_size=224,
    )
