"""Make networks by name: timm's, the 32x32 nets, torchvision's and one's own factories, fitted to the data."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision
from torch import Tensor, nn

from kdzoo import own_code
from kdzoo.distiller import DataSpec
from kdzoo.errors import UserError, is_shortage, told, unknown
from kdzoo.files import path_of
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
from kdzoo.process_state import foreign, only_errors_of

# From a side in pixels, and whether to keep resolution in the stem, to a network and what was adapted.
Builder = Callable[[int, bool], tuple[nn.Module, list[str]]]

_bares: dict[Any, nn.Module] = {}  # networks on the meta device, by their entry points and keywords


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
        name: a short name, any timm name, ``timm/NAME``, ``hf-hub:OWNER/NAME``, ``local-dir:PATH``,
            ``torchvision:NAME``, or ``package.module:factory``, called as ``factory(num_classes=K, **options)``.
        data: classes (0: a network without a classifier), image size, and channel statistics.
        pretrained: whether to start from the published weights of timm or torchvision, or from those of the hub's or
            local folder, with their normalisation. torchvision's are its default ones, or those of ``weights=NAME``.
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
    check_name(name)
    if image_size is not None:
        options["img_size"] = image_size
    origin, _, member = name.partition(":")
    if names.is_timms(name):
        network = _from_timm(name, data, pretrained, fetch, taps, options)
    elif origin == "torchvision":
        network = _from_torchvision(name, member, data, pretrained, fetch, taps, options)
    elif pretrained:
        raise UserError(f"'{name}' has no pretrained weights here; pass a timm name, or weights from a file")
    else:
        network = _from_factory(name, origin, member, data, taps, options)
    network.normalise(mean, std)
    if pretrained and fetch:
        network.origin = "its pretrained weights"
    return network


def check_name(name: str) -> None:
    """Check that ``create`` knows the name. Factories of one's own are not imported for this."""
    origin, colon, member = name.partition(":")
    if origin.endswith(".py"):
        raise UserError(
            f"'{name}' names no network; expected {_module(path_of(origin))}:{member or 'FACTORY'}, the function that "
            "makes it in a module that Python finds from the working folder"
        )
    if origin == "__main__":  # nor would a change of it be noticed
        factory = member or "FACTORY"
        raise UserError(
            f"'{name}' is code of the running script or notebook, which no other process can import; write {factory} "
            f"into a file, such as mynets.py, and give mynets:{factory}"
        )
    if not colon and not timm.is_model(names.resolve(name)):
        raise unknown("model", name, names.known(), hint="(all: kdzoo list models; your own: MODULE:FACTORY)")
    if colon and origin == "torchvision" and member not in (known := _torchvision_models()):
        raise unknown("torchvision model", member, known)
    if colon and origin == "hf-hub" and "/" not in member:
        raise UserError(f"'{name}' names no model of the hub; expected hf-hub:OWNER/NAME")
    if colon and origin == "local-dir" and not (path_of(member) / "config.json").is_file():
        raise UserError(f"'{name}': no config.json in folder '{member}'; expected a model that timm saved for the hub")


def _module(file: Path) -> str:
    """Return the name to import a source file by from the working folder, or from its own where it lies outside."""
    parts = Path(os.path.relpath(file.with_suffix(""))).parts
    return file.stem if ".." in parts else ".".join(parts)


def pretrained_classes(name: str) -> int | None:
    """Return the number of classes of a network's published weights; None if there are none.

    Raises:
        UserError: the hub or folder that says so cannot be read.
    """
    check_name(name)
    origin, colon, member = name.partition(":")
    if origin == "torchvision":
        return len(_torchvision_weights(name, member, "DEFAULT").meta["categories"])
    if colon and names.is_timms(name):
        return int(_bare(name, {}).num_classes)
    facts = None if colon else timm.get_pretrained_cfg(names.resolve(name))
    return facts.num_classes if facts and facts.has_weights else None


def _torchvision_weights(name: str, member: str, which: str) -> Any:
    known = torchvision.models.get_model_weights(member)
    if which not in known.__members__:
        raise unknown("weights", which, known.__members__, f"(of {name})")
    return known[which]


def _bare(name: str, keywords: Mapping[str, Any]) -> Any:
    """Make a timm network on the meta device, without weights, to be read and never changed.

    It is kept for the next network of the same code and keywords, unless a folder or a hub says what it is: that may
    say something else by then.
    """
    entry = _entry(name)
    key = None if ":" in entry else (timm.model_entrypoint(entry), repr(sorted(keywords.items())))
    if key in _bares:
        return _bares[key]
    state = torch.get_rng_state()
    with torch.device("meta"):
        bare = _told(name, lambda: timm.create_model(entry, **keywords))
    torch.set_rng_state(state)
    if key is not None:
        _bares[key] = bare
    return bare


def _entry(name: str) -> str:
    """Return what timm calls a network, with the user's folder as a whole path."""
    origin, colon, member = name.partition(":")
    return f"{origin}:{path_of(member)}" if colon else names.resolve(name)


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
    entry = _entry(name)
    keywords = {"num_classes": data.num_classes, **{key: options[key] for key in options if key != "img_size"}}
    bare = _bare(name, keywords)
    facts = bare.pretrained_cfg
    native = facts.get("input_size", (3, 224, 224))[-1]
    wanted = options.pop("img_size", None)
    size = wanted or (native if pretrained else data.image_size)
    statistics = (facts["mean"], facts["std"]) if pretrained else (data.mean, data.std)

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
    return _fitted(name, data, size, native, build, statistics, fixed, taps, exact=wanted is not None)


def _with_patches(entry: str, bare: nn.Module, side: int, keywords: dict[str, Any]) -> nn.Module:
    """A network whose constructor fixes the patch size: built with its own patches for as fine a grid."""
    chosen = dict(keywords)
    patch = chosen.pop("patch_size")
    body = timm.create_model(entry, **{**chosen, "img_size": side * native_patch(bare) // patch})
    shrink_patches(body, side, patch)
    return body


def _from_torchvision(
    name: str,
    member: str,
    data: DataSpec,
    pretrained: bool,
    fetch: bool,
    taps: Sequence[str] | None,
    options: dict[str, Any],
) -> Network:
    if not data.num_classes:
        raise UserError(f"'{name}' cannot be made without a classifier here; take a network of timm's, or your own")
    which = options.pop("weights", "DEFAULT")
    weights = _torchvision_weights(name, member, which) if pretrained else None
    facts = weights.transforms() if weights else None
    native = facts.crop_size[0] if facts else 299 if member == "inception_v3" else 224
    wanted = options.pop("img_size", None)
    size = wanted or (native if pretrained else data.image_size)
    keywords: dict[str, Any] = {"num_classes": data.num_classes, **options}
    if member in ("googlenet", "inception_v3"):  # their training output is a tuple unless told otherwise
        keywords = {"aux_logits": False, "init_weights": not pretrained, "transform_input": pretrained, **keywords}

    def build(side: int, stem: bool) -> tuple[nn.Module, list[str]]:
        body = torchvision.models.get_model(member, weights=None, **keywords)
        if weights and fetch:
            _fill(name, body, weights)
        return body, shrink_stem(body) if stem and not pretrained else []

    with torch.device("meta"):
        _told(name, lambda: torchvision.models.get_model(member, weights=None, **keywords))
    statistics = (facts.mean, facts.std) if facts else (data.mean, data.std)
    return _fitted(name, data, size, native, build, statistics, True, taps, exact=wanted is not None)


def _fill(name: str, body: nn.Module, weights: Any) -> None:
    """Load torchvision's weights into a network, but for a head of other classes and the auxiliary ones."""
    try:
        state = weights.get_state_dict(progress=False, check_hash=True)
    except Exception as error:  # its download raises kinds of several libraries
        raise UserError(
            f"no pretrained weights for '{name}' ({told(error)}); connect, or load weights from a file"
        ) from error
    expected = body.state_dict()
    head = next(key for key in reversed(expected) if key.endswith(".weight")).removesuffix("weight")
    fits = len(weights.meta["categories"]) == len(expected[f"{head}weight"])
    kept = {key: value for key, value in state.items() if key in expected and (fits or not key.startswith(head))}
    body.load_state_dict({**expected, **kept})


def _from_factory(
    name: str, module: str, member: str, data: DataSpec, taps: Sequence[str] | None, options: dict[str, Any]
) -> Network:
    if not member or not all(module.split(".")):
        raise UserError(f"model '{name}': expected package.module:factory")
    with foreign(f"model '{name}'", f": importing '{module}' failed", "correct that file"):
        try:
            home = own_code.import_module(module)
        except ImportError as error:
            raise UserError(
                f"model '{name}': cannot import '{module}' ({error}); pass package.module:factory"
            ) from error
    factory = getattr(home, member, None)
    if not callable(factory):
        raise unknown("factory", member, (n for n in vars(home) if callable(getattr(home, n))), f"(in {module})")
    size = options.pop("img_size", None) or data.image_size
    call = ", ".join(f"{key}={value!r}" for key, value in {"num_classes": data.num_classes, **options}.items())
    expected = "expected a function that takes num_classes, and its options by their names"
    with foreign(f"model '{name}'", f" cannot be built: {member}({call}) failed", expected):
        body = factory(num_classes=data.num_classes, **options)
    if isinstance(body, Network):
        return body
    if not isinstance(body, nn.Module):
        raise UserError(f"'{name}' returned {type(body).__name__}, expected a torch.nn.Module")
    with foreign(f"model '{name}'", f" fails on images of {size} pixels", "expected logits for each of two images"):
        return wrap(
            body, image_size=size, num_classes=data.num_classes, mean=data.mean, std=data.std, name=name, taps=taps
        )


def _fitted(
    name: str,
    data: DataSpec,
    size: int,
    native: int,
    build: Builder,
    statistics: tuple[Any, Any],
    fixed: bool,
    taps: Sequence[str] | None,
    exact: bool,
) -> Network:
    """Make the network at the first size, from ``size`` up to ``native``, at which it has four usable stages.

    A size that was asked for is ``exact``: it is taken as it is, though the last map may be one pixel.
    """
    state = torch.get_rng_state()
    # Beyond the wanted size, the least enlargement that leaves a last map is taken before the native size.
    larger = [side for side in (2 * size, 4 * size) if side < min(native, LARGE)]
    sides = [size] if exact else [*dict.fromkeys([size, *larger, native])]
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
                classifier=data.num_classes > 0,
            )
            if _usable(network.shapes(), data.num_classes, 1 if exact else min(2, side // 16) or 1):
                return network
            reason = "a stage vanishes"
        except FAILURES as error:
            if is_shortage(error):  # another size would be another network
                raise
            reason = told(error)
    raise UserError(f"'{name}' cannot read images of {size} pixels ({reason}); set another image_size")


def _usable(shapes: Any, classes: int, least: int) -> bool:
    deepest: Tensor = shapes.features[-1]
    return shapes.logits.shape[1] == classes and min(deepest.shape[2:]) >= least


def _pretrained(name: str, entry: str, keywords: dict[str, Any]) -> nn.Module:
    try:
        with only_errors_of("huggingface_hub"):  # not each attempt to connect
            return timm.create_model(entry, pretrained=True, **keywords)
    except Exception as error:  # the hub's client, its cache and timm each raise kinds of their own
        raise UserError(
            f"no pretrained weights for '{name}' ({told(error)}); expected them on the Hugging Face hub or in its "
            "cache; connect, or load weights from a file"
        ) from error


def _told(name: str, call: Callable[[], Any]) -> Any:
    """Return the call's result; any error of a constructor becomes a UserError."""
    try:
        with only_errors_of("huggingface_hub"):
            return call()
    except UserError:
        raise
    except Exception as error:
        sources = {"hf-hub": "its name and the connection to the hub", "local-dir": "what its folder holds"}
        what = "its options" if isinstance(error, TypeError) else sources.get(name.partition(":")[0], "its options")
        raise UserError(f"model '{name}' cannot be built ({told(error)}); check {what}") from error
