"""A method that writes down when its first step began, for ``first_step.py``."""

import os
import time
from pathlib import Path

import torch.nn.functional as F
from torch import Tensor

from kdzoo import Batch, Distiller, Fidelity, Output


class Clocked(Distiller):
    """Supervised training; the environment variable ``CLOCKED`` names the file that gets the time of the first step."""

    paper = "-"
    fidelity = Fidelity.EXACT

    def loss(self, student: Output, teacher: Output, batch: Batch) -> dict[str, Tensor]:
        file = Path(os.environ["CLOCKED"])
        if not file.exists():
            file.write_text(str(time.time()), encoding="utf-8")
        return {"ce": F.cross_entropy(student.logits, batch.targets)}
