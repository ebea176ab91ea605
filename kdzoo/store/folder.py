"""A run's folder: its settings, its history, its result and its student, each written whole or not at all."""

import json
import platform
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import chdir, contextmanager, suppress
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import yaml

from kdzoo.errors import UserError
from kdzoo.files import MOVE_AWAY, make_folder, read_json, read_text, slug, storing, write_text
from kdzoo.keywords import read_yaml, typed
from kdzoo.naming import Names
from kdzoo.resolve import stored
from kdzoo.settings import Run, apart
from kdzoo.store.trust import check_code


@dataclass(frozen=True)
class Result:
    """What a finished run found. Accuracies are in percent, of the whole test set.

    Example:
        >>> result = kdzoo.run("none", "resnet8", overrides=quick, quiet=True)
        >>> result.folder.parent, result.student, result.epochs
        (PosixPath('runs'), 'resnet8', 1)
    """

    folder: Path
    data: str
    protocol: str
    teacher: str | None
    student: str
    distiller: str
    fidelity: str
    seed: int
    teacher_top1: float | None
    top1: float  # of the last epoch
    top5: float
    best_top1: float  # of the best epoch
    best_epoch: int
    epochs: int
    seconds: float  # of training and measuring, without the teacher's training
    images_per_second: float  # the median over epochs
    names: Names  # of its parts, as tables show them
    fingerprint: str = ""  # of the data; empty where their name and options decide them
    parameters: int | None = None  # of the student that ships; None: not counted, as in results of older versions
    extra_parameters: int | None = None  # that the method trains beside the student
    peak_memory: int | None = None  # bytes of the device in training, teacher included; None: not measured

    def plain(self) -> dict[str, Any]:
        """Return the values as JSON holds them; the folder is not among them."""
        values = asdict(self)
        del values["folder"]
        return values


FORMAT = 3  # of config.yaml; another version's folders are refused


class RunFolder:
    """The files of one run; the folder's name holds the hash of its settings."""

    def __init__(self, path: Path):
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.config = path / "config.yaml"
        self.history = path / "metrics.jsonl"
        self.result = path / "result.json"
        self.student = path / "student.safetensors"
        self.environment = path / "environment.json"
        self.failure = path / "failed.txt"
        self.before = path / "before"  # a finished run that this one replaces, until it is finished itself
        self.classes = path / "classes.txt"  # the class that each output of the student stands for, one a line

    @classmethod
    def of(cls, run: Run) -> "RunFolder":
        """Name the folder of a run."""
        settings, place = run
        names = (settings.data.name, settings.teacher.name, settings.student.name, settings.distiller.name)
        title = "-".join(slug(name.removesuffix(".py")) for name in names if name)
        return cls(Path(place.output.root).expanduser() / f"{title}-s{settings.seed}-{settings.identity()}")

    def of_other_data(self, run: Run) -> "RunFolder | None":
        """Find a run beside this one that has the same settings and read other data under the same name."""
        if self.config.exists() or not run.settings.data.fingerprint:
            return None
        wanted = run.settings.plain()
        wanted["data"].pop("fingerprint")
        for path in sorted(self.path.parent.glob(f"{self.path.name.removesuffix(run.settings.identity())}*")):
            with suppress(UserError):
                found, _ = apart(RunFolder(path).read_config())
                if found["data"].pop("fingerprint", "") and found == wanted:
                    return RunFolder(path)
        return None

    def open(self, run: Run) -> None:
        """Make the folder and write what is known before the first step."""
        make_folder(self.path)
        with storing(self.path):
            for part in self.path.glob(".*.part"):  # what a kill left behind
                part.unlink(missing_ok=True)
        write_text(self.config, yaml.safe_dump({"format": FORMAT, **run.plain()}, sort_keys=False))
        write_text(self.environment, json.dumps(environment(run), indent=2) + "\n")

    def read_config(self) -> dict[str, Any]:
        """Read what the run was made with, as it stands in the file.

        Raises:
            UserError: there is no such file, it is damaged, or another version of kdzoo wrote it.
        """
        if not self.config.is_file():
            raise UserError(f"{self.path} is no run; expected a folder with a config.yaml that kdzoo wrote")
        try:
            config = read_yaml(read_text(self.config), self.config.name)
        except UserError as error:
            raise UserError(f"{self.config} is damaged ({error}); {MOVE_AWAY}") from error
        if config and config.pop("format", None) != FORMAT:
            raise self._of_another_version()
        for part in ("distiller", "student", "teacher", "data", "protocol"):
            if not isinstance(config.get(part), dict) or "name" not in config[part]:
                raise UserError(f"{self.config} is damaged (it has no {part}.name); {MOVE_AWAY}")
        return config

    def run(self, trust_code: bool = False, working: Path | None = None) -> Run:
        """Read what the run was made with, checked against what is installed now.

        Args:
            trust_code: import the files and modules that it names, whoever wrote them.
            working: the user's working folder, by default the one of now: code in it that is as it was is trusted.

        Raises:
            UserError: there are no such settings, or they name code that is not trusted.
        """
        config = self.read_config()
        if not trust_code:
            check_code(config, self.path, working or Path.cwd())
        return stored(config)

    @contextmanager
    def home(self) -> Iterator[None]:
        """Work in the folder that the run was made in, if it is still there: relative paths then mean what they did."""
        try:
            folder = Path(json.loads(self.environment.read_text(encoding="utf-8"))["folder"])
        except (OSError, ValueError, KeyError):  # of a run that was copied without it, or by an older version
            folder = Path.cwd()
        with chdir(folder if folder.is_dir() else Path.cwd()):
            yield

    def is_done(self, retry: bool = False) -> bool:
        """Tell whether a bench leaves the run as it is: it is finished, or it failed and is not to be retried."""
        return self.result.is_file() or (self.failure.is_file() and not retry)

    def write_history(self, history: list[dict[str, Any]]) -> None:
        """Write the history, one line an epoch."""
        write_text(self.history, "".join(json.dumps(record) + "\n" for record in history))

    def read_history(self) -> list[dict[str, Any]]:
        """Read the history; it is empty before the first epoch's end."""
        if not self.history.is_file():
            return []
        try:
            return [dict(json.loads(line)) for line in read_text(self.history).splitlines()]
        except (ValueError, TypeError, RecursionError) as error:
            raise UserError(f"{self.history} is damaged; {MOVE_AWAY}") from error

    def read_environment(self) -> dict[str, Any]:
        """Read what the run was made on; empty where that is not known."""
        return read_json(self.environment) if self.environment.is_file() else {}

    def write_result(self, result: Result) -> None:
        """Finish the run: with this file it is done and is not run again.

        Raises:
            StorageError: the folder is not the one that was opened; that was removed or renamed meanwhile.
        """
        with storing(self.path):
            self.config.stat()
        write_text(self.result, json.dumps(result.plain(), indent=2) + "\n")
        shutil.rmtree(self.before, ignore_errors=True)

    def read_result(self) -> Result | None:
        """Read the result; None where the run is not finished."""
        if not self.result.is_file():
            return None
        values = read_json(self.result)
        if "names" not in values:
            raise self._of_another_version()
        try:
            result: Result = typed(Result, {**values, "folder": self.path}, "")
        except UserError as error:
            raise UserError(f"{self.result} is damaged ({error}); {MOVE_AWAY}") from error
        shares = [result.top1, result.top5, result.best_top1, result.teacher_top1 or 0.0]
        if result.plain() | values != result.plain() or not all(0 <= share <= 100 for share in shares):
            raise UserError(f"{self.result} is damaged (a value is no accuracy, or of another type); {MOVE_AWAY}")
        return result

    def _of_another_version(self) -> UserError:
        return UserError(
            f"{self.path} was made by another version of kdzoo, which this one cannot read; read it with the version "
            "that its environment.json names, or run the same command again with another --out"
        )

    def set_aside(self) -> None:
        """Make room for another start: move a finished run into ``before``, where it stays until this one is finished.

        What an unfinished run left is removed; of all other files in the folder none is touched.
        """
        kept = (self.config, self.environment, self.student, self.history, self.classes)
        with storing(self.path):
            if self.result.is_file():
                shutil.rmtree(self.before, ignore_errors=True)
                self.before.mkdir()
                for file in filter(Path.is_file, kept):
                    shutil.copy2(file, self.before)
                self.result.replace(self.before / self.result.name)  # at this moment it is there, and no longer here
            curves = self.path.glob("events.out.tfevents.*")
            for file in (self.student, self.history, self.classes, self.failure, *curves):
                file.unlink(missing_ok=True)


def environment(run: Run) -> dict[str, Any]:
    """Collect versions, device and code revision: what one needs to trust a number later."""
    import torch

    device = torch.device(run.place.engine.device)
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in ("kdzoo", "torch", "torchvision", "timm", "PyWavelets", "numpy")},
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or str(device),
        "device_type": device.type,
        "precision": run.settings.engine.precision,
        "threads": torch.get_num_threads(),
        "revision": _revision(),
        "folder": str(Path.cwd()),
    }


def find_runs(paths: list[Path]) -> list[RunFolder]:
    """Find the finished runs in or below ``paths``.

    Raises:
        UserError: a path is not there.
    """
    found = []
    for path in paths:
        if not path.exists():
            raise UserError(f"no folder {path}; expected a run or a folder of runs")
        found += [RunFolder(file.parent) for file in sorted(path.rglob("result.json"))]
    return found


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _revision() -> str | None:
    """Find the commit of kdzoo's checkout, with ``+`` where files differ from it; None for an installed package."""
    here = Path(__file__).parent

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(here), *arguments], capture_output=True, text=True, check=True, timeout=10
        ).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")) != here.parents[1]:
            return None
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None
