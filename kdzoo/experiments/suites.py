"""Suites: grids of runs in YAML, from which the runs follow one by one.

A suite is a mapping::

    data: digits                  # or {name: cifar100, limit: 2000}, or a list of such
    protocol: quick               # or {name: crd, epochs: 30}
    pairs:                        # teacher, student; a pair may have its own recipe and its own methods
      - [vit_s, resnet18]
      - {teacher: swin_t, student: deit_t, protocol: ofa-vit, distillers: [none, kd]}
      - [[resnet56, vit_s], resnet18]  # two teachers that answer together
    distillers:                   # names, or names with keywords; or all, for every method that is installed
      - kd
      - {name: uhkd, spectrum: spatial}
    seeds: [0, 1, 2]
    teacher: {epochs: 30}         # settings of the teachers' own training, if any
    name: mine                    # by default that of the file
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.resources.abc import Traversable
from typing import Any, NamedTuple

from kdzoo import registry
from kdzoo.errors import UserError, unknown
from kdzoo.files import files_named, path_of, read_text, shipped_folder, slug
from kdzoo.keywords import read_yaml
from kdzoo.resolve import merged, resolve, several
from kdzoo.settings import Run, Settings

LISTS = {"pairs": "[[vit_s, resnet18]]", "distillers": "[none, kd]", "seeds": "[0, 1, 2]"}
DEFAULTS: dict[str, Any] = {
    "data": "digits",
    "protocol": "quick",
    "pairs": None,
    "distillers": None,
    "seeds": [0],
    "teacher": {},
    "name": "",
}
KEYS = tuple(DEFAULTS)
MOST_RUNS = 10_000  # of one suite


@dataclass(frozen=True)
class Suite:
    """A name and its runs, in the order of the file: data, pair, seed, method."""

    name: str
    runs: tuple[Run, ...]
    file: str = ""  # what ``load`` read it from: a name or a path
    seeds: int = 0  # and was given beside it
    overrides: tuple[str, ...] = ()

    def arguments(self) -> list[str]:
        """Return what ``kdzoo bench`` is given to load it again.

        Raises:
            UserError: it was made in Python.
        """
        if not self.file:
            raise UserError(f"suite {self.name} was made in Python; several workers need a suite's name or YAML file")
        return [self.file, *(["--seeds", str(self.seeds)] if self.seeds else []), *self.overrides]


def shipped() -> list[str]:
    """List the names of the suites that come with kdzoo."""
    return sorted(f.name.removesuffix(".yaml") for f in _files())


def load(
    name: str, seeds: int = 0, overrides: Sequence[str] = (), report: Callable[[str], object] = lambda text: None
) -> Suite:
    """Load a suite of ``configs/suites``, or of a YAML file by its path, as checked settings.

    Args:
        name: the suite.
        seeds: this many, from 0, instead of the file's.
        overrides: ``key=value`` settings for every run, such as ``protocol.epochs=30``; ``seed=5`` takes the place of
            the file's seeds.
        report: is told what is read.

    Raises:
        UserError: an unknown suite, key, method, network option or data set; a run that stands there twice; too many.
    """
    path = path_of(name)
    if path.suffix in (".yaml", ".yml"):
        if not path.is_file():
            raise UserError(f"no file {name}; expected a YAML file with the keys {', '.join(KEYS)}")
        text, title = read_text(path), path.stem
    else:
        known = {f.name.removesuffix(".yaml"): f for f in _files()}
        if name not in known:
            near = files_named(name, ".yaml", ".yml")
            raise unknown("suite", name, [*known, *near], hint="(a file's path ends with .yaml)")
        text, title = known[name].read_text(encoding="utf-8"), name
    content = {**DEFAULTS, **read_yaml(text, f"suite {name}")}
    content["distillers"] = _every(content["distillers"])
    for key, value in content.items():
        if key not in KEYS:
            raise unknown(f"key in suite {name}", key, KEYS)
        if key in LISTS and (not isinstance(value, list) or not value):
            raise UserError(f"suite {name} has no list of {key}; expected one, such as {key}: {LISTS[key]}")
    if "seed" in (given := merged({}, overrides)):
        if seeds:
            raise UserError(f"--seeds {seeds} and seed={given['seed']}: expected one of them")
        content["seeds"] = [given["seed"]]
    for seed in content["seeds"]:
        if type(seed) is not int or not 0 <= seed < 2**63:
            raise UserError(
                f"suite {name}: seed {seed!r}: expected a whole number from 0 to {2**63 - 1}, written without quotes"
            )
    if content["name"]:
        title = str(content["name"])
        if slug(title) != title:
            raise UserError(f"suite {name}: name={title}: expected letters, digits, dots, underscores and hyphens")
    content |= {"data": _list(content["data"]), "seeds": range(seeds) if seeds else content["seeds"]}
    pairs = [_pair(title, pair, content) for pair in content["pairs"]]
    size = len(content["data"]) * sum(len(pair.distillers) for pair in pairs) * len(content["seeds"])
    if size > MOST_RUNS:
        raise UserError(f"suite {name} has {size:,} runs; expected at most {MOST_RUNS:,}: lower --seeds, or part it")
    runs = _runs(title, content, pairs, overrides, report)
    return Suite(title, tuple(runs), name, seeds, tuple(overrides))


class _Pair(NamedTuple):
    teachers: Sequence[str]
    student: str
    protocol: Any
    distillers: Sequence[Any]


def _runs(
    title: str,
    content: Mapping[str, Any],
    pairs: Sequence[_Pair],
    overrides: Sequence[str],
    report: Callable[[str], object],
) -> list[Run]:
    from kdzoo import models  # which imports torch and timm

    if not isinstance(content["teacher"], Mapping) or "name" in content["teacher"]:
        raise UserError(
            f"suite {title}: teacher is {content['teacher']}; expected settings of it, such as {{epochs: 30}}"
        )
    runs: list[Run] = []
    seen: set[tuple[registry.Plugin, str]] = set()
    for data in content["data"]:
        fingerprint = None  # computed once for all runs on these data
        for teachers, student, protocol, distillers in pairs:
            teacher = "+".join(teachers) or None
            for network in (*teachers, student):
                models.check_name(network)
            report(f"reading suite {title}: {teacher} -> {student}")
            first = content["seeds"][0]
            resolved = []
            for distiller in distillers:
                run = resolve(
                    {
                        "data": _named(title, "data", data),
                        "protocol": _named(title, "protocol", protocol),
                        "teacher": {**content["teacher"], **several(teachers)},
                        "student": {"name": student},
                        "distiller": _named(title, "distiller", distiller),
                        "seed": first,
                    },
                    overrides,
                    fingerprint=fingerprint,
                )
                fingerprint = run.settings.data.fingerprint
                resolved.append((run, registry.find(run.settings.distiller.name)))
            for seed in content["seeds"]:
                for distiller, (run, method) in zip(distillers, resolved, strict=True):
                    run = run._replace(settings=replace(run.settings, seed=seed))
                    if (same := (method, _without_paths(run.settings))) in seen:
                        under = f", where {' '.join(overrides)} applies to every run" if overrides else ""
                        raise UserError(
                            f"suite {title} has a run twice: {teacher} -> {student}, {distiller}, seed {seed}{under}; "
                            f"remove one of them{' or that setting' if overrides else ''}"
                        )
                    seen.add(same)
                    runs.append(run)
    return runs


def _without_paths(settings: Settings) -> str:
    """Hash all but how files and the method are named, since one file may be named by two paths."""
    contents = dict.fromkeys(settings.files.values(), "")
    return replace(settings, distiller=replace(settings.distiller, name=""), files=contents).identity()


def _pair(title: str, pair: Any, content: Mapping[str, Any]) -> _Pair:
    own = {key: content[key] for key in ("protocol", "distillers")}
    named = dict(zip(("teacher", "student"), pair, strict=False)) if isinstance(pair, list) and len(pair) == 2 else pair
    is_pair = isinstance(named, Mapping) and {"teacher", "student"} <= named.keys() <= {"teacher", "student", *own}
    teacher, student = (named["teacher"], named["student"]) if is_pair else ("", "")
    teachers = (teacher or [""]) if isinstance(teacher, list) else [] if teacher is None else [teacher]
    if not student or not all(isinstance(name, str) and name for name in (student, *teachers)):
        raise UserError(f"suite {title}: {pair} is no pair; expected [teacher, student]")
    found = _Pair(teachers, student, *({**own, **named}[key] for key in own))
    found = found._replace(distillers=_every(found.distillers))
    if not isinstance(found.distillers, list) or not found.distillers:
        raise UserError(f"suite {title}: {pair} has no list of distillers; expected one, such as [none, kd]")
    return found


def _named(title: str, kind: str, entry: Any) -> dict[str, Any]:
    if isinstance(entry, Mapping) and isinstance(entry.get("name"), str):
        return dict(entry)
    if isinstance(entry, str):
        return {"name": entry}
    raise UserError(f"suite {title}: {entry} is no {kind}; expected a name, or {{name: ..., KEY: value}}")


def _every(distillers: Any) -> Any:
    return registry.names() if distillers == "all" else distillers


def _list(entry: Any) -> list[Any]:
    return entry if isinstance(entry, list) and entry else [entry]


def _files() -> list[Traversable]:
    folder = shipped_folder() / "suites"
    return [f for f in folder.iterdir() if f.name.endswith(".yaml")] if folder.is_dir() else []
