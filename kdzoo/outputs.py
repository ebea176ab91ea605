"""What networks show of themselves, and how a method calls them: outputs, stage by stage where it needs that."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from copy import copy
from typing import NamedTuple

import torch
from torch import Tensor, nn

from kdzoo.precision import Precision, autocast


class Show(NamedTuple):
    """The outputs that a network is asked for, besides logits and embedding.

    Example:
        >>> Show()
        Show(features=True, preactivations=False, final=False)
        >>> Show(features=False) | Show(features=False, final=True)
        Show(features=False, preactivations=False, final=True)
    """

    features: bool = True
    preactivations: bool = False
    final: bool = False

    def __or__(self, other: "Show") -> "Show":
        return Show(*(one or another for one, another in zip(self, other, strict=True)))


STAGES = 4  # of every network that shows features
LOGITS, EVERYTHING = Show(features=False), Show(True, True, True)


class Output(NamedTuple):
    """A network's outputs for one batch. Distillers read them in float32.

    A network is called as ``network(images, show)`` and leaves empty what ``show`` does not name or it does not have.

    Example:
        >>> output = Output(torch.zeros(8, 10), torch.zeros(8, 64), (torch.zeros(8, 16, 4, 4),) * 4)
        >>> output.logits.shape, len(output.features), output.final
        (torch.Size([8, 10]), 4, None)
    """

    logits: Tensor  # (B, K); K is 0 for networks without a classifier
    embedding: Tensor  # (B, D): what the classifier reads
    features: tuple[Tensor, ...] = ()  # four stages, shallow to deep, each (B, C, H, W)
    preactivations: tuple[Tensor, ...] = ()  # the features before their last ReLU; where they have none, themselves
    final: Tensor | None = None  # (B, D', H, W): the map whose mean over positions the logits are made of

    def only(self, show: Show) -> "Output":
        """Drop the outputs that ``show`` does not name."""
        return self._replace(
            features=self.features if show.features else (),
            preactivations=self.preactivations if show.preactivations else (),
            final=self.final if show.final else None,
        )

    def float(self) -> "Output":
        """Convert all outputs to float32."""
        features, before = (tuple(f.float() for f in maps) for maps in (self.features, self.preactivations))
        final = None if self.final is None else self.final.float()
        return Output(self.logits.float(), self.embedding.float(), features, before, final)


class StageOutput(NamedTuple):
    """What one stage of a network gives to the next.

    Example:
        >>> StageOutput(torch.zeros(8, 16, 4, 4)).prefix is None
        True
    """

    maps: Tensor  # (B, C, H, W)
    prefix: Tensor | None = None  # (B, P, C): class and register tokens beside the map, where a network has them

    def float(self) -> "StageOutput":
        """Convert both to float32."""
        return StageOutput(self.maps.float(), None if self.prefix is None else self.prefix.float())


class NetworkView:
    """A network as a method sees it: images (B, 3, H, W) in [0, 1] go in, an ``Output`` comes out.

    The output is in float32, and holds what the method's needs name.

    Args:
        network: called as ``network(images, show)``, as those of ``kdzoo.models`` are.
        show: the outputs wanted beside logits and embedding.
        grad: whether gradients flow through the network; False for a frozen teacher.
        precision: what the network computes in; None for what holds where it is called.
        passes: makes the passes instead of ``network`` itself, for networks that several methods share.
        stages: whether its stages can be called one by one.

    Example:
        >>> view = NetworkView(kdzoo.models.wrap(cnn, image_size=32, num_classes=10), Show(features=True))
        >>> output = view(torch.rand(2, 3, 32, 32))
        >>> output.logits.shape, [tuple(maps.shape[1:]) for maps in output.features]
        (torch.Size([2, 10]), [(8, 16, 16), (8, 8, 8), (8, 4, 4), (8, 2, 2)])
        >>> view.classifier
        Linear(in_features=8, out_features=10, bias=True)
    """

    def __init__(
        self,
        network: nn.Module,
        show: Show = LOGITS,
        *,
        grad: bool = True,
        precision: Precision | None = None,
        passes: Callable[[Tensor, Show], Output] | None = None,
        stages: bool = False,
    ):
        self.network, self.show, self.grad, self.precision = network, show, grad, precision
        self.passes, self.stages = passes or network, stages
        self.other: tuple[Tensor, Tensor] | None = None

    def seeing(self, other: Tensor, images: Tensor) -> "NetworkView":
        """Make the view that is shown ``other`` images wherever a method calls it with these ``images``."""
        view = copy(self)
        view.other = images, other
        return view

    def __call__(self, images: Tensor) -> Output:
        images = self._seen(images)
        with torch.set_grad_enabled(self.grad and torch.is_grad_enabled()), self._autocast(images):
            return self.passes(images, self.show).float()

    def _seen(self, images: Tensor) -> Tensor:
        return self.other[1] if self.other is not None and images is self.other[0] else images

    def _autocast(self, like: Tensor) -> AbstractContextManager[None]:
        return nullcontext() if self.precision is None else autocast(like.device.type, self.precision)

    @contextmanager
    def _at_stages(self, like: Tensor) -> Iterator[None]:
        """Batch norms in training mode use the batch's statistics inside, and leave the running ones as they are.

        What passes may be another network's. Running statistics apart for it would never be read, as no student is
        measured or shipped with another network's maps.
        """
        assert self.stages, "needs.stages names the networks whose stages are called"
        norms = [m for m in self.network.modules() if m.training and getattr(m, "track_running_stats", False)]
        for norm in norms:
            norm.track_running_stats = False  # type: ignore[assignment]  # torch's own switch
        try:
            with self._autocast(like):
                yield
        finally:
            for norm in norms:
                norm.track_running_stats = True  # type: ignore[assignment]

    def stage(self, number: int, maps: Tensor, prefix: Tensor | None = None) -> StageOutput:
        """Run one stage, on maps of this network or of another. The method's needs name the network for this.

        Gradients flow to the maps, through a frozen teacher too. Running statistics of batch norms stay as they are:
        they are learned from the network's own images, in plain passes alone.

        Args:
            number: of the stage, from 0.
            maps: (B, C, H, W), of the shape that the stage before gives; for stage 0 images (B, 3, H, W) in [0, 1].
            prefix: (B, P, C), the tokens that the stage before gave beside its map. None puts the mean over the
                map's positions in their place, where the network has such tokens.
        """
        maps = self._seen(maps)
        with self._at_stages(maps):
            return self.network.run_stage(number, maps, prefix)  # type: ignore[operator]  # checked when assembled

    def run_from(self, number: int, maps: Tensor, prefix: Tensor | None = None) -> Output:
        """Run the stages from this number on and then the classifier: ``features`` are the maps of those that ran.

        The arguments are those of ``stage``; at a number of 4 only what follows the last stage runs.
        """
        features = []
        for later in range(number, STAGES):
            maps, prefix = self.stage(later, maps, prefix)
            features.append(maps)
        with self._at_stages(maps):
            output = self.network.run_tail(maps, prefix)  # type: ignore[operator]  # checked when assembled
        return output._replace(features=tuple(features))

    def classify(self, means: Tensor) -> Tensor:
        """Apply the network's own classifier to means (M, D') over parts of its final map: logits (M, K).

        Only networks that show a final map can.
        """
        with torch.set_grad_enabled(self.grad and torch.is_grad_enabled()):
            return self.network.classify(means)  # type: ignore[operator]  # networks that show a final map have it

    @property
    def classifier(self) -> nn.Linear | None:
        """The linear layer from embedding to logits; None if the network has no such layer."""
        layer = getattr(self.network, "classifier", None)
        return layer if isinstance(layer, nn.Linear) else None
