"""Measures kdzoo beside other libraries: the same pair, batch, method and images, each with its own trainer and loader.

    python benchmarks/peers.py --mdistiller DIR --repdistiller DIR --torchdistill DIR --data folder:data/cifar100

The folders are checkouts of megvii-research/mdistiller, HobbitLong/RepDistiller and yoshitomo-matsubara/torchdistill;
nothing is written into them but Python's caches. Each library runs in a separate process and trains without end; its
loader hands out batches only while it is that library's turn, so turns alternate and each is timed by what the trainer
itself does. Weights are random: speed does not depend on them. What is not as its authors wrote it:

- The images are written once, in torchvision's layout of CIFAR-100, to a temporary folder (``--work`` keeps it), where
  the libraries are told to look. torchvision's check of md5 sums stays on, against the sums of these files.
- Where there is no CUDA, ``Tensor.cuda`` and ``Module.cuda`` return self, for code that calls them all the same.
- torchdistill has no resnet32x4 and its kin: it is given kdzoo's, in float32. Its loop is that of its example of image
  classification, which is a script of the checkout.
- Testing and checkpoints between epochs are left out, for all.
"""

import contextlib
import multiprocessing
import os
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from measuring import arguments_of, compiling, file_of, publish, this_machine, waiting
from peer_libraries import LAYOUT, LIBRARIES, accept, write_cifar
from torch import nn

from kdzoo.data import open_dataset
from kdzoo.engine.device import find_device


class Paced:
    """A loader that hands out batches, epoch after epoch, while it is its library's turn, and tells how long that took.

    A turn is a number of steps that comes through ``connection``; its seconds go back. It ends when the next batch is
    there and the device has done its work, so what is timed holds as many batches, steps and reads as were asked for.
    """

    def __init__(self, loader: Any, connection: Connection, wait: Callable[[], None]):
        self.loader, self.connection, self.wait = loader, connection, wait
        self.left, self.begun = 0, 0.0

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Any]:
        while True:
            for batch in self.loader:
                if self.left == 0:
                    self._change()
                self.left -= 1
                yield batch

    def _change(self) -> None:
        if self.begun:
            self.wait()
            self.connection.send(time.perf_counter() - self.begun)
        self.left = self.connection.recv()
        self.begun = time.perf_counter()


def serve(library: str, given: Namespace, folder: Path, log: Path, connection: Connection) -> None:
    """A library's process: trains for ever, in turns, and writes what it has to say to a file."""
    with log.open("w") as said:
        os.dup2(said.fileno(), 1)
        os.dup2(said.fileno(), 2)
    if not torch.cuda.is_available():
        torch.Tensor.cuda = nn.Module.cuda = lambda self, *_, **__: self  # type: ignore[method-assign, assignment]
    accept(given.work / LAYOUT)
    wait = waiting(find_device("auto"))
    with contextlib.suppress(EOFError):  # the other end has closed
        LIBRARIES[library](given, folder, lambda loader: Paced(loader, connection, wait))


class Library:
    """One of the libraries, as it is seen from here."""

    def __init__(self, name: str, given: Namespace, folder: Path):
        self.name, self.log = name, given.work / f"{name}.log"
        self._connection, other = multiprocessing.Pipe()
        self._process = multiprocessing.get_context("spawn").Process(
            target=serve, args=(name, given, folder, self.log, other)
        )
        self._process.start()
        other.close()

    def turn(self, steps: int) -> float:
        """Seconds of the next ``steps`` steps."""
        try:
            self._connection.send(steps)
            return float(self._connection.recv())
        except (EOFError, OSError) as error:
            last = self.log.read_text(errors="replace").strip().splitlines()[-12:]
            raise SystemExit("\n".join([f"{self.name} has stopped:", *last])) from error

    def end(self) -> None:
        """Ends its process."""
        self._connection.close()
        self._process.join()


def compare(given: Namespace, folders: dict[str, Path]) -> pd.DataFrame:
    """All libraries in turns."""
    libraries = [Library(name, given, folder) for name, folder in folders.items()]
    try:
        for library in libraries:
            library.turn(given.warm_up)
        turns = [{library.name: library.turn(given.steps) for library in libraries} for _ in range(given.rounds)]
    finally:
        for library in libraries:
            library.end()
    speeds = given.steps * given.batch_size / pd.DataFrame(turns)
    table = pd.DataFrame({"images_per_second": speeds.median(), "lowest": speeds.min(), "highest": speeds.max()})
    table = table.round(1)
    table["kdzoo_is_times_as_fast"] = (speeds["kdzoo"].median() / speeds.median()).round(2)
    table["precision"] = ["float32" if name != "kdzoo" else given.precision for name in table.index]
    table["workers"] = [
        "none" if name == "kdzoo" else "its own" if given.workers is None else given.workers for name in table.index
    ]
    shim = not torch.cuda.is_available()
    table["cuda_calls"] = ["do nothing" if shim and name == "mdistiller" else "as written" for name in table.index]
    return table.rename_axis("library").reset_index()


def main() -> None:
    """Parses, writes the images, measures, prints and writes the table."""
    parser = arguments_of(__doc__)
    for name in [name for name in LIBRARIES if name != "kdzoo"]:
        parser.add_argument(f"--{name}", type=Path, metavar="DIR", help="its checkout")
    parser.add_argument("--data", default="cifar100")
    parser.add_argument("--method", default="kd")
    parser.add_argument("--teacher", default="resnet32x4")
    parser.add_argument("--student", default="resnet8x4")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--workers", type=int, help="of the others' loaders; default: what each has as its own")
    parser.add_argument("--warm-up", type=int, default=10)
    parser.add_argument("--steps", type=int, help="of a turn; default: 30, on a GPU 300")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--compile", choices=("off", "auto", "on"), default="off", help="kdzoo's; default: off")
    parser.add_argument("--work", type=Path, help="a folder for CIFAR-100 in torchvision's layout and for logs")
    given = parser.parse_args()
    machine = this_machine()
    device = machine.device
    given.precision, given.steps = machine.precision, given.steps or (30 if device.type == "cpu" else 300)
    folders = {name: path for name in LIBRARIES if (path := getattr(given, name, None))}
    with tempfile.TemporaryDirectory() as temporary:
        given.work = (given.work or Path(temporary)).resolve()
        if not (given.work / LAYOUT / "meta").is_file():
            write_cifar(open_dataset(given.data), given.work / LAYOUT)
        table = compare(given, {"kdzoo": Path(), **folders})
    title = compiling(f"peers-{given.method}-{given.teacher}-{given.student}-b{given.batch_size}", given.compile)
    publish(table, file_of(given.results, title, machine))


if __name__ == "__main__":
    main()
