"""Several processes train one run, each on its share of every batch; Lightning Fabric stays behind this file.

torchrun starts the processes, or its launcher does for ``--devices``; they find each other through its variables.
"""

import logging
import os
import signal
import socket
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from importlib.util import find_spec
from typing import Any, cast
from uuid import uuid4

import torch
from torch import Tensor, distributed, nn
from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, record
from torch.distributed.elastic.rendezvous import (
    RendezvousHandler,
    RendezvousInfo,
    RendezvousParameters,
    RendezvousStoreInfo,
    rendezvous_handler_registry,
)
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from kdzoo.errors import AskedToEnd, UserError
from kdzoo.own_code import script_hidden
from kdzoo.quantities import counted
from kdzoo.settings import Run

Forward = Callable[..., dict[str, Tensor]]


class Ranks:
    """The processes that train one run, seen from one of them: here it is the only one."""

    rank, world = 0, 1

    @property
    def first(self) -> bool:
        """Tell whether this process is the one that writes and is looked at."""
        return self.rank == 0

    @property
    def names(self) -> tuple[int, ...]:
        """Names that make a random draw differ between processes; empty where there is one process."""
        return (self.rank,) if self.world > 1 else ()

    def once(self, work: Callable[..., object], *arguments: object) -> None:
        """Do work that one process alone has to do, such as writing a file."""
        if self.first:
            work(*arguments)

    def in_turn(self) -> AbstractContextManager[None]:
        """Make a context that, on each machine, the first process goes through before the others enter it."""
        return nullcontext()

    def wrap(self, module: nn.Module) -> Forward:
        """Return a forward pass after whose backward pass all processes hold the same gradients."""
        return module

    def align(self, module: nn.Module) -> None:
        """Give every process the first one's buffers and frozen parameters."""

    def mean(self, terms: dict[str, Tensor]) -> dict[str, Tensor]:
        """Average scalars over processes, to the same bits on each, without gradient."""
        return terms

    def agree(self, decision: bool) -> bool:
        """Return the first process's decision."""
        return decision

    def device(self, device: torch.device) -> torch.device:
        """Find this process's device, where the run names ``device``."""
        return device


ALONE = Ranks()


class DataParallel(Ranks):
    """The processes of data parallel training, each of which holds student and distiller whole."""

    def __init__(self, fabric: Any):
        self.fabric = fabric
        self.rank, self.world = fabric.global_rank, fabric.world_size
        self._host = distributed.new_group(backend="gloo")  # for decisions: no device waits for them

    def in_turn(self) -> AbstractContextManager[None]:
        return cast(AbstractContextManager[None], self.fabric.rank_zero_first(local=True))

    def wrap(self, module: nn.Module) -> Forward:
        return cast(Forward, self.fabric.setup_module(module, move_to_device=False))

    def align(self, module: nn.Module) -> None:
        for tensor in [*module.buffers(), *(p for p in module.parameters() if not p.requires_grad)]:
            distributed.broadcast(tensor.detach(), src=0)

    def mean(self, terms: dict[str, Tensor]) -> dict[str, Tensor]:
        if not terms:
            return terms
        values = torch.stack([term.detach() for term in terms.values()])
        distributed.all_reduce(values)
        return dict(zip(terms, values / self.world, strict=True))

    def agree(self, decision: bool) -> bool:
        decided = torch.tensor(decision)
        distributed.broadcast(decided, src=0, group=cast(distributed.ProcessGroup, self._host))
        return bool(decided)

    def device(self, device: torch.device) -> torch.device:
        return cast(torch.device, self.fabric.device) if device.type == "cuda" else device


def check(run: Run) -> Run:
    """Take the number of processes from torchrun where it started this one, and refuse what cannot be trained.

    Raises:
        UserError: too few devices, no Fabric, or a batch that cannot be shared evenly.
    """
    devices, world = run.settings.engine.devices, _number("WORLD_SIZE")
    here = devices
    if _is_rank():
        here = _number("LOCAL_WORLD_SIZE")
        if devices not in (1, world):
            raise UserError(f"--devices {devices} in one of {world} processes; leave it to what started them")
        devices = world
    if devices < 1:
        raise UserError(f"--devices {devices}: expected a number from 1")
    if devices == 1:
        return run
    if find_spec("lightning_fabric") is None:
        raise UserError("several devices need lightning-fabric: pip install 'kdzoo[parallel]'")
    device = torch.device(run.place.engine.device)
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"several devices are cpu or cuda, not {device.type}; leave --devices out")
    if device.type == "cuda" and device.index is not None:
        raise UserError(f"{device} is one device and --devices asks for {devices}; say --device cuda")
    if device.type == "cuda" and here > torch.cuda.device_count():
        raise UserError(f"this machine has {torch.cuda.device_count()} cuda devices, not {here}; lower --devices")
    batch_size = run.settings.protocol.batch_size
    if batch_size % devices:
        raise UserError(
            f"a batch of {counted(batch_size, 'image')} cannot be shared evenly by {devices} devices; set "
            f"protocol.batch_size, which counts all devices' images, to a multiple of {devices}"
        )
    return run._replace(settings=replace(run.settings, engine=replace(run.settings.engine, devices=devices)))


def to_start(run: Run) -> bool:
    """Tell whether this process only starts the processes that train."""
    return run.settings.engine.devices > 1 and not _is_rank()


def is_first() -> bool:
    """Tell whether this process speaks for the run: it is alone, it started the others, or it is the first of them."""
    return not _is_rank() or _number("RANK") == 0


@contextmanager
def joined(run: Run) -> Iterator[Ranks]:
    """Join the processes of this run, and part at the end; ``ALONE`` for a run of one process."""
    devices, place = run.settings.engine.devices, run.place.engine
    if devices == 1:
        yield ALONE
        return
    from lightning_fabric import Fabric
    from lightning_fabric.plugins.environments.torchelastic import TorchElasticEnvironment
    from lightning_fabric.strategies.ddp import DDPStrategy

    here = _number("LOCAL_WORLD_SIZE")
    fabric = Fabric(
        accelerator=torch.device(place.device).type,
        devices=here,
        num_nodes=devices // here,
        # A method may leave parameters unused; its buffers it keeps in step itself.
        strategy=DDPStrategy(find_unused_parameters=True, broadcast_buffers=False),
        plugins=[TorchElasticEnvironment()],
    )
    logging.getLogger("lightning_fabric").setLevel(logging.WARNING)  # what it says at info level is no news
    warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated")  # its successor is too new
    fabric.launch()
    if place.threads:
        torch.set_num_threads(place.threads)  # Fabric has shared out the cores
    yield DataParallel(fabric)
    distributed.destroy_process_group()  # not after an error, when others may never come to it


@contextmanager
def handlers_kept() -> Iterator[None]:
    """Put the handlers of signals back on exit: the launcher leaves its own behind."""
    before = {number: signal.getsignal(number) for number in signal.valid_signals()}
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            for number, handler in before.items():
                if handler is not None and signal.getsignal(number) is not handler:
                    signal.signal(number, handler)


def start(work: Callable[..., object], run: Run, *arguments: object) -> None:
    """Let torchrun's launcher run ``work(run, *arguments)`` in one process for each device, on this machine.

    As soon as one fails, all are ended.

    Raises:
        UserError: one raised it, or was killed.
    """
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # else DDP warns of methods that leave no parameter unused
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # what failed is told below
    if loopback := next((name for _, name in socket.if_nameindex() if name.startswith("lo")), None):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", loopback)
    devices = run.settings.engine.devices
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=devices,
        run_id=uuid4().hex,
        rdzv_backend=OnThisMachine.NAME,
        max_restarts=0,
    )
    try:
        # A function of the script itself can only be found by running it again.
        with handlers_kept(), nullcontext() if work.__module__ == "__main__" else script_hidden():
            elastic_launch(config, _work_as_rank)(work, run, *arguments)
    except SignalException as error:
        if error.sigval == signal.SIGINT:
            raise KeyboardInterrupt from error
        raise AskedToEnd from error
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        left = failure.error_file_data["message"]
        if failure.exitcode < 0 or isinstance(left, str):  # it left no error behind
            by = f"was ended by {failure.signal_name()}" if failure.exitcode < 0 else f"exited with {failure.exitcode}"
            raise UserError(
                f"process {rank} of {devices} {by}; the same command continues from the last checkpoint"
            ) from error
        said = str(left["message"])
        if said.startswith("UserError: "):
            raise UserError(said.removeprefix("UserError: ")) from error
        raise


class OnThisMachine(RendezvousHandler):
    """Where the processes of one machine find each other: a store that no other machine can reach."""

    NAME = "kdzoo-loopback"

    def __init__(self, parameters: RendezvousParameters):
        self.run_id = parameters.run_id
        listening = socket.create_server(("127.0.0.1", 0))
        address, port = listening.getsockname()
        self.place = RendezvousStoreInfo(address, port)
        # Without a socket of ours it would listen on all interfaces.
        self.store = TCPStore(
            address, port, is_master=True, wait_for_workers=False, master_listen_fd=listening.detach()
        )

    def next_rendezvous(self) -> RendezvousInfo:
        return RendezvousInfo(PrefixStore(self.run_id, self.store), 0, 1, self.place)

    use_agent_store = True

    def get_backend(self) -> str:
        return self.NAME

    def get_run_id(self) -> str:
        return self.run_id

    def is_closed(self) -> bool:
        return False

    def set_closed(self) -> None:
        """Nothing: it ends with its process."""

    def num_nodes_waiting(self) -> int:
        return 0

    def shutdown(self) -> bool:
        return True


rendezvous_handler_registry.register(OnThisMachine.NAME, OnThisMachine)


@record
def _work_as_rank(work: Callable[..., object], *arguments: object) -> None:
    work(*arguments)


def _is_rank() -> bool:
    return "RANK" in os.environ and _number("WORLD_SIZE") > 1


def _number(variable: str) -> int:
    return int(os.environ.get(variable, 1))
