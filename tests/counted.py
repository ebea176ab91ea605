"""A method that writes down every step that it is asked for, and that can be made to die or to hang on its way."""

import os
import signal
import threading
from pathlib import Path

from torch import Tensor

from kdzoo import Batch, Distiller, Fidelity, Output
from kdzoo.losses import cross_entropy


class Counted(Distiller):
    """Supervised training.

    Args:
        ce: weight of the cross-entropy.
        folder: where ``steps.txt`` gets a line for each step. After the first step, a file ``kill`` there makes the
            process that finds it first kill itself, and a file ``hang`` makes it tell the pipe ``node`` its Ray node
            and hang.
    """

    paper = "-"
    fidelity = Fidelity.EXACT

    def __init__(self, *, ce: float = 1.0, folder: str = ""):
        super().__init__(ce=ce)
        self.folder = Path(folder)

    def loss(self, student: Output, teacher: Output, batch: Batch) -> dict[str, Tensor]:
        if batch.progress > 0:
            if taken(self.folder / "kill"):
                os.kill(os.getpid(), signal.SIGKILL)
            if taken(self.folder / "hang"):
                import ray

                (self.folder / "node").write_text(ray.get_runtime_context().get_node_id())
                threading.Event().wait()
        with (self.folder / "steps.txt").open("a") as file:
            file.write(f"{float(batch.progress):.3f} {batch.index.tolist()[:8]}\n")  # which differ by seed
        return self.weigh(ce=lambda: cross_entropy(student.logits, batch.targets))


def taken(file: Path) -> bool:
    """Whether the file was there, and it was this process that took it."""
    try:
        file.rename(f"{file}.taken")
    except FileNotFoundError:
        return False
    return True
