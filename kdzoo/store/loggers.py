"""Hand what a run finds to TensorBoard, MLflow and Weights & Biases, where ``output.log`` asks for them.

Nothing is sent anywhere unless the user's own settings of a library say where: MLflow writes to a database beside the
runs, W&B to a folder beside them.
"""

import json
import os
import posixpath
import re
import secrets
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from importlib.util import find_spec
from itertools import chain, count
from pathlib import Path
from typing import Any, Protocol, TypeVar

from filelock import FileLock

from kdzoo.errors import UserError, told
from kdzoo.files import read_json, write_text
from kdzoo.keywords import flat
from kdzoo.settings import Place, Run
from kdzoo.store.folder import RunFolder
from kdzoo.store.result import Result

Value = TypeVar("Value")
LONGEST = 240  # characters of a name, of the 250 that MLflow takes
REFUSED = r"[^\w. :/-]" if os.name == "posix" else r"[^\w. /-]"  # by MLflow in a name


class Logger(Protocol):
    """What is told of one run, in one library."""

    def write(self, history: Sequence[Mapping[str, Any]]) -> None:
        """Add the epochs that it does not hold yet."""

    def finish(self, result: Result) -> None:
        """Add the result and the student."""

    def close(self, state: str) -> None:
        """End the record: the run is "finished", "failed" or "stopped"."""


class Loggers:
    """The loggers of one run: a context manager. One that fails says so in a line and is told nothing more.

    Args:
        run: whose settings are recorded, and which loggers it asks for; None: no logger.
        folder: the run's.
        say: prints a line.
    """

    def __init__(
        self, run: Run | None = None, folder: RunFolder | None = None, say: Callable[[str], object] = print
    ) -> None:
        self.say, self.state, self.opened = say, "stopped", dict[str, Logger]()
        if run is not None and folder is not None:
            for name in run.place.output.log:
                self._alone(name, partial(self._open, name, run, folder))

    def write(self, history: Sequence[Mapping[str, Any]]) -> None:
        """Add the epochs of a history that the loggers do not hold yet."""
        self._each(lambda logger: logger.write(history))

    def finish(self, history: Sequence[Mapping[str, Any]], result: Result) -> None:
        """Add what is left of the history, the result, and the student as it lies in the run's folder."""
        self.write(history)
        self._each(lambda logger: logger.finish(result))
        self.state = "finished"

    def fail(self) -> None:
        """Note that the run failed, and did not only stop on the way."""
        self.state = "failed"

    def __enter__(self) -> "Loggers":
        return self

    def __exit__(self, *_: object) -> None:
        self._each(lambda logger: logger.close(self.state))

    def _open(self, name: str, run: Run, folder: RunFolder) -> None:
        self.opened[name] = LOGGERS[name](run, folder)

    def _each(self, work: Callable[[Logger], object]) -> None:
        for name, logger in list(self.opened.items()):
            self._alone(name, partial(work, logger))

    def _alone(self, name: str, work: Callable[[], object]) -> None:
        try:
            work()
        except Exception as error:
            self.opened.pop(name, None)
            self.say(f"output.log: {name} failed, and the run continues without it ({told(error)})")


def check_installed(place: Place) -> None:
    """Check that the libraries of all loggers that are asked for are installed.

    Raises:
        UserError: one is not.
    """
    for name in place.output.log:
        if find_spec(name) is None:
            raise UserError(f"output.log asks for {name}, which is not installed: pip install 'kdzoo[{name}]'")


def points(record: Mapping[str, Any]) -> dict[str, float]:
    """Return the numbers that a run found in an epoch."""
    return numbers({name: value for name, value in record.items() if name != "epoch"})


def numbers(values: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """Return the numbers in nested values by their full names, such as ``loss/kd``."""
    return acceptable(dict(_numbers(values, prefix)))


def _numbers(values: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, float]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _numbers(value, f"{prefix}{key}/")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield f"{prefix}{key}", float(value)


def acceptable(values: Mapping[str, Value]) -> dict[str, Value]:
    """Give each value a name that all three libraries take, as near to its own as that allows; no two have the same."""
    found: dict[str, Value] = {}
    for name, value in values.items():
        plain = re.sub(REFUSED, "_", name)[-LONGEST:]
        if posixpath.normpath(plain) != plain or plain.startswith(("/", "..")):  # a path that has a shorter form
            plain = plain.replace("/", "_")
        again = (f"{plain}_{number}" for number in count(2))
        found[next(each for each in chain([plain], again) if each not in found)] = value
    return found


def texts(values: Mapping[str, Any], longest: int) -> dict[str, str]:
    """Return nested settings as texts by their full keys, cut to what a library takes."""
    plain = {key: value if isinstance(value, str) else json.dumps(value) for key, value in flat(values).items()}
    return acceptable({key: value[:longest] for key, value in plain.items()})


def noted_name(folder: RunFolder, library: str) -> str | None:
    """Return the name of the run's record in a library, as its folder notes it; None where it notes none."""
    if not folder.loggers.is_file():
        return None
    name = read_json(folder.loggers).get(library)
    return name if isinstance(name, str) and re.fullmatch("[0-9a-f]{8,64}", name) else None


def note_name(folder: RunFolder, library: str, name: str) -> str:
    """Note the name of the run's record in a library, for when it continues."""
    noted = read_json(folder.loggers) if folder.loggers.is_file() else {}
    write_text(folder.loggers, json.dumps(noted | {library: name}) + "\n")
    return name


class TensorBoard:
    """Event files in the run's folder, with a scalar for each number."""

    def __init__(self, run: Run, folder: RunFolder):
        from torch.utils.tensorboard import SummaryWriter

        for stale in folder.path.glob("events.out.tfevents.*"):  # a resumed run writes its whole history anew
            stale.unlink()
        self.writer, self.written = SummaryWriter(str(folder.path)), 0
        self.writer.add_text("settings", block(run.settings.plain()))

    def write(self, history: Sequence[Mapping[str, Any]]) -> None:
        for record in history[self.written :]:
            for name, value in points(record).items():
                self.writer.add_scalar(name, value, record["epoch"])
        self.written = len(history)
        self.writer.flush()

    def finish(self, result: Result) -> None:
        self.writer.add_text("result", block(result.plain()))

    def close(self, state: str) -> None:
        self.writer.close()


def block(values: Mapping[str, Any]) -> str:
    """Return values as a block of code in Markdown, in which nothing is markup."""
    return "".join(f"    {line}\n" for line in json.dumps(values, indent=2).splitlines())


# Where the user did not set it: no report of its use over the network, no news of its database, and seconds instead of
# minutes until a server that does not answer counts as failed.
MLFLOW = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
}


class MLflow:
    """A run of MLflow: in the store that ``MLFLOW_TRACKING_URI`` names, else in ``mlflow.db`` beside the runs."""

    def __init__(self, run: Run, folder: RunFolder):
        for name, value in MLFLOW.items():
            os.environ.setdefault(name, value)
        from mlflow import MlflowClient
        from mlflow.entities import Param
        from mlflow.exceptions import MlflowException

        self.folder, root = folder, folder.path.parent.resolve()
        store = os.environ.get("MLFLOW_TRACKING_URI")
        local = f"sqlite:///{(root / 'mlflow.db').as_posix()}?timeout=60"  # seconds to wait for other writers
        with FileLock(root / ".mlflow.lock"):  # two processes cannot both make the database
            self.client = MlflowClient(store or local)
            experiment = experiment_of(self.client, None if store else (root / "mlflow").as_uri())
        noted, known = noted_name(folder, "mlflow"), {}
        try:
            known = self.client.get_run(noted).data.metrics if noted else {}
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":  # it may lie in another store
                raise
            noted = None
        self.id = noted or note_name(
            folder, "mlflow", self.client.create_run(experiment, run_name=folder.path.name).info.run_id
        )
        histories = (self.client.get_metric_history(self.id, name) for name in known)
        self.seen = {(point.key, point.step) for points in histories for point in points}
        self.client.update_run(self.id, status="RUNNING")
        params = [Param(key, value) for key, value in texts(run.settings.plain(), 6000).items()]
        for start in range(0, len(params), 100):  # at most so many at a time
            self.client.log_batch(self.id, params=params[start : start + 100])

    def write(self, history: Sequence[Mapping[str, Any]]) -> None:
        for record in history:
            self._log(points(record), record["epoch"])

    def _log(self, found: Mapping[str, float], step: int) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        new = [Metric(name, value, now, step) for name, value in found.items() if (name, step) not in self.seen]
        if new:
            self.client.log_batch(self.id, metrics=new)
        self.seen |= {(metric.key, metric.step) for metric in new}

    def finish(self, result: Result) -> None:
        from mlflow.entities import RunTag

        self._log(numbers(result.plain(), "result/"), result.epochs)
        tags = [RunTag(f"result.{key}", value) for key, value in texts(result.plain(), 5000).items()]
        self.client.log_batch(self.id, tags=tags)
        for file in (self.folder.student, self.folder.classes, self.folder.environment):
            self.client.log_artifact(self.id, str(file))

    def close(self, state: str) -> None:
        self.client.set_terminated(self.id, {"finished": "FINISHED", "failed": "FAILED"}.get(state, "KILLED"))


def experiment_of(client: Any, artifacts: str | None) -> str:
    """Return the id of the experiment that the user's settings of MLflow name, else of ``kdzoo``."""
    if number := os.environ.get("MLFLOW_EXPERIMENT_ID"):
        return number
    name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "kdzoo")
    found = client.get_experiment_by_name(name)
    return found.experiment_id if found else client.create_experiment(name, artifact_location=artifacts)


class WandB:
    """A run of Weights & Biases: offline in ``wandb`` beside the runs, unless ``WANDB_MODE`` says otherwise."""

    def __init__(self, run: Run, folder: RunFolder):
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # it would report its own errors over the network
        import wandb

        self.folder, self.identity = folder, run.settings.identity()
        mode, root = os.environ.get("WANDB_MODE", "offline"), Path(os.environ.get("WANDB_DIR", folder.path.parent))
        number = noted_name(folder, "wandb") or note_name(folder, "wandb", secrets.token_hex(4))
        if mode == "offline":  # which cannot go back to a run: its whole history is written anew
            for stale in root.glob(f"*wandb/offline-run-*-{number}"):
                shutil.rmtree(stale)
        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "kdzoo"),
            name=folder.path.name,
            id=number,
            dir=root,
            config=run.settings.plain(),
            mode=mode,
            resume=None if mode == "offline" else "allow",
            reinit="create_new",
            settings=wandb.Settings(console="off", silent=True),
        )
        self.written = self.run.step if self.run.resumed else 0

    def write(self, history: Sequence[Mapping[str, Any]]) -> None:
        for record in history:
            if record["epoch"] > self.written:
                self.run.log(points(record), step=record["epoch"], commit=True)
                self.written = record["epoch"]

    def finish(self, result: Result) -> None:
        import wandb

        self.run.summary.update({f"result/{key}": value for key, value in flat(result.plain()).items()})
        student = wandb.Artifact(f"student-{self.identity}", type="model")
        for file in (self.folder.student, self.folder.classes, self.folder.environment):
            student.add_file(str(file.resolve()), policy="immutable", skip_cache=True)  # nothing is copied
        self.run.log_artifact(student)

    def close(self, state: str) -> None:
        self.run.finish(exit_code=0 if state == "finished" else 1)


LOGGERS: dict[str, Callable[[Run, RunFolder], Logger]] = {
    "tensorboard": TensorBoard,
    "mlflow": MLflow,
    "wandb": WandB,
}
