"""Export what a finished run ships as a folder for other tools, which appears whole or not at all."""

import json
import os
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from kdzoo import __version__, data
from kdzoo.engine.progress import Progress
from kdzoo.errors import UserError, out_of_memory_told, unknown
from kdzoo.experiments import model_card
from kdzoo.experiments.run import HERE, Here, compare_data, open_data
from kdzoo.experiments.students import load, parts_used
from kdzoo.files import appearing, output_path, path_of
from kdzoo.models import Student
from kdzoo.models.export_program import (
    Comparison,
    compare,
    open_onnx,
    open_program,
    quantise_onnx,
    write_onnx,
    write_program,
)
from kdzoo.models.export_timm import CannotSay, write_timm
from kdzoo.store.folder import RunFolder
from kdzoo.store.result import Result

Format = Literal["timm", "onnx", "torch", "hub"]
FORMATS: tuple[Format, ...] = ("timm", "onnx", "torch", "hub")
RECORD = "export.json"  # what was exported, and how it was checked
IMAGES = 128  # test images that a program is compared on, by default
CALIBRATION = 128  # training images that decide the ranges of 8-bit numbers
BATCH = 32


class Export(NamedTuple):
    """An export that was written.

    Example:
        >>> run = kdzoo.run("none", "resnet8", overrides=quick, quiet=True)
        >>> made = kdzoo.export(run.folder, "torch", out="student")
        >>> made.folder.name, sorted(file.name for file in made.folder.iterdir())
        ('student', ['export.json', 'model.pt2'])
    """

    folder: Path
    lines: tuple[str, ...]  # what was written and how it was checked, for people


@out_of_memory_told(lambda: "exporting a student")
def export(
    run: str | Path,
    format: Format,
    out: str | Path | None = None,
    *,
    quantize: Literal["int8"] | None = None,
    images: int = IMAGES,
    overwrite: bool = False,
    here: Here = HERE,
) -> Export:
    """Export the student of a finished run as a folder.

    Args:
        run: the run's folder.
        format: ``timm``, a folder for ``timm.create_model("local-dir:FOLDER", pretrained=True)``; ``hub``, the same
            with a model card; ``onnx``; or ``torch``, a program of torch.export. Where timm's configuration cannot say
            what the student is, its folder holds such a program instead.
        out: the folder to write; None: ``exports/RUN-FORMAT``.
        quantize: ``int8`` also writes an ONNX model of 8 bits.
        images: test images that ``onnx`` and ``torch`` are compared on, spread over the classes; 0: all.
        overwrite: whether an export that is there is replaced.
        here: where the data of the run lie now, and whether its code is trusted.

    Raises:
        UserError: the run cannot be read, its network cannot be expressed, a package or the data are missing, or the
            folder is there.

    Example:
        >>> run = kdzoo.run("none", "test_vit", overrides=quick, quiet=True)
        >>> made = kdzoo.export(run.folder, "timm", out="mine")
        >>> import timm
        >>> timm.create_model("local-dir:mine", pretrained=True).num_classes
        10
    """
    if format not in FORMATS:
        raise unknown("format", format, FORMATS)
    if quantize is not None and format != "onnx":
        raise UserError(f"--quantize is for --format onnx, not for {format}")
    source = RunFolder(path_of(run).resolve())
    result = source.finished()
    target = output_path(out if out is not None else Path("exports") / f"{source.path.name}-{format}").absolute()
    check_target(target, overwrite)
    student = load(source.path, trust_code=here.trust_code)
    with appearing(target) as folder, Progress() as progress:
        record: dict[str, Any] = {"kdzoo": __version__, "run": source.path.name, "format": format}
        record |= {"top1": result.shipped_top1, "image_size": student.image_size, "test_crop": student.test_crop}
        record |= {"classes": list(student.classes)}
        with progress.doing(f"writing {result.student} for {format}"):
            if format in ("timm", "hub"):
                lines, found = _for_timm(student, result, folder, target, format)
            else:
                lines, found = _program(student, source, folder, format, quantize, images, here, progress)
        text = json.dumps({**record, **found}, indent=2)
        (folder / RECORD).write_text(text + "\n", encoding="utf-8")
        check_target(target, overwrite)  # once more: somebody may have made it meanwhile
    return Export(target, tuple(lines))


def _for_timm(
    student: Student, result: Result, folder: Path, target: Path, format: str
) -> tuple[list[str], dict[str, Any]]:
    """Write the folder of timm, or a program where timm cannot say what the student is; for the hub with a card."""
    try:
        write_timm(student.network, folder, student.classes, student.test_crop)
        why = ""
        lines = [f"timm reads it: timm.create_model({f'local-dir:{target}'!r}, pretrained=True)"]
        lines += filter(None, [model_card.enlarging(student)])
    except CannotSay as error:
        why = str(error)
        for file in folder.iterdir():
            file.unlink()
        write_program(student, folder / "model.pt2")
        read = f"torch.export.load({str(target / 'model.pt2')!r}).module()"
        lines = [f"not for timm, since {why}: it holds a torch.export program instead, {read}"]
    if format == "hub":
        text = model_card.card(result, student, program=bool(why))
        (folder / "README.md").write_text(text, encoding="utf-8")
        upload = shlex.join(["hf", "upload", "OWNER/NAME", str(target)])
        lines.append(f"README.md is its card: add a licence. Nothing is uploaded; to do so: {upload}")
    return lines, {"timm": not why, "reason": why}


def _program(
    student: Student,
    source: RunFolder,
    folder: Path,
    format: str,
    quantize: str | None,
    images: int,
    here: Here,
    progress: Progress,
) -> tuple[list[str], dict[str, Any]]:
    """Write a program and compare it with the student on test images."""
    found: dict[str, Any] = {}
    dataset, test_crop = _data(source, here, progress)
    programs: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {}
    if format == "torch":
        write_program(student, folder / "model.pt2")
        programs["model.pt2"] = open_program(folder / "model.pt2")
    else:
        found["opset"] = write_onnx(student, folder / "model.onnx")
        programs["model.onnx"] = open_onnx(folder / "model.onnx")
    if quantize is not None:
        shown = (batch for batch, _ in dataset.sample("train", CALIBRATION, BATCH, test_crop))
        quantise_onnx(folder / "model.onnx", folder / "model-int8.onnx", shown)
        programs["model-int8.onnx"] = open_onnx(folder / "model-int8.onnx")
    compared = compare(programs, student, dataset.sample("test", images, BATCH, test_crop))
    found |= {name: {**seen._asdict(), "of": dataset.test_size} for name, seen in compared.items()}
    return [_told(name, seen) for name, seen in compared.items()], found


def _told(name: str, seen: Comparison) -> str:
    if seen.agreement is None:
        return f"{name}: embeddings of {seen.images} test images differ by at most {seen.max_difference:.2g}"
    return (
        f"{name}: top-1 {seen.top1:.2f} % on {seen.images} test images "
        f"(the student in float32: {seen.student_top1:.2f} %), "
        f"the same class for {seen.agreement:.2f} %, logits differ by at most {seen.max_difference:.2g}"
    )


def _data(source: RunFolder, here: Here, progress: Progress) -> tuple[data.Dataset, float]:
    """Open the data of a run on the CPU."""
    run = here._replace(device="cpu", precision="float32").place(source, ("data", *parts_used(source)))
    with source.home():
        dataset = open_data(run, torch.device("cpu"), progress, source)
        compare_data(run, source, dataset, progress)
    return dataset, run.settings.protocol.test_crop


def check_target(target: Path, overwrite: bool) -> None:
    """Check that a folder may be written: it is not there, or is an export of kdzoo that may be replaced.

    Raises:
        UserError: it is there.
    """
    if not os.path.lexists(target):
        return
    if not (target / RECORD).is_file():
        raise UserError(f"{target} is there, and no export of kdzoo; choose another --out")
    if not overwrite:
        raise UserError(f"{target} is there; choose another --out, or replace it by --overwrite")
