"""Read CIFAR as torchvision keeps it, and download it where it is missing."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from kdzoo.errors import UserError, is_shortage
from kdzoo.image_set import Loaded


def read(name: str, kind: Callable[..., Any], root: Path) -> Loaded:
    """Read both splits of torchvision's data set ``kind`` under ``root``.

    Raises:
        UserError: the files are neither there nor can they be downloaded.
    """
    try:
        try:
            train, test = (kind(root, train=train) for train in (True, False))
        except RuntimeError as error:  # not there, or damaged
            if is_shortage(error):
                raise
            train, test = (kind(root, train=train, download=True) for train in (True, False))
    except (OSError, RuntimeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"{name} is not under '{root}' and cannot be downloaded ({reason}); "
            "put torchvision's files there, or name an image tree as folder:PATH"
        ) from error
    return train.classes, (train.data, train.targets), (test.data, test.targets)
