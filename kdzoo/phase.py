"""The phase before training: fit parameters to a loss by gradient descent."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from kdzoo.distiller import Batch
from kdzoo.tensors import all_sum

LONGEST = 5.0  # length of all gradients together


def fit(
    parameters: Iterable[nn.Parameter],
    loss: Callable[[Batch], Tensor],
    batches: Iterable[Batch],
    *,
    epochs: int,
    lr: float,
) -> None:
    """Minimise the loss of each batch by SGD with momentum 0.9 and weight decay 5e-4.

    Gradients are averaged over the ranks of a distributed run, so that all have the same parameters after it, and cut
    to a length of 5 together, without which the losses of some teachers' large maps diverge. Parameters that the loss
    does not read stay as they are.

    Args:
        parameters: what is trained.
        loss: computes a scalar from a batch.
        batches: each iteration over them is an epoch.
        epochs: how many.
        lr: learning rate, constant.
    """
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=lr, momentum=0.9, weight_decay=5e-4)
    ranks = all_sum(torch.ones((), device=trained[0].device))
    for batch in (batch for _ in range(epochs) for batch in batches):
        optimizer.zero_grad()
        loss(batch).backward()
        for parameter in trained:
            if parameter.grad is not None:
                parameter.grad = all_sum(parameter.grad) / ranks
        nn.utils.clip_grad_norm_(trained, LONGEST)
        optimizer.step()
    optimizer.zero_grad()
