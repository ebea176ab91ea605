"""Frozen settings: what a run is, and the place where it happens."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Literal, NamedTuple

from kdzoo.keywords import at_least, between, fraction, not_negative, per_channel, positive, setting, share
from kdzoo.recipe import Protocol


@dataclass(frozen=True)
class DistillerSettings:
    """The method, and its keywords: all of them, in the order of its constructor."""

    name: str = ""
    keywords: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class NetworkSettings:
    """A network, the weights it starts from, and what it makes of images before it reads them."""

    name: Any = None
    weights: str | None = None  # a file of weights to start from
    pretrained: bool = False  # published weights; a head of other classes is left out
    # Side in pixels that it reads; None: its weights' own, else the data's.
    image_size: int | None = setting(None, between, 1, 4096)
    # Subtracted from images in [0, 1]; None: its weights' own, else the data's.
    mean: tuple[float, ...] | None = setting(None, per_channel, share)
    # By which images are divided after that; None: the same.
    std: tuple[float, ...] | None = setting(None, per_channel, positive)
    taps: tuple[str, ...] | None = None  # four submodules, shallow to deep, whose outputs are its stages; None: found
    options: dict[str, Any] = field(default_factory=dict)  # keywords of the network's own, such as drop_path_rate

    def making(self) -> dict[str, Any]:
        """Return the keywords of ``models.create`` that decide the network and what it reads."""
        return {"image_size": self.image_size, "mean": self.mean, "std": self.std, "taps": self.taps, **self.options}


@dataclass(frozen=True)
class StudentSettings(NetworkSettings):
    """The network that learns."""

    name: str = ""

    @property
    def is_started(self) -> bool:
        """Whether it starts from weights, of a file or published."""
        return self.pretrained or self.weights is not None


@dataclass(frozen=True)
class TeacherSettings(NetworkSettings):
    """The network that is learnt from. It is trained once and kept, by a recipe that may differ from the student's.

    Weights of a file are taken instead of training; published ones are fine-tuned where the classes differ.
    """

    name: str | None = None
    finetune: bool = False  # train the weights of the file on, with a new head where the classes differ
    protocol: str | None = None  # its recipe; None: finetune where it starts from weights, else the run's file
    epochs: int | None = setting(None, between, 1, 10**6)  # None: the recipe's
    lr: float | None = setting(None, positive)  # None: the recipe's
    seed: int = setting(0, between, 0, 2**63 - 1)

    def untrained(self) -> StudentSettings:
        """Return the same network as one that learns: what is trained to be the teacher."""
        return StudentSettings(**{key.name: getattr(self, key.name) for key in fields(NetworkSettings)})


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
