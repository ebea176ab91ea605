"""Several frozen networks that answer as one teacher."""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from kdzoo.models.network import Network
from kdzoo.outputs import LOGITS, Output, Show, StageOutput

Combine = Literal["probabilities", "logits", "learned"]
ROUNDS = 200  # of expectation maximisation at most
SETTLED = 1e-6  # a change of the weights below which they are learned


class Ensemble(Network):
    """Networks that see the same images: one answer of all, and the features, embedding and classifier of one of them.

    With ``probabilities``, the logits are :math:`\\log \\sum_i w_i p_i` of the networks' probabilities :math:`p_i`, so
    that their softmax is the weighted mean of these; with ``logits``, they are the weighted mean of the logits.

    Args:
        networks: of the same classes.
        combine: how they answer.
        shown: the place of the network that shows features, embedding and classifier.
        weights: (networks,) above 0, with a sum of 1; None: all equal.
        turns: whether each of the networks shows them in one step after the other, see ``take_turn``.
    """

    shares: Tensor

    def __init__(
        self,
        networks: Sequence[Network],
        combine: Combine = "probabilities",
        shown: int = 0,
        weights: Tensor | None = None,
        turns: bool = False,
    ):
        nn.Module.__init__(self)  # its parts are networks already
        self.networks = nn.ModuleList(networks)
        self.combine, self.turns = combine, turns
        self.place = [shown]  # which copies share, so that all of them take the same turn
        shares = torch.full((len(networks),), 1 / len(networks)) if weights is None else weights
        self.register_buffer("shares", shares.to(torch.float32))
        self.name = "+".join(network.name for network in networks)
        self.origin = ", ".join(dict.fromkeys(network.origin for network in networks))
        self.eval()

    @property
    def each(self) -> list[Network]:
        """The networks."""
        return list(self.networks)  # type: ignore[arg-type]  # all are networks of kdzoo

    @property
    def shown(self) -> int:
        """The place of the network that shows features, embedding and classifier now."""
        return self.place[0]

    def take_turn(self, step: int) -> None:
        """Let the network whose turn it is in this step show features, where they take turns."""
        if self.turns:
            self.place[0] = step % len(self.networks)

    @property
    def one(self) -> Network:
        """The network that shows features, embedding and classifier."""
        return self.each[self.shown]

    def over(self, change: Callable[[Network], Network]) -> "Ensemble":
        """Make the ensemble of what ``change`` makes of each network; it takes the same turns."""
        changed = Ensemble([change(network) for network in self.each], self.combine, 0, self.shares, self.turns)
        changed.place = self.place
        return changed.to(self.shares.device)

    def forward(self, images: Tensor, show: Show = LOGITS) -> Output:
        outputs = [network(images, show if i == self.shown else LOGITS) for i, network in enumerate(self.each)]
        logits = torch.stack([output.logits for output in outputs])
        return outputs[self.shown]._replace(logits=combined(logits, self.combine, self.shares))

    def shapes(self) -> Output:
        return self.one.shapes()

    def classify(self, means: Tensor) -> Tensor:
        return self.one.classify(means)

    def run_stage(self, number: int, maps: Tensor, prefix: Tensor | None = None) -> StageOutput:
        return self.one.run_stage(number, maps, prefix)

    def run_tail(self, maps: Tensor, prefix: Tensor | None = None) -> Output:
        return self.one.run_tail(maps, prefix)

    @property
    def classifier(self) -> nn.Linear | None:
        return self.one.classifier

    @property
    def showing(self) -> list[Network]:
        """The networks that show features, embedding and classifier, at once or by turns."""
        return self.each if self.turns else [self.one]

    @property
    def inseparable(self) -> str:
        return next(filter(None, (network.inseparable for network in self.showing)), "")

    @property
    def stageless(self) -> str:  # type: ignore[override]  # of any that is shown
        return next(filter(None, (network.stageless for network in self.showing)), "")

    @property
    def has_classifier(self) -> bool:  # type: ignore[override]
        return self.one.has_classifier

    @property
    def image_size(self) -> int:  # type: ignore[override]
        return self.one.image_size

    @property
    def mean(self) -> Tensor:  # type: ignore[override]
        return self.one.mean

    @property
    def reads(self) -> str:
        return "; ".join(dict.fromkeys(network.reads for network in self.each))

    def facts(self) -> dict[str, Any]:
        return self.one.facts()


def combined(logits: Tensor, combine: Combine, shares: Tensor) -> Tensor:
    """Combine logits (networks, B, K) of several networks to those of one answer (B, K), in float32."""
    logits, shares = logits.float(), shares[:, None, None]
    if combine == "logits":
        return (shares * logits).sum(dim=0)
    return torch.logsumexp(logits.log_softmax(dim=2) + shares.log(), dim=0)


def learned_shares(logits: Tensor, labels: Tensor) -> Tensor:
    r"""Learn how much each network counts in the mean of probabilities: (networks,), above 0, with a sum of 1.

    They are those of the highest likelihood :math:`\sum_n \log \sum_i w_i p_i(y_n)`, a concave function, found by
    expectation maximisation: :math:`w_i \leftarrow \frac1N \sum_n w_i p_i(y_n) / \sum_j w_j p_j(y_n)`.

    Source: Dempster, Laird and Rubin 1977, the weights of a mixture whose parts are known.

    Args:
        logits: (networks, N, K) of labelled images.
        labels: (N,) int64.
    """
    right = logits.double().log_softmax(dim=2).gather(2, labels.expand(len(logits), -1)[:, :, None])[:, :, 0]
    shares = torch.full((len(logits),), 1 / len(logits), dtype=torch.float64, device=logits.device)
    for _ in range(ROUNDS):
        before, shares = shares, (right + shares.log()[:, None]).softmax(dim=0).mean(dim=1)
        if (shares - before).abs().max() < SETTLED:
            break
    return shares.clamp_min(torch.finfo(torch.float32).tiny).float()
