"""What goes wrong in one run's own work, told in a line, so that the runs beside it continue."""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from kdzoo.distiller import Batch
from kdzoo.engine.memory import out_of_memory
from kdzoo.engine.passes import TeacherPasses, writes
from kdzoo.errors import StorageError, UserError, told
from kdzoo.models.cast import probed
from kdzoo.own_code import place
from kdzoo.process_state import process_state, put_back
from kdzoo.settings import Run
from kdzoo.tensors import leaves, trained_by

if TYPE_CHECKING:
    from kdzoo.engine.lane import Lane

WEIGHTS = "the teacher's weights"


def fault(error: BaseException, run: Run, when: str) -> UserError:
    """Turn any error of a run's own work into a line that says which method failed, when, and where in which file.

    Args:
        error: what was raised by a method, a network or memory.
        run: whose work it was.
        when: such as "at step 12".
    """
    if isinstance(error, UserError):
        return error
    if full := out_of_memory(error, run):
        return full
    where = f" ({found})" if (found := place(error)) else ""
    failed = UserError(f"distiller '{run.settings.distiller.name}' failed {when}: {told(error)}{where}")
    failed.__cause__ = error  # which --debug shows
    return failed


@contextmanager
def caught(run: Run, when: Callable[[], str], note: Callable[[UserError], object]) -> Iterator[None]:
    """Give any error inside, which is of the run's own work, to ``note`` and continue; a full disk stops all runs."""
    try:
        yield
    except (StorageError, KeyboardInterrupt):
        raise
    except BaseException as error:
        note(fault(error, run, when()))


def check_terms(terms: Any, who: str, when: str, device: torch.device, before: Collection[str] = ()) -> None:
    """Check that a loss is a dictionary of float32 scalars.

    Args:
        terms: what a method returned.
        who: the method.
        when: such as "at step 12".
        device: of the training.
        before: the names of its terms in steps before; none in the first.

    Raises:
        UserError: it is something else; says what.
    """
    if not isinstance(terms, Mapping):
        raise UserError(f"distiller '{who}' returned {_described(terms)} {when}; expected a dictionary of loss terms")
    if not terms:
        raise UserError(f"distiller '{who}' has no loss term {when}: all weights are 0")
    for name, term in terms.items():
        if not isinstance(name, str):
            raise UserError(f"distiller '{who}' named a loss term {name!r} {when}; expected a text")
        if not (isinstance(term, Tensor) and is_scalar(term) and term.device.type == device.type):
            raise UserError(
                f"distiller '{who}' returned {_described(term)} as '{name}' {when}; expected a float32 tensor without "
                f"dimensions on {device.type}"
            )
    if before and terms.keys() != set(before):
        raise UserError(
            f"distiller '{who}' returned the terms {', '.join(terms)} {when} in place of {', '.join(before)}; return "
            "the same in each step, a zero where a term has nothing to say"
        )
    if not any(term.requires_grad for term in terms.values()):
        raise UserError(
            f"distiller '{who}' returned terms that depend on no trained weight {when}; compute them from the "
            "student's outputs, without detach() or no_grad()"
        )


def check_gradients(
    terms: Mapping[str, Tensor], trained: nn.Module, parameters: Iterable[Tensor], who: str, when: str
) -> None:
    """Check that each term of a first loss trains something, and nothing that no optimizer sees.

    Args:
        terms: that passed ``check_terms``.
        trained: a module with the student and the method.
        parameters: those that the optimizer steps.
        who: the method.
        when: such as "at step 0".

    Raises:
        UserError: a term that is not 0 has no gradient, or a parameter that gets one is never stepped; names it.
    """
    for name, term in terms.items():
        if not term.requires_grad and term.any():
            raise UserError(
                f"the term '{name}' of distiller '{who}' depends on no trained weight {when}, so it teaches nothing; "
                "compute it from the student's outputs, without detach() or no_grad(), or set its weight to 0"
            )
    stepped = {id(parameter) for parameter in parameters}
    names = {id(parameter): name for name, parameter in trained.named_parameters()}
    for leaf in trained_by(torch.stack(list(terms.values())).sum()):
        if isinstance(leaf, nn.Parameter) and id(leaf) not in stepped:
            title = names.get(id(leaf), f"a parameter of shape {tuple(leaf.shape)}")
            raise UserError(
                f"the loss of distiller '{who}' has a gradient for {title} {when}, which no optimizer sees; make "
                "layers in build(), or in the network's constructor, each as an attribute or in an nn.ModuleList"
            )


def is_scalar(term: Tensor) -> bool:
    """Tell whether a tensor is one plain float32 number."""
    return term.ndim == 0 and term.dtype == torch.float32 and term.layout == torch.strided


def check_trained(trained: nn.Module, before: Collection[nn.Parameter], who: str) -> None:
    """Check that all parameters after the phase before training are those that are trained, and float32.

    Args:
        trained: a module with the student and the method.
        before: its parameters before that phase.
        who: the method.

    Raises:
        UserError: one is not; names it.
    """
    known = {id(parameter) for parameter in before}
    student = trained.get_submodule("student")
    if not any(parameter.requires_grad for parameter in student.parameters()):
        raise UserError(f"the student of distiller '{who}' is frozen: no weight of it requires a gradient")
    for name, parameter in trained.named_parameters():
        if id(parameter) not in known:
            raise UserError(
                f"distiller '{who}' made or replaced {name} before training, which no optimizer sees; make it in "
                "build()"
            )
        if parameter.dtype != torch.float32:
            kind = str(parameter.dtype).removeprefix("torch.")
            raise UserError(
                f"{name} is {kind}, with distiller '{who}'; expected float32, which is trained and shipped "
                "(engine.precision says what networks compute in)"
            )


def check_finite(module: nn.Module, what: str) -> None:
    """Check that no weight or statistic of a module is NaN or infinite.

    Raises:
        UserError: one is; names it.
    """
    state = {name: tensor for name, tensor in module.state_dict().items() if tensor.is_floating_point()}
    if not state:
        return
    finite = torch.stack([tensor.isfinite().all() for tensor in state.values()]).tolist()  # one wait for the device
    if bad := [name for name, whole in zip(state, finite, strict=True) if not whole]:
        raise UserError(f"{what} is not finite: {bad[0]}; lower protocol.lr or a term's weight, or set protocol.clip")


def _described(value: object) -> str:
    if isinstance(value, Tensor):
        kind = str(value.dtype).removeprefix("torch.")
        kept = f"{str(value.layout).removeprefix('torch.')} on {value.device.type}"
        return f"a tensor of shape {tuple(value.shape)} and {kind} ({kept})"
    name = type(value).__name__
    return "None" if value is None else f"{'an' if name[0] in 'aeio' else 'a'} {name}"


class Shared:
    """What all lanes read in a step, watched for a method that writes to it.

    Args:
        teacher: makes the passes that lanes share; None where there is none.
        lanes: how many there are. Beside others, a teacher that was written to is restored from a copy.
    """

    def __init__(self, teacher: TeacherPasses | None, lanes: int):
        self.teacher = teacher
        modules = [] if teacher is None else [teacher.network, teacher.fast]
        tensors = [tensor for module in modules for tensor in module.state_dict(keep_vars=True).values()]
        self.weights = list({id(tensor): tensor for tensor in tensors}.values())
        self.copies = [tensor.detach().clone() for tensor in self.weights] if lanes > 1 else []
        self.state = process_state()
        self.parts: dict[str, list[Tensor]] = {}
        self.before: dict[str, int] = {}
        self.watch(None)

    def watch(self, batch: Batch | None) -> None:
        """Begin to watch another batch; None before the first."""
        named = {} if batch is None else batch._asdict()
        self.parts = {f"the batch's {name}": leaves(value) for name, value in named.items()}
        self.parts[WEIGHTS] = self.weights
        self.before = self.counts()

    def counts(self) -> dict[str, int]:
        """Count the writes to each part of what is shared; of a pass, those since it was made."""
        counted = {name: writes(tensors) for name, tensors in self.parts.items()}
        passes = [] if self.teacher is None else self.teacher.made.values()
        counted["the teacher's outputs"] = sum(writes(made.tensors) - made.writes for made in passes)
        return counted

    def was_written_by(self, lane: "Lane") -> bool:
        """Tell whether the lane, which was the last at work, wrote to what is shared; that is its failure then."""
        if (written := self.written()) is None:
            return False
        if written == WEIGHTS and (name := self.changed_by_a_pass()):
            lane.failure = UserError(
                f"the teacher changes its {name} in each pass, in evaluation mode too, and a teacher is frozen; let "
                "its forward change nothing in that mode"
            )
            return True
        lane.failure = UserError(
            f"distiller '{lane.run.settings.distiller.name}' changed {written} {lane.when}, which the methods beside "
            "it read too; compute on a copy"
        )
        return True

    def changed_by_a_pass(self) -> str:
        """Name what a pass of the teacher writes to of itself; empty for nothing."""
        assert self.teacher is not None, "weights of a teacher were written to"
        state = self.teacher.network.state_dict(keep_vars=True)
        before = {name: writes([tensor]) for name, tensor in state.items()}
        probed(self.teacher.network)
        self.before = self.counts()
        return next((name for name, tensor in state.items() if writes([tensor]) != before[name]), "")

    def written(self) -> str | None:
        """Name what was written to since the last look, and restore what outlives the batch; None for nothing."""
        found = put_back(self.state)
        now = self.counts()
        found += [name for name in now if now[name] != self.before[name]]
        if WEIGHTS in found:
            with torch.no_grad():
                for tensor, copy in zip(self.weights, self.copies, strict=False):  # alone, it has none
                    tensor.copy_(copy)
        if found:
            self.before = self.counts()
        return found[0] if found else None
