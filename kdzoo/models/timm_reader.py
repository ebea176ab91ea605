"""Read four intermediate maps, embedding and logits of a timm network in one pass."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from kdzoo.errors import is_shortage
from kdzoo.models.maps import FAILURES, CannotRead, Layout, Slot, as_map, close_to, evenly_spaced, layout_of, logits_in
from kdzoo.outputs import Output

STEMS = ("stem", "patch_embed")  # the modules whose output makes a fourth map beside three stages


def speaks_timm(body: nn.Module) -> bool:
    """Check that a network has timm's interface."""
    return all(
        callable(getattr(body, name, None))
        for name in ("forward_features", "forward_intermediates", "forward_head", "get_classifier")
    )


class TimmReader:
    """A reader of timm networks, by their ``forward_intermediates`` and ``forward_head``.

    ``classifier`` is the name of the layer that makes the logits of the embedding, where there is exactly one.

    Args:
        body: the network, in evaluation mode; ``Any`` because timm's interface has no type.
        images: a probe, (B, 3, H, W), normalised.

    Raises:
        CannotRead: fewer than four intermediate maps.
    """

    trunk = "forward_features"

    def __init__(self, body: Any, images: Tensor):
        final, maps = body.forward_intermediates(images, output_fmt="NCHW")
        grids = {m.shape[2:] for m in maps}
        count = len(maps)
        self._stem = Slot()
        self._stem_layout: Layout | None = None
        if count == 3:
            self.indices = [0, 1, 2]
            self._watch_stem(body, images)
        elif len(grids) == 1:
            self.indices = evenly_spaced(count)
        elif count >= 4:
            self.indices = list(range(count - 4, count))
        else:
            raise CannotRead(f"{count} intermediate maps")
        # Pairs of classifiers (DeiT's and LeViT's distilled heads) and 1x1 convolutions are not one linear
        # map of the embedding: there the whole head runs.
        layer = body.get_classifier()
        embedding = body.forward_head(final, pre_logits=True)
        linear = (
            isinstance(layer, nn.Linear)
            and embedding.ndim == 2
            and layer(embedding).allclose(body.forward_head(final), rtol=1e-3, atol=1e-4)
        )
        self.classifier = next(name for name, m in body.named_modules() if m is layer) if linear else None
        self._final = self._final_layout(body, final, embedding) if linear else None

    def _final_layout(self, body: Any, final: Tensor, embedding: Tensor) -> Layout | None:
        """How ``forward_head``'s input holds a map of whose mean the embedding is made; None where it holds none.

        Class tokens and learned poolings are no means. Batch norms after the pooling would take the means of parts
        for images, and learn their statistics.
        """
        layout = layout_of(final, len(final))
        if layout is None:
            return None
        self._prefix = final.shape[1] - layout.height * layout.width if layout.kind == "tokens" else 0
        normed: list[nn.Module] = []
        batch_norms = [m for m in body.modules() if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d)]
        handles = [m.register_forward_pre_hook(lambda norm, _: normed.append(norm)) for m in batch_norms]
        try:
            found = body.forward_head(self._pixel(as_map(final, layout).mean((2, 3)), layout), pre_logits=True)
        except FAILURES as error:
            if is_shortage(error):
                raise
            return None
        finally:
            for handle in handles:
                handle.remove()
        return layout if close_to(found, embedding, 1e-3) and not normed else None

    def _pixel(self, means: Tensor, layout: Layout) -> Tensor:
        """Vectors (M, D') as maps of one pixel, in the layout that ``forward_head`` reads."""
        if layout.kind == "NCHW":
            return means[:, :, None, None]
        if layout.kind == "NHWC":
            return means[:, None, None]
        return F.pad(means[:, None], (0, 0, self._prefix, 0))  # where means are taken, prefix tokens are not read

    def _watch_stem(self, body: Any, images: Tensor) -> None:
        stem = next((module for name in STEMS if (module := getattr(body, name, None)) is not None), None)
        if stem is None:
            raise CannotRead("three stages and no stem")
        handle = stem.register_forward_hook(self._stem.output)
        self.open()
        body.forward_features(images)
        output = self._stem.take()
        self._stem_layout = layout_of(output, len(images))
        if self._stem_layout is None:
            handle.remove()
            raise CannotRead("three stages and no map from the stem")

    def read(self, body: Any, images: Tensor, features: bool) -> Output:
        """Run normalised images (B, 3, H, W) through the network and return what ``Output`` holds.

        Logits (B, K), embedding (B, D), four maps (B, C, H, W) if ``features``, and the final map where there is one.
        """
        maps: list[Tensor] = []
        if features:
            self.open()
            final, maps = body.forward_intermediates(images, indices=self.indices, output_fmt="NCHW")
            if self._stem_layout is not None:
                maps = [as_map(self._stem.take(), self._stem_layout), *maps]
        else:
            final = body.forward_features(images)
        logits, embedding = self.tail(body, final)
        last = None if self._final is None else as_map(final, self._final)
        return Output(logits, embedding, tuple(maps), final=last)

    def tail(self, body: Any, final: Tensor) -> tuple[Tensor, Tensor]:
        """Compute logits (B, K) and embedding (B, D) of what ``forward_features`` gives."""
        embedding = body.forward_head(final, pre_logits=True)
        if self.classifier is not None:
            return body.get_classifier()(embedding), embedding
        pooled = embedding if embedding.ndim == 2 else embedding.flatten(2).mean(2)
        return logits_in(body.forward_head(final)), pooled

    def open(self) -> None:
        """Store what hooks see from now on."""
        self._stem.open()

    def forget(self) -> None:
        """Drop what hooks have stored, and store no more."""
        self._stem.take()

    def head(self, body: Any, means: Tensor) -> Tensor:
        """Classify means (M, D') over parts of the final map: logits (M, K). The network must have a final map."""
        assert self._final is not None, "no final map is shown"
        return body.forward_head(self._pixel(means, self._final))
