"""Typed run settings: YAML of ``configs/`` and ``key=value`` overrides, checked before any work begins."""

import csv
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cache
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import yaml
from omegaconf import OmegaConf

from kdzoo import own_code, registry
from kdzoo.errors import UserError, unknown
from kdzoo.files import read_text, shipped_folder
from kdzoo.keywords import (
    at_least,
    between,
    each,
    explained,
    fraction,
    keyword_settings,
    not_negative,
    positive,
    read_yaml,
    setting,
    share,
    typed,
)
from kdzoo.recipe import Protocol


@dataclass(frozen=True)
class DistillerSettings:
    """The method, and its keywords: all of them, in the order of its constructor."""

    name: str = ""
    keywords: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class StudentSettings:
    """The network that learns."""

    name: str = ""
    weights: str | None = None  # start from this file of weights; a head of other classes is left out
    pretrained: bool = False  # start from timm's pretrained weights
    # Side in pixels that it reads; None: its weights' own, else the data's.
    image_size: int | None = setting(None, between, 1, 4096)
    # Subtracted from images in [0, 1]; None: its weights' own, else the data's.
    mean: tuple[float, ...] | None = setting(None, each, share)
    # By which images are divided after that; None: the same.
    std: tuple[float, ...] | None = setting(None, each, positive)
    taps: tuple[str, ...] | None = None  # four submodules, shallow to deep, whose outputs are its stages; None: found
    options: dict[str, Any] = field(default_factory=dict)  # keywords of the network's own, such as drop_path_rate


@dataclass(frozen=True)
class TeacherSettings:
    """The network that is learnt from. It is trained once and kept, by a recipe that may differ from the student's."""

    name: str | None = None
    weights: str | None = None  # a file of weights instead of training
    pretrained: bool = False  # timm's pretrained weights; fine-tuned where the classes differ
    image_size: int | None = setting(None, between, 1, 4096)  # as the student's
    mean: tuple[float, ...] | None = setting(None, each, share)  # as the student's
    std: tuple[float, ...] | None = setting(None, each, positive)  # as the student's
    taps: tuple[str, ...] | None = None  # as the student's
    options: dict[str, Any] = field(default_factory=dict)  # as the student's
    finetune: bool = False  # train the weights of the file on, with a new head where the classes differ
    protocol: str | None = None  # its recipe; None: finetune where it starts from weights, else the run's file
    epochs: int | None = setting(None, between, 1, 10**6)  # None: the recipe's
    lr: float | None = setting(None, positive)  # None: the recipe's
    seed: int = setting(0, between, 0, 2**63 - 1)


@dataclass(frozen=True)
class DataSettings:
    """What the networks see; the size of the images is the protocol's."""

    name: str = "digits"
    limit: int | None = setting(None, at_least, 1)  # this many training images at most
    options: dict[str, Any] = field(default_factory=dict)  # keywords of what makes the set, where it has any
    classes: str | None = None  # their order: text, natural, or a file with one name a line; None: the set's own
    # Share of the training images held out to measure on, instead of the test images.
    val: float = setting(0.0, fraction)
    exif: bool = True  # images of files are turned as their camera noted
    alpha: str = "white"  # the colour that transparent pixels are laid on
    skip_damaged: bool = False  # image files that cannot be decoded are left out
    fingerprint: str = ""  # of images and labels; found by itself, empty where name and options decide them

    def opening(self) -> dict[str, Any]:
        """Return the keywords of ``open_dataset`` that decide images and labels."""
        return {key: value for key, value in asdict(self).items() if key != "fingerprint"}


@dataclass(frozen=True)
class EngineSettings:
    """How a run computes, as far as that changes its result."""

    precision: Literal["auto", "float32", "tf32", "bf16"] = "auto"  # of the networks; auto: bf16 where fast
    # Parts of a batch that go through one by one, each a batch to norms and losses.
    accumulate: int = setting(1, between, 1, 2**20)
    # That share every batch of one run; protocol.batch_size counts the images of all.
    devices: int = setting(1, between, 1, 4096)


@dataclass(frozen=True)
class Settings:
    """What a run is: everything that decides its result, and nothing else."""

    distiller: DistillerSettings = field(default_factory=DistillerSettings)
    student: StudentSettings = field(default_factory=StudentSettings)
    teacher: TeacherSettings = field(default_factory=TeacherSettings)
    data: DataSettings = field(default_factory=DataSettings)
    protocol: Protocol = field(default_factory=Protocol)
    engine: EngineSettings = field(default_factory=EngineSettings)
    seed: int = setting(0, between, 0, 2**63 - 1)
    files: dict[str, str] = field(default_factory=dict)  # SHA-256 of each file of the user's that the others name

    def plain(self) -> dict[str, Any]:
        """Return plain dictionaries, lists and scalars; the keywords stand beside the method's name."""
        plain = asdict(self)
        plain["distiller"] = {"name": self.distiller.name, **self.distiller.keywords}
        return json.loads(json.dumps(plain))

    def identity(self) -> str:
        """Hash the settings; files and data count by their content: an edited distiller or image makes another run."""
        return hashlib.sha256(json.dumps(self.plain(), sort_keys=True).encode()).hexdigest()[:12]


@dataclass(frozen=True)
class EnginePlace:
    """The device, and how it is used."""

    device: str = "auto"
    graph: bool = True  # the step as CUDA graphs, where it can be
    compile: bool = False  # the networks by torch.compile
    checkpoint_activations: bool = False  # the student's maps are computed again for the backward pass, not kept
    threads: int = setting(0, between, 0, 1024)  # 0: as many as there are cores
    # At most so many runs of a suite make a group; 0: all that can, side by side as memory holds.
    lanes: int = setting(0, between, 0, 10**6)
    # The share of the device's memory that they may take; lowered where groups share it.
    memory: float = setting(1.0, between, 0.001, 1)
    checkpoint_seconds: float = setting(60.0, not_negative)  # at most this much work is lost when killed


@dataclass(frozen=True)
class DataPlace:
    """Where data lie, and who decodes them."""

    root: str = "data"  # where torchvision's sets lie
    workers: int = setting(2, between, 0, 128)  # decoding processes of sets too large for memory


@dataclass(frozen=True)
class TeacherPlace:
    """What is asked of a teacher before anything is distilled."""

    allow_weak: bool = False  # distil from a teacher near chance all the same


@dataclass(frozen=True)
class OutputPlace:
    """Where results go."""

    root: str = "runs"
    tensorboard: bool = False
    # Epochs between measurements of the student; the last is always measured.
    measure_every: int = setting(1, between, 1, 10**6)


@dataclass(frozen=True)
class Place:
    """Where a run happens: nothing here changes its result beyond rounding, and all of it may differ at every start."""

    engine: EnginePlace = field(default_factory=EnginePlace)
    data: DataPlace = field(default_factory=DataPlace)
    teacher: TeacherPlace = field(default_factory=TeacherPlace)
    output: OutputPlace = field(default_factory=OutputPlace)

    def within(self, **changes: dict[str, Any]) -> "Place":
        """Change keys of the place's sections, such as ``place.within(engine={"threads": 1})``."""
        return replace(self, **{name: replace(getattr(self, name), **keys) for name, keys in changes.items()})


class Run(NamedTuple):
    """What a run is, and where it happens."""

    settings: Settings
    place: Place

    def within(self, **changes: dict[str, Any]) -> "Run":
        """Change keys of the sections of the run's place."""
        return self._replace(place=self.place.within(**changes))

    def plain(self) -> dict[str, Any]:
        """Return both in one mapping, by the keys that a user gives."""
        plain = self.settings.plain()
        for section, keys in asdict(self.place).items():
            plain[section] = {**plain.get(section, {}), **keys}
        return plain


# The keys of the settings, in the sections that have keys of the place too.
DECISIVE = {
    section.name: {key.name for key in fields(getattr(Settings(), section.name))}
    for section in fields(Place)
    if section.name in {one.name for one in fields(Settings)}
}


def apart(plain: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Part a run's mapping into the keys of what it is and those of where it happens, with all that is unknown."""
    what, where = dict(plain), {}
    for section in (one.name for one in fields(Place)):
        given, decisive = what.pop(section, {}), DECISIVE.get(section, set())
        where[section] = {key: value for key, value in given.items() if key not in decisive}
        if decisive:
            what[section] = {key: value for key, value in given.items() if key in decisive}
    return what, where


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
    given = _merged(values, overrides)
    keywords = given.pop("distiller", {}) or {}
    if not isinstance(keywords, dict) or not keywords.get("name"):
        raise UserError("no distiller is named; pass --distiller NAME ('kdzoo list distillers' lists all)")
    recipe = given.pop("protocol", {})
    if "files" in given:
        raise UserError("files is no setting; the files that a run names are found by themselves")
    run = _with_data(given)
    settings = replace(run.settings, protocol=_protocol(recipe))
    names = settings.data.name, settings.protocol.name, settings.teacher.name, settings.student.name
    usual = preset(str(keywords["name"]), *names)
    settings = replace(
        settings,
        distiller=distiller_settings({**usual, **keywords}),
    )
    if not settings.student.name:
        raise UserError("no student is named; pass --student NAME ('kdzoo list models' lists short names)")
    if fingerprint is None:
        fingerprint = fingerprint_of(settings.data, run.place.data.root)
    settings = replace(settings, data=replace(settings.data, fingerprint=fingerprint))
    return Run(replace(settings, files=files_of(settings)), run.place)


def resolve_data(name: str, overrides: Sequence[str] = ()) -> Run:
    """Make a run's data settings, and the place where the data lie, without a method or a network.

    Raises:
        UserError: as by ``resolve``.
    """
    run = _with_data(_merged({"data": {"name": name}}, overrides))
    fingerprint = fingerprint_of(run.settings.data, run.place.data.root)
    return run._replace(settings=replace(run.settings, data=replace(run.settings.data, fingerprint=fingerprint)))


def _merged(values: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Join nested values and ``key=value`` strings, the latter winning."""
    for override in overrides:
        if "=" not in override:
            raise UserError(f"'{override}' is no setting; expected key=value, such as protocol.epochs=30")
    with explained():
        merged = OmegaConf.merge(OmegaConf.create(dict(values)), OmegaConf.from_dotlist(list(overrides)))
        return OmegaConf.to_container(merged)  # type: ignore[return-value]  # a mapping gives a mapping


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
        return fingerprint(data.name, root, options=data.options, classes=data.classes, val=data.val)
    except UserError:
        return ""


def stored(plain: Mapping[str, Any]) -> Run:
    """Read the run that ``Run.plain`` wrote down: complete, so no preset, recipe or default of today takes part.

    Raises:
        UserError: a key or keyword that is not known any more.
    """
    given = dict(plain)
    distiller = distiller_settings(given.pop("distiller"))
    settings, place = _typed(given)
    return Run(replace(settings, distiller=distiller), place)


def _typed(given: Mapping[str, Any]) -> Run:
    """Check the keys and values of a run's mapping, the distiller's and a recipe's file left aside."""
    for section in ("student", *(one.name for one in fields(Place))):
        if not isinstance(given.get(section, {}), Mapping):
            raise UserError(f"{section}={given[section]}: expected {section}.KEY=value")
    what, where = apart(given)
    place: Place = typed(Place, where, "", also=Settings)
    settings: Settings = typed(Settings, what, "", also=Place)
    teacher = settings.teacher
    if teacher.finetune and not (teacher.weights or teacher.pretrained):
        raise UserError("teacher.finetune=true: expected weights to start from; give --teacher-weights FILE too")
    for role, network in (("teacher", teacher), ("student", settings.student)):
        if network.weights and network.pretrained:
            raise UserError(f"{role}.weights and {role}.pretrained=true are both set; keep one of them")
        for key in ("name", "data", "pretrained", "fetch", "num_classes", "image_size", "mean", "std", "taps"):
            if key in network.options:
                raise UserError(f"{role}.options.{key} is no keyword to set: expected those of the network's own")
    return Run(settings, place)


def files_of(settings: Settings) -> dict[str, str]:
    """Compute the SHA-256 of each file of the user's that the settings name.

    These are methods, data sets, weights and networks, with the user's own modules that they import.
    """
    found: dict[str, Path] = {}
    modules: list[str] = []
    for name in (settings.distiller.name, settings.data.name.partition(":")[0]):
        path = Path(name).expanduser()
        if path.suffix == ".py" and path.is_file():
            found |= {name: path, **own_code.sources(own_code.imported(path), path.parent)}
    for network in (settings.teacher, settings.student):
        origin, colon, member = (network.name or "").partition(":")
        if colon and origin == "local-dir":
            found |= _weights(member)
        elif colon:
            modules.append(origin)
        found |= _weights(network.weights or "")
    found |= _weights(settings.data.classes or "")
    found |= own_code.sources(modules)
    states = {name: path.stat() for name, path in found.items()}
    return {name: _digest(found[name], state.st_size, state.st_mtime_ns) for name, state in states.items()}


def _weights(name: str) -> dict[str, Path]:
    """List a file of weights, or the files of a folder that holds some, by their names."""
    path = Path(name).expanduser()
    if name and path.is_dir():
        return {f"{name}/{file.name}": file for file in sorted(path.iterdir()) if file.is_file()}
    return {name: path} if name and path.is_file() else {}


@cache
def _digest(path: Path, size: int, changed: int) -> str:
    """Compute the SHA-256 of a file in this state, once for all runs of a suite."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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
    """Check a method's keywords, given beside its ``name``, against its constructor, and fill in the defaults."""
    keywords = dict(given)
    name = str(keywords.pop("name"))
    return DistillerSettings(name, keyword_settings(registry.load(name), keywords))


def _protocol(given: Mapping[str, Any]) -> Protocol:
    if not isinstance(given, Mapping):
        raise UserError(f"protocol={given}: expected protocol.KEY=value, or --protocol NAME")
    name = str(given.get("name", "quick"))
    path = Path(name).expanduser()
    if path.suffix in (".yaml", ".yml"):
        if not path.is_file():
            raise UserError(f"no file {name}; expected a YAML file with the keys of a protocol")
        text = read_text(path)
    else:
        known = {f.name.removesuffix(".yaml"): f for f in _protocol_files()}
        if name not in known:
            raise unknown("protocol", name, known, hint="(a file's path ends with .yaml)")
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
