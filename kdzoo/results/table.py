"""Make tables of finished runs: one row for each data set, protocol, pair and method."""

import math
import warnings
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd

from kdzoo import registry
from kdzoo.errors import UserError, unknown, visible
from kdzoo.files import path_of
from kdzoo.naming import ALONE
from kdzoo.results import published, statistics
from kdzoo.results.unfinished import find_searches, none_finished, trials, unfinished
from kdzoo.store.folder import RunFolder, find_runs

BASELINE = "kd"
SECTION = ["data", "protocol", "ship", "measured"]  # what is compared with each other agrees in these
PAIR = ["teacher", "student"]
MEASURES = ("top1", "best_top1", "top5")  # top1 and top5 are of the last epoch
TIMES = ("seconds", "images_per_second", "latency_1", "latency_64")
LIKENESS = ("agreement", "kl", "knn", "probe")  # of students that learned without labels or without a classifier
NUMBERS = ("teacher_top1", *MEASURES, *TIMES, *LIKENESS)
COUNTS = ("parameters", "extra_parameters", "peak_memory", "flops", "file_bytes")


def table(folders: str | Path | Iterable[str | Path], baseline: str = BASELINE) -> pd.DataFrame:
    """Compare the finished runs in or below ``folders``: one row for each data set, protocol, pair and method.

    Accuracies are in percent, with mean, deviation and 95 % interval over seeds. ``difference`` is the method's top-1
    minus the baseline's over the seeds that both have, of the students that are kept; ``p_holm`` is its corrected
    p-value, ``verdict`` says in a word whether it holds, and published numbers stand beside ours. Runs that keep the
    last student and those that keep the best (``ship``) are never compared with each other, nor runs whose top-1 is
    another share (``measured``: accuracy, agreement, knn or neighbours).

    Args:
        folders: one folder of runs, or several.
        baseline: the method that the others are compared with.

    Raises:
        UserError: there is no such folder, no finished run, or no run of the baseline.

    Warns:
        UserWarning: runs are left out, as they are damaged, failed or not finished.

    Example:
        >>> for name in ("none", "kd"):
        ...     _ = kdzoo.run(name, "resnet8", "resnet14", overrides=quick, out="compared", quiet=True)
        >>> found = kdzoo.table("compared", baseline="none")
        >>> sorted(zip(found["method"], found["verdict"]))
        [('kd', 'no test (n = 1)'), ('none', 'baseline')]
    """
    given = folders if isinstance(folders, Iterable) and not isinstance(folders, str) else [folders]
    paths = [path_of(path) for path in given]
    if not paths:
        raise UserError("no folder is named; expected one or several, with finished runs in or below them")
    runs, waiting = rows(find_runs(paths)), unfinished(paths, trials(find_searches(paths)))
    if runs.empty:
        raise none_finished(paths, waiting)
    for line in [*runs.attrs["left_out"], *waiting]:
        warnings.warn(line, stacklevel=2)
    check_baseline(runs, baseline)
    return summary(runs, baseline)


def rows(folders: Iterable[RunFolder]) -> pd.DataFrame:
    """Make one row for each finished run: its result, and its device and precision.

    Its names are those of ``kdzoo.naming``, written down when it ended: nothing that its settings name is imported.
    Damaged folders are left out; the attribute ``left_out`` of the table says which and why.

    Raises:
        UserError: there are damaged folders and no other.
    """
    found, left_out = [], list[UserError]()
    for folder in folders:
        try:
            result, machine = folder.read_result(), folder.read_environment()
        except UserError as error:
            left_out.append(error)
            continue
        if result is None:
            continue
        values = result.plain()
        found.append(
            {
                **values,
                **values.pop("names"),
                "folder": folder.path,
                "device": machine.get("device") or "unknown",
                "precision": machine.get("precision") or "unknown",
            }
        )
    if left_out and not found:
        raise left_out[0]
    if not found:
        return pd.DataFrame()
    table = pd.DataFrame(found).map(lambda value: visible(value) if isinstance(value, str) else value)
    for name in (*NUMBERS, *COUNTS):
        table[name] = pd.to_numeric(table[name], errors="coerce")
    versions = table.pop("versions")
    _tell_apart(table, "data", table.pop("fingerprint"))
    for part in ("method", "protocol", *PAIR):
        _tell_apart(table, part, versions.map(lambda found, part=part: found.get(part, "")))
    table.attrs["left_out"] = [f"left out: {visible(str(error))}" for error in left_out]
    return table


def _tell_apart(table: pd.DataFrame, column: str, contents: pd.Series) -> None:
    """Add the first digits of its hash to each name in a column that stands for different contents."""
    differ = contents.groupby(table[column]).transform("nunique") > 1
    table.loc[differ, column] += " [" + contents[differ].str[:6].replace("", "unknown") + "]"


def repeated(runs: pd.DataFrame) -> int:
    """Count the runs that repeat a row's seed, in another precision or from an edited file."""
    return int(runs.duplicated([*SECTION, *PAIR, "method", "seed"]).sum())


def observations(runs: pd.DataFrame) -> pd.DataFrame:
    """Make one row for each section, pair, method and seed.

    A student trained alone stands beside every teacher of its student, since it is what each of them must beat.
    Several runs of one seed count once, by their mean; of their fidelities the least sure counts.
    """
    student = [*SECTION, "student"]
    alone, distilled = runs[runs["teacher"] == ALONE], runs[runs["teacher"] != ALONE]
    pairs = distilled[[*SECTION, *PAIR]].drop_duplicates()
    beside = alone.drop(columns="teacher").merge(pairs, on=student)
    lonely = alone[~pd.MultiIndex.from_frame(alone[student]).isin(pd.MultiIndex.from_frame(pairs[student]))]
    everyone = pd.concat([part for part in (distilled, beside, lonely) if len(part)])
    return (
        everyone.groupby([*SECTION, *PAIR, "method", "seed"], sort=False)
        .agg(
            fidelity=("fidelity", lambda names: max(names, key=_doubt)),
            **{name: (name, "mean") for name in NUMBERS},
            **{name: (name, "max") for name in COUNTS},
        )
        .reset_index()
    )


def summary(runs: pd.DataFrame, baseline: str = BASELINE) -> pd.DataFrame:
    """Make one row for each section, pair and method, with unrounded numbers; unknown values are NaN.

    Accuracies are in percent. ``difference`` is in top-1 of the students that are kept, over the seeds that the method
    and the baseline both have (``compared`` many); ``p_holm`` is corrected over the methods of the same pair.
    The published number of either epoch stands beside ours, its difference being ours minus it.
    """
    seen = observations(runs)
    found = []
    for key, pair in groups(seen, [*SECTION, *PAIR]):
        compared = _compare(pair, baseline)
        where = dict(zip([*SECTION, *PAIR], key, strict=True))
        block = []
        for method, group in pair.groupby("method", sort=False):
            row: dict[str, Any] = {**where, "method": method, "fidelity": max(group["fidelity"], key=_doubt)}
            row |= {"seeds": len(group), "teacher_top1": group["teacher_top1"].mean()}
            for name in MEASURES:
                measured = statistics.mean(group[name])
                row |= {f"{name}_{part}": getattr(measured, part) for part in ("mean", "std", "low", "high")}
            row |= compared[str(method)]
            for epoch, ours in (("last", row["top1_mean"]), ("best", row["best_top1_mean"])):
                row |= _beside(published.find(**where, method=str(method), epoch=epoch), ours, epoch)
            row |= {name: group[name].mean() for name in (*TIMES, *LIKENESS)}
            row |= {name: group[name].max() for name in COUNTS}
            block.append(row)
        found += sorted(block, key=lambda row: -row[f"{shipped(pair)}_mean"])
    table = pd.DataFrame(found)
    return table.astype(dict.fromkeys(COUNTS, "Int64"))


def comparisons(runs: pd.DataFrame, baseline: str = BASELINE) -> pd.DataFrame:
    """Make one row for each section and method, with its difference to the baseline over all pairs.

    ``difference`` is over the pairs and seeds that the method and the baseline both have, ``p_holm`` corrected
    over the methods. Where one of the two has no teacher, its run counts once: beside the mean over the teachers of
    its student. The test is about these pairs, not about pairs in general: for those, see the ranks.
    ``rank`` is the average over the pairs that all ranked methods have, missing for a method that lacks one.
    """
    seen = observations(runs)
    alone = set(runs.loc[runs["teacher"] == ALONE, "method"])
    found = []
    for key, section in groups(seen, SECTION):
        compared = _compare(section, baseline, alone)
        ranks = average_ranks(scores(section))
        block = []
        for method, group in section.groupby("method", sort=False):
            row: dict[str, Any] = {**dict(zip(SECTION, key, strict=True)), "method": method}
            row |= {"fidelity": max(group["fidelity"], key=_doubt), "pairs": len(group[PAIR].drop_duplicates())}
            block.append(row | compared[str(method)] | {"rank": ranks.get(str(method), math.nan)})
        found += sorted(block, key=lambda row: math.inf if math.isnan(row["rank"]) else row["rank"])
    return pd.DataFrame(found)


def shipped(section: pd.DataFrame) -> str:
    """Name the measure of the students that a section keeps: top-1 of the best epoch, or of the last."""
    return "best_top1" if "best" in set(section["ship"]) else "top1"


def scores(section: pd.DataFrame) -> pd.DataFrame:
    """Tabulate the mean top-1 of the students that are kept, pairs x methods, without those that have gaps.

    The pair or method that lacks the larger share of its cells is left out, one after the other.
    """
    named = section.assign(pair=[pair_name(*pair) for pair in zip(section["teacher"], section["student"], strict=True)])
    table = named.pivot_table(index="pair", columns="method", values=shipped(section), aggfunc="mean", sort=False)
    while table.isna().any(axis=None):
        pairs, methods = table.isna().mean(axis=1), table.isna().mean(axis=0)
        table = (
            table.drop(index=pairs.idxmax()) if pairs.max() > methods.max() else table.drop(columns=methods.idxmax())
        )
    return table


def groups(table: pd.DataFrame, by: list[str]) -> Iterator[tuple[tuple[str, ...], pd.DataFrame]]:
    """Iterate over the groups of rows that agree in the columns ``by``: their values there, and the rows."""
    for key, group in table.groupby(by, sort=False):
        yield tuple(map(str, key)), group


def pair_name(teacher: str, student: str) -> str:
    """Write a pair as ``vit_s → resnet18``, or as the student alone if it has no teacher."""
    return student if teacher == ALONE else f"{teacher} → {student}"


def average_ranks(complete: pd.DataFrame) -> dict[str, float]:
    """Compute the average rank of each method of ``scores``; empty if there is one pair or one method."""
    if min(complete.shape) < 2:
        return {}
    return dict(zip(map(str, complete.columns), map(float, statistics.average_ranks(complete)), strict=True))


def check_baseline(runs: pd.DataFrame, baseline: str) -> None:
    """Check that there are runs of the method ``baseline``."""
    if baseline not in set(runs["method"]):
        raise unknown("baseline", baseline, set(runs["method"]), hint="(a method of the table, as the table names it)")


def _compare(seen: pd.DataFrame, baseline: str, alone: Collection[str] = ()) -> dict[str, dict[str, Any]]:
    """For each method its paired difference to the baseline; p is corrected over the methods.

    ``alone`` are methods without a teacher: the same run stands beside every teacher, and counts once.
    """
    top1 = shipped(seen)
    groups = {str(name): group.set_index([*PAIR, "seed"])[top1] for name, group in seen.groupby("method")}
    theirs = groups.get(baseline)
    differences = {}
    for name, ours in groups.items():
        if theirs is not None and name != baseline:
            both = pd.concat({"ours": ours, "theirs": theirs}, axis=1, join="inner")
            if name in alone or baseline in alone:
                both = both.groupby(level=["student", "seed"]).mean()
            differences[name] = statistics.paired(both["ours"], both["theirs"])
    corrected = dict(zip(differences, statistics.holm([d.p for d in differences.values()]), strict=True))
    found: dict[str, dict[str, Any]] = {}
    for name in groups:
        blank = statistics.Difference(0, *[math.nan] * 4)
        d = differences.get(name, blank)
        said = "baseline" if name == baseline else ""
        found[name] = {
            "difference": d.mean,
            "difference_low": d.low,
            "difference_high": d.high,
            "compared": d.n,
            "p": d.p,
            "p_holm": corrected.get(name, math.nan),
            "verdict": statistics.verdict(d, corrected[name]) if name in corrected else said,
        }
    return found


def _beside(number: published.Published | None, ours: float, epoch: str) -> dict[str, Any]:
    return {
        f"published_{epoch}_top1": number.top1 if number else math.nan,
        f"published_{epoch}_difference": ours - number.top1 if number else math.nan,
        f"published_{epoch}_source": number.source if number else "",
        f"published_{epoch}_status": number.status if number else "",
        f"published_{epoch}_note": number.note if number else "",
    }


def _doubt(fidelity: str) -> int:
    """The place of a fidelity in the order of doubt; one that is not known is the least sure."""
    known = list(registry.FIDELITIES)
    return known.index(fidelity) if fidelity in known else len(known)
