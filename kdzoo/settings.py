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

from kdzoo import registry
from kdzoo.errors import UserError, unknown
from kdzoo.files import shipped_folder
from kdzoo.keywords import explained, keyword_settings, read_yaml, typed
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
    options: dict[str, Any] = field(default_factory=dict)  # keywords of the network's own, such as drop_path_rate


@dataclass(frozen=True)
class TeacherSettings:
    """The network that is learnt from. It is trained once and kept, by a recipe that may differ from the student's."""

    name: str | None = None
    weights: str | None = None  # a file of weights instead of training
    pretrained: bool = False  # timm's pretrained weights; fine-tuned where the classes differ
    options: dict[str, Any] = field(default_factory=dict)  # keywords of the network's own, as the student's
    protocol: str | None = None  # the recipe it is trained by; None: the run's, as it stands in its file
    epochs: int | None = None  # None: the recipe's
    seed: int = 0


@dataclass(frozen=True)
class DataSettings:
    """What the networks see; the size of the images is the protocol's."""

    name: str = "digits"
    limit: int | None = None  # this many training images at most
    options: dict[str, Any] = field(default_factory=dict)  # keywords of what makes the set, where it has any


@dataclass(frozen=True)
class EngineSettings:
    """How a run computes, as far as that changes its result."""

    precision: Literal["auto", "float32", "tf32", "bf16"] = "auto"  # of the networks; auto: bf16 where fast
    accumulate: int = 1  # parts of a batch that go through one by one, each a batch to norms and losses
    devices: int = 1  # that share every batch of one run; protocol.batch_size counts the images of all


@dataclass(frozen=True)
class Settings:
    """What a run is: everything that decides its result, and nothing else."""

    distiller: DistillerSettings = field(default_factory=DistillerSettings)
    student: StudentSettings = field(default_factory=StudentSettings)
    teacher: TeacherSettings = field(default_factory=TeacherSettings)
    data: DataSettings = field(default_factory=DataSettings)
    protocol: Protocol = field(default_factory=Protocol)
    engine: EngineSettings = field(default_factory=EngineSettings)
    seed: int = 0
    files: dict[str, str] = field(default_factory=dict)  # SHA-256 of each file of the user's that the others name

    def plain(self) -> dict[str, Any]:
        """Return plain dictionaries, lists and scalars; the keywords stand beside the method's name."""
        plain = asdict(self)
        plain["distiller"] = {"name": self.distiller.name, **self.distiller.keywords}
        return json.loads(json.dumps(plain))

    def identity(self) -> str:
        """Hash the settings; files count by their content, so an edited distiller makes another run."""
        return hashlib.sha256(json.dumps(self.plain(), sort_keys=True).encode()).hexdigest()[:12]


@dataclass(frozen=True)
class EnginePlace:
    """The device, and how it is used."""

    device: str = "auto"
    graph: bool = True  # the step as CUDA graphs, where it can be
    compile: bool = False  # the networks by torch.compile
    checkpoint_activations: bool = False  # the student's maps are computed again for the backward pass, not kept
    threads: int = 0  # 0: as many as there are cores
    lanes: int = 0  # at most so many runs of a suite make a group; 0: all that can, side by side as memory holds
    memory: float = 1.0  # the share of the device's memory that they may take; lowered where groups share it
    checkpoint_seconds: float = 60.0  # at most this much work is lost when killed


@dataclass(frozen=True)
class DataPlace:
    """Where data lie, and who decodes them."""

    root: str = "data"  # where torchvision's sets lie
    workers: int = 2  # decoding processes of sets too large for memory


@dataclass(frozen=True)
class TeacherPlace:
    """What is asked of a teacher before anything is distilled."""

    allow_weak: bool = False  # distil from a teacher near chance all the same


@dataclass(frozen=True)
class OutputPlace:
    """Where results go."""

    root: str = "runs"
    tensorboard: bool = False
    measure_every: int = 1  # epochs between measurements of the student; the last is always measured


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


def resolve(values: Mapping[str, Any], overrides: Sequence[str] = ()) -> Run:
    """Make a run from nested ``values`` (flags, a suite) and ``key=value`` strings, the latter winning.

    Keywords that are not given come from the published preset for this pair, if there is one, else from the method's
    defaults.

    A protocol is given by ``protocol.name``; its file is read first and its keys may be overridden. Where
    ``protocol.epochs`` is overridden alone, milestones and warm-up shrink or grow with it.

    Raises:
        UserError: an unknown key, name or protocol (with the nearest), a value of the wrong type.
    """
    from kdzoo.data import option_settings  # here, so that lists and help texts need no torch

    for override in overrides:
        if "=" not in override:
            raise UserError(f"'{override}' is no setting; expected key=value, such as protocol.epochs=30")
    with explained():
        merged = OmegaConf.merge(OmegaConf.create(dict(values)), OmegaConf.from_dotlist(list(overrides)))
        given: dict[str, Any] = OmegaConf.to_container(merged)  # type: ignore[assignment]  # a mapping gives a mapping
    keywords = given.pop("distiller", {}) or {}
    if not isinstance(keywords, dict) or not keywords.get("name"):
        raise UserError("no distiller is named; pass --distiller NAME ('kdzoo list distillers' lists all)")
    recipe = given.pop("protocol", {})
    if "files" in given:
        raise UserError("files is no setting; the files that a run names are found by themselves")
    run = _typed(given)
    settings = replace(run.settings, protocol=_protocol(recipe))
    names = settings.data.name, settings.protocol.name, settings.teacher.name, settings.student.name
    usual = preset(str(keywords["name"]), *names)
    settings = replace(
        settings,
        data=replace(settings.data, options=option_settings(settings.data.name, settings.data.options)),
        distiller=distiller_settings({**usual, **keywords}),
    )
    if not settings.student.name:
        raise UserError("no student is named; pass --student NAME ('kdzoo list models' lists short names)")
    return Run(replace(settings, files=_files_of(settings)), run.place)


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
    if place.output.measure_every < 1:
        raise UserError(f"output.measure_every={place.output.measure_every}: expected a number of epochs from 1")
    if place.engine.lanes < 0:
        raise UserError(f"engine.lanes={place.engine.lanes}: expected a number of runs, or 0 for all")
    if not 0 < place.engine.memory <= 1:
        raise UserError(f"engine.memory={place.engine.memory:g}: expected a share of memory, above 0 and up to 1")
    settings: Settings = typed(Settings, what, "", also=Place)
    for role, network in (("teacher", settings.teacher), ("student", settings.student)):
        for key in ("name", "pretrained", "fetch", "num_classes"):
            if key in network.options:
                raise UserError(f"{role}.options.{key} is no keyword to set: expected those of the network's own")
    if settings.engine.accumulate < 1:
        raise UserError(f"engine.accumulate={settings.engine.accumulate}: expected how many parts a batch has, from 1")
    return Run(settings, place)


def _files_of(settings: Settings) -> dict[str, str]:
    """Compute the SHA-256 of each file that the settings name: a method, weights, a data set of the user's."""
    found = {}
    weights = settings.teacher.weights, settings.student.weights
    for name in (settings.distiller.name, *weights, settings.data.name.partition(":")[0]):
        path = Path(name or "").expanduser()
        if name and path.suffix and path.is_file():
            state = path.stat()
            found[name] = _digest(path, state.st_size, state.st_mtime_ns)
    return found


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
        text = path.read_text(encoding="utf-8")
    else:
        known = {f.name.removesuffix(".yaml"): f for f in _protocol_files()}
        if name not in known:
            raise unknown("protocol", name, known, hint="(a file's path ends with .yaml)")
        text = known[name].read_text(encoding="utf-8")
    recipe = read_yaml(text, f"protocol {name}")
    epochs = given.get("epochs")
    if isinstance(epochs, int) and "epochs" in recipe:
        scale = epochs / recipe["epochs"]
        recipe["milestones"] = [max(1, round(m * scale)) for m in recipe.get("milestones", ())]
        recipe["warmup"] = recipe.get("warmup", 0) * scale
    augmentation = {**recipe.pop("augmentation", {}), **given.get("augmentation", {})}
    result: Protocol = typed(Protocol, {**recipe, **given, "augmentation": augmentation, "name": name}, "protocol.")
    if result.epochs < 1 or result.batch_size < 2:
        raise UserError(
            f"protocol.epochs={result.epochs} and protocol.batch_size={result.batch_size}: "
            "expected at least 1 epoch and batches of at least 2"
        )
    return result


def _protocol_files() -> list[Traversable]:
    folder = shipped_folder() / "protocols"
    return [f for f in folder.iterdir() if f.name.endswith(".yaml")]
