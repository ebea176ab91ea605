"""Check the history of a run, one record for each epoch, when it is read back."""

import math
from collections.abc import Mapping
from typing import Any


def check_history(history: Any, step: int, steps_per_epoch: int) -> None:
    """Check that a history has a sound record for each epoch that ended within ``step`` steps, and no other.

    Raises:
        ValueError: it is something else.
    """
    if not isinstance(history, list) or len(history) != step // steps_per_epoch:
        raise ValueError(f"its history is not that of {step} steps")
    for epoch, record in enumerate(history, 1):
        if not _is_sound(record, epoch, steps_per_epoch):
            raise ValueError(f"the record of epoch {epoch} is damaged")


def _is_sound(record: Any, epoch: int, steps_per_epoch: int) -> bool:
    keys = {"epoch", "step", "lr", "loss", "top1", "top5", "images_per_second"}  # and nll, since that is measured
    if not isinstance(record, Mapping) or record.keys() - {"nll"} != keys or not isinstance(record["loss"], Mapping):
        return False
    if (record["epoch"], record["step"]) != (epoch, epoch * steps_per_epoch):
        return False
    measured = [record[name] for name in ("top1", "top5") if record[name] is not None]
    likely = [record["nll"]] if record.get("nll") is not None else []
    numbers = [record["lr"], record["images_per_second"], *measured, *likely, *record["loss"].values()]
    return all(is_number(number) for number in numbers) and all(0 <= share <= 100 for share in measured)


def is_number(value: Any) -> bool:
    """Tell whether a value is a finite number."""
    return isinstance(value, int | float) and math.isfinite(value)
