"""What a run hands to TensorBoard, MLflow and W&B is what its own files hold; the libraries' files are read back."""

import os
import shutil
import socket
import struct
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

import kdzoo
from kdzoo.engine.progress import Progress
from kdzoo.engine.training import train_lanes
from kdzoo.errors import UserError
from kdzoo.settings import Run
from kdzoo.store.folder import RunFolder
from kdzoo.store.loggers import LOGGERS, Loggers, points, texts
from tests.made_runs import write
from tests.misbehaving import write_method
from tests.short_runs import settings

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the libraries among themselves

HISTORY = [
    {"epoch": n, "step": 4 * n, "lr": 0.1, "loss": {"ce": 2.0 / n, "kd": 1.0}, "top1": top1, "top5": top1}
    | {"images_per_second": 9.5}
    for n, top1 in ((1, None), (2, 50.0), (3, 75.0))
]
NAMES = {"step", "lr", "loss/ce", "loss/kd", "top1", "top5", "images_per_second"}


@pytest.fixture(autouse=True, scope="module")
def own_configuration():
    """No configuration of the libraries on this machine takes part, and none is left behind."""
    before = dict(os.environ)
    for name in before:
        if name.startswith(("MLFLOW_", "WANDB_")):
            del os.environ[name]
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="module")
def made_store(tmp_path_factory):
    """A store of MLflow as it is made for the first run; making it takes seconds."""
    pytest.importorskip("mlflow")
    root = tmp_path_factory.mktemp("made")
    folder = write(root, 75.0, 0)
    with Loggers(folder.run().within(output={"log": ("mlflow",)}), folder, print) as loggers:
        loggers.write(HISTORY[:1])
        loggers.fail()
    return folder


@pytest.fixture
def store(made_store, tmp_path, monkeypatch):
    """A copy of it, beside the runs of a test; it holds one run of another experiment."""
    monkeypatch.chdir(tmp_path)  # for MLflow keeps artifacts in the folder where a store was opened, if it names none
    shutil.copy(made_store.path.parent / "mlflow.db", tmp_path / "mlflow.db")
    client = pytest.importorskip("mlflow").MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    client.rename_experiment(client.get_experiment_by_name("kdzoo").experiment_id, "before")
    return client


@pytest.fixture
def asked(monkeypatch):
    """The addresses beyond this machine that are asked for; asking fails."""
    seen, connect = [], socket.socket.connect

    def connect_here(self, address):
        if isinstance(address, tuple) and address[0] not in ("127.0.0.1", "::1", "localhost"):
            seen.append(address)
            raise OSError("no network")
        return connect(self, address)

    def resolve(host, *arguments, **options):
        if host not in ("127.0.0.1", "::1", "localhost", None):
            seen.append(host)
            raise OSError("no network")
        return real(host, *arguments, **options)

    real = socket.getaddrinfo
    monkeypatch.setattr(socket.socket, "connect", connect_here)
    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    return seen


def recorded(root, log, *histories):
    """A run, handed to a logger in one start for each history; the last start finishes it."""
    folder = write(root, 75.0, 0)
    for name in ("student", "classes"):
        getattr(folder, name).write_text(name)
    run, said = folder.run(), []
    run = Run(run.settings, run.place).within(output={"log": (log,)})
    for number, history in enumerate(histories, 1):
        with Loggers(run, folder, said.append) as loggers:
            for epoch in range(1, len(history) + 1):
                loggers.write(history[:epoch])
            if number == len(histories):
                loggers.finish(history, folder.read_result())
    assert said == []
    return folder


def expected():
    """Each number of the history, by name and epoch."""
    points = {}
    for record in HISTORY:
        flat = {**{k: v for k, v in record.items() if k not in ("loss", "epoch")}}
        flat |= {f"loss/{name}": value for name, value in record["loss"].items()}
        points |= {(name, record["epoch"]): value for name, value in flat.items() if value is not None}
    return points


def in_tensorboard(folder):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder.path)).Reload()
    return [(name, event.step, event.value) for name in events.Tags()["scalars"] for event in events.Scalars(name)]


def in_mlflow(client):
    [run] = client.search_runs([client.get_experiment_by_name("kdzoo").experiment_id])
    names = run.data.metrics
    points = [point for name in names for point in client.get_metric_history(run.info.run_id, name)]
    return run, [(point.key, point.step, point.value) for point in points]


def in_wandb(folder):
    """The records of the only offline run, whose file is a log of LevelDB's kind after a head of seven bytes."""
    wandb = pytest.importorskip("wandb")
    from wandb.proto.wandb_internal_pb2 import Record

    wandb.teardown()  # waits for the process that writes the file
    [file] = folder.path.parent.glob("wandb/offline-run-*/*.wandb")
    content, at, whole, records = file.read_bytes(), 7, b"", []
    while at + 7 <= len(content):
        if 32768 - at % 32768 < 7:  # the rest of a block that no head fits in
            at += 32768 - at % 32768
            continue
        _, length, kind = struct.unpack_from("<IHB", content, at)
        whole += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # a record in one part, or its last part
            records.append(Record.FromString(whole))
            whole = b""
    return records


def wandb_points(records):
    found = []
    for history in (record.history for record in records if record.HasField("history")):
        items = {"/".join(item.nested_key) or item.key: yaml.safe_load(item.value_json) for item in history.item}
        found += [(name, items["_step"], value) for name, value in items.items() if not name.startswith("_")]
    return found


def test_tensorboard_holds_every_number_once_after_two_starts(tmp_path):
    pytest.importorskip("tensorboard")
    folder = recorded(tmp_path, "tensorboard", HISTORY[:2], HISTORY)
    points = in_tensorboard(folder)
    assert {(name, step): pytest.approx(value) for name, step, value in points} == expected()
    assert len(points) == len(expected())


@pytest.mark.slow(reason="loads mlflow")
def test_mlflow_holds_settings_curves_result_and_student(store, tmp_path, asked):
    folder = recorded(tmp_path, "mlflow", HISTORY[:2], HISTORY)
    run, points = in_mlflow(store)
    curves = [point for point in points if not point[0].startswith("result/")]
    assert {(name, step): value for name, step, value in curves} == expected()
    assert len(curves) == len(expected())  # none twice, though the run was started twice
    assert run.data.params["distiller.name"] == "kd"
    assert run.data.params["distiller.temperature"] == "4.0"
    assert run.data.metrics["result/top1"] == 75.0
    assert run.data.tags["result.teacher"] == "vit_s"
    assert run.info.status == "FINISHED"
    student = Path(run.info.artifact_uri.removeprefix("file://")) / "student.safetensors"
    assert student.read_bytes() == folder.student.read_bytes()
    assert asked == []


def test_wandb_holds_settings_curves_result_and_student_offline(tmp_path, asked):
    pytest.importorskip("wandb")
    folder = recorded(tmp_path, "wandb", HISTORY[:2], HISTORY)
    records = in_wandb(folder)
    points = wandb_points(records)
    assert {(name, step): value for name, step, value in points if name != "epoch"} == expected()
    assert len(points) == len({point[:2] for point in points})
    text = "".join(str(record) for record in records)
    assert "temperature" in text
    assert "result/top1" in text
    [artifact] = [record.artifact for record in records if record.HasField("artifact")]
    files = {entry.path: entry.local_path for entry in artifact.manifest.contents}
    assert Path(files["student.safetensors"]).read_text() == "student"
    assert asked == []


def test_an_address_beyond_this_machine_is_noticed(asked):
    with pytest.raises(OSError, match="no network"):
        socket.create_connection(("192.0.2.1", 80))
    with pytest.raises(OSError, match="no network"):
        socket.create_connection(("example.org", 80))
    assert len(asked) == 2


@pytest.mark.slow(reason="trains several runs")
def test_lanes_side_by_side_have_a_record_each_and_the_results_that_they_have_without(tmp_path, dataset, teacher):
    pytest.importorskip("tensorboard")
    log = ["tensorboard"]
    log += [library for library in ("mlflow", "wandb") if find_spec(library)]
    ends = {}
    for root, chosen in ((tmp_path / "with", log), (tmp_path / "without", [])):
        runs = [settings(root, name, f"output.log=[{','.join(chosen)}]") for name in ("kd", "dist")]
        ends[root.name] = train_lanes(runs, dataset, teacher, Progress(quiet=True))
    assert [end.weights for end in ends["with"]] == [end.weights for end in ends["without"]]
    for end in ends["with"]:
        values = {(name, step): value for name, step, value in in_tensorboard(RunFolder(end.folder))}
        history = RunFolder(end.folder).read_history()
        assert [values["top1", record["epoch"]] for record in history] == pytest.approx([r["top1"] for r in history])
    if "mlflow" in log:
        client = pytest.importorskip("mlflow").MlflowClient(f"sqlite:///{tmp_path / 'with' / 'mlflow.db'}")
        runs = client.search_runs([client.get_experiment_by_name("kdzoo").experiment_id])
        tops = {run.info.run_name: run.data.metrics["result/top1"] for run in runs}
        assert tops == {end.folder.name: end.top1 for end in ends["with"]}
    if "wandb" in log:
        assert len(list((tmp_path / "with").glob("wandb/offline-run-*"))) == 2
    assert not list((tmp_path / "without").glob("*/events*"))


def test_a_logger_that_is_not_installed_is_one_line_before_anything_is_made(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(
        UserError, match=r"output.log asks for wandb, which is not installed: pip install 'kdzoo\[wandb"
    ):
        kdzoo.run("kd", "resnet8", "resnet14", out=tmp_path / "runs", overrides=["output.log=[wandb]"], quiet=True)
    assert not (tmp_path / "runs").exists()


def test_a_logger_that_fails_is_one_line_and_the_run_ends_as_without_it(tmp_path, dataset, teacher):
    run = settings(tmp_path, "kd", "output.log=[tensorboard]")
    (RunFolder.of(run).path / "events.out.tfevents.0").mkdir(parents=True)  # which cannot be replaced
    said = []
    progress = Progress(quiet=True)
    progress.say = said.append
    [result] = train_lanes([run], dataset, teacher, progress)
    assert 0 <= result.top1 <= 100
    [line] = [line for line in said if "output.log" in line]
    assert line.startswith("output.log: tensorboard failed, and the run continues without it (")
    assert "\n" not in line


def test_a_store_of_mlflow_that_cannot_be_reached_is_one_line(tmp_path, monkeypatch):
    pytest.importorskip("mlflow")
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/file/mlflow.db")
    folder, said = write(tmp_path, 75.0, 0), []
    with Loggers(folder.run().within(output={"log": ("mlflow",)}), folder, said.append) as loggers:
        loggers.write(HISTORY)
    assert len(said) == 1
    assert said[0].startswith("output.log: mlflow failed")


def test_the_users_own_store_of_mlflow_is_written_and_the_one_beside_the_runs_is_not(store, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "pets")
    recorded(tmp_path / "runs", "mlflow", HISTORY)
    assert len(store.search_runs([store.get_experiment_by_name("pets").experiment_id])) == 1
    assert not (tmp_path / "runs" / "mlflow.db").exists()


def test_a_run_whose_lane_failed_is_marked_so(made_store):
    mlflow = pytest.importorskip("mlflow")
    run, _ = in_mlflow(mlflow.MlflowClient(f"sqlite:///{made_store.path.parent / 'mlflow.db'}"))
    assert run.info.status == "FAILED"
    assert (run.info.run_name, run.data.metrics["loss/ce"]) == (made_store.path.name, 2.0)


@pytest.mark.parametrize(
    ("method", "more", "state"),
    [("kd", [], "finished"), ("kd", ["engine.stop_after=1"], "stopped"), ("bad", [], "failed")],
)
def test_a_record_ends_as_its_run_does(tmp_path, dataset, teacher, monkeypatch, method, more, state):
    closed = []
    logger = SimpleNamespace(write=lambda _: None, finish=lambda _: None, close=closed.append)
    monkeypatch.setitem(LOGGERS, "tensorboard", lambda run, folder: logger)
    file = write_method(tmp_path, 0, "NaN") if method == "bad" else method
    run = settings(tmp_path, file, "output.log=[tensorboard]", *more)
    train_lanes([run], dataset, teacher, Progress(quiet=True))
    assert closed == [state]


def test_a_run_that_a_store_does_not_know_begins_anew_in_it(store, tmp_path):
    folder = write(tmp_path, 75.0, 0)
    folder.loggers.write_text('{"mlflow": "0123456789abcdef0123456789abcdef"}')
    recorded(tmp_path, "mlflow", HISTORY)
    assert len(in_mlflow(store)[1]) > len(expected())


def test_folders_that_were_written_with_the_older_setting_are_read(tmp_path):
    folder = write(tmp_path, 75.0, 0)
    folder.student.write_text("student")
    config = yaml.safe_load(folder.config.read_text())
    for old, new in ((True, ("tensorboard",)), (False, ())):
        output = {key: value for key, value in config["output"].items() if key != "log"} | {"tensorboard": old}
        folder.config.write_text(yaml.safe_dump({**config, "output": output}))
        assert folder.run().place.output.log == new
        folder.check(folder.run())


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("[tensorbord]", "unknown output.log 'tensorbord'; did you mean tensorboard"),
        ("[wandb,wandb]", "expected each word once"),
        ("mlflow", "output.log"),
    ],
)
def test_a_wrong_name_of_a_logger_is_one_line(tmp_path, given, said):
    with pytest.raises(UserError, match=said):
        settings(tmp_path, "kd", f"output.log={given}")


STRANGE = {"a+b": 1.0, "a*b": 2.0, "a_b": 3.0, "κ": 4.0, "..": 5.0, "x" * 300: 6.0, "": 7.0, "a//b": 8.0}


def test_names_that_mlflow_refuses_are_replaced_and_none_is_lost():
    validation = pytest.importorskip("mlflow.utils.validation")
    found = points({"epoch": 1, "loss": STRANGE})
    assert sorted(found.values()) == sorted(STRANGE.values())
    assert {"loss/a_b", "loss/a_b_2", "loss/a_b_3", "loss/κ"} <= found.keys()
    settings = {"files": {f"{'../' * i}mine ({i})/./{key}.py": key for i, key in enumerate(STRANGE)}, "seed": 0}
    named = texts(settings, 400)
    assert sorted(named.values()) == sorted([*STRANGE, "0"])
    assert "seed" in named
    for name in (*found, *named):
        validation._validate_metric(name, 1.0, 0, 0)
        validation._validate_param(name, "value")


@pytest.mark.slow(reason="loads mlflow")
def test_a_run_whose_names_mlflow_refuses_is_recorded_whole(store, tmp_path):
    record = {**HISTORY[0], "loss": {"a+b": 1.0, "a*b": 2.0}}
    recorded(tmp_path, "mlflow", [record])
    _, found = in_mlflow(store)
    assert {("loss/a_b", 1, 1.0), ("loss/a_b_2", 1, 2.0)} <= set(found)
