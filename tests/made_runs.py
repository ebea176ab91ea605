"""Finished runs that nobody trained: folders as an engine leaves them, and the rows that tables are made of."""

import pandas as pd

from kdzoo.naming import names_of
from kdzoo.resolve import resolve
from kdzoo.results import table
from kdzoo.store.folder import Result, RunFolder, find_runs


def write(root, top1, seed, *overrides, distiller="kd", **found):
    """A finished run of the digits, as an engine would leave it."""
    run = resolve(
        {"distiller": {"name": distiller}, "student": {"name": "resnet_8"}, "output": {"root": str(root)}},
        ["teacher.name=vit_s", f"seed={seed}", "engine.device=cpu", "engine.precision=float32", *overrides],
    )
    folder = RunFolder.of(run)
    folder.open(run)
    values = {
        "data": "digits",
        "protocol": "quick",
        "teacher": "vit_s",
        "student": "resnet_8",
        "distiller": distiller,
        "fidelity": "exact",
        "seed": seed,
        "teacher_top1": 96.0,
        "top1": top1,
        "top5": 99.0,
        "best_top1": top1 + 1,
        "best_epoch": 1,
        "epochs": 2,
        "seconds": 1.0,
        "images_per_second": 100.0,
        "names": names_of(run.settings),
        "fingerprint": run.settings.data.fingerprint,
    }
    folder.write_result(Result(folder=folder.path, **{**values, **found}))
    return folder


def runs(*scores, **common):
    """Runs from (teacher, student, method, seed, top1), as ``table.rows`` gives them."""
    fixed = {
        "data": "cifar100",
        "protocol": "crd",
        "fidelity": "exact",
        "teacher_top1": 79.0,
        "top5": 90.0,
        "seconds": 10.0,
        "images_per_second": 100.0,
        "parameters": None,
        "extra_parameters": None,
        "peak_memory": None,
        "ship": "last",
        "flops": None,
        "file_bytes": None,
        "latency_1": None,
        "latency_64": None,
        "device": "cpu",
        "precision": "float32",
        "preset": False,
    }
    names = ("teacher", "student", "method", "seed", "top1")
    records = [fixed | dict(zip(names, row, strict=True)) | {"best_top1": row[-1] + 0.5} | common for row in scores]
    return pd.DataFrame(records)


def varied(root):
    """Three seeds of kd, and three runs that each differ from it in one thing."""
    for seed, top1 in enumerate((80.0, 81.0, 85.0)):
        write(root, top1, seed)
    write(root, 70.0, 0, "distiller.temperature=1")
    write(root, 60.0, 0, "protocol.epochs=1")
    write(root, 50.0, 0, distiller="none")
    return table.rows(find_runs([root]))
