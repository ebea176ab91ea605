"""Networks as distillers see them: images in [0, 1] go in, logits, embedding and four feature maps come out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import chain
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kdzoo.errors import UserError, is_shortage, told
from kdzoo.models.hook_reader import HookReader
from kdzoo.models.maps import FAILURES, CannotRead, logits_in
from kdzoo.models.preactivations import Preactivations
from kdzoo.models.stages import Stages
from kdzoo.models.timm_reader import TimmReader, speaks_timm
from kdzoo.modes import evaluating
from kdzoo.outputs import LOGITS, Output, Show, StageOutput
from kdzoo.own_code import at_own_place
from kdzoo.quantities import counted

PROBE_BATCH = 2
LUMA = (0.299, 0.587, 0.114)  # of red, green and blue, by ITU-R BT.601


M = TypeVar("M", bound=nn.Module)


class Network(nn.Module):
    """A classifier that normalises and resizes its images itself.

    ``body`` is the bare network, and the only part with a state: its ``state_dict`` is what is saved.
    The outputs are float32 in every precision.

    Args:
        body: normalised images (B, 3, H, W) -> logits (B, K), which may be the output itself, the first of a tuple, or
            ``logits`` of a mapping or object. A body whose first convolution has one channel is given their luma.
        name: what it is called.
        image_size: side in pixels of what ``body`` reads.
        mean: per channel of images in [0, 1], or one number for all channels.
        std: the same.
        resize: whether images of any other size are brought to ``image_size`` inside.
        taps: submodules whose outputs are the features, shallow to deep; None to find four, and none to show none.
        adapted: sentences about what was changed to suit the image size.
        stageless: why no features are shown, where ``taps`` are none.
        classifier: whether the body ends in one; else what it returns is the embedding (B, D), and logits are (B, 0).
    """

    mean: Tensor
    std: Tensor
    luma: Tensor

    reads_channels_last = True  # False where it fails on maps that are not contiguous, as ``view`` does

    def __init__(
        self,
        body: nn.Module,
        *,
        name: str,
        image_size: int,
        mean: Sequence[float],
        std: Sequence[float],
        resize: bool = True,
        taps: Sequence[str] | None = None,
        adapted: Sequence[str] = (),
        stageless: str = "",
        classifier: bool = True,
    ):
        super().__init__()
        self.has_classifier = classifier
        self.name, self.image_size, self.adapted, self.stageless = name, image_size, tuple(adapted), stageless
        self.origin = "weights drawn at random"  # a line about where its weights come from
        self.body = body
        self._resize = resize
        first = next((module for module in body.modules() if isinstance(module, nn.Conv2d)), None)
        self._gray = first is not None and first.in_channels == 1
        dtype = next((p.dtype for p in body.parameters() if p.is_floating_point()), torch.float32)
        for key, values in {"mean": mean, "std": std, "luma": LUMA}.items():
            self.register_buffer(key, torch.tensor(values, dtype=dtype).view(1, -1, 1, 1), persistent=False)
        with _undisturbed(self):
            self._reader = _reader(body, self._probe(), taps, classifier)
            self._before = Preactivations(body, lambda: self._reader.read(body, self._probe(), True).features)
        self._stages: Stages | None = None  # found when first asked for

    def forward(self, images: Tensor, show: Show = LOGITS) -> Output:
        """Compute logits and embedding, and the maps that ``show`` names where the network has them.

        Args:
            images: (B, 3, H, W) in [0, 1].
            show: what is wanted; by default logits and embedding, which is the body's plain pass.
        """
        if show.preactivations:
            self._before.open()
        output = self._reader.read(self.body, self._prepared(images), show.features or show.preactivations)
        if output.logits is None or output.logits.shape[:1] != images.shape[:1]:  # len would fix it in an export
            kind = "training" if self.training else "evaluation"
            raise UserError(f"'{self.name}' gives no row of logits for each of {len(images)} images in {kind} mode")
        if show.preactivations:
            output = output._replace(preactivations=self._before.take(output.features))
        return self._named(output).only(show).float()

    def _named(self, output: Output) -> Output:
        """Take what a body without a classifier returns for the embedding."""
        return output if self.has_classifier else output._replace(logits=output.logits[:, :0], embedding=output.logits)

    def classify(self, means: Tensor) -> Tensor:
        """Classify means (M, D') over parts of the final map as the network classifies the mean of all: logits (M, K).

        Only of networks that have a final map.
        """
        return self._reader.head(self.body, means)

    @property
    def inseparable(self) -> str:
        """Why its stages cannot be called one by one; empty where they can."""
        try:
            self._separate()
        except FAILURES as error:
            if is_shortage(error):
                raise
            return told(error) if not isinstance(error, CannotRead) else str(error)
        return ""

    def run_stage(self, number: int, maps: Tensor, prefix: Tensor | None = None) -> StageOutput:
        """Run one stage, on maps of this network or of another.

        Args:
            number: of the stage, from 0.
            maps: (B, C, H, W), as the stage before gives them; for stage 0 images (B, 3, H, W) in [0, 1].
            prefix: (B, P, C), the tokens that the stage before gave beside its map. None puts the mean over the
                map's positions in their place.
        """
        stages = self._stages_for(maps)
        maps = maps if number else self._prepared(maps)
        return stages.run(self.body, number, maps, prefix).float()

    def run_tail(self, maps: Tensor, prefix: Tensor | None = None) -> Output:
        """Compute logits and embedding of the last stage's maps, of this network or of another."""
        return self._named(self._stages_for(maps).tail(self.body, self._reader, maps, prefix)).float()

    @property
    def classifier(self) -> nn.Linear | None:
        """The linear layer from embedding to logits; None if it is not one such layer."""
        layer = None if self._reader.classifier is None else self.body.get_submodule(self._reader.classifier)
        return layer if isinstance(layer, nn.Linear) else None

    def normalise(self, mean: Sequence[float] | None, std: Sequence[float] | None) -> None:
        """Set the mean and standard deviation, per channel or for all, of the images it is given; None keeps them."""
        for buffer, values in ((self.mean, mean), (self.std, std)):
            if values is not None:
                buffer.copy_(torch.tensor(values).view(1, -1, 1, 1))

    @property
    def reads(self) -> str:
        """What it makes of images before it reads them, and what of it was adapted to their size."""
        mean, std = (" ".join(f"{value:.4g}" for value in part.flatten().tolist()) for part in (self.mean, self.std))
        return ", ".join([f"{self.image_size} px", f"mean {mean}", f"std {std}", *self.facts()["adapted"]])

    def facts(self) -> dict[str, Any]:
        """Describe what its weights must be read with: size, mean, standard deviation, and what of it was adapted."""
        adapted = [change for change in self.adapted if not change.startswith("images resized")]  # not of the network
        mean, std = (part.flatten().tolist() for part in (self.mean, self.std))
        facts = {"image_size": self.image_size, "mean": mean, "std": std, "adapted": adapted}
        return facts if self.has_classifier else {**facts, "classifier": False}

    def checkpoint_activations(self) -> None:
        """Recompute activations in the backward pass instead of storing them: less memory, more work.

        Raises:
            UserError: the network does not know how.
        """
        switch = getattr(self.body, "set_grad_checkpointing", None)
        try:
            if switch is None:
                raise NotImplementedError
            switch(True)
        except (AssertionError, NotImplementedError):  # timm's way to say no
            raise UserError(
                f"'{self.name}' cannot compute activations again; set engine.checkpoint_activations=false, or take a "
                "network of timm's that can"
            ) from None

    def shapes(self) -> Output:
        """Return the network's outputs for two images on the meta device: shapes without data."""
        with _undisturbed(self):
            seen = self._named(self._reader.read(self.body, self._probe(), True))
        features = tuple(f.to("meta") for f in seen.features)
        before = features if self._before.known else ()  # each has its feature's shape
        final = None if seen.final is None else seen.final.to("meta")
        return Output(seen.logits.to("meta"), seen.embedding.to("meta"), features, before, final).float()

    def _separate(self) -> Stages:
        """Find the stages as functions, once; CannotRead says why they are none."""
        if self._stages is None:
            with _undisturbed(self):
                self._stages = Stages(self.body, self._reader, self._probe())
        return self._stages

    def _stages_for(self, maps: Tensor) -> Stages:
        """Return the stages, which know in which form they give maps where ``maps`` are; the first call finds out."""
        stages = self._separate()
        if not stages.knows_forms(maps):
            with _undisturbed(self):
                stages.learn_forms(self.body, self._probe())
        return stages

    def _prepared(self, images: Tensor) -> Tensor:
        size = (self.image_size, self.image_size)
        images = images.to(self.mean.dtype)
        if self._resize and images.shape[-2:] != size:
            shrinks = images.shape[-1] > self.image_size
            images = F.interpolate(images, size, mode="bilinear", align_corners=False, antialias=shrinks)
        images = (images - self.mean) / self.std
        images = (images * self.luma).sum(dim=1, keepdim=True) if self._gray else images
        return images if self.reads_channels_last else images.contiguous()

    def find_layout(self) -> None:
        """Find out whether it reads maps whose channels lie last in memory, where its weights lie so too."""
        images = self._probe().contiguous(memory_format=torch.channels_last)
        tensors = [(tensor, tensor.data) for tensor in chain(self.parameters(), self.buffers())]
        with _undisturbed(self):
            try:
                self._reader.read(channels_last(self).body, images, False)
            except FAILURES as error:
                if is_shortage(error):
                    raise
                self.reads_channels_last = False
            finally:
                for tensor, data in tensors:
                    tensor.data = data

    def _probe(self) -> Tensor:
        # A generator apart, so that the global one stays still; not zeros, with which two ways of reading could agree.
        side, generator = self.image_size, torch.Generator().manual_seed(0)
        images = torch.rand(PROBE_BATCH, 3, side, side, generator=generator, device="cpu")
        weight = next((p for p in self.body.parameters() if p.is_floating_point()), self.mean)
        return self._prepared(images.to(self.mean)).to(weight)


def wrap(
    module: nn.Module,
    *,
    image_size: int,
    num_classes: int,
    taps: Sequence[str] | None = None,
    mean: Sequence[float] = (0.0, 0.0, 0.0),
    std: Sequence[float] = (1.0, 1.0, 1.0),
    name: str = "custom",
) -> Network:
    """Make a ``Network`` of any module that maps images (B, 3, H, W) to logits (B, K).

    Args:
        module: the network.
        image_size: side in pixels of what it reads; images of other sizes are resized inside.
        num_classes: K; 0: the module has no classifier, and returns an embedding (B, D).
        taps: names of four submodules, shallow to deep, whose outputs are the features; None to find them. Where none
            are found the network shows no features, which methods of logits do not need.
            Maps may be (B, C, H, W), (B, H, W, C) or tokens (B, N, C) of a square grid after prefix tokens.
        mean: per channel of images in [0, 1], subtracted inside.
        std: per channel, divided by inside.
        name: what it is called.

    Raises:
        UserError: the module fails on such images, or gives other than (B, K).
    """
    if isinstance(module, Network):
        return module
    if hasattr(module, "_orig_mod"):
        raise UserError(f"'{name}' is compiled, which hides its layers; pass what torch.compile was given")
    if any(weight.is_meta for weight in module.parameters()):
        raise UserError(
            f"weights of '{name}' are on the meta device, where they have shapes and no numbers; call "
            "to_empty(device=...) and load weights first"
        )
    if taps is not None and len(taps) != 4:
        raise UserError(f"taps of '{name}' are {counted(len(taps), 'name')}, expected four, from shallow to deep")
    made = partial(Network, module, name=name, image_size=image_size, mean=mean, std=std, classifier=num_classes > 0)
    try:
        try:
            network = made(taps=taps)
        except CannotRead as error:
            why = str(error)
            network = made(taps=(), stageless=why)
    except CannotRead as error:
        raise UserError(
            f"'{name}' has neither four stages ({why}) nor an embedding ({error}); pass taps=[...], the names of four "
            "of its submodules from shallow to deep"
        ) from None
    except FAILURES as error:
        raise UserError(
            f"'{name}' fails on images of {image_size} pixels ({told(error)}){at_own_place(error)}; correct that, or "
            "pass the image_size it reads"
        ) from error
    classes = network.shapes().logits.shape[1]
    if classes != num_classes:
        gives = counted(classes, "logit")
        raise UserError(f"'{name}' gives {gives}, expected {num_classes}; give it that many classes")
    network.find_layout()
    return network


def channels_last(module: M) -> M:
    """Lay the weights of convolutions out as their maps are, but those of networks that read no such maps.

    ``Module.to`` would refuse a method's 5-D weights.
    """
    networks = [part for part in module.modules() if isinstance(part, Network) and not part.reads_channels_last]
    left = {id(tensor) for network in networks for tensor in chain(network.parameters(), network.buffers())}
    for tensor in chain(module.parameters(), module.buffers()):
        if tensor.ndim == 4 and id(tensor) not in left:
            tensor.data = tensor.data.contiguous(memory_format=torch.channels_last)
    return module


def describe(network: Network) -> dict[str, Any]:
    """Describe a network before it runs, in plain numbers and strings: parameters, sizes, stages."""
    shapes = network.shapes()
    return {
        "name": network.name,
        "parameters": sum(p.numel() for p in network.body.parameters()),
        "image_size": network.image_size,
        "classes": shapes.logits.shape[1],
        "embedding": shapes.embedding.shape[1],
        "taps": [list(f.shape[1:]) for f in shapes.features],
        "adapted": list(network.adapted),
    }


def _reader(body: nn.Module, images: Tensor, taps: Sequence[str] | None, classifier: bool) -> TimmReader | HookReader:
    if taps is None and speaks_timm(body):
        try:
            reader = TimmReader(body, images)
            if reader.read(body, images, True).logits.allclose(logits_in(body(images)), rtol=1e-3, atol=1e-4):
                return reader
        except FAILURES as error:  # hooks read what the interface does not show
            if is_shortage(error):  # another reader would show other features
                raise
    return HookReader(body, images, taps, classifier)


@contextmanager
def _undisturbed(network: nn.Module) -> Iterator[None]:
    """Evaluation without gradients; generators and each module's mode are put back."""
    devices = {p.device for p in network.parameters() if p.device.type == "cuda"}
    with evaluating(network), torch.no_grad(), torch.random.fork_rng(devices=list(devices)):
        yield
