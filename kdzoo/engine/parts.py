"""Gradient accumulation: a batch that goes through in parts, for one step of the optimiser."""

from kdzoo.data import Loader
from kdzoo.distiller import Batch
from kdzoo.errors import UserError


def micro_batches(batch: Batch, parts: int) -> list[Batch]:
    """The batch in equal parts that share its memory; ``parts`` divides the rows, and no row is mixed with another."""
    if parts == 1:
        return [batch]
    rows = len(batch.labels) // parts
    cuts = [slice(start, start + rows) for start in range(0, parts * rows, rows)]
    return [
        batch._replace(
            images=batch.images[cut],
            labels=batch.labels[cut],
            targets=batch.targets[cut],
            index=batch.index[cut],
            views={name: view[cut] for name, view in batch.views.items()},
        )
        for cut in cuts
    ]


def check_parts(loader: Loader, parts: int) -> None:
    """Whether batches can be cut into ``parts``.

    Raises:
        UserError: they cannot.
    """
    if parts < 1 or loader.rows % parts or (parts > 1 and loader.rows < 2 * parts):
        raise UserError(
            f"engine.accumulate={parts} does not cut batches of {loader.rows} into equal parts of at least 2; "
            "choose a divisor"
        )
    if parts > 1 and loader.mixes:
        raise UserError(
            f"engine.accumulate={parts}: mixup and cutmix pair rows of a whole batch; set them to 0, or accumulate to 1"
        )
