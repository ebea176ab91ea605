"""Make runs of what users give: YAML of ``configs/``, flags and ``key=value``, checked before any work begins."""

import csv
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, fields, replace
from functools import cache
from importlib.resources.abc import Traversable
from pathlib import Path
from types import MappingProxyType
from typing import Any

import yaml
from omegaconf import OmegaConf

from kdzoo import own_code, registry
from kdzoo.errors import UserError, unknown
from kdzoo.files import digest, files_named, path_of, read_text, shipped_folder
from kdzoo.keywords import explained, flat, keyword_settings, read_yaml, refuse_markers, typed
from kdzoo.quantities import counted
from kdzoo.recipe import Protocol
from kdzoo.settings import (
    DECISIVE,
    TURNS,
    DataSettings,
    DistillerSettings,
    FurtherTeacher,
    NetworkSettings,
    Place,
    Run,
    Settings,
    TeacherSettings,
    apart,
    are_mappings,
)

RECIPES = (".yaml", ".yml")  # endings of a file of one's own


def resolve(values: Mapping[str, Any], overrides: Sequence[str] = (), *, fingerprint: str | None = None) -> Run:
    """Make a run from nested ``values`` (flags, a suite) and ``key=value`` strings, the latter winning.

    Keywords that are not given come from the published preset for this pair, if there is one, else from the method's
    defaults.

    A protocol is given by ``protocol.name``; its file is read first and its keys may be overridden. Where
    ``protocol.epochs`` is overridden alone, milestones and warm-up shrink or grow with it.

    Args:
        values: by section and key.
        overrides: further settings.
        fingerprint: of the data, where it is known already; None: it is computed.

    Raises:
        UserError: an unknown key, name or protocol (with the nearest), a value of the wrong type.
    """
    given = merged(values, overrides)
    _check_text(given)
    keywords = given.pop("distiller", {}) or {}
    if not isinstance(keywords, dict):
        raise UserError(f"distiller={keywords}: expected distiller.KEY=value, such as distiller.name=kd")
    if not keywords.get("name"):
        raise UserError("no distiller is named; pass --distiller NAME ('kdzoo list distillers' lists all)")
    recipe = given.pop("protocol", {})
    if "files" in given:
        raise UserError("files is no setting; the files that a run names are found by themselves")
    _check_places(given, str(keywords["name"]))
    run = _with_data(given)
    settings = replace(run.settings, protocol=_protocol(recipe))
    _check_ship(Run(settings, run.place))
    names = settings.data.name, settings.protocol.name, settings.teacher.title, settings.student.name
    usual = preset(str(keywords["name"]), *names)
    settings = replace(settings, distiller=distiller_settings({**usual, **keywords}))
    if not settings.student.name:
        raise UserError("no student is named; pass --student NAME ('kdzoo list models' lists short names)")
    if fingerprint is None:
        fingerprint = fingerprint_of(settings.data, run.place.data.root)
    settings = replace(settings, data=replace(settings.data, fingerprint=fingerprint))
    return Run(replace(settings, files=files_of(settings)), run.place)


def _check_places(given: Mapping[str, Any], method: str) -> None:
    """Check that no keyword of the method stands where sections stand."""
    if stray := given.keys() - {one.name for kind in (Settings, Place) for one in fields(kind)}:
        own = [f"distiller.{keyword}" for keyword in keyword_settings(registry.load(method), {})]
        for key in sorted(stray):
            if f"distiller.{key}" in own:
                raise unknown("setting", key, own)


def _check_text(given: Mapping[str, Any]) -> None:
    """Check that a run's folder can keep the settings: the bytes of a path need not be text."""
    for key, value in flat(given).items():
        if any("\ud800" <= letter <= "\udfff" for letter in str(value)):
            raise UserError(
                f"{key}={ascii(str(value))[1:-1]} is no text in UTF-8; rename that path, or set LC_ALL=C.UTF-8"
            )


def _check_ship(run: Run) -> None:
    """Check that the student to keep is one that the recipe makes."""
    ship, every = run.settings.output.ship, run.place.output.measure_every
    if ship == "ema" and not run.settings.protocol.ema:
        raise UserError(
            "output.ship=ema: this protocol averages no weights; set protocol.ema=0.999, or keep output.ship=last"
        )
    if ship == "best" and every > 1:
        raise UserError(
            f"output.ship=best: the best epoch is found by measuring each, and output.measure_every={every} leaves "
            "some out; set it to 1"
        )


def resolve_data(name: str, overrides: Sequence[str] = ()) -> Run:
    """Make a run's data settings, and the place where the data lie, without a method or a network.

    Raises:
        UserError: as by ``resolve``, or a setting that is none of the data.
    """
    given = merged({"data": {"name": name}}, overrides)
    for key in flat({section: value for section, value in given.items() if section != "data"}):
        raise UserError(f"{key} is no setting of the data, which all begin with data., such as data.val=0.1")
    run = _with_data(given)
    fingerprint = fingerprint_of(run.settings.data, run.place.data.root)
    return run._replace(settings=replace(run.settings, data=replace(run.settings.data, fingerprint=fingerprint)))


def merged(
    values: Mapping[str, Any], overrides: Sequence[str], others: Mapping[str, Any] = MappingProxyType({})
) -> dict[str, Any]:
    """Join nested values, ``others`` of the same kind, and ``key=value`` strings, the latter winning."""
    if isinstance(overrides, str) or not isinstance(overrides, Sequence):  # a generator gives each value once
        kind = type(overrides).__name__
        raise UserError(f"overrides is of type {kind}; expected a list of key=value, such as ['protocol.epochs=30']")
    for override in overrides:
        if not isinstance(override, str) or "=" not in override:
            raise UserError(f"'{override}' is no setting; expected key=value, such as protocol.epochs=30")
    refuse_markers(values, "")
    refuse_markers(others, "")
    with explained():
        added = OmegaConf.from_dotlist([_quoted(override) for override in overrides])
        refuse_markers(OmegaConf.to_container(added), "")
        merged = OmegaConf.merge(OmegaConf.create(dict(values)), OmegaConf.create(dict(others)), added)
        return OmegaConf.to_container(merged)  # type: ignore[return-value]  # a mapping gives a mapping


def _quoted(override: str) -> str:
    """Put quotes around a text that YAML would cut or refuse: a '#' begins a comment there, an '@' nothing."""
    key, value = override.split("=", 1)
    cut = re.match(r"[#@`%&*!|>]|[^\[{'\"].* #", value)
    return f"{key}={json.dumps(value, ensure_ascii=False)}" if cut else override


def _with_data(given: Mapping[str, Any]) -> Run:
    """Check a run's mapping as ``_typed`` does, and fill in all options of its data set.

    An option may stand beside the set's name, ``data.labels=FILE``, as well as below ``data.options``.
    """
    from kdzoo.data import option_settings  # here, so that lists and help texts need no torch

    data = given.get("data", {})
    if isinstance(data, dict) and isinstance(data.get("options", {}), dict):
        known = option_settings(str(data.get("name", DataSettings.name)), {}).keys() - DECISIVE["data"]
        options = {**data.get("options", {}), **{key: value for key, value in data.items() if key in known}}
        data = {key: value for key, value in data.items() if key not in known}
        given = {**given, "data": {**data, "options": options} if options else data}
    run = _typed(given)
    settings = run.settings.data
    if settings.fingerprint:
        raise UserError("data.fingerprint is no setting; it is computed from images and labels")
    options = option_settings(settings.name, settings.options)
    return run._replace(settings=replace(run.settings, data=replace(settings, options=options)))


def fingerprint_of(data: DataSettings, root: str) -> str:
    """Compute the fingerprint of the data; empty where they cannot be read, which opening them explains."""
    from kdzoo.data import fingerprint

    try:
        return fingerprint(
            data.name,
            root,
            options=data.options,
            classes=data.classes,
            val=data.val,
            select=data.select,
            test=data.test,
        )
    except UserError:
        return ""


def stored(plain: Mapping[str, Any], checked: bool = True) -> Run:
    """Read the run that ``Run.plain`` wrote down: complete, so no preset, recipe or default of today takes part.

    Args:
        plain: what it wrote.
        checked: whether the method, whose code is imported for it, checks its keywords.

    Raises:
        UserError: a key or keyword that is not known any more.
    """
    given = dict(plain)
    keywords = dict(given.pop("distiller"))
    distiller = distiller_settings(keywords) if checked else DistillerSettings(str(keywords.pop("name")), keywords)
    settings, place = _typed(given)
    return Run(replace(settings, distiller=distiller), place)


def _typed(given: Mapping[str, Any]) -> Run:
    """Check the keys and values of a run's mapping, the distiller's and a recipe's file left aside."""
    for section in ("student", *(one.name for one in fields(Place))):
        if not isinstance(given.get(section, {}), Mapping):
            raise UserError(f"{section}={given[section]}: expected {section}.KEY=value")
    others = given.get("teacher", {}).get("others", ())
    if not are_mappings(others):
        raise UserError(f"teacher.others={others}: expected a list of teachers, such as [{{name: resnet56}}]")
    what, where = apart(given)
    place: Place = typed(Place, where, "", also=Settings)
    settings: Settings = typed(Settings, what, "", also=Place)
    settings = replace(settings, teacher=_teachers(settings.teacher))
    for role, network in _networks(settings):
        if getattr(network, "finetune", False) and not (network.weights or network.pretrained):
            raise UserError(f"{role}.finetune=true: expected weights to start from; give --teacher-weights FILE too")
        if network.weights and network.pretrained:
            raise UserError(f"{role}.weights and {role}.pretrained=true are both set; keep one of them")
        for key in (
            "name",
            "data",
            "pretrained",
            "classifier",
            "fetch",
            "num_classes",
            "image_size",
            "mean",
            "std",
            "taps",
        ):
            if key in network.options:
                raise UserError(f"{role}.options.{key} is no keyword to set: expected those of the network's own")
    return Run(settings, place)


def several(names: Sequence[str], weights: Sequence[str] = ()) -> dict[str, Any]:
    """Write the settings of one teacher or of several, by their names and the files of their weights.

    Raises:
        UserError: there are weights of some of them only, or a file without a name.
    """
    if "" in weights:
        raise UserError("--teacher-weights is empty; expected a file or a folder, or leave it out to train the teacher")
    if weights and len(weights) != max(len(names), 1):
        raise UserError(
            f"--teacher names {counted(len(names), 'network')}, and --teacher-weights {len(weights)}; give weights for "
            "each, in the order of the teachers, or for none"
        )
    if not names:
        return {"weights": weights[0]} if weights else {}
    files = weights or [""] * len(names)
    first, *others = (
        {"name": name} | ({"weights": file} if file else {}) for name, file in zip(names, files, strict=True)
    )
    return first | ({"others": others} if others else {})


def _teachers(teacher: TeacherSettings) -> TeacherSettings:
    """Check what further teachers are given, and leave out defaults; without any, how they answer means nothing."""
    if teacher.name == "":
        raise UserError("teacher.name is empty: expected the name of a network, or null for none")
    others, usual = [], asdict(FurtherTeacher())
    for other in teacher.others:
        made: FurtherTeacher = typed(FurtherTeacher, other, "teacher.others.")
        if not made.name:
            raise UserError(f"teacher.others={[other]}: expected a name in each, such as {{name: resnet56}}")
        others.append(
            {key: value for key, value in json.loads(json.dumps(asdict(made))).items() if value != usual[key]}
        )
    if others and not teacher.name:
        raise UserError("teacher.others names further teachers, and teacher.name none; pass --teacher NAME")
    teacher = replace(teacher, others=tuple(others))
    names = [one.name for one in teacher.parts]
    if teacher.features not in ("", TURNS, *names):
        raise unknown("teacher.features", teacher.features, [TURNS, *filter(None, names)])
    return teacher if others else teacher.parts[0]  # which answers alone


def _networks(settings: Settings) -> Iterator[tuple[str, NetworkSettings]]:
    """List the teachers and the student, by the section of the settings that each stands in."""
    first, *others = settings.teacher.parts
    yield "teacher", first
    for teacher in others:
        yield "teacher.others", teacher
    yield "student", settings.student


def files_of(settings: Settings) -> dict[str, str]:
    """Compute the SHA-256 of each file of the user's that the settings name.

    These are methods, recipes, data sets, weights and networks, with the user's own modules that they import.
    """
    return {name: digest(file) for part in files_by_part(settings).values() for name, file in part.items()}


def changed_files(settings: Settings) -> list[str]:
    """List the user's files that are no longer as they were when the settings were resolved."""
    now = files_of(settings)
    return sorted(name for name, recorded in settings.files.items() if now.get(name, recorded) != recorded)


def files_by_part(settings: Settings) -> dict[str, dict[str, Path]]:
    """Find the user's files that the method, the recipe, the data, the teacher and the student consist of."""
    found = {
        "method": _code(settings.distiller.name),
        "protocol": _recipe_file(settings.protocol.name),
        "data": _code("", (settings.data.name, settings.data.test or "")) | _weights(settings.data.classes or ""),
    }
    for role, network in _networks(settings):
        name = network.name or ""
        folder = name.removeprefix("local-dir:") if name.startswith("local-dir:") else ""
        found.setdefault(role.partition(".")[0], {}).update(
            _code(networks=(name,))
            | _weights(folder)
            | _weights(network.weights or "")
            | _recipe_file(getattr(network, "protocol", None) or "")
        )
    return found


def _code(distiller: str = "", data: Sequence[str] = (), networks: Sequence[str] = ()) -> dict[str, Path]:
    files: dict[str, Path] = {}
    for named in own_code.named(distiller, data, networks).values():
        files |= named
    return files


def _recipe_file(name: str) -> dict[str, Path]:
    """List the file of a recipe, unless it is one that comes with kdzoo."""
    return _weights(name) if path_of(name).suffix in RECIPES else {}


def _weights(name: str) -> dict[str, Path]:
    """List a file of weights, or the files of a folder that holds some, by their names."""
    path = path_of(name)
    if name and path.is_dir():
        return {f"{name}/{file.name}": file for file in sorted(path.iterdir()) if file.is_file()}
    return {name: path} if name and path.is_file() else {}


def preset(distiller: str, data: str, protocol: str, teacher: str | None, student: str) -> dict[str, Any]:
    """Find the keywords that the field uses for this method on this pair, data and recipe (``configs/presets.csv``)."""
    return dict(_presets().get((distiller, data, protocol, teacher or "", student), {}))


@cache
def _presets() -> dict[tuple[str, ...], dict[str, Any]]:
    """Read all presets, by method, data, protocol, teacher and student."""
    found: dict[tuple[str, ...], dict[str, Any]] = {}
    for row in csv.DictReader((shipped_folder() / "presets.csv").read_text(encoding="utf-8").splitlines()):
        key = tuple(row[part] for part in ("distiller", "data", "protocol", "teacher", "student"))
        found.setdefault(key, {})[row["keyword"]] = yaml.safe_load(row["value"])
    return found


def read_protocol(name: str, epochs: int | None = None) -> Protocol:
    """Read a recipe of ``configs/protocols``, or of a YAML file by its path; ``epochs`` replaces its own."""
    return _protocol({"name": name} if epochs is None else {"name": name, "epochs": epochs})


def protocol_names() -> list[str]:
    """List the names of the recipes that come with kdzoo."""
    return sorted(f.name.removesuffix(".yaml") for f in _protocol_files())


def distiller_settings(given: Mapping[str, Any]) -> DistillerSettings:
    """Check a method's keywords, given beside its ``name``, by its constructor, and fill in the defaults."""
    given = dict(given)
    name = str(given.pop("name"))
    method = registry.load(name)
    try:
        keywords = keyword_settings(method, given)
        method(**keywords)
    except UserError as error:
        raise UserError(f"distiller {name}: {error}") from error
    except (Exception, SystemExit):  # a bug of the method, which is told when it is built, and stops no other
        pass
    return DistillerSettings(name, keywords)


def _protocol(given: Mapping[str, Any]) -> Protocol:
    if not isinstance(given, Mapping):
        raise UserError(f"protocol={given}: expected protocol.KEY=value, such as protocol.name=quick")
    name = str(given.get("name", "quick"))
    path = path_of(name)
    if path.suffix in RECIPES:
        if not path.is_file():
            raise UserError(f"no file {name}; expected a YAML file with the keys of a protocol")
        text = read_text(path)
    else:
        known = {f.name.removesuffix(".yaml"): f for f in _protocol_files()}
        if name not in known:
            near = files_named(name, *RECIPES)
            raise unknown("protocol", name, [*known, *near], hint="(a file's path ends with .yaml)")
        text = known[name].read_text(encoding="utf-8")
    recipe = _recipe(f"protocol {name}", text)
    augmentation = given.get("augmentation", {})
    if not isinstance(augmentation, Mapping):
        raise UserError(f"protocol.augmentation={augmentation}: expected protocol.augmentation.KEY=value")
    epochs: Protocol = typed(Protocol, {"epochs": given.get("epochs", recipe.epochs)}, "protocol.")
    scale = epochs.epochs / recipe.epochs
    scaled = {
        **asdict(recipe),
        "milestones": [max(1, round(milestone * scale)) for milestone in recipe.milestones],
        "warmup": recipe.warmup * scale,
        "lr_of": {} if "lr" in given else recipe.lr_of,
    }
    augmentation = {**scaled["augmentation"], **augmentation}
    result: Protocol = typed(Protocol, {**scaled, **given, "augmentation": augmentation, "name": name}, "protocol.")
    return result


@cache
def _recipe(title: str, text: str) -> Protocol:
    """Read a recipe's text, its values checked."""
    recipe: Protocol = typed(Protocol, read_yaml(text, title), f"{title}: ")
    return recipe


def _protocol_files() -> list[Traversable]:
    folder = shipped_folder() / "protocols"
    return [f for f in folder.iterdir() if f.name.endswith(".yaml")]
