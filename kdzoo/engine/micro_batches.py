"""Gradient accumulation: a batch that goes through in several micro-batches, for one step of the optimiser."""

from functools import partial

from torch import Tensor
from torch.utils._pytree import tree_map_only

from kdzoo.data import Loader
from kdzoo.distiller import Batch
from kdzoo.errors import UserError


def micro_batches(batch: Batch, count: int) -> list[Batch]:
    """Cut a batch into ``count`` equal ones that share its memory; ``count`` divides the rows, and none are mixed."""
    if count == 1:
        return [batch]
    rows = len(batch.images) // count

    def cut(tensor: Tensor, number: int) -> Tensor:
        return tensor[number * rows : (number + 1) * rows] if tensor.ndim else tensor

    return [tree_map_only(Tensor, partial(cut, number=number), batch) for number in range(count)]


def check_micro_batches(loader: Loader, count: int) -> None:
    """Check that batches can be cut into ``count`` equal ones.

    Raises:
        UserError: they cannot.
    """
    if count < 1 or loader.rows % count or (count > 1 and loader.rows < 2 * count):
        raise UserError(
            f"engine.accumulate={count} does not cut batches of {loader.rows} into equal parts of at least 2; "
            "choose a divisor"
        )
    if count > 1 and loader.mixes:
        raise UserError(
            f"engine.accumulate={count}: mixup and cutmix pair rows of a whole batch; set them to 0, or accumulate to 1"
        )
