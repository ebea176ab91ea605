"""Cases: a run, or two processes on one bench, is harmed once or more, started again, and compared by hash."""

import hashlib
import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from kdzoo import cli
from kdzoo.commands.training import UNFINISHED

from .harm import AT_OPERATIONS, SIGNALS, Harm, Operations, forked, limit_memory

for module in ("experiments.bench", "experiments.run", "results.last_screen", "results.layout", "results.table"):
    import_module(f"kdzoo.{module}")  # once, before any process is forked

ON = ["engine.device=cpu", "engine.precision=float32", "engine.checkpoint_seconds=0", "protocol.epochs=2"]
ON += ["protocol.batch_size=32", "data.limit=96", "teacher.epochs=1", "teacher.allow_weak=true", "protocol.ema=0.9"]
SUITE = "{pairs: [[resnet14, resnet8]], distillers: [none, kd], seeds: [0, 1]}"
SUBJECTS = {
    "run": (["run", "--distiller", "kd", "--teacher", "resnet14", "--student", "resnet8", "--out", "runs", *ON], 1),
    "bench": (["bench", "suite.yaml", "--out", "runs", *ON], 2),
}
TIMES = {
    "seconds",
    "images_per_second",
    "peak_memory",
    "latency_1",
    "latency_64",
}  # of results and histories, which differ each time
NATIVE = {-signal.SIGSEGV, -signal.SIGABRT}  # where a library that is not Python's finds no memory
HANG = 120.0  # seconds
FOLDERS = ("runs/*resnet8*", "runs/*resnet8*/checkpoints", "runs", "cache/teachers/*", "cache")


class Fault(Exception):
    """An end that should not be."""


@dataclass(frozen=True)
class Case:
    """A seed's case: on what, and which harms, one after the other."""

    seed: int
    subject: str
    harms: tuple[Harm, ...]

    @property
    def lacks_memory(self) -> bool:
        """Whether runs may have failed for good reason."""
        return any(harm.kind == "memory" for harm in self.harms)

    def __str__(self) -> str:
        return f"seed {self.seed:<5} {self.subject:<5} {', '.join(map(str, self.harms))}"


class Torture:
    """Runs cases in folders of their own below ``folder``; one that ends well leaves nothing there."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.whole: dict[str, dict[str, str]] = {}  # by subject: what an undisturbed start leaves
        self.operations: dict[str, int] = {}
        self.seconds: dict[str, float] = {}

    def undisturbed(self, subject: str) -> None:
        """Make what all ends are compared with, once."""
        if subject in self.whole:
            return
        home = self.home(f"whole-{subject}")
        begun = time.monotonic()
        end = self.ended(home, *self.started(home, subject, None))
        if end != 0:
            raise Fault(f"undisturbed, {subject} ended with {end}: {said(home)}")
        self.seconds[subject] = time.monotonic() - begun
        self.operations[subject] = int((home / "operations").read_text())
        self.whole[subject] = found(home / "runs")
        again = self.home(f"again-{subject}")
        self.ended(again, *self.started(again, subject, None))
        if found(again / "runs") != self.whole[subject]:
            raise Fault(f"two undisturbed starts of {subject} differ")
        other = {name: digest for name, digest in self.whole[subject].items() if "student" in name}
        if len(set(other.values())) != len(other):
            raise Fault("students of different runs are equal: the comparison shows nothing")

    def drawn(self, seed: int, kinds: Sequence[str], subjects: Sequence[str] = tuple(SUBJECTS)) -> Case:
        """Draw the case of a seed."""
        chance = random.Random(seed)
        subject = chance.choice(subjects)
        self.undisturbed(subject)
        harms = []
        for _ in range(chance.choice((1, 1, 1, 2, 3))):
            kind = chance.choice(kinds)
            if kind in AT_OPERATIONS:
                point: float = chance.randint(1, self.operations[subject])
            else:
                point = round(chance.random(), 3) if kind in SIGNALS else round(chance.uniform(1, 30) ** 2)
            harms.append(Harm(kind, point, chance.choice(FOLDERS) if kind in ("removed", "renamed") else ""))
        return Case(seed, subject, tuple(harms))

    def run(self, case: Case) -> str:
        """Run a case and say how its starts ended.

        Raises:
            Fault: one ended as it should not, or what it left differs from what an undisturbed start leaves.
        """
        self.undisturbed(case.subject)
        home, ends, native = self.home(f"seed-{case.seed}"), [], False
        for harm in case.harms:
            others = [self.started(home, case.subject, None, i)[0] for i in range(1, SUBJECTS[case.subject][1])]
            number, begun = self.started(home, case.subject, harm)
            if harm.kind in SIGNALS:
                time.sleep(harm.point * self.seconds[case.subject])
                os.kill(number, SIGNALS[harm.kind])
            end = self.ended(home, number, begun)
            native |= harm.kind == "memory" and end in NATIVE
            check_end(home, end, harm)
            ends.append(str(end))
            for i, other in enumerate(others, 1):
                end = self.ended(home, other, begun, i)
                check_end(home, end, None, i)
                ends[-1] += f"|{end}"
            self.check_finished(home, case.subject)
        end = self.ended(home, *self.started(home, case.subject, None, retry=case.lacks_memory))
        if end != 0:
            raise Fault(f"undisturbed after the harm, it ended with {end}: {said(home)}")
        self.check_finished(home, case.subject)
        left = {name: digest for name, digest in found(home / "runs").items() if "-moved-" not in name}
        if left != self.whole[case.subject]:
            differing = [n for n, d in (left.items() ^ self.whole[case.subject].items())]
            raise Fault(f"the end differs from an undisturbed one in {', '.join(sorted(set(differing)))}")
        shutil.rmtree(home)
        return f"{', '.join(ends)}{' (by a native library)' if native else ''}, then 0 and equal"

    def home(self, name: str) -> Path:
        """Make an empty folder for a case."""
        home = self.folder / name
        shutil.rmtree(home, ignore_errors=True)
        home.mkdir(parents=True)
        (home / "suite.yaml").write_text(SUITE)
        return home

    def started(
        self, home: Path, subject: str, harm: Harm | None, number: int = 0, retry: bool = False
    ) -> tuple[int, float]:
        """Start a process on a subject; returns its number, and when."""

        def work() -> None:
            os.chdir(home)
            os.environ["KDZOO_CACHE"] = str(home / "cache")
            sys.argv = ["kdzoo", *SUBJECTS[subject][0], *(["--retry"] if retry and subject == "bench" else [])]
            operations = Operations(home, harm)
            if harm is not None and harm.kind == "memory":
                limit_memory(harm.point)
            try:
                cli.main()
            finally:
                if harm is None:
                    count = operations.count
                    (home / "operations").write_text(str(count))

        return forked(work, home / f"said-{number}"), time.monotonic()

    def ended(self, home: Path, process: int, begun: float, number: int = 0) -> int:
        """Wait for a process; returns its exit code, negative for a signal."""
        while True:
            done, status = os.waitpid(process, os.WNOHANG)
            if done:
                return os.waitstatus_to_exitcode(status)
            if time.monotonic() - begun > HANG:
                os.kill(process, signal.SIGKILL)
                os.waitpid(process, 0)
                raise Fault(f"it hangs: {said(home, number)}")
            time.sleep(0.01)

    def check_finished(self, home: Path, subject: str) -> None:
        """Check that what says that it is finished is whole, and equal to the undisturbed."""
        for file in (home / "runs").rglob("result.json"):
            if file.parent.name == "before":
                continue
            name = file.parent.name.partition("-moved-")[0]
            here = {
                key: digest for key, digest in found(file.parents[1]).items() if key.startswith(f"{file.parent.name}/")
            }
            for part in (
                "config.yaml",
                "student.safetensors",
                "metrics.jsonl",
                "predictions.safetensors",
                "result.json",
            ):
                if here.get(f"{file.parent.name}/{part}") != self.whole[subject][f"{name}/{part}"]:
                    raise Fault(f"{file.parent.name} says that it is finished, and its {part} differs or is missing")


def check_end(home: Path, end: int, harm: Harm | None, number: int = 0) -> None:
    """Check an exit code, and that no traceback was printed."""
    text = (home / f"said-{number}").read_text(errors="replace")
    if "Traceback" in text or "Exception ignored" in text:
        raise Fault(f"it ended with {end} and a traceback: {text.strip().splitlines()[-1][:300]}")
    allowed = {0, 2, UNFINISHED}  # the last where the other process of a bench is still at work
    if harm is not None:
        allowed |= {
            "kill": {-signal.SIGKILL},
            "killed": {-signal.SIGKILL},
            "term": {-signal.SIGTERM, 128 + signal.SIGTERM},
            "hangup": {-signal.SIGHUP, 128 + signal.SIGTERM},
            "memory": NATIVE,
            "int": {-signal.SIGINT, 128 + signal.SIGINT},
        }.get(harm.kind, set())
    if end not in allowed:
        raise Fault(f"it ended with {end}: {said(home, number)}")
    if end == 2 and "error: " not in text.strip().splitlines()[-1]:
        raise Fault(f"it ended with 2 and no reason: {said(home, number)}")


def said(home: Path, number: int = 0) -> str:
    """The last line that a process printed."""
    lines = (home / f"said-{number}").read_text(errors="replace").strip().splitlines()
    return lines[-1][:300] if lines else "(nothing)"


def found(runs: Path) -> dict[str, str]:
    """The files of all runs in a folder, each with a hash of what must be equal; values that are times are left out."""
    digests = {}
    for file in sorted(path for path in runs.rglob("*") if path.is_file()):
        if file.name in (".lock", "owner.json") or file.suffix == ".part" or file.parent.name == "checkpoints":
            continue  # what a process that dies after its result may leave
        if file.name == "environment.json":
            content = b""
        elif file.name in ("result.json", "metrics.jsonl"):
            parts = file.read_text().splitlines() if file.suffix == ".jsonl" else [file.read_text()]
            values = [{k: v for k, v in json.loads(part).items() if k not in TIMES} for part in parts]
            content = json.dumps(values).encode()
        else:
            content = file.read_bytes()
        digests[str(file.relative_to(runs))] = hashlib.sha256(content).hexdigest()[:16]
    return digests
