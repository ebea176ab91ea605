"""A run's folder: its settings, its history, its result and its student, each written whole or not at all."""

import json
import os
import shutil
from collections.abc import Collection, Iterator, Mapping
from contextlib import chdir, contextmanager, suppress
from pathlib import Path
from typing import Any

import yaml

from kdzoo.errors import UserError
from kdzoo.files import (
    MOVE_AWAY,
    digest,
    files_below,
    make_folder,
    path_of,
    read_json,
    read_text,
    remove_parts,
    slug,
    storing,
    write_text,
)
from kdzoo.keywords import flat, read_yaml
from kdzoo.resolve import stored
from kdzoo.settings import Place, Run, Settings, apart, are_mappings
from kdzoo.store import checkpoint
from kdzoo.store.environment import environment
from kdzoo.store.result import Result
from kdzoo.store.trust import PARTS, check_code

LONGEST_TITLE = 200  # of the 255 bytes that a folder's name may have
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
        self.loggers = path / "loggers.json"  # the names of its records in MLflow and W&B
        self.failure = path / "failed.txt"
        self.before = path / "before"  # a finished run that this one replaces, until it is finished itself
        self.classes = path / "classes.txt"  # the class that each output of the student stands for, one a line
        self.predictions = path / "predictions.safetensors"  # of the student, and of its teacher, on the test images

    @classmethod
    def of(cls, run: Run) -> "RunFolder":
        """Name the folder of a run."""
        settings, place = run
        names = (settings.data.name, settings.teacher.title, settings.student.name, settings.distiller.name)
        title = "-".join(slug(name.removesuffix(".py")) for name in names if name)[:LONGEST_TITLE]
        return cls(path_of(place.output.root) / f"{title}-s{settings.seed}-{settings.identity()}")

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
        """Make the folder and write what is known before the first step; the run's lock must be held."""
        make_folder(self.path)
        with storing(self.path):
            for folder in (self.path, self.checkpoints):
                remove_parts(folder)
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
            raise self._of_another_version("format")
        output = config.get("output")
        if isinstance(output, dict) and "tensorboard" in output:  # which is now one of several loggers
            output["log"] = ["tensorboard"] if output.pop("tensorboard") else []
        for part in ("distiller", "student", "teacher", "data", "protocol"):
            if not isinstance(config.get(part), dict) or "name" not in config[part]:
                raise UserError(f"{self.config} is damaged (it has no {part}.name); {MOVE_AWAY}")
        for part, known in KNOWN.items():
            if isinstance(known, Mapping) and not isinstance(config.get(part, {}), Mapping):
                raise UserError(f"{self.config} is damaged ({part} is no mapping); {MOVE_AWAY}")
        if not are_mappings(config["teacher"].get("others", [])):
            raise UserError(f"{self.config} is damaged (teacher.others is no list of teachers); {MOVE_AWAY}")
        return config

    def check(self, run: Run) -> None:
        """Check that what lies here is this run's and whole; a folder that is not there yet is.

        Raises:
            UserError: the settings were edited or written by another version, or files of a finished run are lost.
        """
        result = self.read_result()
        if result is not None:
            self.check_student(result)
            if not self.config.is_file():
                raise UserError(f"{self.path} has lost its {self.config.name}; {MOVE_AWAY}")
        if self.config.is_file():
            self.check_config(run)

    def check_config(self, run: Run) -> None:
        """Check that the settings that stand here are this run's.

        Raises:
            UserError: they were edited, or written by another version.
        """
        config = self.read_config()
        found, wanted = flat(apart(config)[0]), flat(run.settings.plain())
        if strange := [*_unknown(config), *(wanted.keys() ^ found.keys())]:
            raise self._of_another_version(strange[0])
        if changed := [key for key, value in wanted.items() if found[key] != value]:
            raise UserError(
                f"{self.config} was edited by hand ({', '.join(changed)}); write back what stood there, or {MOVE_AWAY}"
            )

    def check_student(self, result: Result) -> None:
        """Check that the student of a finished run is as it was written.

        Raises:
            UserError: it is lost or damaged.
        """
        if not self.student.is_file():
            raise UserError(f"{self.path} has lost its {self.student.name}; {MOVE_AWAY}")
        if result.weights not in ("", digest(self.student)):
            raise UserError(f"{self.student} is damaged (its checksum differs); {MOVE_AWAY}")

    def finished(self) -> Result:
        """Read the result of a run that is finished.

        Raises:
            UserError: this is no run, or it is not finished.
        """
        result = self.read_result()
        if result is None:
            self.read_config()
            raise UserError(f"{self.path} is not finished; run its command again, and it continues")
        return result

    def read_classes(self) -> tuple[str, ...]:
        """Read the class that each output of the student stands for.

        Raises:
            UserError: they are lost.
        """
        if not self.classes.is_file():
            raise UserError(f"{self.path} has lost its {self.classes.name}; copy the whole folder")
        return tuple(read_text(self.classes).splitlines())

    def run(self, trust_code: bool = False, working: Path | None = None, parts: Collection[str] = PARTS) -> Run:
        """Read what the run was made with, checked against what is installed now.

        Args:
            trust_code: import the files and modules that it names, whoever wrote them.
            working: the user's working folder, by default the one of now: code in it that is as it was is trusted.
            parts: of the run, whose code is used; none of the others is imported.

        Raises:
            UserError: there are no such settings, another version wrote them, or they name code that is not trusted.
        """
        config = self.read_config()
        if not trust_code:
            check_code(config, self.path, working or Path.cwd(), parts)
        if strange := next(_unknown(config), None):
            raise self._of_another_version(strange)
        return stored(config, checked="distiller" in parts)

    @contextmanager
    def home(self) -> Iterator[None]:
        """Work in the folder that the run was made in, if it is still there: relative paths then mean what they did."""
        folder = self.read_environment().get("folder") or ""  # none: of a run that was copied without the file
        with chdir(folder if os.path.isdir(folder) else Path.cwd()):
            yield

    def is_done(self, retry: bool = False) -> bool:
        """Tell whether a bench leaves the run as it is: it is finished, or it failed and is not to be retried."""
        return self.result.is_file() or (self.failure.is_file() and not retry)

    def has_reached(self, epoch: int) -> bool:
        """Tell whether an unfinished run was trained for so many epochs, and can be continued from there."""
        try:
            step = int(self.read_history()[epoch - 1]["step"])
        except (UserError, LookupError, TypeError, ValueError):  # resuming writes a lost or damaged history again
            return False
        return max(checkpoint.steps(self.checkpoints), default=0) >= step

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
        values = read_json(self.environment) if self.environment.is_file() else {}
        for name in ("device", "precision", "folder"):
            if not isinstance(values.get(name, ""), str):
                raise UserError(f"{self.environment} is damaged ({name} is no text); {MOVE_AWAY}")
        return values

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
        try:
            return Result.of(values, self.path)
        except KeyError as missing:
            raise self._of_another_version(missing.args[0]) from None
        except UserError as error:
            raise UserError(f"{self.result} is damaged ({error}); {MOVE_AWAY}") from error

    def _of_another_version(self, key: str) -> UserError:
        return UserError(
            f"{self.path} was written by another version of kdzoo, which this one cannot read ({key} differs); read it "
            f"with the version that its {self.environment.name} names, or move it away, or choose another --out"
        )

    def set_aside(self) -> None:
        """Make room for another start: move a finished run into ``before``, where it stays until this one is finished.

        What an unfinished run left is removed; of all other files in the folder none is touched.
        """
        kept = (self.config, self.environment, self.student, self.history, self.classes, self.predictions)
        with storing(self.path):
            if self.result.is_file():
                shutil.rmtree(self.before, ignore_errors=True)
                self.before.mkdir()
                for file in filter(Path.is_file, kept):
                    shutil.copy2(file, self.before)
                self.result.replace(self.before / self.result.name)  # at this moment it is there, and no longer here
            curves = self.path.glob("events.out.tfevents.*")
            for file in (
                self.student,
                self.history,
                self.classes,
                self.predictions,
                self.failure,
                self.loggers,
                *curves,
            ):
                file.unlink(missing_ok=True)


KNOWN = {**Run(Settings(), Place()).plain(), "distiller": {}}


def _unknown(config: Mapping[str, Any], known: Mapping[str, Any] = KNOWN, prefix: str = "") -> Iterator[str]:
    """Find the settings that this version does not have; where it has an empty mapping, any key may stand."""
    for key, value in config.items():
        if key not in known:
            yield f"{prefix}{key}"
        elif isinstance(value, Mapping) and isinstance(known[key], Mapping) and known[key]:
            yield from _unknown(value, known[key], f"{prefix}{key}.")


def find_runs(paths: list[Path]) -> list[RunFolder]:
    """Find the finished runs in or below ``paths``, each once; not one whose successor is finished.

    Raises:
        UserError: a path is no folder.
    """
    for path in paths:
        if not path.is_dir():
            raise UserError(f"no folder {path}; expected a run or a folder of runs")
    found = {file.parent.resolve(): RunFolder(file.parent) for file in files_below(paths, "result.json")}
    replaced = {folder.before.resolve() for folder in found.values()}  # a kill may leave them
    return [folder for place, folder in found.items() if place not in replaced]
