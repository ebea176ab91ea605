"""Write a method, check that it keeps the promises of a distiller, and compare it with kd on the same batches.

python examples/own_method.py
"""

from pathlib import Path

from torch import Tensor
from torch.nn.functional import l1_loss

import kdzoo
from kdzoo import Batch, Distiller, Fidelity, Output
from kdzoo.losses import cross_entropy


class Absolute(Distiller):
    r"""Let the student's logits follow the teacher's, by absolute error.

    .. math:: L = w_{ce} H(y, p_s) + w_{match} |z_s - z_t|

    Args:
        ce: weight of the cross-entropy with the ground truth.
        match: weight of the absolute error of the logits.
    """

    paper = "none"
    fidelity = Fidelity.EXACT

    def __init__(self, *, ce: float = 1.0, match: float = 1.0):
        super().__init__(ce=ce, match=match)

    def loss(self, student: Output, teacher: Output, batch: Batch) -> dict[str, Tensor]:
        return self.weigh(
            ce=lambda: cross_entropy(student.logits, batch.targets),
            match=lambda: l1_loss(student.logits, teacher.logits),
        )


def main(out: str = "runs/own-method", epochs: int = 2) -> list[float]:
    """Check the method, train with it and with kd, and return both accuracies."""
    for result in kdzoo.check(Absolute):
        print(f"{result.outcome:8}  {result.name}")
    shorter = [f"protocol.epochs={epochs}", f"teacher.epochs={epochs}", "teacher.allow_weak=true"]
    results = [
        kdzoo.run(method, teacher="resnet14", student="resnet8", out=out, overrides=shorter)
        for method in (str(Path(__file__)), "kd")
    ]
    for result in results:
        print(f"{result.distiller}: {result.top1:.2f} %")
    return [result.top1 for result in results]


if __name__ == "__main__":
    main()
