"""Write a student as a program that runs without its code: of torch.export, or of ONNX."""

import json
import logging
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from kdzoo.errors import UserError, is_shortage, told
from kdzoo.models.student import Student

INPUT, OUTPUT = "images", "logits"
Run = Callable[[Tensor], Tensor]  # images (B, 3, S, S) in [0, 1] -> logits (B, K)


class Comparison(NamedTuple):
    """How a program's answers differ from the student's on the same images; shares are in percent.

    A student without a classifier gives no classes, and these shares are None.
    """

    images: int
    max_difference: float  # between two logits, or two numbers of the embedding
    agreement: float | None = None  # images whose top-1 is the same
    top1: float | None = None
    student_top1: float | None = None


def compare(
    programs: Mapping[str, Run], student: Student, batches: Iterable[tuple[Tensor, Tensor]]
) -> dict[str, Comparison]:
    """Show the same images and labels to the student and to each program."""
    ours: list[Tensor] = []
    theirs: dict[str, list[Tensor]] = {name: [] for name in programs}
    labels: list[Tensor] = []
    with torch.inference_mode():
        for images, its in batches:
            ours.append(student(images))
            labels.append(its)
            for name, program in programs.items():
                theirs[name].append(program(images))
    answers = {name: torch.cat(logits) for name, logits in theirs.items()}
    classify = bool(student.classes)
    return {name: _compared(logits, torch.cat(ours), torch.cat(labels), classify) for name, logits in answers.items()}


def _compared(theirs: Tensor, ours: Tensor, labels: Tensor, classify: bool) -> Comparison:
    def share(one: Tensor, other: Tensor) -> float:
        return 100 * (one == other).sum().item() / len(labels)

    farthest = (theirs - ours).abs().max().item()
    if not classify:
        return Comparison(len(labels), farthest)
    its, mine = theirs.argmax(1), ours.argmax(1)
    return Comparison(len(labels), farthest, share(its, mine), share(its, labels), share(mine, labels))


def write_program(student: Student, file: Path) -> None:
    """Write a torch.export program, which takes batches of any size; ``torch.export.load(file).module()`` reads it.

    Raises:
        UserError: the network does something that torch.export cannot follow.
    """
    with _explained(student, "torch"):
        program = torch.export.export(student, (_example(student),), dynamic_shapes=_batch())
    torch.export.save(program, file, extra_files={"classes.json": json.dumps(student.classes)})


def open_program(file: Path) -> Run:
    """Read what ``write_program`` wrote."""
    with _silent():
        return torch.export.load(file).module()


def write_onnx(student: Student, file: Path) -> int:
    """Write an ONNX model, which takes batches of any size, and return its opset.

    Raises:
        UserError: the network does something that ONNX cannot express, or a package is missing.
    """
    _require("onnx", "onnxscript", "onnxruntime")
    with _explained(student, "onnx"):
        program = torch.onnx.export(
            student,
            (_example(student),),
            dynamo=True,
            dynamic_shapes=_batch(),
            input_names=[INPUT],
            output_names=[OUTPUT],
            verbose=False,
        )
    assert program is not None, "the exporter of torch.export returns a program"
    program.model.metadata_props["classes"] = json.dumps(student.classes)
    program.save(file, external_data=False)
    return program.model.opset_imports[""]


def open_onnx(file: Path) -> Run:
    """Read an ONNX model with onnxruntime, on the CPU."""
    _require("onnxruntime")
    import onnxruntime

    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])

    def run(images: Tensor) -> Tensor:
        [logits] = session.run([OUTPUT], {INPUT: images.cpu().contiguous().numpy()})
        return torch.from_numpy(np.asarray(logits))

    return run


def quantise_onnx(source: Path, target: Path, batches: Iterable[Tensor]) -> None:
    """Write an ONNX model with weights and activations of 8 bits, whose ranges are those of ``batches`` of images."""
    _require("onnx", "onnxruntime")
    from onnxruntime import quantization

    waiting = iter(batches)

    class Reader(quantization.CalibrationDataReader):
        def get_next(self) -> Mapping[str, Any] | None:
            images = next(waiting, None)
            return None if images is None else {INPUT: images.cpu().contiguous().numpy()}

    prepared = target.with_suffix(".prepared.onnx")
    with _silent():
        quantization.shape_inference.quant_pre_process(str(source), str(prepared), skip_symbolic_shape=True)
        quantization.quantize_static(str(prepared), str(target), Reader(), per_channel=True)
    prepared.unlink()


def _example(student: Student) -> Tensor:
    side = student.image_size
    return torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(0))


def _batch() -> tuple[dict[int, Any]]:
    return ({0: torch.export.Dim("batch")},)


def _require(*packages: str) -> None:
    """Check that packages are installed and can be imported, and name the extra that they come with."""
    from importlib.util import find_spec

    if missing := [package for package in packages if find_spec(package) is None]:
        raise UserError(f"ONNX needs {', '.join(missing)}: pip install 'kdzoo[export]'")
    for package in packages:
        try:
            with _silent():
                import_module(package)
        except ImportError as error:  # of a library below it, or another version of numpy
            raise UserError(
                f"ONNX needs {package}, which is installed and cannot be imported ({told(error)}); install it again: "
                f"pip install --force-reinstall {package}"
            ) from error


@contextmanager
def _explained(student: Student, kind: str) -> Iterator[None]:
    name = getattr(student.network, "name", type(student.network).__name__)
    try:
        with _silent(), torch.no_grad():
            yield
    except Exception as error:  # of many kinds, by what a network does
        if is_shortage(error):
            raise
        other = "another network" if kind == "torch" else "--format torch"
        cause: BaseException = error
        while cause.__cause__ is not None:  # the exporter wraps what stopped it
            cause = cause.__cause__
        raise UserError(f"{name} cannot be written for {kind} ({told(cause)}); choose {other}") from error


@contextmanager
def _silent() -> Iterator[None]:
    """Keep exporters from logging and warning of what is checked here."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
