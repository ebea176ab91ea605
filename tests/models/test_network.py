"""What a network promises whatever is inside: reading, wrapping, compiling, copying."""

import copy
import weakref
from itertools import pairwise

import pytest
import torch
from torch import nn

from kdzoo import DataSpec
from kdzoo.errors import UserError
from kdzoo.models import create, unfuse_attention, wrap
from kdzoo.outputs import EVERYTHING
from kdzoo.tensors import leaves

DATA = DataSpec("fake", 10, tuple("abcdefghij"), 32, torch.arange(10), (0.4, 0.5, 0.6), (0.2, 0.3, 0.4))
IMAGES = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
ONE_OF_EACH_KIND = [
    "resnet8x4",
    "wrn_16_1",
    "vgg8",
    "shufflenetv1",
    "shufflenetv2",
    "mobilenetv2_half",
    "test_resnet",
    "test_vit",
    "swin_pico",
    "test_convnext",
    "mobilenetv2_035",
    "mixer_s32_224",
    "torchvision:mobilenet_v3_small",
]


class Tokens(nn.Module):
    """Blocks on tokens (B, 1 + N, C), a class token first; a pass gives only logits."""

    def __init__(self, depth=6):
        super().__init__()
        self.patch = nn.Conv2d(3, 8, 8, 8)
        self.cls = nn.Parameter(torch.ones(1, 1, 8))
        self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(depth))
        self.head = nn.Linear(8, 10)

    def forward(self, x):
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls.expand(len(x), -1, -1), x], 1)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x[:, 0])


class ChannelsLast(nn.Module):
    """Stages whose maps are (B, H, W, C)."""

    def __init__(self):
        super().__init__()
        self.stages = nn.ModuleList(nn.Linear(4 * w, 2 * w) for w in (3, 6, 12, 24))
        self.head = nn.Linear(48, 10)

    def forward(self, x):
        x = x.permute(0, 2, 3, 1)
        for stage in self.stages:
            x = x.unflatten(1, (-1, 2)).unflatten(3, (-1, 2)).permute(0, 1, 3, 5, 2, 4).flatten(3)
            x = stage(x)
        return self.head(x.mean((1, 2)))


class Flat(nn.Module):
    """No maps at all."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(3 * 32 * 32, 10)

    def forward(self, x):
        return self.head(x.flatten(1))


@pytest.mark.parametrize("name", ONE_OF_EACH_KIND)
@pytest.mark.slow(reason="torch.compile takes seconds for each")
def test_the_whole_pass_compiles_as_one_graph(name):
    network = create(name, DATA).eval()
    torch.compiler.reset()
    compiled = torch.compile(network, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        expected, got = network(IMAGES, EVERYTHING), compiled(IMAGES, EVERYTHING)
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["resnet8x4", "test_vit", "test_convnext", "torchvision:mobilenet_v3_small"])
def test_low_precision_inside_leaves_float32_outside(name):
    network = create(name, DATA).to(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16):
        output = network(IMAGES.to(memory_format=torch.channels_last), EVERYTHING)
    assert {output.logits.dtype, output.embedding.dtype, *(f.dtype for f in output.features)} == {torch.float32}
    output.logits.sum().backward()


@pytest.mark.parametrize("name", ["resnet8", "test_vit", "torchvision:shufflenet_v2_x0_5"])
def test_asking_for_shapes_disturbs_nothing(name):
    network = create(name, DATA).train()
    network.body.get_submodule(next(n for n, _ in network.body.named_children())).eval()
    modes = [module.training for module in network.modules()]
    state = {key: value.clone() for key, value in network.state_dict().items()}
    generator = torch.get_rng_state()
    shapes = network.shapes()
    assert shapes.logits.is_meta
    assert all(f.is_meta and len(f) == 2 for f in shapes.features)
    assert torch.get_rng_state().equal(generator)
    assert [module.training for module in network.modules()] == modes
    assert all(value.equal(state[key]) for key, value in network.state_dict().items())


@pytest.mark.parametrize("name", ["test_vit", "swin_pico"])
def test_attention_written_out_is_the_fused_one(name):
    torch.manual_seed(0)
    network = create(name, DATA).eval()
    fused = network(IMAGES)
    unfuse_attention(network)
    written_out = network(IMAGES)
    assert not any(getattr(module, "fused_attn", False) for module in network.modules())
    torch.testing.assert_close(written_out, fused, rtol=1e-4, atol=1e-5)


def test_shapes_are_those_of_a_pass():
    network = create("swin_pico", DATA)
    shapes, output = network.shapes(), network(IMAGES, EVERYTHING)
    assert shapes.embedding.shape == output.embedding.shape
    assert [f.shape for f in shapes.features] == [f.shape for f in output.features]


@pytest.mark.parametrize("name", ["resnet8", "wrn_16_1", "test_vit", "torchvision:resnet18"])
def test_shapes_are_those_of_all_that_can_be_asked_for(name):
    network = create(name, DATA)
    shapes, plain = network.shapes(), network(IMAGES)
    assert (plain.features, plain.preactivations, plain.final) == ((), (), None)
    output = network(IMAGES, EVERYTHING)
    assert [f.shape for f in shapes.preactivations] == [f.shape for f in output.preactivations]
    assert all(f.is_meta for f in shapes.preactivations)
    assert (shapes.final is None) == (output.final is None) == (name == "test_vit")
    assert shapes.final is None or shapes.final.shape == output.final.shape


def test_images_are_normalised_inside():
    network = create("resnet8", DATA).eval()
    mean, std = torch.tensor(DATA.mean).view(1, 3, 1, 1), torch.tensor(DATA.std).view(1, 3, 1, 1)
    torch.testing.assert_close(network(IMAGES).logits, network.body((IMAGES - mean) / std))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_images_of_any_float_are_read_alike(dtype):
    network, images = create("resnet8", DATA).eval(), IMAGES.to(dtype)
    assert torch.equal(network(images).logits, network(images.float()).logits)


def test_only_the_body_has_a_state():
    network = create("resnet8", DATA)
    assert {f"body.{key}" for key in network.body.state_dict()} == network.state_dict().keys()


@pytest.mark.parametrize("body", [Tokens, ChannelsLast])
def test_a_copy_reads_its_own_body(body):
    network = wrap(body(), image_size=32, num_classes=10).eval()
    double = copy.deepcopy(network)
    torch.testing.assert_close(double(IMAGES, EVERYTHING), network(IMAGES, EVERYTHING))
    for parameter in double.parameters():
        nn.init.zeros_(parameter)
    assert all((f == 0).all() for f in double(IMAGES, EVERYTHING).features)
    assert any((f != 0).any() for f in network(IMAGES, EVERYTHING).features)


@pytest.mark.parametrize("body", [Tokens, ChannelsLast, lambda: create("resnet8", DATA).body])
def test_a_body_that_its_owner_calls_keeps_no_map_and_can_be_copied(body):
    body, seen = body(), []
    networks = [wrap(body, image_size=32, num_classes=10) for _ in range(2)]
    for module in body.modules():
        module.register_forward_hook(lambda module, inputs, output: seen.append(weakref.ref(output)))
    for call in (*networks, body):
        call(IMAGES)
        assert not any(output() is not None for output in seen)
        copy.deepcopy(body)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_body_of_another_dtype_reads_its_images(dtype):
    body = ChannelsLast()
    network = wrap(body, image_size=32, num_classes=10, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4))
    wanted = network(IMAGES, EVERYTHING)
    body = body.to(dtype)
    found = wrap(body, image_size=32, num_classes=10, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4))(IMAGES, EVERYTHING)
    torch.testing.assert_close(found, wanted, rtol=0.1, atol=0.1)


def test_a_body_whose_pass_failed_can_be_copied():
    body = Tokens()
    network = wrap(body, image_size=32, num_classes=10)
    handle = body.head.register_forward_hook(lambda module, inputs, output: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        network(IMAGES)
    handle.remove()
    copy.deepcopy(body)


def test_tokens_become_maps_without_their_prefix():
    body = Tokens()
    network = wrap(body, image_size=32, num_classes=10)
    kept = []
    body.blocks[-1].register_forward_hook(lambda module, inputs, output: kept.append(output))
    output = network(IMAGES, EVERYTHING)
    assert [tuple(f.shape) for f in output.features] == [(2, 8, 4, 4)] * 4
    torch.testing.assert_close(output.features[-1].flatten(2).transpose(1, 2), kept[0][:, 1:])
    torch.testing.assert_close(body.head(output.embedding), output.logits)


def test_maps_with_channels_last_become_channels_first():
    output = wrap(ChannelsLast(), image_size=32, num_classes=10)(IMAGES, EVERYTHING)
    assert [tuple(f.shape[1:]) for f in output.features] == [(6, 16, 16), (12, 8, 8), (24, 4, 4), (48, 2, 2)]
    torch.testing.assert_close(output.features[-1].mean((2, 3)), output.embedding)


def test_taps_may_be_named():
    body = Tokens()
    network = wrap(body, image_size=32, num_classes=10, taps=["patch", "blocks.0", "blocks.1", "blocks.2"])
    torch.testing.assert_close(network(IMAGES, EVERYTHING).features[0], body.patch(IMAGES))


class ByName(nn.Module):
    """Calls its layers by the name of what they read where ``named``."""

    def __init__(self, named):
        super().__init__()
        self.named = named
        widths = [3, 4, 8, 12, 16]
        self.convolutions = nn.ModuleList(nn.Conv2d(*both, 3, 2, 1) for both in pairwise(widths))
        self.norms = nn.ModuleList(map(nn.BatchNorm2d, widths[1:]))
        self.relus = nn.ModuleList(nn.ReLU() for _ in widths[1:])
        self.head = nn.Linear(16, 10)

    def forward(self, x):
        for layers in zip(self.convolutions, self.norms, self.relus, strict=True):
            for layer in layers:
                x = layer(input=x) if self.named else layer(x)
        return self.head(input=x.mean((2, 3))) if self.named else self.head(x.mean((2, 3)))


def test_layers_may_be_called_by_the_name_of_what_they_read():
    named, plain = (wrap(ByName(way), image_size=32, num_classes=10).eval() for way in (True, False))
    named.load_state_dict(plain.state_dict())
    for one, other in zip(leaves(named(IMAGES, EVERYTHING)), leaves(plain(IMAGES, EVERYTHING)), strict=True):
        assert torch.equal(one, other)
    assert len(named(IMAGES, EVERYTHING).preactivations) == 4
    assert named.classifier is named.body.head


def test_a_timm_network_is_wrapped_by_timms_own_interface():
    body = create("test_vit", DATA).body.eval()
    network = wrap(body, image_size=32, num_classes=10).eval()
    torch.testing.assert_close(network(IMAGES).logits, body(IMAGES))
    assert network.classifier is body.head


def test_images_of_another_size_are_resized_inside():
    network = wrap(Tokens(), image_size=32, num_classes=10)
    assert network(torch.rand(2, 3, 48, 48)).logits.shape == (2, 10)
    torch.testing.assert_close(network(torch.ones(2, 3, 64, 64)).logits, network(torch.ones(2, 3, 32, 32)).logits)


@pytest.mark.parametrize(
    ("body", "options", "said"),
    [
        (nn.Sequential(nn.Conv2d(3, 10, 32), nn.Flatten()), {}, "taps="),
        (Tokens(), {"taps": ["patch"]}, "expected four"),
        (Tokens(), {"taps": ["patch", "blocks.0", "blocks.1", "nowhere"]}, "nowhere"),
        (Tokens(), {"num_classes": 11}, "gives 10 logits"),
        (Flat(), {"image_size": 16}, "image_size"),
        (nn.Conv2d(3, 10, 3), {}, "expected logits"),
    ],
)
def test_what_cannot_be_wrapped_is_refused_in_one_line(body, options, said):
    with pytest.raises(UserError, match=said) as error:
        wrap(body, **{"image_size": 32, "num_classes": 10, **options})
    assert "\n" not in str(error.value)
