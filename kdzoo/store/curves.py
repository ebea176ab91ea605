"""TensorBoard's view of a run, written epoch by epoch where it is asked for."""

from pathlib import Path
from typing import Any

from kdzoo.errors import UserError


class Curves:
    """Event files of one run in its folder, a scalar for each number of an epoch's record."""

    def __init__(self, folder: Path):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise UserError("output.tensorboard needs tensorboard: pip install 'kdzoo[tensorboard]'") from error
        for stale in folder.glob("events.out.tfevents.*"):  # a resumed run writes its whole history anew
            stale.unlink()
        self.writer = SummaryWriter(str(folder))
        self.written = 0

    def write(self, history: list[dict[str, Any]]) -> None:
        """Add the records that were not written yet."""
        for record in history[self.written :]:
            for name in ("top1", "top5", "lr", "images_per_second"):
                if record[name] is not None:
                    self.writer.add_scalar(name, record[name], record["epoch"])
            for name, value in record["loss"].items():
                self.writer.add_scalar(f"loss/{name}", value, record["epoch"])
        self.written = len(history)
        self.writer.flush()
