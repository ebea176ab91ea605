"""Suites: grids of runs in YAML, from which the runs follow one by one.

A suite is a mapping::

    data: digits                  # or {name: cifar100, limit: 2000}, or a list of such
    protocol: quick               # or {name: crd, epochs: 30}
    pairs:                        # teacher, student; a pair may have a recipe of its own
      - [vit_s, resnet18]
      - {teacher: swin_t, student: deit_t, protocol: ofa-vit}
    distillers:                   # names, or names with keywords
      - kd
      - {name: uhkd, spectrum: spatial}
    seeds: [0, 1, 2]
    teacher: {epochs: 30}         # settings of the teachers' own training, if any
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

import yaml

from kdzoo import config
from kdzoo.errors import UserError, unknown
from kdzoo.files import shipped_folder

KEYS = ("data", "protocol", "pairs", "distillers", "seeds", "teacher")
REQUIRED = ("pairs", "distillers")


@dataclass(frozen=True)
class Suite:
    """A name and its runs, in the order of the file: data, pair, seed, method."""

    name: str
    runs: tuple[config.Settings, ...]


def shipped() -> list[str]:
    """The names of the suites that come with kdzoo."""
    return sorted(f.name.removesuffix(".yaml") for f in _files())


def load(name: str, seeds: Sequence[int] = (), overrides: Sequence[str] = ()) -> Suite:
    """A suite of ``configs/suites``, or of a YAML file by its path, as checked settings.

    Args:
        name: the suite.
        seeds: instead of the file's.
        overrides: ``key=value`` settings for every run, such as ``protocol.epochs=30``.

    Raises:
        UserError: an unknown suite, key, method, network option or data set; a run that stands there twice.
    """
    path = Path(name).expanduser()
    if path.suffix in (".yaml", ".yml"):
        if not path.is_file():
            raise UserError(f"no file {name}; expected a YAML file with the keys {', '.join(KEYS)}")
        text, title = path.read_text(encoding="utf-8"), path.stem
    else:
        known = {f.name.removesuffix(".yaml"): f for f in _files()}
        if name not in known:
            raise unknown("suite", name, known, hint="(a file's path ends with .yaml)")
        text, title = known[name].read_text(encoding="utf-8"), name
    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"suite {name} is no valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, Mapping):
        raise UserError(f"suite {name} holds no mapping; expected the keys {', '.join(KEYS)}")
    for key in content:
        if key not in KEYS:
            raise unknown(f"key in suite {name}", str(key), KEYS)
    for key in REQUIRED:
        if not content.get(key):
            raise UserError(f"suite {name} has no {key}; expected a list of them")
    return Suite(title, tuple(_runs(title, content, seeds, overrides)))


def _runs(
    title: str, content: Mapping[str, Any], seeds: Sequence[int], overrides: Sequence[str]
) -> list[config.Settings]:
    runs: list[config.Settings] = []
    seen: set[str] = set()
    for data in _list(content.get("data", "digits")):
        for pair in content["pairs"]:
            teacher, student, protocol = _pair(title, pair, content.get("protocol", "quick"))
            for seed in seeds or content.get("seeds", (0,)):
                for distiller in content["distillers"]:
                    settings = config.resolve(
                        {
                            "data": _named(data),
                            "protocol": _named(protocol),
                            "teacher": {**content.get("teacher", {}), "name": teacher},
                            "student": {"name": student},
                            "distiller": _named(distiller),
                            "seed": seed,
                        },
                        overrides,
                    )
                    if settings.identity() in seen:
                        raise UserError(
                            f"suite {title} has a run twice: {teacher} -> {student}, {distiller}, seed {seed}; "
                            "remove one of them"
                        )
                    seen.add(settings.identity())
                    runs.append(settings)
    return runs


def _pair(title: str, pair: Any, protocol: Any) -> tuple[str | None, str, Any]:
    if isinstance(pair, Mapping) and {"teacher", "student"} <= pair.keys() <= {"teacher", "student", "protocol"}:
        return pair["teacher"], pair["student"], pair.get("protocol", protocol)
    if isinstance(pair, Sequence) and not isinstance(pair, str) and len(pair) == 2:
        return pair[0], pair[1], protocol
    raise UserError(f"suite {title}: {pair} is no pair; expected [teacher, student]")


def _named(entry: Any) -> dict[str, Any]:
    return dict(entry) if isinstance(entry, Mapping) else {"name": entry}


def _list(entry: Any) -> list[Any]:
    return entry if isinstance(entry, list) else [entry]


def _files() -> list[Traversable]:
    folder = shipped_folder() / "suites"
    return [f for f in folder.iterdir() if f.name.endswith(".yaml")] if folder.is_dir() else []
