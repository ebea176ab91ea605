"""The commands that take a student elsewhere: predict and export."""

import csv
import io
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from kdzoo.commands.options import DEBUG, PATH, TRUST_CODE, computing, loading, tell, with_data, write_out
from kdzoo.errors import UserError, visible
from kdzoo.quantities import counted

if TYPE_CHECKING:
    from kdzoo.experiments.predictions import Prediction


@click.command()
@click.argument("folder", type=PATH, metavar="RUN")
@click.argument("images", nargs=-1, required=True, type=PATH, metavar="IMAGES...")
@click.option(
    "--format", "style", type=click.Choice(["csv", "json"]), default="csv", help="Form of the output (default: csv)."
)
@click.option(
    "--top",
    type=click.IntRange(min=1),
    default=1,
    help="Number of classes for each image, likeliest first (default: 1).",
)
@computing
@click.option(
    "--workers",
    type=click.IntRange(0, 128),
    help="Number of processes that decode images beside the network (default: one for each core where a GPU computes, "
    "else 0).",
)
@TRUST_CODE
@DEBUG
def predict(folder: Path, images: tuple[Path, ...], style: str, **options: Any) -> None:
    """Classify image files by the student of a finished run.

    IMAGES are files, or folders whose images are all taken. They are read as the run read its own: turned upright,
    resized, cropped, normalised.

    \b
      kdzoo predict runs/digits-resnet8-none-s0-0123456789ab photos --top 3 > answers.csv

    Prints the path of each image, its class and the class's probability. An image that cannot be read is left out and
    named, and the exit code is then 2.
    """
    from kdzoo.engine.progress import Progress

    with Progress() as progress, loading(progress, "the student"):
        from kdzoo.experiments.predictions import predict

        found = predict(folder, images, **options)
    failures, count = list[str](), 0

    def readable() -> "Iterator[Prediction]":
        nonlocal count
        for each in found:
            count += 1
            if each.failure:
                failures.append(each.failure)
                tell([each.failure])
            else:
                yield each

    for line in _table(readable()) if style == "csv" else _array(readable()):
        write_out(line)
    if failures:
        raise UserError(
            f"{len(failures)} of {counted(count, 'image')} cannot be read, see above; replace or remove what is damaged"
        )


def _table(found: "Iterator[Prediction]") -> Iterator[str]:
    """Write a line of CSV for each image."""
    from kdzoo.results.render import no_formula

    def line(cells: list[object]) -> str:
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerow(no_formula(cell) for cell in cells)
        return text.getvalue()

    is_first = True
    for each in found:
        if is_first:
            columns = [f"_{place}" if place > 1 else "" for place in range(1, len(each.classes) + 1)]
            yield line(["image", *(f"{name}{place}" for place in columns for name in ("class", "probability"))])
            is_first = False
        pairs = zip(each.classes, each.probabilities, strict=True)
        cells = [cell for name, share in pairs for cell in (visible(name), f"{share:.6g}")]
        yield line([visible(each.image), *cells])


def _array(found: "Iterator[Prediction]") -> Iterator[str]:
    """Write a JSON array, an image a line."""
    opening = "[\n"
    for each in found:
        pairs = zip(each.classes, each.probabilities, strict=True)
        classes = [{"class": name, "probability": _number(share)} for name, share in pairs]
        yield opening + json.dumps({"image": each.image, "classes": classes})
        opening = ",\n"
    yield "[]\n" if opening == "[\n" else "\n]\n"


def _number(share: float) -> float | None:
    """Round a probability; None, which JSON has, where a logit is no number, which it has not."""
    return float(f"{share:.6g}") if math.isfinite(share) else None


@click.command()
@click.argument("folder", type=PATH, metavar="RUN")
@click.option(
    "--format",
    "style",
    required=True,
    type=click.Choice(["timm", "onnx", "torch", "hub"]),
    help="Folder for timm; ONNX model; program of torch.export; or folder for timm with a model card for the hub.",
)
@click.option("--out", type=PATH, help="Folder to write (default: exports/RUN-FORMAT).")
@click.option("--overwrite", is_flag=True, help="Replace an export that is there (default: refuse).")
@click.option(
    "--quantize", type=click.Choice(["int8"]), help="Also write an ONNX model of 8 bits, and measure its accuracy."
)
@click.option(
    "--images",
    type=click.IntRange(min=0),
    default=128,
    help="Number of test images that onnx and torch are compared on; 0 takes all (default: 128).",
)
@with_data
@DEBUG
def export(
    folder: Path, style: Any, out: Path | None, overwrite: bool, quantize: Any, images: int, **here: Any
) -> None:
    """Export the student of a finished run for other tools.

    \b
      kdzoo export runs/digits-resnet8-none-s0-0123456789ab --format onnx --quantize int8

    A network that timm cannot make by its configuration is written as a program of torch.export. ONNX and torch are
    compared with the student on test images, so they need the run's data. Nothing is uploaded.
    """
    from kdzoo.engine.progress import Progress

    with Progress() as progress, loading(progress):
        from kdzoo.experiments.exports import export
        from kdzoo.experiments.run import Here
        from kdzoo.results.last_screen import shortened

    made = export(folder, style, out, quantize=quantize, images=images, overwrite=overwrite, here=Here(**here))
    click.echo(f"wrote {shortened(made.folder)}")
    for line in made.lines:
        click.echo(line)
