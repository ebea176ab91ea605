"""Frozen settings: what a run is, and the place where it happens."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Literal, NamedTuple

from kdzoo.keywords import (
    at_least,
    between,
    described,
    fraction,
    not_negative,
    per_channel,
    positive,
    setting,
    share,
    some_of,
    switch_or_auto,
)
from kdzoo.recipe import Protocol

LOGGERS = ("tensorboard", "mlflow", "wandb")


TURNS = "turns"  # as teacher.features: each of several teachers shows its features in one step after the other


@dataclass(frozen=True)
class DistillerSettings:
    """The method, and its keywords: all of them, in the order of its constructor."""

    name: str = setting("", "Distillation method: a name of 'kdzoo list distillers', or a Python file")
    keywords: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class NetworkSettings:
    """A network, the weights it starts from, and what it makes of images before it reads them."""

    name: Any = None
    weights: str | None = setting(
        None, "File or folder with its weights; a student starts from them, a teacher keeps them"
    )
    pretrained: bool = setting(
        False, "Start from the weights published for this network; a head of other classes is new"
    )
    image_size: int | None = setting(
        None, "Side in pixels of the images it reads (null: that of its weights, else the data's)", between, 1, 4096
    )
    mean: tuple[float, ...] | None = setting(
        None,
        "Mean of each colour, from 0 to 1, subtracted from images (null: that of its weights, else the data's)",
        per_channel,
        share,
    )
    std: tuple[float, ...] | None = setting(
        None,
        "Standard deviation of each colour, by which images are divided (null: that of its weights, else the data's)",
        per_channel,
        positive,
    )
    classifier: bool = setting(
        True, "Whether it ends in a classifier; false leaves that out, and a student learns from the embedding"
    )
    taps: tuple[str, ...] | None = setting(
        None, "Names of four submodules, shallow to deep, whose outputs are its stages (null: found by themselves)"
    )
    options: dict[str, Any] = setting(dict, "Keywords of the network's constructor, such as options.drop_path_rate=0.1")

    def making(self) -> dict[str, Any]:
        """Return the keywords of ``models.create`` that decide the network and what it reads."""
        return {"image_size": self.image_size, "mean": self.mean, "std": self.std, "taps": self.taps, **self.options}


@dataclass(frozen=True)
class StudentSettings(NetworkSettings):
    """The network that learns."""

    name: str = setting(
        "", "Network that is trained: a name of 'kdzoo list models', of timm, or package.module:factory"
    )

    @property
    def is_started(self) -> bool:
        """Whether it starts from weights, of a file or published."""
        return self.pretrained or self.weights is not None


@dataclass(frozen=True)
class TeacherSettings(NetworkSettings):
    """The network that is learnt from. It is trained once and kept, by a recipe that may differ from the student's.

    Weights of a file are taken instead of training; published ones are fine-tuned where the classes differ.
    """

    name: str | None = setting(None, "Network that the student learns from, named in the same way (null: none)")
    finetune: bool = setting(False, "Train the weights of teacher.weights on, with a new head where the classes differ")
    protocol: str | None = setting(
        None, "Recipe of the teacher's training (null: finetune where it starts from weights, else the student's file)"
    )
    epochs: int | None = setting(None, "Epochs of the teacher's training (null: its recipe's)", between, 1, 10**6)
    lr: float | None = setting(None, "Learning rate of the teacher's training (null: its recipe's)", positive)
    seed: int = setting(0, "Seed of the teacher's training; students of all seeds share it", between, 0, 2**63 - 1)
    others: tuple[dict[str, Any], ...] = setting(
        (),
        "Further teachers, which answer together with the first, such as [{name: resnet56, seed: 1}]: settings as of "
        "teacher; protocol, epochs, lr and seed are those of the first unless given",
    )
    combine: Literal["probabilities", "logits", "learned"] = setting(
        "probabilities",
        "Common answer of several teachers: mean of their probabilities, mean of their logits, or learned: mean of "
        "their probabilities with weights learned on training images",
    )
    features: str = setting(
        "",
        "Which of several teachers shows its features and embedding: the name of one (empty: the first), or turns: "
        "another one in each step, with modules of the method for each teacher",
    )

    @property
    def title(self) -> str | None:
        """The teacher's name, or the names of all; None where there is none."""
        return self.name and "+".join([self.name, *(other["name"] for other in self.others)])

    @property
    def parts(self) -> list["TeacherSettings"]:
        """Each of the teachers as if it were the only one."""
        alone = replace(self, others=(), combine="probabilities", features="")
        common = {key: getattr(self, key) for key in ("protocol", "epochs", "lr", "seed")}
        given = [{key: value for key, value in other.items() if value is not None} for other in self.others]
        return [alone, *(TeacherSettings(**{**common, **other}) for other in given)]

    def untrained(self) -> StudentSettings:
        """Return the same network as one that learns: what is trained to be the teacher."""
        return StudentSettings(**{key.name: getattr(self, key.name) for key in fields(NetworkSettings)})


def are_mappings(others: object) -> bool:
    """Tell whether a value of ``teacher.others`` is a list of mappings."""
    return isinstance(others, list | tuple) and all(isinstance(other, Mapping) for other in others)


@dataclass(frozen=True)
class FurtherTeacher(NetworkSettings):
    """One more teacher beside the first; what is None of its training is as of the first."""

    name: str = setting("", "Network that the student also learns from, named as teacher.name")
    finetune: bool = setting(False, "As teacher.finetune")
    protocol: str | None = setting(None, "As teacher.protocol")
    epochs: int | None = setting(None, "As teacher.epochs", between, 1, 10**6)
    lr: float | None = setting(None, "As teacher.lr", positive)
    seed: int | None = setting(None, "As teacher.seed", between, 0, 2**63 - 1)


@dataclass(frozen=True)
class DataSettings:
    """What the networks see; the size of the images is the protocol's."""

    name: str = setting("digits", "Data set: a name of 'kdzoo list data', folder:PATH, or a Python file")
    limit: int | None = setting(None, "Number of training images to use (null: all)", at_least, 1)
    options: dict[str, Any] = setting(
        dict, "Keywords of the data set, such as options.split=letters; data.split works too"
    )
    classes: str | None = setting(
        None, "Order of the classes: text, natural (2 before 10), or a file with one name a line (null: the set's own)"
    )
    val: float = setting(
        0.0, "Share of the training images that is held out and measured on, instead of the test images", fraction
    )
    select: float = setting(
        0.0,
        "Share of the training images left by data.val that is held out to choose between methods, and measured on "
        "instead of the test images",
        fraction,
    )
    test: str | None = setting(
        None, "Labelled data set, such as folder:PATH, whose test images are measured on instead of the set's own"
    )
    exif: bool = setting(True, "Turn photographs upright, as their camera noted")
    alpha: str = setting("white", "Colour that transparent pixels are laid on")
    skip_damaged: bool = setting(False, "Leave out image files that cannot be decoded, and count them")
    fingerprint: str = ""  # of images and labels; found by itself, empty where name and options decide them

    @property
    def measured_on(self) -> str:
        """Name the images that accuracies are of: a teacher may have seen those that are held out here."""
        return f"held-out training images of {self.name}" if self.val or self.select else self.test or self.name

    def opening(self) -> dict[str, Any]:
        """Return the keywords of ``open_dataset`` that decide images and labels."""
        return {key: value for key, value in asdict(self).items() if key != "fingerprint"}


@dataclass(frozen=True)
class EngineSettings:
    """How a run computes, as far as that changes its result."""

    precision: Literal["auto", "float32", "tf32", "bf16"] = setting(
        "auto", "Precision of the networks: float32, tf32 (CUDA only) or bf16; auto is bf16 where the hardware has it"
    )
    accumulate: int = setting(
        1,
        "Number of parts that a batch goes through the networks in, one after another, to save memory",
        between,
        1,
        2**20,
    )
    devices: int = setting(1, "Number of devices that share every batch of a run, one process each", between, 1, 4096)


@dataclass(frozen=True)
class OutputSettings:
    """Which student a run keeps."""

    ship: Literal["last", "best", "ema"] = setting(
        "last",
        "Student to keep: last is that after the last epoch, averaged where protocol.ema is set; best is that of the "
        "epoch with the best top-1; ema is the average, and refused where protocol.ema is 0",
    )


@dataclass(frozen=True)
class Settings:
    """What a run is: everything that decides its result, and nothing else."""

    distiller: DistillerSettings = field(default_factory=DistillerSettings)
    student: StudentSettings = field(default_factory=StudentSettings)
    teacher: TeacherSettings = field(default_factory=TeacherSettings)
    data: DataSettings = field(default_factory=DataSettings)
    protocol: Protocol = field(default_factory=Protocol)
    engine: EngineSettings = field(default_factory=EngineSettings)
    output: OutputSettings = field(default_factory=OutputSettings)
    seed: int = setting(
        0, "Seed of the initial weights, and of the order and augmentation of the batches", between, 0, 2**63 - 1
    )
    files: dict[str, str] = field(default_factory=dict)  # SHA-256 of each file of the user's that the others name

    def plain(self) -> dict[str, Any]:
        """Return plain dictionaries, lists and scalars; the keywords stand beside the method's name."""
        plain = asdict(self)
        plain["distiller"] = {"name": self.distiller.name, **self.distiller.keywords}
        return json.loads(json.dumps(plain))

    @property
    def task(self) -> str:
        """The teacher and the data, such as ``vit_s on digits``."""
        return f"{self.teacher.title or 'no teacher'} on {self.data.name}"

    def identity(self) -> str:
        """Hash the settings; files and data count by their content: an edited distiller or image makes another run."""
        return hashlib.sha256(json.dumps(self.plain(), sort_keys=True).encode()).hexdigest()[:12]


@dataclass(frozen=True)
class EnginePlace:
    """The device, and how it is used."""

    device: str = setting("auto", "Device to train on: cpu, cuda, cuda:1 or mps; auto is the first GPU, else the CPU")
    graph: bool = setting(True, "Run training steps as CUDA graphs, where that is possible")
    compile: bool | str = setting(
        "auto",
        "Compile the networks: on, off (to repeat a run bit by bit), or auto: where that saves time within the run",
        switch_or_auto,
    )
    checkpoint_activations: bool = setting(
        False, "Compute the student's feature maps again in the backward pass instead of keeping them, to save memory"
    )
    threads: int = setting(0, "Number of CPU threads (0: one for each core)", between, 0, 1024)
    lanes: int = setting(
        0, "Number of runs of a suite that may be trained side by side (0: as many as memory holds)", between, 0, 10**6
    )
    memory: float = setting(1.0, "Share of the device's memory that runs side by side may take", between, 0.001, 1)
    stop_after: int = setting(
        0,
        "Epoch after which the runs of a suite stop; the same command without it continues them (0: train to the end)",
        between,
        0,
        10**6,
    )
    checkpoint_seconds: float | None = setting(
        None,
        "Seconds between checkpoints: at most so much work is lost when a run is killed (null: a minute, or more where "
        "writing them would take over a thirtieth of the time)",
        not_negative,
    )


@dataclass(frozen=True)
class DataPlace:
    """Where data lie, and who decodes them."""

    root: str = setting("data", "Folder of the data sets that torchvision downloads")
    workers: int = setting(2, "Number of processes that decode images of sets too large for memory", between, 0, 128)


@dataclass(frozen=True)
class TeacherPlace:
    """What is asked of a teacher before anything is distilled, and what of its work is kept for later runs."""

    allow_weak: bool = setting(False, "Distil even from a teacher whose accuracy is close to guessing")
    keep: Literal["nothing", "logits"] = setting(
        "nothing",
        "Outputs of the teacher to keep on disk: nothing, or logits (float16), which later runs of logit methods with "
        "the same teacher, data, recipe and seed read instead of running the teacher",
    )


@dataclass(frozen=True)
class OutputPlace:
    """Where results go."""

    root: str = setting("runs", "Folder that holds the runs")
    log: tuple[str, ...] = setting(
        (), "Loggers that record the run too, such as [tensorboard,mlflow]; the third is wandb", some_of, LOGGERS
    )
    measure_every: int = setting(
        1,
        "Number of epochs from one measurement of the student to the next; the last is always measured",
        between,
        1,
        10**6,
    )


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

    @property
    def last_epoch(self) -> int:
        """The epoch after which its training stops here: that of the recipe, or ``engine.stop_after``."""
        epochs = self.settings.protocol.epochs
        return min(self.place.engine.stop_after or epochs, epochs)

    @property
    def is_trained_whole(self) -> bool:
        """Whether that is the end of its recipe."""
        return self.last_epoch == self.settings.protocol.epochs

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


def all_settings() -> list[tuple[str, Any, str]]:
    """List every key that a user can set, with its default and its meaning, section by section."""
    known = [*described(Settings), *described(Place)]
    order = [section.name for section in (*fields(Settings), *fields(Place))]
    return sorted(known, key=lambda each: order.index(each[0].partition(".")[0]))
