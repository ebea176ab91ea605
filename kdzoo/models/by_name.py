"""Make networks by name: timm's, the 32x32 nets, torchvision's and one's own factories, fitted to the data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import timm
import torch
import torchvision
from torch import Tensor, nn

from kdzoo import own_code
from kdzoo.distiller import DataSpec
from kdzoo.errors import UserError, unknown
from kdzoo.models import names
from kdzoo.models.adapt import (
    LARGE,
    SMALL,
    constructor_keywords,
    native_patch,
    shrink_patches,
    shrink_stem,
    token_options,
)
from kdzoo.models.maps import FAILURES
from kdzoo.models.network import Network, wrap

# From a side in pixels, and whether to keep resolution in the stem, to a network and what was adapted.
Builder = Callable[[int, bool], tuple[nn.Module, list[str]]]


def create(
    name: str,
    data: DataSpec,
    *,
    pretrained: bool = False,
    fetch: bool = True,
    image_size: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    taps: Sequence[str] | None = None,
    **options: Any,
) -> Network:
    """Make a network for the data: images (B, 3, H, W) in [0, 1] go in, an ``Output`` comes out.

    Weights are drawn from torch's global generator. A network made for another image size is adapted, or has
    its images resized inside; ``Network.adapted`` says which. ``img_size=224`` among the options makes it read
    that size, with images resized inside; pretrained networks read the size they were trained at.

    Args:
        name: a short name, any timm name, ``torchvision:NAME``, or ``package.module:factory``, called as
            ``factory(num_classes=K, **options)``.
        data: classes, image size, and channel statistics.
        pretrained: whether to start from timm's published weights, with their normalisation.
        fetch: whether to download the pretrained weights. False builds the same architecture without them, to load a
            fine-tuned checkpoint into.
        image_size: side in pixels that it reads; None: the one it was pretrained at, else the data's.
        mean: per channel of images in [0, 1]; None: the one it was pretrained with, else the data's.
        std: the same.
        taps: names of four submodules, shallow to deep, whose outputs are its stages; None to find them.
        options: keywords of the network's constructor.

    Raises:
        UserError: an unknown name or option, a factory that fails, or weights that cannot be downloaded.
    """
    check(name)
    origin, colon, member = name.partition(":")
    if image_size is not None:
        options["img_size"] = image_size
    network = _made(name, origin, colon, member, data, pretrained, fetch, taps, options)
    network.normalise(mean, std)
    return network


def _made(
    name: str,
    origin: str,
    colon: str,
    member: str,
    data: DataSpec,
    pretrained: bool,
    fetch: bool,
    taps: Sequence[str] | None,
    options: dict[str, Any],
) -> Network:
    if colon and pretrained:
        raise UserError(f"'{name}' has no pretrained weights here; pass a timm name, or weights from a file")
    if not colon:
        return _from_timm(name, data, pretrained, fetch, taps, options)
    if origin == "torchvision":
        return _from_torchvision(name, member, data, taps, options)
    return _from_factory(name, origin, member, data, taps, options)


def check(name: str) -> None:
    """Check that ``create`` knows the name. Factories of one's own are not imported for this."""
    origin, colon, member = name.partition(":")
    if not colon and not timm.is_model(names.resolve(name)):
        raise unknown("model", name, names.known())
    if colon and origin == "torchvision" and member not in (known := _torchvision_models()):
        raise unknown("torchvision model", member, known)


def pretrained_classes(name: str) -> int | None:
    """Return the number of classes of timm's published weights for this network; None if there are none."""
    facts = timm.get_pretrained_cfg(names.resolve(name)) if ":" not in name else None
    return facts.num_classes if facts and facts.has_weights else None


def _torchvision_models() -> list[str]:
    return torchvision.models.list_models(module=torchvision.models)


def _from_timm(
    name: str,
    data: DataSpec,
    pretrained: bool,
    fetch: bool,
    taps: Sequence[str] | None,
    options: dict[str, Any],
) -> Network:
    entry = names.resolve(name)
    facts = _told(name, lambda: timm.get_pretrained_cfg(entry))
    native = facts.input_size[-1] if facts else 224
    wanted = options.pop("img_size", None)
    size = wanted or (native if pretrained else data.image_size)
    keywords = {"num_classes": data.num_classes, **options}
    statistics = (facts.mean, facts.std) if pretrained else (data.mean, data.std)
    state = torch.get_rng_state()
    with torch.device("meta"):
        bare = _told(name, lambda: timm.create_model(entry, **keywords))
    torch.set_rng_state(state)

    def build(side: int, stem: bool) -> tuple[nn.Module, list[str]]:
        chosen, adapted = (keywords, []) if side == native else token_options(bare, side, keywords, pretrained)
        if pretrained:
            return (_pretrained(name, entry, chosen) if fetch else timm.create_model(entry, **chosen)), adapted
        try:
            body = timm.create_model(entry, **chosen)
        except TypeError:
            if "patch_size" not in chosen or "patch_size" in options:
                raise
            body = _with_patches(entry, bare, side, chosen)
        if stem and native > SMALL and "patch_size" not in chosen:
            adapted += shrink_stem(body)
        return body, adapted

    fixed = "img_size" in constructor_keywords(bare)
    return _fitted(name, data, size, native, build, statistics, fixed, taps)


def _with_patches(entry: str, bare: nn.Module, side: int, keywords: dict[str, Any]) -> nn.Module:
    """A network whose constructor fixes the patch size: built with its own patches for as fine a grid."""
    chosen = dict(keywords)
    patch = chosen.pop("patch_size")
    body = timm.create_model(entry, **{**chosen, "img_size": side * native_patch(bare) // patch})
    shrink_patches(body, side, patch)
    return body


def _from_torchvision(
    name: str, member: str, data: DataSpec, taps: Sequence[str] | None, options: dict[str, Any]
) -> Network:
    size = options.pop("img_size", None) or data.image_size
    keywords: dict[str, Any] = {"num_classes": data.num_classes, "weights": None, **options}
    if member in ("googlenet", "inception_v3"):  # their training output is a tuple unless told otherwise
        keywords = {"aux_logits": False, "init_weights": True, **keywords}

    def build(side: int, stem: bool) -> tuple[nn.Module, list[str]]:
        body = torchvision.models.get_model(member, **keywords)
        return body, shrink_stem(body) if stem else []

    with torch.device("meta"):
        _told(name, lambda: torchvision.models.get_model(member, **keywords))
    native = 299 if member == "inception_v3" else 224
    return _fitted(name, data, size, native, build, (data.mean, data.std), True, taps)


def _from_factory(
    name: str, module: str, member: str, data: DataSpec, taps: Sequence[str] | None, options: dict[str, Any]
) -> Network:
    try:
        home = own_code.import_module(module)
    except ImportError as error:
        raise UserError(f"model '{name}': cannot import '{module}' ({error}); pass package.module:factory") from None
    factory = getattr(home, member, None)
    if not callable(factory):
        raise unknown("factory", member, (n for n in vars(home) if callable(getattr(home, n))), f"in {module}")
    size = options.pop("img_size", None) or data.image_size
    try:
        body = factory(num_classes=data.num_classes, **options)
    except UserError:
        raise
    except Exception as error:
        call = ", ".join(f"{key}={value!r}" for key, value in {"num_classes": data.num_classes, **options}.items())
        raise UserError(
            f"model '{name}' cannot be built: {member}({call}) failed ({_line(error)}); expected a function that takes "
            "num_classes, and its options by their names"
        ) from error
    if isinstance(body, Network):
        return body
    if not isinstance(body, nn.Module):
        raise UserError(f"'{name}' returned {type(body).__name__}, expected a torch.nn.Module")
    return wrap(body, image_size=size, num_classes=data.num_classes, mean=data.mean, std=data.std, name=name, taps=taps)


def _fitted(
    name: str,
    data: DataSpec,
    size: int,
    native: int,
    build: Builder,
    statistics: tuple[Any, Any],
    fixed: bool,
    taps: Sequence[str] | None,
) -> Network:
    """The network at the first size, from ``size`` up to ``native``, at which it has four usable stages."""
    state = torch.get_rng_state()
    # Beyond the wanted size, the least enlargement that leaves a last map is taken before the native size.
    sides = [size, *(side for side in (2 * size, 4 * size) if side < min(native, LARGE))]
    if native not in sides:
        sides.append(native)
    for side, stem in [(side, stem) for side in sides for stem in (True, False) if side <= SMALL or not stem]:
        torch.set_rng_state(state)  # a failed attempt draws nothing from the generator
        try:
            body, adapted = build(side, stem)
            resize = side != data.image_size
            network = Network(
                body,
                name=name,
                image_size=side,
                mean=statistics[0],
                std=statistics[1],
                resize=resize or fixed,
                taps=taps,
                adapted=[*adapted, f"images resized to {side} inside"] if resize else adapted,
            )
            if _usable(network.shapes(), data.num_classes, min(2, side // 16) or 1):
                return network
            reason = "a stage vanishes"
        except FAILURES as error:
            reason = _line(error)
    raise UserError(f"'{name}' cannot read images of {size} pixels ({reason}); pass img_size=...")


def _usable(shapes: Any, classes: int, least: int) -> bool:
    deepest: Tensor = shapes.features[-1]
    return shapes.logits.shape[1] == classes and min(deepest.shape[2:]) >= least


def _pretrained(name: str, entry: str, keywords: dict[str, Any]) -> nn.Module:
    try:
        return timm.create_model(entry, pretrained=True, **keywords)
    except Exception as error:  # the hub's client, its cache and timm each raise kinds of their own
        raise UserError(
            f"no pretrained weights for '{name}' ({_line(error)}); expected them on the Hugging Face hub or in its "
            "cache; connect, or load weights from a file"
        ) from error


def _told(name: str, call: Callable[[], Any]) -> Any:
    """Return the call's result; any error of a constructor becomes a UserError."""
    try:
        return call()
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"model '{name}' cannot be built ({_line(error)}); check its options") from error


def _line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:160]}" if lines else type(error).__name__
