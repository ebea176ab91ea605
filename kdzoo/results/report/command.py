"""Write the command that makes a run again, from the settings that its folder holds; no code that they name is run."""

import json
import re
import shlex
from collections.abc import Mapping
from dataclasses import asdict
from functools import cache
from typing import Any

from kdzoo.data import option_settings
from kdzoo.errors import UserError
from kdzoo.keywords import flat
from kdzoo.resolve import distiller_settings, preset, protocol_names, read_protocol
from kdzoo.settings import Place, Run, Settings

OPTIONS = {
    "distiller.name": "--distiller",
    "teacher.name": "--teacher",
    "teacher.weights": "--teacher-weights",
    "student.name": "--student",
    "data.name": "--data",
    "data.root": "--data-root",
    "protocol.name": "--protocol",
    "protocol.epochs": "--epochs",
    "seed": "--seed",
    "engine.precision": "--precision",
    "output.root": "--out",
}
KEPT = ("teacher.allow_weak", "data.root", "output.root")  # keys of the place that a command needs
PLAIN = re.compile(r"[A-Za-z_./][\w./+-]*")


def command(config: Mapping[str, Any]) -> str:
    """Write the ``kdzoo run`` that makes a run of these settings, which are those of ``RunFolder.read_config``.

    Settings at their defaults are left out, except those of code outside of what is installed, whose defaults are
    unknown here.

    Raises:
        UserError: a setting is none that kdzoo writes.
    """
    try:
        return shlex.join(_words(config))
    except (TypeError, ValueError, LookupError, AttributeError) as error:
        raise UserError(f"the settings of the run are damaged ({error}): no command") from error


def _words(config: Mapping[str, Any]) -> list[str]:
    names = {part: config[part]["name"] or "" for part in ("distiller", "data", "protocol", "teacher", "student")}
    if others := config["teacher"].get("others"):  # for which no keywords are published
        names["teacher"] = "+".join([names["teacher"], *(other["name"] for other in others)])
    parts = names.values()
    given, usual = flat(config), _usual(*map(str, parts), config["protocol"].get("epochs"))
    place = flat(asdict(Place()))
    words = ["kdzoo", "run"]
    for key, option in OPTIONS.items():
        if key in given and given[key] != usual.get(key):
            words += [option, str(given[key])]
    for key, value in given.items():
        decides = key not in place or key in KEPT
        if key not in OPTIONS and decides and not key.startswith("files.") and key != "data.fingerprint":
            words += [f"{key}={_text(value)}"] if key not in usual or usual[key] != value else []
    return words


@cache
def _usual(distiller: str, data: str, protocol: str, teacher: str, student: str, epochs: int) -> dict[str, Any]:
    """The values that keys have where a command does not give them; none for keys whose default is unknown here."""
    usual = flat(Run(Settings(), Place()).plain())
    usual = {key: value for key, value in usual.items() if not key.startswith("protocol.")}
    usual |= {"protocol.name": "quick", "engine.precision": None}  # always said: the default is the machine's
    found: dict[str, Any] = {}
    try:
        if protocol in protocol_names():
            recipe, own = asdict(read_protocol(protocol, epochs)), read_protocol(protocol).epochs
            found["protocol"] = {**recipe, "name": "quick", "epochs": own}
        if _installed(distiller):
            keywords = preset(distiller, data, protocol, teacher, student)
            found["distiller"] = distiller_settings({"name": distiller, **keywords}).keywords
        if _installed(data):
            found["data"] = {"options": option_settings(data, {})}
    except UserError:  # of a method or a set that is not here any more: all is said
        pass
    return usual | flat(json.loads(json.dumps(found)))


def _installed(name: str) -> bool:
    """Whether a method or a data set is no file, so that looking at its defaults runs nothing of the run's folder."""
    return not name.partition(":")[0].endswith(".py")


def _text(value: object) -> str:
    """Write a value as the command line reads it."""
    is_word = isinstance(value, str) and PLAIN.fullmatch(value) and value.lower() not in ("null", "true", "false")
    return str(value) if is_word else json.dumps(value)
