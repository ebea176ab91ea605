"""Write a model card in the form of the Hugging Face hub: what a student is, how it was made, what it reaches."""

import html
import re
from contextlib import suppress
from statistics import mean, stdev

from huggingface_hub import EvalResult, ModelCardData

from kdzoo import __version__
from kdzoo.errors import UserError
from kdzoo.models import Student
from kdzoo.naming import ALONE
from kdzoo.quantities import counted, short
from kdzoo.store.folder import find_runs
from kdzoo.store.result import MEASURED, MEASURED_BY, Result

KEPT = {"best": "the best epoch, chosen on the images that it is measured on", "ema": "the last epoch, averaged"}
EMBEDDING = "image-feature-extraction"
FOR_TIMM = """```python
import timm

model = timm.create_model("hf-hub:OWNER/NAME", pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_data_config(model.pretrained_cfg))
```"""
FOR_TORCH = """```python
import torch
from huggingface_hub import hf_hub_download

program = torch.export.load(hf_hub_download("OWNER/NAME", "model.pt2")).module()
# images in [0, 1]: the short side resized to {resized} pixels, then the centre of {side} x {side} cut out
logits = program(torch.rand(1, 3, {side}, {side}))
```"""


def card(result: Result, student: Student, program: bool) -> str:
    """Write the card of a run's student, with the finished runs beside it that differ in their seed alone.

    Args:
        result: of the run.
        student: what it ships.
        program: whether the folder holds a torch.export program instead of what timm reads.
    """
    names, seeds = result.names, beside(result)
    accurate, task = result.measured == "accuracy", "image-classification" if student.classes else EMBEDDING
    top1 = [run.shipped_top1 for run in seeds]
    facts = ModelCardData(
        pipeline_tag=task,
        tags=[task, "knowledge-distillation", "kdzoo", *(["timm"] if not program else [])],
        model_name=_line(result.student),
        eval_results=[
            EvalResult(
                task_type=task,
                dataset_type=re.sub(r"[^A-Za-z0-9_-]+", "-", result.data),
                dataset_name=_line(names.data),
                metric_type=result.measured,
                metric_name=f"Top-1 {'accuracy' if accurate else f'by {MEASURED_BY[result.measured]}'} (%)",
                metric_value=round(result.shipped_top1, 2),
            )
        ],
        library_name=None if program else "timm",
    )
    spread = f" ± {stdev(top1):.2f}" if len(top1) > 1 else ""
    reached = f"{mean(top1):.2f}{spread} % over {counted(len(top1), 'seed')}"
    rows = [
        ("student", names.student),
        ("teacher", "none" if names.teacher == ALONE else names.teacher),
        ("teacher's top-1", "" if result.teacher_top1 is None else f"{result.teacher_top1:.2f} %"),
        ("method", f"{names.method} ({result.fidelity})"),
        ("data", names.data),
        ("protocol", f"{names.protocol}, {counted(result.epochs, 'epoch')}, seed {result.seed}"),
        ("weights of", KEPT.get(result.ship, "the last epoch")),
        ("top-1 of this file", f"{result.shipped_top1:.2f} %"),
        ("top-1 is the share of", "" if accurate else MEASURED[result.measured]),
        ("top-1 of the recipe", f"{reached} ({', '.join(str(run.seed) for run in seeds)})"),
        ("classes", str(len(student.classes) or "none: it gives embeddings")),
        ("parameters", "" if result.parameters is None else f"{result.parameters:,}"),
        ("operations of one image", "" if result.flops is None else f"{short(result.flops / 1e9)} GFLOPs"),
    ]
    side, resized = student.image_size, int(student.image_size / student.test_crop)
    usage = FOR_TORCH.format(side=side, resized=resized) if program else FOR_TIMM
    usage = usage if student.classes else usage.replace("logits =", "embedding =")
    return "\n".join(
        [
            "---",
            facts.to_yaml().strip(),
            "# license:  # add yours before you upload; see https://huggingface.co/docs/hub/repositories-licenses",
            "---",
            "",
            f"# {escaped(result.student)} distilled on {escaped(names.data)}",
            "",
            f"Trained with kdzoo {__version__}. "
            + (
                "Accuracies are of all test images; with data.val, these are training images that were held out."
                if accurate
                else "What top-1 is a share of stands below."
            ),
            "",
            "| | |",
            "|---|---|",
            *(f"| {what} | {escaped(value)} |" for what, value in rows if value),
            "",
            "## Use",
            "",
            usage,
            "",
            *([] if program or not (note := enlarging(student)) else [note, ""]),
        ]
    )


def enlarging(student: Student) -> str:
    """Say what timm's transform does not do where the network enlarges the run's images; empty where it does not."""
    side, read = student.image_size, getattr(student.network, "image_size", 0)
    if read <= side:
        return ""
    return (
        f"It was measured on images of {side} px that were enlarged to {read} px: resize the short side of larger "
        f"pictures to {int(side / student.test_crop)} px before timm's transform, or its answers differ."
    )


def beside(result: Result) -> list[Result]:
    """Find the finished runs in the same folder that differ in their seed alone, this one among them, by seed."""
    found = {result.seed: result}
    for folder in find_runs([result.folder.parent]):
        with suppress(UserError):  # a damaged neighbour is not this run's concern
            other = folder.read_result()
            if other is not None and _recipe(other) == _recipe(result):
                found.setdefault(other.seed, other)
    return [found[seed] for seed in sorted(found)]


def escaped(text: str) -> str:
    """Write a text that is not ours so that Markdown shows it as it is, on one line."""
    return re.sub(r"([\\`*_{}\[\]()#+!|~:@-])", r"\\\1", html.escape(_line(text)))


def _line(text: str) -> str:
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def _recipe(result: Result) -> tuple[object, ...]:
    return result.names, result.fingerprint, result.ship
