"""Compares what a student learns without labels, without a classifier and from two teachers with the usual way.

    python benchmarks/teachers.py train --pictures FOLDER --out runs/teachers
    python benchmarks/teachers.py tables --pictures FOLDER --out runs/teachers

FOLDER holds train/CLASS/* and test/CLASS/*, such as CIFAR-100 as pictures, or some of its classes. Two teachers are
trained on it once, then a vit_pico by each way and with three seeds: on labels alone; from a teacher with labels (kd,
pkt); on the same pictures without their labels; from the teacher without its head; from the other teacher, and from
both. All are measured on the test images with their labels. It can be stopped and started again.
"""

import math
from pathlib import Path
from statistics import fmean
from typing import Any

import pandas as pd
import yaml
from measuring import arguments_of, file_of, publish, this_machine

import kdzoo
from kdzoo.experiments.bench import bench
from kdzoo.experiments.suites import load
from kdzoo.results.table import observations, rows
from kdzoo.store import predictions
from kdzoo.store.folder import RunFolder, find_runs

TEACHERS = ("resnet8x4", "resnet20")
STUDENT = "vit_pico"
SEEDS = [0, 1, 2]
TEACHER_EPOCHS, EPOCHS = 12, 6
RECIPE = {"name": "quick", "epochs": EPOCHS, "augmentation": {"crop": 4, "flip": True}}
SHOWN = ("top1", "top5", "kl", "knn", "probe", "teacher_top1")


def train(pictures: str, out: Path) -> None:
    """Train the teachers, then the students of each way."""
    files = [weights(name, pictures, out) for name in TEACHERS]
    first, second = (
        dict[str, Any]({"name": name, "weights": str(file)}) for name, file in zip(TEACHERS, files, strict=True)
    )
    labelled, bare = {"name": f"folder:{pictures}"}, {"name": f"images:{pictures}", "test": f"folder:{pictures}"}
    ways: dict[str, tuple[dict[str, str], dict[str, Any], list[str]]] = {
        "with labels": (labelled, first, ["none", "kd", "pkt"]),
        "without labels": (bare, first, ["kd", "pkt"]),
        "teacher without a head": (labelled, {**first, "classifier": False}, ["pkt", "rkd"]),
        "another teacher": (labelled, second, ["kd"]),
        "two teachers": (labelled, {**first, "others": [second]}, ["kd"]),
    }
    for way, (data, teacher, methods) in ways.items():
        file = out / f"{way.replace(' ', '-')}.yaml"
        content = {
            "data": data,
            "protocol": RECIPE,
            "pairs": [[teacher["name"], STUDENT]],
            "distillers": methods,
            "seeds": SEEDS,
            "teacher": {key: value for key, value in teacher.items() if key != "name"},
        }
        file.write_text(yaml.safe_dump(content, sort_keys=False))
        bench(
            load(str(file), overrides=[f"output.measure_every={EPOCHS}", "engine.compile=off"]), out / file.stem
        ).check()


def weights(name: str, pictures: str, out: Path) -> Path:
    """Train a teacher on labels, and return the file of its weights."""
    settings = [f"protocol.epochs={TEACHER_EPOCHS}", f"output.measure_every={TEACHER_EPOCHS}"]
    settings += ["protocol.augmentation.crop=4", "protocol.augmentation.flip=true", "engine.compile=off"]
    made = kdzoo.run("none", name, data=f"folder:{pictures}", out=out / "teachers", overrides=settings)
    return made.folder / "student.safetensors"


def tables(out: Path, title: str, results: Path) -> None:
    """Write a row for each way and method: means over the seeds, and the deviation of top-1."""
    found = []
    for file in sorted(out.glob("*.yaml")):
        runs = rows(find_runs([out / file.stem]))
        for method, group in observations(runs).groupby("method", sort=False):
            row = {"way": file.stem.replace("-", " "), "method": method, "seeds": len(group)}
            row |= {"measured": runs["measured"].iloc[0], "top1_std": group["top1"].std()}
            row |= {name: group[name].mean() for name in SHOWN}
            folders = [RunFolder(path) for path in runs.loc[runs["method"] == method, "folder"]]
            found.append(row | {"agreement": fmean(map(agreement, folders))})
    publish(pd.DataFrame(found).round(3), file_of(results, title, this_machine()))


def agreement(folder: RunFolder) -> float:
    """Compute the percent of the test images that a run's student and its teacher take for the same class."""
    kept = predictions.read(folder.predictions, len(folder.read_classes()))
    return 100 * float((kept.student == kept.teacher).mean()) if len(kept.teacher) else math.nan


def main() -> None:
    parser = arguments_of(__doc__)
    parser.add_argument("what", choices=["train", "tables"])
    parser.add_argument("--pictures", required=True, help="folder with train/CLASS/* and test/CLASS/*")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    if given.what == "train":
        train(given.pictures, given.out)
    else:
        tables(given.out, f"teachers-{STUDENT}-{EPOCHS}epochs-{len(SEEDS)}seeds", given.results)


if __name__ == "__main__":
    main()
