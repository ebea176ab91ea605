"""Memory: how much the device has free, what a lane takes of it, and how many lanes it holds at a time."""

import sys
from collections.abc import Iterable, Sequence
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import psutil
import torch
from torch import Tensor

from kdzoo.distiller import Batch
from kdzoo.engine.device import give_back_memory
from kdzoo.errors import OutOfMemory, is_shortage
from kdzoo.settings import Run
from kdzoo.tensors import leaves

if TYPE_CHECKING:
    from kdzoo.engine.lane import Lane

ROOM = 0.8  # the share of free memory that lanes may take, as a few steps do not show all of what they need

CGROUPS = Path("/sys/fs/cgroup")  # as a container sees its own

RESERVE = 2**26  # bytes, for libraries of C++

WORKSPACE = 1.5  # peaks of processes on a CPU, over what is counted: 1.25 to 1.4 for steps of more than 200 MB


class Cost(NamedTuple):
    """Bytes that a lane takes beside data and teacher."""

    kept: int  # from step to step: weights, moments, averages
    passing: int  # within a step: activations and gradients


def free(device: torch.device, share: float = 1.0) -> float:
    """Measure the free bytes of the GPU, or of machine, container and process, capped at this share of the total.

    On a CPU what this process holds on to without using it is given back first, so that it counts as free.
    """
    if device.type == "cuda":
        reusable = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        available, total = torch.cuda.mem_get_info(device)
        return min(available + reusable, share * total)
    give_back_memory()
    machine = psutil.virtual_memory()
    limit, used = container()
    return min(machine.available, limit - used, addresses(), share * min(machine.total, limit))


def addresses() -> float:
    """Measure the bytes that this process may still take by its own limit (``ulimit -v``), infinite without one."""
    return process_limit() - psutil.Process().memory_info().vms


def process_limit() -> float:
    """Read the bytes that this process may take in all by its own limit, infinite without one."""
    if sys.platform != "linux":
        return inf
    import resource

    found, _ = resource.getrlimit(resource.RLIMIT_AS)
    return inf if found == resource.RLIM_INFINITY else found


def check_reserve() -> None:
    """Check that there is room for what libraries of C++ take beside tensors, as some of them crash where it lacks.

    Only a process with a limit can find too little; elsewhere memory is given out beyond what there is.

    Raises:
        RuntimeError: torch's, as for any tensor that does not fit.
    """
    if process_limit() < inf:
        torch.empty(RESERVE, dtype=torch.uint8)


def container() -> tuple[float, float]:
    """Read the bytes that the container may use, infinite outside of one, and those that it uses and cannot drop.

    Read of control groups, version 2 or 1; files read lately are what can be dropped.
    """
    for limit, usage, dropped in (
        ("memory.max", "memory.current", "inactive_file"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "total_inactive_file"),
    ):
        try:
            most = float((CGROUPS / limit).read_text().replace("max", "inf"))
            used = int((CGROUPS / usage).read_text())
            lines = (CGROUPS / usage).with_name("memory.stat").read_text().splitlines()
            return most, used - int(dict(line.split() for line in lines)[dropped])
        except (OSError, ValueError, KeyError):
            continue
    return inf, 0


def weigh(lane: "Lane", batch: Batch) -> Cost:
    """Measure what a lane takes, by another step of one that has made its first.

    On a GPU the step's peak is measured. Elsewhere gradients and what is kept for the backward pass are counted, and
    ``WORKSPACE`` times that is taken, since the resident size of a process tells little: it holds on to what it has
    freed.
    """
    kept = bytes_of(lane.state_dict())
    if lane.device.type == "cuda":
        torch.cuda.synchronize(lane.device)
        torch.cuda.reset_peak_memory_stats(lane.device)
        before = torch.cuda.memory_allocated(lane.device)
        lane.step(batch, 1)
        torch.cuda.synchronize(lane.device)
        return Cost(kept, torch.cuda.max_memory_allocated(lane.device) - before)
    weights = {p.untyped_storage().data_ptr() for p in lane.trained.parameters()}
    saved: dict[int, int] = {}

    def count(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        lane.step(batch, 1)
    gradients = sum(p.nbytes for p in lane.trained.parameters() if p.requires_grad)
    counted = gradients + sum(size for place, size in saved.items() if place not in weights)
    return Cost(kept, round(WORKSPACE * counted))


def together(costs: Iterable[Cost]) -> int:
    """Add up the bytes of lanes side by side: all that each keeps, and one step, as they take turns."""
    costs = list(costs)
    return sum(cost.kept for cost in costs) + max((cost.passing for cost in costs), default=0)


def packed(costs: Sequence[Cost], room: float) -> list[list[int]]:
    """Pack the lanes' numbers in their order, as many together as ``room`` bytes hold, and at least one."""
    packs: list[list[int]] = []
    for i in range(len(costs)):
        if packs and together(costs[j] for j in (*packs[-1], i)) <= room:
            packs[-1].append(i)
        else:
            packs.append([i])
    return packs


def bytes_of(state: Any) -> int:
    """Count the bytes of all tensors in nested dictionaries and lists."""
    return sum(leaf.nbytes for leaf in leaves(state))


def out_of_memory(error: BaseException, run: Run) -> OutOfMemory | None:
    """Translate an error that says that memory is full into a user's words; None for any other.

    It does not chain to ``error``, whose traceback would keep alive what did not fit.
    """
    if not is_shortage(error):
        return None
    if isinstance(error, OutOfMemory):
        return OutOfMemory(str(error))
    return OutOfMemory(
        f"out of memory with batches of {run.settings.protocol.batch_size} on {run.place.engine.device}; "
        "lower --batch-size or protocol.image_size"
    )
