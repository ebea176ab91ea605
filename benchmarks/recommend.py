"""Measures whether ``kdzoo recommend`` finds what training everything would, and what that costs.

    python benchmarks/recommend.py train digits --out runs/measured [--repeats 10] [--part grid repeats schedules]
    python benchmarks/recommend.py tables digits --out runs/measured

``grid`` trains every candidate at full length on all training images with five seeds or more: what is true, as far as
they tell. ``repeats`` asks the question so many times, with other seeds each time. ``schedules`` trains every
candidate to its end on the search's part of the images, by several schedules of the learning rate and with and without
an average of the weights, to see from which epoch on, and by which, ranks tell those of the grid. All of it can be
stopped and started again. The tables: a row for each stage of each repeat with the most memory until its end; and where
there is a grid, a row for each of its runs, a row for each repeat (its choice, how far the grid sees it from the best,
its cost), a row for each claim of a difference, and a row for each schedule and epoch with its rank correlation.

Settings: digits (resnet14 -> resnet8), and of CIFAR-100 as a folder of pictures (--data) cifar (resnet20 -> resnet8)
and transformer (resnet8x4 -> vit_pico).
"""

import json
import resource
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Any
from unittest.mock import patch

import pandas as pd
from measuring import arguments_of, file_of, publish, this_machine
from scipy import stats

from kdzoo.engine import lane as lanes
from kdzoo.engine.optim import learning_rate
from kdzoo.experiments import halving
from kdzoo.experiments.halving import SEEDS
from kdzoo.experiments.question import Question
from kdzoo.experiments.recommend import REFERENCES, Trainer, search
from kdzoo.experiments.workers import Local
from kdzoo.recipe import Protocol
from kdzoo.results import statistics
from kdzoo.results.recommendation import Recommendation
from kdzoo.store.folder import RunFolder, find_runs
from kdzoo.store.search import Search

METHODS = ("at", "dist", "dkd", "figkd", "fitnet", "lfcc", "nkd", "pkt", "rkd", "sp", "spectralkd", "ttm", "uhkd")
GRID_SEED, USUAL_SEEDS = 1000, 5  # of a grid: its first, and how many one would take
SCHEDULE_SEEDS = (2000, 2001)
SCHEDULES = {
    "recipe": (),
    "recipe, no average": ("protocol.ema=0",),
    "recipe, averaged": ("protocol.ema=0.97",),
    "constant": ("protocol.schedule=constant", "protocol.ema=0"),
    "constant, averaged": ("protocol.schedule=constant", "protocol.ema=0.97"),
    "constant with short decays": ("protocol.schedule=constant", "protocol.ema=0"),
}
DECAY = 0.3  # of the epochs between two rungs, in which the rate of short decays falls to nothing
WITHIN = 0.5  # points of top-1


@dataclass(frozen=True)
class Case:
    """A pair with its data and recipe."""

    teacher: str
    student: str
    protocol: Mapping[str, Any]
    settings: int = 2
    grid_seeds: int = USUAL_SEEDS
    teacher_keys: tuple[str, ...] = ()  # of the teacher's training

    @property
    def seeds(self) -> tuple[int, ...]:
        """The seeds of the grid."""
        return tuple(range(GRID_SEED, GRID_SEED + self.grid_seeds))

    def question(self, data: str, seed: int) -> Question:
        """The question that is asked with this seed."""
        own = ("teacher.allow_weak=true", "engine.compile=off", *self.teacher_keys)
        return Question(
            (self.teacher,), (self.student,), METHODS, self.settings, "", {"name": data}, self.protocol, (), seed, own
        )


CASES = {
    "digits": Case("resnet14", "resnet8", {"name": "quick", "epochs": 5}, grid_seeds=20),
    "cifar": Case("resnet20", "resnet8", {"name": "crd", "epochs": 6}, settings=1, teacher_keys=("teacher.epochs=20",)),
    "transformer": Case(  # without Muon, which costs more here than the networks do
        "resnet8x4",
        "vit_pico",
        {
            "name": "quick",
            "epochs": 6,
            "batch_size": 64,
            "image_size": 16,
            "optimizer": "adamw",
            "lr": 2e-3,
            "min_lr": 0.0,
            "augmentation": {"crop": 2, "flip": True},
        },
        settings=1,
        teacher_keys=("teacher.protocol=crd", "teacher.epochs=20"),
    ),
}


def train(case: Case, data: str, out: Path, repeats: int, parts: list[str]) -> None:
    """Train what the tables are made of."""
    made = read_or_ask(case, data, out)
    if "grid" in parts:
        bench_of(case, data, made, out / "grid", case.seeds, final=True)
    if "repeats" in parts:
        for number in range(1, repeats):
            asked(case, data, out, number)
    if "schedules" in parts:
        for name, overrides in SCHEDULES.items():
            decays = partial(with_decays, made.rungs) if "decays" in name else learning_rate
            with patch.object(lanes, "learning_rate", decays):
                bench_of(case, data, made, folder_of(out, name), SCHEDULE_SEEDS, False, overrides)


def folder_of(out: Path, schedule: str) -> Path:
    """Where the runs of a schedule lie."""
    return out / schedule.replace(", ", "-").replace(" ", "-")


def read_or_ask(case: Case, data: str, out: Path) -> Search:
    """The first repeat, whose candidates are those of all others."""
    asked(case, data, out, 0)
    return Search.read(out / "repeat-0")


def asked(case: Case, data: str, out: Path, number: int) -> None:
    """Ask the question once, and note the most memory after each stage."""
    folder, peaks = out / f"repeat-{number}", dict[str, int]()

    def noting(self: Trainer, made: Search, stage: str, *given: Any) -> Iterator[Any]:
        found = list(before(self, made, stage, *given))
        peaks[stage] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return iter(found)

    before = Trainer.train
    with patch.object(Trainer, "train", noting):
        search(case.question(data, 10 * number), folder)
    if not (folder / "peaks.json").is_file():
        (folder / "peaks.json").write_text(json.dumps(peaks))


def bench_of(
    case: Case, data: str, made: Search, out: Path, seeds: tuple[int, ...], final: bool, overrides: tuple[str, ...] = ()
) -> None:
    """Train every candidate with these seeds."""
    everyone = {case.student: list(range(len(made.candidates)))}
    for seed in seeds:  # a group at a time
        question = case.question(data, seed)
        question = replace(question, overrides=(*question.overrides, *overrides))
        trainer = Trainer(question, out, Local(), quiet=False)
        stage, own = ("final", [f"output.measure_every={made.epochs}"]) if final else ("whole", [])
        list(trainer.train(replace(made, seeds=[seed]), stage, everyone, own))


def runs_in(folder: Path) -> dict[tuple[str, int], RunFolder]:
    """The finished runs in a folder, by their methods' titles and seeds."""
    results = {run: run.finished() for run in find_runs([folder])}
    return {(result.names.method, result.seed): run for run, result in results.items() if result.names}


def with_decays(rungs: list[int], protocol: Protocol, base: float, step: int, steps_per_epoch: int) -> float:
    """A rate that is constant but for short decays that end at the rungs and at the end."""
    epoch = step / steps_per_epoch
    ends = [0.0, *map(float, rungs), float(protocol.epochs)]
    begin, end = next((one, two) for one, two in pairwise(ends) if epoch < two)
    falling = (end - epoch) / (DECAY * (end - begin))
    return learning_rate(protocol, base, step, steps_per_epoch) * min(1.0, falling)


def grid_of(out: Path, file: Path | None) -> dict[tuple[str, int], float]:
    """The top-1 of each run of the grid, by its method's title and seed: from its table, or else from the runs."""
    if file:
        table = pd.read_csv(file)
        return dict(zip(zip(table["method"], table["seed"], strict=True), table["top1"], strict=True))
    runs = runs_in(out / "grid") if (out / "grid").is_dir() else {}
    return {key: run.finished().top1 for key, run in runs.items()}


def tables(case: Case, out: Path, title: str, results: Path, file: Path | None) -> None:
    """Write what was found; ``file`` is the grid's table, where its runs are not here."""
    folders = sorted(out.glob("repeat-*"), key=lambda path: int(path.name.split("-")[1]))
    peaks = {folder.name: json.loads((folder / "peaks.json").read_text()) for folder in folders}
    memory = [
        {"repeat": name, "stage": stage, "bytes": most} for name, each in peaks.items() for stage, most in each.items()
    ]
    publish(pd.DataFrame(memory), file_of(results, f"recommend-{title}-memory", this_machine()))
    grid = grid_of(out, file)
    if not grid:
        return
    made = Search.read(out / "repeat-0")
    sizes = sorted({USUAL_SEEDS, case.grid_seeds})
    means = {
        n: {one.title: fmean(grid[one.title, seed] for seed in case.seeds[:n]) for one in made.candidates}
        for n in sizes
    }
    rows, claims = [], []
    for folder in folders:
        found = Recommendation.read(folder)
        [answer] = found.answers
        chosen = answer.best.candidate.title
        stages = list(peaks[folder.name].values())
        spent = sum(halving.epochs_of([len(found.search.candidates)], len(REFERENCES), found.search.epochs))
        behind = {n: max(known.values()) - known[chosen] for n, known in means.items()}
        rows.append(
            {
                "repeat": folder.name,
                "choice": chosen,
                **{f"points below the best of a grid of {n} seeds": points for n, points in behind.items()},
                **{f"is within {WITHIN} points, {n} seeds": points <= WITHIN for n, points in behind.items()},
                "epochs": spent,
                **{
                    f"share of a grid of {n} seeds": spent / (n * len(found.search.candidates) * found.search.epochs)
                    for n in (SEEDS, USUAL_SEEDS)
                },
                "memory after the first rung": stages[0],
                "memory in the end": stages[-1],
            }
        )
        for one in answer.finalists[1:]:
            if not one.reason and one.is_apart:
                claim: dict[str, Any] = {
                    "repeat": folder.name,
                    "better": chosen,
                    "worse": one.candidate.title,
                    "difference": one.behind.mean,
                    "p": one.p,
                }
                for n in sizes:
                    values = ([grid[name, seed] for seed in case.seeds[:n]] for name in (chosen, one.candidate.title))
                    seen = statistics.paired(*values)
                    claim[f"difference over {n} seeds"] = seen.mean
                    claim[f"p over {n} seeds"] = seen.p
                    claim[f"{n} seeds show it"] = seen.p < statistics.ALPHA and seen.mean > 0
                claims.append(claim)
    correlations = [
        {"schedule": name, **row, "is rung": row["epoch"] in made.rungs}
        for name in SCHEDULES
        if folder_of(out, name).is_dir()
        for row in correlated(runs_in(folder_of(out, name)), means[case.grid_seeds])
    ]
    machine = this_machine()
    whole = [{"method": title, "seed": seed, "top1": top1} for (title, seed), top1 in sorted(grid.items())]
    for name, part in (("grid", whole), ("repeats", rows), ("claims", claims), ("schedules", correlations)):
        if part:
            publish(pd.DataFrame(part), file_of(results, f"recommend-{title}-{name}", machine))


def correlated(runs: Mapping[tuple[str, int], RunFolder], means: Mapping[str, float]) -> list[dict[str, Any]]:
    """Spearman's correlation of the ranks after each epoch with those of the grid's means, for each seed.

    Ranks are by negative log-likelihood, and for comparison by top-1.
    """
    rows = []
    for seed in sorted({seed for _, seed in runs}):
        histories = {title: run.read_history() for (title, found), run in runs.items() if found == seed}
        for epoch, records in enumerate(zip(*histories.values(), strict=True)):
            truth = [means[title] for title in histories]
            row: dict[str, Any] = {"epoch": epoch + 1, "seed": seed}
            for name, sign in (("nll", -1), ("top1", 1)):
                values = [record.get(name) for record in records]
                if None not in values:
                    row[f"rank correlation by {name}"] = float(
                        stats.spearmanr([sign * value for value in values], truth).statistic
                    )
            rows.append(row)
    return rows


def main() -> None:
    parser = arguments_of(__doc__)
    parser.add_argument("what", choices=["train", "tables"])
    parser.add_argument("case", choices=[*CASES])
    parser.add_argument("--data", default="digits", help="a data set, such as folder:pictures")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--part", nargs="+", default=["grid", "repeats", "schedules"])
    parser.add_argument("--grid", type=Path, help="of tables: that of the grid, where its runs are not under --out")
    given = parser.parse_args()
    case, out = CASES[given.case], given.out / given.case
    if given.what == "train":
        train(case, given.data, out, given.repeats, given.part)
    else:
        title = f"{case.teacher}-{case.student}-{given.case}-{case.protocol['epochs']}epochs"
        tables(case, out, title, given.results, given.grid)


if __name__ == "__main__":
    main()
