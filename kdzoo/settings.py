"""Typed run settings: YAML of ``configs/`` and ``key=value`` overrides, checked before any work begins."""

import csv
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any, Literal

import yaml
from omegaconf import OmegaConf

from kdzoo import registry
from kdzoo.errors import UserError, unknown
from kdzoo.files import shipped_folder
from kdzoo.keywords import explained, keyword_settings, read_yaml, typed
from kdzoo.recipe import Protocol


@dataclass
class StudentSettings:
    """The network that learns."""

    name: str = ""
    pretrained: bool = False  # start from timm's pretrained weights


@dataclass
class TeacherSettings:
    """The network that is learnt from. It is trained once and kept: its recipe is its own, not the student's."""

    name: str | None = None
    weights: str | None = None  # a file of weights instead of training
    pretrained: bool = False  # timm's pretrained weights; fine-tuned where the classes differ
    protocol: str | None = None  # the recipe it is trained by; None: the run's, as it stands in its file
    epochs: int | None = None  # None: the recipe's
    seed: int = 0
    allow_weak: bool = False  # distil from a teacher near chance all the same


@dataclass
class DataSettings:
    """What the networks see."""

    name: str = "digits"
    root: str = "data"  # where torchvision's sets lie
    limit: int | None = None  # this many training images at most
    image_size: int | None = None  # the side images are shown at; None: the protocol's, else the set's own
    options: dict[str, Any] = field(default_factory=dict)  # keywords of what makes the set, where it has any
    workers: int = 2  # decoding processes of sets too large for memory


@dataclass
class EngineSettings:
    """Where and how it computes."""

    device: str = "auto"
    precision: Literal["auto", "float32", "tf32", "bf16"] = "auto"  # of the networks; auto: bf16 where fast
    graph: bool = True  # the step as CUDA graphs, where it can be
    compile: bool = False  # the networks by torch.compile
    accumulate: int = 1  # parts of a batch that go through one by one, each a batch to norms and losses
    checkpoint_activations: bool = False  # the student's maps are computed again for the backward pass, not kept
    devices: int = 1  # that share every batch of one run; protocol.batch_size counts the images of all
    threads: int = 0  # 0: as many as there are cores
    lanes: int = 0  # at most so many runs of a suite make a group; 0: all that can, side by side as memory holds
    memory: float = 1.0  # the share of the device's memory that they may take; executors lower it where groups share
    checkpoint_seconds: float = 60.0  # at most this much work is lost when killed


@dataclass
class OutputSettings:
    """Where results go."""

    root: str = "runs"
    tensorboard: bool = False
    measure_every: int = 1  # epochs between measurements of the student; the last is always measured


@dataclass
class Settings:
    """Everything that a run is made of."""

    distiller: dict[str, Any] = field(default_factory=dict)  # name, and the method's keywords
    student: StudentSettings = field(default_factory=StudentSettings)
    teacher: TeacherSettings = field(default_factory=TeacherSettings)
    data: DataSettings = field(default_factory=DataSettings)
    protocol: Protocol = field(default_factory=Protocol)
    engine: EngineSettings = field(default_factory=EngineSettings)
    output: OutputSettings = field(default_factory=OutputSettings)
    seed: int = 0

    def plain(self) -> dict[str, Any]:
        """The settings as plain dictionaries, lists and scalars."""
        return json.loads(json.dumps(asdict(self)))

    def identity(self) -> str:
        """A hash of all that can change the result: not where it lies, nor how many threads it ran on.

        Files count by their content, so an edited distiller or another teacher's weights make another run.
        """
        what = self.plain()
        del what["output"], what["data"]["root"], what["data"]["workers"], what["teacher"]["allow_weak"]
        parts = self.engine.accumulate
        what["engine"] = self.engine.precision + (f" in {parts} parts" if parts > 1 else "")
        if self.engine.devices > 1:  # batch norms and losses that compare images see what one device has of a batch
            what["devices"] = self.engine.devices
        what["files"] = [
            hashlib.sha256(Path(name).expanduser().read_bytes()).hexdigest()
            for name in (self.distiller["name"], self.teacher.weights)
            if name and Path(name).suffix and Path(name).expanduser().is_file()
        ]
        return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:12]


def resolve(values: Mapping[str, Any], overrides: Sequence[str] = ()) -> Settings:
    """Settings from nested ``values`` (flags, a file) and ``key=value`` strings, the latter winning.

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
    settings: Settings = typed(Settings, given, "")
    settings.protocol = _protocol(recipe)
    settings.data.options = option_settings(settings.data.name, settings.data.options)
    settings.distiller = distiller_settings({**preset(settings, keywords["name"]), **keywords})
    if settings.output.measure_every < 1:
        raise UserError(f"output.measure_every={settings.output.measure_every}: expected a number of epochs from 1")
    if settings.engine.lanes < 0:
        raise UserError(f"engine.lanes={settings.engine.lanes}: expected a number of runs, or 0 for all")
    if not settings.student.name:
        raise UserError("no student is named; pass --student NAME ('kdzoo list models' lists short names)")
    return settings


def preset(settings: Settings, distiller: str) -> dict[str, Any]:
    """The keywords that the field uses for this method on this pair, data and recipe (``configs/presets.csv``)."""
    run = {
        "distiller": distiller,
        "data": settings.data.name,
        "protocol": settings.protocol.name,
        "teacher": settings.teacher.name,
        "student": settings.student.name,
    }
    lines = (shipped_folder() / "presets.csv").read_text(encoding="utf-8").splitlines()
    rows = [row for row in csv.DictReader(lines) if all(row[key] == value for key, value in run.items())]
    return {row["keyword"]: yaml.safe_load(row["value"]) for row in rows}


def read_protocol(name: str, epochs: int | None = None) -> Protocol:
    """A recipe of ``configs/protocols``, or of a YAML file by its path; for so many epochs where they are given."""
    return _protocol({"name": name} if epochs is None else {"name": name, "epochs": epochs})


def protocol_names() -> list[str]:
    """The names of the recipes that come with kdzoo."""
    return sorted(f.name.removesuffix(".yaml") for f in _protocol_files())


def distiller_settings(keywords: Mapping[str, Any]) -> dict[str, Any]:
    """Checks a method's keywords against its constructor and fills in the defaults."""
    name = str(keywords["name"])
    given = {key: value for key, value in keywords.items() if key != "name"}
    return {"name": name, **keyword_settings(registry.load(name), given)}


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
