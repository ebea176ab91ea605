"""Networks by name, and what becomes of them on small images."""

import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F

from kdzoo import DataSpec, Show
from kdzoo.errors import UserError
from kdzoo.models import Network, cifar_mobile, create, describe, short_names


def data(image_size=32, num_classes=100):
    names = tuple(map(str, range(num_classes)))
    return DataSpec("fake", num_classes, names, image_size, torch.zeros(4, dtype=torch.int64))


def shapes(network):
    return [tuple(f.shape[1:]) for f in network.shapes().features]


class Tiny(nn.Module):
    """A network that no library knows."""

    def __init__(self, num_classes=10, width=4):
        super().__init__()
        self.stages = nn.Sequential(
            nn.Conv2d(3, width, 3, 1, 1),
            nn.Conv2d(width, width, 3, 2, 1),
            nn.Conv2d(width, width, 3, 2, 1),
            nn.Conv2d(width, width, 3, 2, 1),
        )
        self.fc = nn.Linear(width, num_classes)

    def forward(self, x):
        return self.fc(self.stages(x).mean((2, 3)))


def not_a_network(num_classes):
    return num_classes


@pytest.mark.parametrize(
    ("name", "millions"),
    [
        ("resnet20", 0.28),
        ("resnet56", 0.86),
        ("resnet110", 1.74),
        ("resnet8x4", 1.23),
        ("resnet32x4", 7.43),
        ("wrn_16_2", 0.70),
        ("wrn_40_1", 0.57),
        ("wrn_40_2", 2.26),
        ("vgg8", 3.97),
        ("vgg13", 9.46),
        ("mobilenetv2_half", 0.81),
        ("shufflenetv1", 0.95),
        ("shufflenetv2", 1.36),
        ("resnet50_cifar", 23.71),
    ],
)
def test_the_32x32_nets_have_the_published_number_of_parameters(name, millions):
    assert round(describe(create(name, data()))["parameters"] / 1e6, 2) == millions


def test_every_short_name_is_known_to_timm_and_builds():
    assert all(timm.is_model(name) for name in short_names().values())
    assert {"vit_s", "swin_t", "resnet18", "vgg8", "wrn_40_2", "mixer_b16"} <= short_names().keys()


def test_every_network_of_the_published_tables_has_a_short_name():
    tables = """convnext_t deit_t mixer_b16 mobilenetv1 mobilenetv2 mobilenetv2_half resmlp_s12 resnet110 resnet18
        resnet20 resnet32 resnet32x4 resnet34 resnet50 resnet50_cifar resnet56 resnet8x4 shufflenetv1 shufflenetv2
        swin_nano swin_pico swin_t vgg13 vgg8 vit_s wrn_16_2 wrn_40_1 wrn_40_2"""
    assert set(tables.split()) <= short_names().keys()


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("name", ["shufflenetv1", "shufflenetv2"])
def test_shuffled_maps_and_the_gradients_of_joined_ones_stay_laid_out_as_they_are(name, layout):
    network = create(name, data()).to(memory_format=layout)
    lies: list[bool] = []

    def watch(_, inputs, output):
        lies.append(inputs[0].is_contiguous(memory_format=layout))
        output.register_hook(lambda slope: lies.append(slope.is_contiguous(memory_format=layout)))

    for norm in network.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.register_forward_hook(watch)
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)).contiguous(memory_format=layout)
    network(images).logits.square().sum().backward()
    assert len(lies) > 90
    assert all(lies)


@pytest.mark.parametrize("groups", [2, 3])
def test_channels_are_shuffled_alike_in_either_layout(groups):
    maps = torch.arange(2 * 12 * 3 * 5.0).view(2, 12, 3, 5)
    wanted = F.channel_shuffle(maps, groups)
    for layout in (torch.channels_last, torch.contiguous_format):
        found = cifar_mobile._shuffle(maps.contiguous(memory_format=layout), groups)
        assert torch.equal(found, wanted)
        assert found.is_contiguous(memory_format=layout)


def test_the_same_seed_gives_the_same_weights():
    def weights(seed):
        torch.manual_seed(seed)
        return torch.cat([p.flatten() for p in create("vit_pico", data()).parameters()])

    assert weights(3).equal(weights(3))
    assert not weights(3).equal(weights(4))


@pytest.mark.parametrize(
    ("name", "size", "deepest"),
    [
        ("vit_t", 8, (192, 4, 4)),
        ("vit_t", 16, (192, 8, 8)),
        ("vit_t", 32, (192, 8, 8)),
        ("vit_t", 64, (192, 8, 8)),
        ("vit_t", 224, (192, 14, 14)),
        ("vit_pico", 32, (96, 8, 8)),
        ("mixer_s16", 8, (512, 4, 4)),
        ("swin_pico", 8, (384, 1, 1)),
        ("swin_pico", 32, (384, 2, 2)),
        ("resnet18", 32, (512, 4, 4)),
        ("resnet18", 96, (512, 3, 3)),
        ("mobilenetv2", 32, (320, 2, 2)),
        ("test_convnext", 32, (64, 2, 2)),
    ],
)
def test_networks_are_adapted_to_the_image_size(name, size, deepest):
    network = create(name, data(size))
    assert network.image_size == size
    assert shapes(network)[-1] == deepest
    assert not any("resized" in sentence for sentence in network.adapted)


def test_token_networks_tap_blocks_1_3_9_and_11():
    network = create("vit_t", data()).eval()
    images = torch.rand(2, 3, 32, 32)
    seen = []
    for index in (1, 3, 9, 11):
        network.body.blocks[index].register_forward_hook(lambda module, inputs, output: seen.append(output))
    for tap, block in zip(network(images, Show()).features, seen, strict=True):
        torch.testing.assert_close(tap.flatten(2).transpose(1, 2), block[:, 1:])


def test_a_network_that_cannot_be_adapted_reads_resized_images():
    network = create("levit_128s", data()).eval()
    assert network.image_size > 32
    assert network.adapted[-1] == f"images resized to {network.image_size} inside"
    assert network(torch.rand(2, 3, 32, 32)).logits.shape == (2, 100)


def test_a_network_can_be_asked_to_read_larger_images():
    network = create("test_vit", data(), img_size=160).eval()
    assert network.adapted == ("images resized to 160 inside",)
    plain = timm.create_model("test_vit", num_classes=100)
    plain.load_state_dict(network.body.state_dict())


def test_options_reach_the_constructor_and_win():
    assert shapes(create("vit_t", data(), depth=4, patch_size=8)) == [(192, 4, 4)] * 4


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small", "shufflenet_v2_x0_5", "squeezenet1_1"])
def test_torchvision_networks_are_read_too(name):
    network = create(f"torchvision:{name}", data()).eval()
    images = torch.rand(2, 3, 32, 32)
    output = network(images, Show())
    assert len(output.features) == 4
    assert output.logits.shape == (2, 100)
    torch.testing.assert_close(network.body((images - network.mean) / network.std), output.logits)


def test_a_factory_of_ones_own_is_read_too():
    network = create(f"{__name__}:Tiny", data(), width=6)
    assert isinstance(network, Network)
    assert shapes(network) == [(6, 32, 32), (6, 16, 16), (6, 8, 8), (6, 4, 4)]
    assert network.classifier is network.body.fc


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("resnet19", {}, "did you mean"),
        ("torchvision:resnet19", {}, "did you mean"),
        ("no.such.package:factory", {}, "cannot import"),
        (f"{__name__}:Tinny", {}, "did you mean Tiny"),
        (f"{__name__}:not_a_network", {}, "torch.nn.Module"),
        (f"{__name__}:Tiny", {"depth": 3}, "depth"),
        ("resnet18", {"no_such_option": 3}, "no_such_option"),
    ],
)
def test_what_cannot_be_built_is_refused_in_one_line(name, options, said):
    with pytest.raises(UserError, match=said) as error:
        create(name, data(), **options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["resnet20", "torchvision:resnet18"])
def test_pretrained_weights_that_cannot_be_had_are_refused_in_one_line(name):
    with pytest.raises(UserError, match="pretrained weights") as error:
        create(name, data(), pretrained=True)
    assert "\n" not in str(error.value)


def test_a_description_is_plain_numbers_and_strings():
    assert describe(create("resnet8", data(num_classes=10))) == {
        "name": "resnet8",
        "parameters": 78042,
        "image_size": 32,
        "classes": 10,
        "embedding": 64,
        "taps": [[16, 32, 32], [16, 32, 32], [32, 16, 16], [64, 8, 8]],
        "adapted": [],
    }
