"""The names of a run's parts as tables show them, with what differs from the defaults: equal names are comparable."""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from kdzoo.data import option_settings
from kdzoo.errors import UserError
from kdzoo.resolve import distiller_settings, files_by_part, preset, read_protocol
from kdzoo.settings import DataSettings, Settings, StudentSettings, TeacherSettings

ALONE = "-"  # the teacher of a student that has none


@dataclass(frozen=True)
class Names:
    """The names of a run's parts; a method's defaults are those of the preset for the pair, where there is one."""

    method: str
    protocol: str
    data: str
    teacher: str
    student: str
    preset: bool  # whether the method has the keywords that the field uses for the pair
    # Of the method, recipe, teacher and student that consist of files of the user's: a hash of these, by the part.
    versions: dict[str, str] = field(default_factory=dict)


def names_of(settings: Settings) -> Names:
    """Name the parts of a run."""
    plain = settings.plain()
    parts = {part: plain[part]["name"] for part in ("distiller", "data", "protocol", "teacher", "student")}
    usual = preset(**{**parts, "teacher": settings.teacher.title})
    keywords = plain["distiller"]
    return Names(
        method=_named(keywords, lambda name: {"name": name, **distiller_settings({"name": name, **usual}).keywords}),
        protocol=_protocol(plain["protocol"]),
        data=_data(plain["data"]),
        teacher=_teachers(settings.teacher, settings.protocol.name) if settings.teacher.name else ALONE,
        student=_named(plain["student"], lambda _: asdict(StudentSettings())),
        preset=bool(usual) and all(keywords.get(key) == value for key, value in usual.items()),
        versions=dict(_versions(settings)),
    )


def _versions(settings: Settings) -> Iterator[tuple[str, str]]:
    for part, files in files_by_part(settings).items():
        found = [settings.files.get(name, "") for name in sorted(files)]
        if found and part != "data":  # which have a fingerprint
            yield part, hashlib.sha256(" ".join(found).encode()).hexdigest()


def _named(settings: Mapping[str, Any], defaults_of: Callable[[str], dict[str, Any]]) -> str:
    """Name a part of the settings, with what differs from its defaults."""
    try:
        defaults = json.loads(json.dumps(defaults_of(settings["name"])))
    except UserError:  # a file that it comes from is gone since the run began
        return str(settings["name"])
    changed = [change for change in _changes(settings, defaults) if not change.startswith("name=")]
    return f"{settings['name']} ({', '.join(changed)})" if changed else str(settings["name"])


def _changes(settings: Mapping[str, Any], defaults: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Give ``key=value`` of each difference; nested settings have dotted keys."""
    for key, value in settings.items():
        usual = defaults.get(key)
        if isinstance(value, Mapping) and isinstance(usual, Mapping):
            yield from _changes(value, usual, f"{prefix}{key}.")
        elif value != usual:
            yield f"{prefix}{key}={value}"


def _teachers(settings: TeacherSettings, protocol: str) -> str:
    """Name the teacher, or all of them, and how several answer where that is not the usual way."""
    together = {key: getattr(settings, key) for key in ("combine", "features")}
    names = " + ".join(_teacher(asdict(part), protocol) for part in settings.parts)
    return _named({"name": names, **together}, lambda _: asdict(TeacherSettings()))


def _teacher(settings: Mapping[str, Any], protocol: str) -> str:
    """Name a teacher with what sets it apart: its recipe where it is not the student's, its weights' file."""
    named = json.loads(json.dumps(settings))
    if named.get("protocol") == protocol:
        named["protocol"] = None
    if named.get("weights"):
        named["weights"] = Path(named["weights"]).name
    return _named(named, lambda _: asdict(TeacherSettings()))


def _protocol(settings: Mapping[str, Any]) -> str:
    """Name a recipe with what sets it apart: its epochs, but not the milestones and the warm-up that follow."""

    def usual(name: str) -> dict[str, Any]:
        return {**asdict(read_protocol(name, settings["epochs"])), "epochs": read_protocol(name).epochs}

    return _named(settings, usual)


def _data(settings: Mapping[str, Any]) -> str:
    """Name a data set with what sets it apart: options, a limit, and how its images are read."""
    limit, given = settings["limit"], settings["options"]
    usual: dict[str, Any] = {}
    with suppress(UserError):  # a set that is not there any more is named with all its options
        usual = option_settings(settings["name"], {}) if given else {}
    changed = [f"{key}={value}" for key, value in given.items() if value != usual.get(key)]
    changed += [f"{limit} images"] if limit else []
    others = {key: value for key, value in settings.items() if key not in ("name", "limit", "options", "fingerprint")}
    changed += _changes(others, asdict(DataSettings()))
    return f"{settings['name']} ({', '.join(changed)})" if changed else str(settings["name"])
