"""Measurements that the checks make, and the messages of checks that fail: expected, got, what to do."""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from kdzoo import toys
from kdzoo.distillation import Distillation
from kdzoo.distiller import Batch, Distiller
from kdzoo.errors import UserError, told
from kdzoo.outputs import Output
from kdzoo.own_code import place

Terms = Mapping[str, Tensor]
TAUGHT = "compute it from the student's outputs, without detach() or no_grad()"
LEAST_FALL = 0.1  # of the loss in a short training, as a share of its size
LEAST_TEACHING = 0.01  # of the gradient with few classes, as a share of that with ten
MOST_GROWTH = 1.8  # of a term, where each image of the batch stands there twice; that of a sum over the batch is 2
LEAST_AGREEMENT = 0.6  # of the student with labels or teacher after it


@contextmanager
def promising(promise: str) -> Iterator[None]:
    """Turn any error inside the context into an AssertionError of one line."""
    try:
        yield
    except AssertionError as error:
        if str(error).startswith("expected"):
            raise
        raise AssertionError(f"expected {promise}; got a failed assertion: {error}; look at {place(error)}") from error
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # an exit too
        said = f"{error}; correct that" if isinstance(error, UserError) else f"{told(error)}; look at {place(error)}"
        raise AssertionError(f"expected {promise}; got {said}") from error


def expect(ok: bool, expected: str, got: object, remedy: str) -> None:
    """Raise an AssertionError of one line unless ``ok``."""
    if not ok:
        raise AssertionError(f"expected {expected}; got {got}; {remedy}")


def expect_finite(together: Distillation, batch: Batch, where: str) -> None:
    """Check that all terms and all gradients of a batch are finite."""
    with promising(f"finite terms for {where}"):
        together.zero_grad()
        terms = together(batch)
        remedy = "guard divisions, logs and roots; use log_softmax"
        for name, term in terms.items():
            expect(term.ndim == 0, f"a scalar '{name}' for {where}", tuple(term.shape), "take the mean over the batch")
            expect(bool(term.isfinite()), f"a finite '{name}' for {where}", term.item(), remedy)
        loss = toys.total(terms)
        expect(loss.requires_grad, f"a loss with a gradient for {where}", "none", TAUGHT)
        loss.backward()
        remedy = "guard abs, sqrt and norms, whose gradient at 0 is not finite"
        for name, parameter in together.named_parameters():
            finite = parameter.grad is None or bool(parameter.grad.isfinite().all())
            expect(finite, f"finite gradients for {where}", f"NaN or infinity in that of {name}", remedy)


def relative_gap(terms: Terms, others: Terms) -> float:
    """Compute the largest relative difference between terms of the same name.

    0.001 is added to each size, so that terms near 0 are not compared by their share.
    """
    if terms.keys() != others.keys():
        return float("inf")
    gaps = [((terms[name] - others[name]).abs() / (others[name].abs() + 1e-3)).item() for name in terms]
    return max(gaps, default=0.0)


def expect_equal(terms: Terms, others: Terms, when: str, remedy: str, tolerance: float = 0.0) -> None:
    """Check that two sets of terms are equal, exactly or within a relative ``tolerance``."""
    shown = (", ".join(f"{name} {term.item():.7g}" for name, term in given.items()) for given in (terms, others))
    same = relative_gap(terms, others) <= tolerance
    expect(same, f"the same terms {when}", " against ".join(shown), remedy)


class Narrow(TorchFunctionMode):
    """A record of the functions that return float16 or bfloat16."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[str] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.dtype in (torch.bfloat16, torch.float16):
            self.found.add(func.__name__)
        return result


class Learning(NamedTuple):
    """The result of a short training on the toy problem."""

    fall: float  # of the loss, as a share of what it was
    agreement_before: float  # of a new student with labels or teacher, whichever it agrees with more
    agreement: float


def learning(distiller: type[Distiller], seed: int = 0) -> Learning:
    """Train a toy student briefly and measure what it learned; ``seed`` chooses the student and the images.

    A method made for far larger networks or data sets is trained with its ``toy_settings``.
    """
    teacher = copy.deepcopy(toys.taught())
    together = toys.distillation(distiller, toys.toy_settings(distiller), teacher=teacher, seed=seed)
    test = toys.batch_of(seed=999, size=32)
    answers = torch.stack([test.labels, teacher(test.images).logits.argmax(1)])

    def standing() -> tuple[float, float]:
        now = copy.deepcopy(together)
        shipped = copy.deepcopy(now.deploy()).eval()(test.images)
        expect(isinstance(shipped, Output), "deploy to ship images -> Output", type(shipped), "correct deploy")
        agreement = (shipped.logits.argmax(1) == answers).float().mean(1).max().item()
        return toys.total(toys.seeded(now, 5, size=32)).item(), agreement

    loss_before, agreement_before = standing()
    toys.train(together, steps=120, size=16, seed=1000 * seed)
    loss, agreement = standing()
    return Learning((loss_before - loss) / abs(loss_before), agreement_before, agreement)


def teaching(distiller: type[Distiller], classes: int) -> float:
    """Measure the gradient that reaches the student from all terms but the cross-entropy with the labels."""
    together = toys.distillation(distiller, classes=classes)
    terms = together(toys.batch_of(size=16, classes=classes))
    taught = [term for name, term in terms.items() if name != "ce" and term.requires_grad]
    weights = list(together.student.parameters())
    gradients = torch.autograd.grad(torch.stack(taught).sum(), weights, allow_unused=True) if taught else ()
    return nn.utils.get_total_norm([gradient for gradient in gradients if gradient is not None]).item()
