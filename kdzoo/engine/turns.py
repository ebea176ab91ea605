"""Let several teachers show their features by turns: the method has modules for each of them."""

from collections.abc import Callable, Iterable, Sequence

from torch import Tensor, nn

from kdzoo.distiller import Batch, DataSpec, Distiller
from kdzoo.errors import UserError
from kdzoo.models import Ensemble
from kdzoo.outputs import NetworkView, Output


class Turns(Distiller):
    """Several copies of a method, one for each teacher: the one whose teacher shows its features computes the loss.

    Args:
        make: makes a copy.
        teachers: that take turns.

    Raises:
        UserError: the method ships modules that it trained beside one teacher.
    """

    paper = "none"

    def __init__(self, make: Callable[[], Distiller], teachers: Ensemble):
        methods = [make() for _ in teachers.networks]
        first = methods[0]
        super().__init__(**first.weights)
        if type(first).deploy is not Distiller.deploy:
            raise UserError(
                f"{type(first).__name__} ships modules that belong to one teacher; name it with teacher.features"
            )
        self.methods = nn.ModuleList(methods)
        self.needs, self.is_active, self.fewest_classes = first.needs, first.is_active, first.fewest_classes
        self.label_terms, self.logit_terms = first.label_terms, first.logit_terms  # type: ignore[misc]
        self.fidelity = first.fidelity  # type: ignore[misc]  # of the class, for all methods that are written down
        self.shapes: Sequence[Output] = [network.shapes() for network in teachers.each]

    def assemble(self, student: Output, teacher: Output, data: DataSpec) -> "Turns":
        for method, shapes in zip(self.copies, self.shapes, strict=True):
            method.assemble(student, shapes, data)
        self.needs, self.is_assembled = self.copies[0].needs, True  # which some methods know once they are built
        return self

    def leave_out(self, *, labels: bool = False, logits: bool = False) -> list[str]:
        for method in self.copies:
            method.leave_out(labels=labels, logits=logits)
        return super().leave_out(labels=labels, logits=logits)

    @property
    def title(self) -> str:
        return self.copies[0].title

    @property
    def has_phase(self) -> bool:
        return self.copies[0].has_phase

    @property
    def copies(self) -> list[Distiller]:
        """The copies of the method, in the order of the teachers."""
        return list(self.methods)  # type: ignore[arg-type]  # all are methods

    def forward(self, student: NetworkView, teacher: NetworkView, batch: Batch) -> dict[str, Tensor]:
        return self.copies[teachers_of(teacher).shown](student, teacher, batch)

    def prepare(self, student: NetworkView, teacher: NetworkView, batches: Iterable[Batch]) -> None:
        for turn, method in enumerate(self.copies):
            teachers_of(teacher).take_turn(turn)
            method.prepare(student, teacher, batches)


def teachers_of(view: NetworkView) -> Ensemble:
    """Return the teachers that a view shows."""
    assert isinstance(view.network, Ensemble)
    return view.network
