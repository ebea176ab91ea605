"""Several processes train one run, each on its share of every batch; Lightning Fabric stays behind this file.

The processes are started here (``--devices``) or by torchrun, and find each other through torchrun's variables.
"""

import logging
import os
import signal
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from importlib.util import find_spec
from multiprocessing.queues import SimpleQueue
from typing import Any, cast

import torch
from torch import Tensor, distributed, nn
from torch.multiprocessing import get_context
from torch.multiprocessing.spawn import ProcessException, start_processes

from kdzoo.errors import UserError
from kdzoo.settings import Settings

Forward = Callable[..., dict[str, Tensor]]


class Ranks:
    """The processes that train one run, seen from one of them: here it is the only one."""

    rank, world = 0, 1

    @property
    def first(self) -> bool:
        """Whether this process is the one that writes and is looked at."""
        return self.rank == 0

    @property
    def names(self) -> tuple[int, ...]:
        """Names that make a random draw differ between processes; empty where there is one process."""
        return (self.rank,) if self.world > 1 else ()

    def once(self, work: Callable[..., object], *arguments: object) -> None:
        """Does what is to be done by one process only, such as writing a file."""
        if self.first:
            work(*arguments)

    def in_turn(self) -> AbstractContextManager[None]:
        """On each machine, the first process goes through this context before the others enter it."""
        return nullcontext()

    def wrap(self, module: nn.Module) -> Forward:
        """The module's forward pass, after whose backward pass all processes hold the same gradients."""
        return module

    def align(self, module: nn.Module) -> None:
        """Gives every process the first one's buffers and frozen parameters."""

    def mean(self, terms: dict[str, Tensor]) -> dict[str, Tensor]:
        """The means over processes of scalars, the same bits on each; no gradient."""
        return terms

    def agree(self, decision: bool) -> bool:
        """The first process's decision."""
        return decision


ALONE = Ranks()


class DataParallel(Ranks):
    """Every process holds student and distiller whole."""

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


def check(settings: Settings) -> None:
    """Takes the number of processes from torchrun where it started this one, and refuses what cannot be run.

    Raises:
        UserError: too few devices, no Fabric, or a batch that cannot be shared evenly.
    """
    engine, here, world = settings.engine, 1, _number("WORLD_SIZE")
    if _is_rank():
        here = _number("LOCAL_WORLD_SIZE")
        if engine.devices not in (1, world):
            raise UserError(f"--devices {engine.devices} in one of {world} processes; leave it to what started them")
        engine.devices = world
    elif engine.devices != 1:
        here = engine.devices
    if engine.devices < 1:
        raise UserError(f"--devices {engine.devices}: expected a number from 1")
    if engine.devices == 1:
        return
    if find_spec("lightning_fabric") is None:
        raise UserError("several devices need lightning-fabric: pip install 'kdzoo[parallel]'")
    device = torch.device(engine.device)
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"several devices are cpu or cuda, not {device.type}; leave --devices out")
    if device.type == "cuda" and device.index is not None:
        raise UserError(f"{device} is one device and --devices asks for {engine.devices}; say --device cuda")
    if device.type == "cuda" and here > torch.cuda.device_count():
        raise UserError(f"this machine has {torch.cuda.device_count()} cuda devices, not {here}; lower --devices")
    if settings.protocol.batch_size % engine.devices:
        raise UserError(
            f"a batch of {settings.protocol.batch_size} images cannot be shared evenly by {engine.devices} devices; "
            f"set protocol.batch_size, which counts all devices' images, to a multiple of {engine.devices}"
        )


def to_start(settings: Settings) -> bool:
    """Tell whether this process only starts the processes that train."""
    return settings.engine.devices > 1 and not _is_rank()


def is_first() -> bool:
    """Whether this process speaks for the run: it is alone, it started the others, or it is the first of them."""
    return not _is_rank() or _number("RANK") == 0


@contextmanager
def joined(settings: Settings) -> Iterator[Ranks]:
    """The processes of this run once all are there; at the end they part. ``ALONE`` for a run of one process.

    The device in ``settings`` becomes this process's own.
    """
    engine = settings.engine
    if engine.devices == 1:
        yield ALONE
        return
    from lightning_fabric import Fabric
    from lightning_fabric.plugins.environments.torchelastic import TorchElasticEnvironment
    from lightning_fabric.strategies.ddp import DDPStrategy

    kind, here = torch.device(engine.device).type, _number("LOCAL_WORLD_SIZE")
    fabric = Fabric(
        accelerator=kind,
        devices=here,
        num_nodes=engine.devices // here,
        # A method may leave parameters unused; its buffers it keeps in step itself.
        strategy=DDPStrategy(find_unused_parameters=True, broadcast_buffers=False),
        plugins=[TorchElasticEnvironment()],
    )
    logging.getLogger("lightning_fabric").setLevel(logging.WARNING)  # what it says at info level is no news
    warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated")  # its successor is too new
    fabric.launch()
    if engine.threads:
        torch.set_num_threads(engine.threads)  # Fabric has shared out the cores
    if kind == "cuda":
        engine.device = str(fabric.device)
    yield DataParallel(fabric)
    distributed.destroy_process_group()  # not after an error, when others may never come to it


def start(work: Callable[..., object], settings: Settings, *arguments: object) -> None:
    """Run ``work(settings, *arguments)`` in one process for each device, on this machine.

    As soon as one fails, all are ended.

    Raises:
        UserError: one raised it, or was killed.
    """
    store = distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # type: ignore[attr-defined]
    variables = {
        "WORLD_SIZE": str(settings.engine.devices),
        "LOCAL_WORLD_SIZE": str(settings.engine.devices),
        "GROUP_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",  # the store is there already, so no port can be lost to others
    }
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # else DDP warns of methods that leave no parameter unused
    errors: SimpleQueue[str] = get_context("spawn").SimpleQueue()
    started = start_processes(
        _work_as_rank,
        (variables, errors, work, settings, *arguments),
        nprocs=settings.engine.devices,
        join=False,
        start_method="spawn",
    )
    assert started is not None
    logging.getLogger(start_processes.__module__).setLevel(logging.ERROR)  # that others are ended is what we ask for
    try:
        while not started.join():
            pass
    except ProcessException as error:  # of the first that was seen to end, which may be a victim of another's end
        if not errors.empty():
            raise UserError(errors.get()) from error
        for index, process in enumerate(started.processes):
            code = process.exitcode or 0
            if code < 0 and code != -signal.SIGTERM:  # which is what the others are ended by
                raise UserError(
                    f"process {index} of {settings.engine.devices} was ended by {signal.Signals(-code).name}; "
                    "the same command continues from the last checkpoint"
                ) from error
        raise
    finally:
        for process in started.processes:
            if process.is_alive():
                process.kill()
            process.join()


def _work_as_rank(
    rank: int, variables: dict[str, str], errors: "SimpleQueue[str]", work: Callable[..., object], *arguments: object
) -> None:
    os.environ |= {**variables, "RANK": str(rank), "LOCAL_RANK": str(rank)}
    try:
        work(*arguments)
    except UserError as error:
        errors.put(str(error))
        os._exit(2)  # at once: the others wait in vain, and so would this one's way out


def _is_rank() -> bool:
    return "RANK" in os.environ and _number("WORLD_SIZE") > 1


def _number(variable: str) -> int:
    return int(os.environ.get(variable, 1))
