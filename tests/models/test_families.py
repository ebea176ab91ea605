"""Small members of timm's families, each walked as a teacher and as a student on 32x32 images."""

import pytest
import torch

from kdzoo import DataSpec, Show
from kdzoo.models import create

DATA = DataSpec("fake", 7, tuple("abcdefg"), 32, torch.arange(7))

FAMILIES = [
    "beit_base_patch16_224",
    "cait_xxs24_224",
    "coat_lite_tiny",
    "convit_tiny",
    "convmixer_1024_20_ks9_p14",
    "cs3darknet_focus_s",
    "cspnext_tiny",
    "deit_tiny_distilled_patch16_224",
    "deit_tiny_patch16_224",
    "densenet121",
    "dla46x_c",
    "edgenext_xx_small",
    "efficientformerv2_s0",
    "efficientvit_b0",
    "efficientvit_m0",
    "fasternet_t0",
    "fastvit_t8",
    "ghostnet_050",
    "gmlp_ti16_224",
    "hgnetv2_b0",
    "iformer_t",
    "inception_next_atto",
    "lcnet_035",
    "levit_128s",
    "mixer_s32_224",
    "mobilenetv1_100",
    "mobilenetv2_035",
    "mobilevit_xxs",
    "pit_ti_224",
    "pvt_v2_b0",
    "regnetx_002",
    "repghostnet_050",
    "repvit_m1",
    "resmlp_12_224",
    "resnest14d",
    "resnet10t",
    "resnetv2_18",
    "rexnet_100",
    "shvit_s1",
    "starnet_s050",
    "swiftformer_xs",
    "swin_pico_patch4_window7_224",
    "test_byobnet",
    "test_coatnet",
    "test_convnext",
    "test_efficientnet",
    "test_mambaout",
    "test_nfnet",
    "test_resnet",
    "test_vit",
    "test_vit_relpos",
    "tiny_vit_5m_224",
    "visformer_tiny",
    "vit_tiny_patch16_dinov3_qkvb",
    "vit_tiny_r_s16_p8_224",
    "ese_vovnet19b_slim_dw",
    "xcit_nano_12_p8_224",
]


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.slow(reason="trains a network of each of timm's families")
def test_a_timm_network_teaches_and_learns_at_32_pixels(name):
    network = create(name, DATA)
    images = torch.rand(2, 3, 32, 32)

    network.eval()
    with torch.no_grad():
        taught = network(images, Show(features=True))
        plain = network(images)
        asked = network(images, Show(features=False, preactivations=True, final=True))
    assert plain.features == ()
    assert len(taught.features) == 4
    assert all(f.ndim == 4 and len(f) == 2 and min(f.shape[2:]) >= 2 for f in taught.features)
    assert taught.logits.shape == (2, 7)
    assert taught.logits.isfinite().all()
    assert taught.embedding.ndim == 2
    torch.testing.assert_close(plain.logits, taught.logits, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(plain.embedding, taught.embedding, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(bare_logits(network, images), taught.logits, rtol=1e-3, atol=1e-4)
    if network.classifier is not None:
        torch.testing.assert_close(network.classifier(taught.embedding), taught.logits, rtol=1e-3, atol=1e-4)

    assert asked.features == ()
    for before, feature in zip(asked.preactivations, taught.features if asked.preactivations else (), strict=True):
        assert before.shape == feature.shape
        assert before.isfinite().all()
    if asked.final is not None:
        torch.testing.assert_close(network.classify(asked.final.mean((2, 3))), taught.logits, rtol=1e-3, atol=1e-4)

    network.train()
    learnt = network(images, Show(features=True))
    (learnt.logits.square().sum() + sum(f.square().mean() for f in learnt.features)).backward()
    reached = [p.grad is not None for p in network.parameters() if p.requires_grad]
    assert sum(reached) > 0.9 * len(reached)


def bare_logits(network, images):
    """The body's own forward on what the network feeds it."""
    size = network.image_size
    if images.shape[-1] != size:
        images = torch.nn.functional.interpolate(images, (size, size), mode="bilinear", align_corners=False)
    with torch.no_grad():
        return network.body((images - network.mean) / network.std)
