"""A bench on a Ray cluster survives the loss of a node; no step is lost and none is done twice."""

import os
import secrets
import socket
import sys
import threading
from types import SimpleNamespace

import pytest

from kdzoo.engine.progress import Progress
from kdzoo.errors import UserError
from kdzoo.experiments import on_ray
from kdzoo.experiments.bench import bench
from kdzoo.experiments.on_ray import OnRay, Origin, on_node
from kdzoo.experiments.work import grouped
from kdzoo.experiments.workers import find
from kdzoo.store.folder import RunFolder

pytestmark = pytest.mark.slow(reason="starts the nodes of a Ray cluster")
TOKEN = secrets.token_hex(32)  # one for all tests, since Ray reads it once in the life of a process
SMALL = {"object_store_memory": 80 * 2**20, "num_gpus": 0}


@pytest.fixture
def ray(monkeypatch):
    """Ray, whose processes end with the test."""
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("RAY_AUTH_TOKEN", TOKEN)  # else Ray leaves one in the home folder
    monkeypatch.setenv("RAY_worker_niceness", "0")  # else they starve beside other tests
    import ray

    yield ray
    ray.shutdown()


@pytest.fixture
def cluster(ray, monkeypatch):
    """Two nodes of one core, and a head without any."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False, **SMALL})
    for _ in range(2):
        cluster.add_node(num_cpus=1, **SMALL)
    monkeypatch.setenv("RAY_ADDRESS", cluster.address)
    yield cluster
    ray.shutdown()
    cluster.shutdown()


def test_groups_of_a_node_that_is_lost_are_trained_by_another(
    cluster, counted, tmp_path, no_step_is_missing_or_done_twice
):
    os.mkfifo(tmp_path / "node")
    (tmp_path / "hang").touch()
    killed = []

    def kill_the_node_of_the_run_that_hangs():
        node_id = (tmp_path / "node").read_text()
        [node] = [node for node in cluster.list_all_nodes() if node.node_id == node_id]
        cluster.remove_node(node, allow_graceful=False)
        killed.append(node_id)

    killer = threading.Thread(target=kill_the_node_of_the_run_that_hangs, daemon=True)
    killer.start()
    report = bench(counted(3), tmp_path / "runs", quiet=True, executor=find("ray"))
    assert len(killed) == 1
    assert (len(report.finished), report.stopped, report.failed, report.elsewhere) == (6, {}, {}, [])
    assert no_step_is_missing_or_done_twice(3)


def test_where_there_is_no_cluster_one_is_started_and_mistakes_there_come_back_as_one_line(
    ray, counted, tmp_path, monkeypatch
):
    monkeypatch.setenv("RAY_ADDRESS", "local")  # not this machine's own cluster, if it has one
    with pytest.raises(UserError, match="no node of the cluster has 1 cores and 64 GPUs"):
        bench(counted(1), tmp_path / "runs", quiet=True, executor=find("ray", gpus=64))
    suite = counted(2)
    folder = RunFolder.of(suite.runs[0].within(output={"root": str(tmp_path / "runs")})).path
    folder.parent.mkdir(exist_ok=True)
    folder.touch()  # where a folder should be
    report = bench(suite, tmp_path / "runs", quiet=True, executor=find("ray", gpus=0))
    assert folder in report.stopped
    assert all("cannot be written" in reason for reason in report.stopped.values())
    assert len(report.finished) == 2


def test_a_cluster_that_does_not_answer_is_one_line(counted, tmp_path, monkeypatch):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{unused.getsockname()[1]}"
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(UserError, match=f"no Ray cluster answers at {address} .*refused.*; start one by") as caught:
        bench(counted(1), tmp_path / "runs", quiet=True, executor=find("ray"))
    assert "\n" not in str(caught.value)


def test_ray_that_is_not_installed_is_one_line(counted, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match=r"pip install 'kdzoo\[ray\]'"):
        bench(counted(1), tmp_path / "runs", quiet=True, executor=find("ray"))


def test_a_node_that_does_not_share_the_folder_says_so(counted, tmp_path):
    place = counted(1).runs[0].within(output={"root": str(tmp_path / "not-there")}).place
    value, reason = on_node(Origin.here(place), list)
    assert value is None
    assert f"has no folder {tmp_path / 'not-there'}; start the bench in a folder that all nodes share" in reason


def test_a_node_writes_where_the_bench_was_started_though_its_user_has_another_home(counted, tmp_path, monkeypatch):
    homes, done = [tmp_path / "one", tmp_path / "two"], []
    task = SimpleNamespace(options=lambda **_: SimpleNamespace(remote=lambda origin, work: done.append((origin, work))))
    monkeypatch.setattr(on_ray, "connect", lambda quiet: SimpleNamespace())
    monkeypatch.setattr(OnRay, "task", lambda *_: task.options())
    monkeypatch.setattr(OnRay, "share", lambda *_: 1.0)
    monkeypatch.setattr(on_ray, "answers", lambda ray, tasks: iter([("worker 1", None, "stopped")]))
    monkeypatch.setenv("HOME", str(homes[0]))
    suite = counted(1)
    groups = grouped(run.within(output={"root": "~/runs"}) for run in suite.runs)
    with Progress(quiet=True) as progress:
        OnRay().start(suite, groups, progress)
    monkeypatch.setenv("HOME", str(homes[1]))
    [(_, work)] = done
    folders = {RunFolder.of(run).path.parent for group in work.args[0] for run in group}
    assert folders == {homes[0] / "runs"}
