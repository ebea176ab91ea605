"""FT: the student's last map is translated into factors that paraphrase the teacher's."""

from collections.abc import Iterable
from itertools import pairwise

from torch import Tensor, nn
from torch.nn import functional as F

from kdzoo import Batch, DataSpec, Distiller, Fidelity, Needs, NetworkView, Output
from kdzoo.connectors import BatchNorm2d, CommonGrid, check_stages
from kdzoo.keywords import at_least, one_of, positive
from kdzoo.losses import cross_entropy
from kdzoo.phase import fit


def layers(widths: tuple[int, ...], back: bool = False, norm: bool = False) -> nn.Sequential:
    """Make 3x3 convolutions, or transposed ones, through these widths, each with leaky ReLU and perhaps batch norm."""
    modules: list[nn.Module] = []
    for inputs, outputs in pairwise(widths):
        modules.append((nn.ConvTranspose2d if back else nn.Conv2d)(inputs, outputs, 3, padding=1))
        modules += [BatchNorm2d(outputs)] if norm else []
        modules.append(nn.LeakyReLU(0.1))
    return nn.Sequential(*modules)


def factor_loss(student: Tensor, teacher: Tensor, form: str) -> Tensor:
    """Average the absolute difference of factors (B, C, H, W), taken to length 1 for each image.

    They are compared as they are ("flat"), or as the mean of their squares over channels ("spatial").
    """
    if form == "spatial":
        student, teacher = (maps.square().mean(dim=1) for maps in (student, teacher))
    a, b = (F.normalize(maps.flatten(1), eps=1e-6) for maps in (student, teacher))
    return F.l1_loss(a, b)


class FT(Distiller):
    r"""Paraphrasing Complex Network: Network Compression via Factor Transfer.

    .. math:: L = w_{ce} H(y, p_s) + w_{ft} \operatorname{mean} \left|
        \frac{T(f_s)}{\|T(f_s)\|_2} - \frac{P(f_t)}{\|P(f_t)\|_2} \right|

    f are the last maps. The paraphraser P, three 3x3 convolutions with leaky ReLU to ``rate`` times the teacher's
    width, is the encoder of an auto-encoder that learns before training, on the teacher alone, to restore its map by
    absolute errors; then it is frozen. The translator T is made as P is, from the student's width.

    Where the grids differ, the larger factors are average-pooled to the smaller height and width. Gradients before
    training are cut to a length of 5 together, without which the auto-encoder of maps of size 30 and more diverged.

    RepDistiller's version, ``form="spatial"`` with a weight of 200, compares the mean square over channels, which the
    paper does not, gives T batch norm, and trains the auto-encoder by squared errors for 30 epochs; here it is trained
    as the authors do in both forms. In that form a map of one position has nothing to match.

    Args:
        ce: weight of the cross-entropy with the ground truth.
        ft: weight of the factors' term.
        rate: width of the factors over the teacher's.
        form: "flat" or "spatial".
        epochs: how long the auto-encoder is trained.
        lr: its learning rate.
        stage: which stage is matched; 3 is the last.

    Source: Kim, Park and Kwak 2018, eq. 3; ``Models/FeatureProjection.py``, ``train_Paraphraser.py``,
    ``train_student.py`` and ``utils.py`` of Jangho-Kim/Factor-Transfer-pytorch; "spatial" of RepDistiller,
    ``distiller_zoo/FT.py`` and ``models/util.py``.
    """

    paper = "arXiv:1802.04977"
    fidelity = Fidelity.EXACT
    needs = Needs(logits=False)

    def __init__(
        self,
        *,
        ce: float = 1.0,
        ft: float = 500.0,
        rate: float = 0.5,
        form: str = "flat",
        epochs: int = 6,
        lr: float = 0.1,
        stage: int = 3,
    ):
        super().__init__(ce=ce, ft=ft)
        self.rate, self.lr, self.epochs = positive(rate=rate), positive(lr=lr), at_least(1, epochs=epochs)
        self.form, self.stage = one_of(("flat", "spatial"), form=form), stage

    def build(self, student: Output, teacher: Output, data: DataSpec) -> None:
        check_stages((self.stage,), student, teacher)
        f_s, f_t = student.features[self.stage], teacher.features[self.stage]
        self.width = f_t.shape[1]
        self.factors = max(round(self.width * self.rate), 1)
        self.grid = CommonGrid(f_s, f_t)
        self.translate = layers((f_s.shape[1], f_s.shape[1], self.factors, self.factors), norm=self.form == "spatial")
        self.paraphrase = layers((self.width, self.width, self.factors, self.factors)).requires_grad_(False)

    def prepare(self, student: NetworkView, teacher: NetworkView, batches: Iterable[Batch]) -> None:
        """Train the paraphraser, and a decoder that is thrown away, to restore the teacher's map; then freeze it."""
        if not self.is_active:
            return
        decode = layers((self.factors, self.factors, self.width, self.width), back=True)
        coder = nn.Sequential(self.paraphrase, decode.to(next(self.paraphrase.parameters()).device))

        def loss(batch: Batch) -> Tensor:
            maps = teacher(batch.images).features[self.stage]
            return F.l1_loss(coder(maps), maps)

        fit(coder.requires_grad_().parameters(), loss, batches, epochs=self.epochs, lr=self.lr)
        self.paraphrase.requires_grad_(False)

    def loss(self, student: Output, teacher: Output, batch: Batch) -> dict[str, Tensor]:
        return self.weigh(
            ce=lambda: cross_entropy(student.logits, batch.targets), ft=lambda: self.transfer(student, teacher)
        )

    def transfer(self, student: Output, teacher: Output) -> Tensor:
        """Compute the loss of the translated and the paraphrased map: a scalar."""
        translated, paraphrased = self.grid(
            self.translate(student.features[self.stage]), self.paraphrase(teacher.features[self.stage])
        )
        return factor_loss(translated, paraphrased, self.form)
