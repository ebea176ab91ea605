"""Plan a search by successive halving: how many candidates are trained for how long, and what that costs."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from kdzoo.engine import memory
from kdzoo.errors import UserError
from kdzoo.experiments.estimate import GroupCost, LaneCost
from kdzoo.quantities import counted, duration, either

FINALISTS = 3  # of each student, beside the references
SEEDS, MOST_SEEDS = 3, 100  # of each finalist: fewer tell nothing apart
LAST = 0.75  # of a training: where the last rung lies
SHARE = 0.2  # of the training images: the part that candidates are ranked on
UNITS = {"s": 1.0, "min": 60.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


def counts(candidates: int, finalists: int = FINALISTS) -> list[int]:
    """Count the candidates of each rung, from all of them down to the finalists.

    >>> counts(40)
    [40, 20, 10, 5, 3]
    """
    found = [candidates]
    while found[-1] > finalists:
        found.append(max(finalists, math.ceil(found[-1] / 2)))
    return found


def left(candidates: int, rung: int) -> int:
    """Return how many candidates a rung begins with, counted from 0; after the last, how many are finalists."""
    found = counts(candidates)
    return found[min(rung, len(found) - 1)]


def rungs(candidates: int, epochs: int) -> list[int]:
    """Choose the epochs after which the worse half stops: three quarters of all, half of that, and so on, rounded up.

    >>> rungs(40, 32)
    [3, 6, 12, 24]
    >>> rungs(40, 5)
    [1, 2, 3, 4]
    """
    cuts, found = len(counts(candidates)) - 1, list[int]()
    for i in range(1, cuts + 1):
        wanted = math.ceil(LAST * epochs / 2 ** (cuts - i))
        found.append(max(min(wanted, epochs - 1 - cuts + i), i))
    return found


def fewest_epochs(candidates: int) -> int:
    """Return the shortest training at full length whose rungs all lie before its end."""
    return len(counts(candidates))


def epochs_of(candidates: Sequence[int], references: int, epochs: int, seeds: int = SEEDS) -> tuple[int, int]:
    """Count the epochs of all students together, in the search and of the finalists.

    Args:
        candidates: of each student.
        references: methods that are trained anew beside a student's finalists, at most.
        epochs: of a training at full length.
        seeds: of each finalist.
    """
    search = final = 0
    for number in candidates:
        ends = rungs(max(candidates), epochs)
        lengths = [end - begin for begin, end in zip([0, *ends], ends, strict=False)]
        search += sum(length * left(number, rung) for rung, length in enumerate(lengths))
        final += seeds * epochs * min(number, FINALISTS + references)
    return search, final


@dataclass(frozen=True)
class Prices:
    """What an epoch of one student costs, and what is paid once."""

    once: float = 0.0  # seconds: of the teacher's own trainings, and of phases before the training of students
    search: float = 0.0  # of an epoch on the part of the training images that the search trains on
    final: float = 0.0  # of one on all of them

    @classmethod
    def of(cls, cost: GroupCost, lanes: Sequence[LaneCost], teaching: float) -> "Prices":
        """Take the mean over the candidates' lanes; what they share is paid by each of a final's few."""
        step = sum(lane.step for lane in lanes) / len(lanes)
        test = sum(lane.test for lane in lanes) / len(lanes)
        packs = len(memory.packed([lane.memory for lane in lanes], cost.room))
        alone = cost.steps * (step + cost.shared / FINALISTS)
        return cls(
            once=2 * teaching + cost.phases(lanes),
            search=cost.steps * (step + packs * cost.shared / len(lanes)) + test,
            final=alone / (1 - SHARE),
        )

    def seconds(self, search: float, final: float) -> float:
        """Estimate the seconds of so many epochs."""
        return self.once + self.search * search + self.final * final


def longest(
    budget: str,
    candidates: Sequence[int],
    references: int,
    most: int,
    prices: Prices,
    seeds: int = SEEDS,
    settings: int = 3,
) -> int:
    """Choose the epochs of a training at full length that a budget pays, at most ``most``.

    Args:
        budget: as ``4h``, ``90min`` or ``600epochs``; empty: no limit.
        candidates: of each student.
        references: as of ``epochs_of``.
        most: the recipe's epochs.
        prices: of an epoch.
        seeds: as of ``epochs_of``.
        settings: of each method, at most, among the candidates.

    Raises:
        UserError: the budget is none, or cannot pay the shortest search.
    """
    fewest = fewest_epochs(max(candidates))
    fewer = ["name fewer --methods", *["lower --settings"] * (settings > 1)]
    if most < fewest:
        raise UserError(
            f"epochs: {most}, too few to halve {max(candidates)} candidates until {FINALISTS} are left; "
            f"{either([f'set --epochs {fewest} or more', *fewer])}"
        )
    if not budget:
        return most
    amount, unit = parsed(budget)
    price = (lambda search, final: float(search + final)) if unit == "epochs" else prices.seconds
    for epochs in range(most, fewest - 1, -1):
        least = price(*epochs_of(candidates, references, epochs, seeds))
        if least <= amount:
            return epochs
    need = counted(round(least), "epoch") if unit == "epochs" else duration(math.ceil(least))
    raise UserError(
        f"a budget of {budget} cannot pay the shortest search, of {counted(sum(candidates), 'candidate')}: it takes "
        f"about {need}; {either(['raise --budget', *fewer, *['lower --seeds'] * (seeds > SEEDS)])}"
    )


def parsed(budget: str) -> tuple[float, str]:
    """Read a budget: seconds and ``time``, or epochs and ``epochs``.

    >>> parsed("1.5h"), parsed("600epochs")
    ((5400.0, 'time'), (600.0, 'epochs'))
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([a-z]+)", str(budget).strip())
    unit = match[2] if match else ""
    if match is None or unit not in (*UNITS, "epoch", "epochs") or not float(match[1]):
        raise UserError(f"--budget {budget}: expected a time, such as 4h or 90min, or epochs, such as 600epochs")
    return (float(match[1]), "epochs") if unit not in UNITS else (float(match[1]) * UNITS[unit], "time")
