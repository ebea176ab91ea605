"""kdzoo: knowledge-distillation methods on one fast and fair engine.

Names are imported when they are first used, so that ``import kdzoo`` and the command line start at once.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kdzoo.distillation import Distillation
    from kdzoo.distiller import Batch, DataSpec, Distiller, Fidelity, Needs, Output, Seen
    from kdzoo.experiments.run import Result, run

__version__ = "0.1.0"

_HOMES = {
    "kdzoo.distiller": ("Batch", "DataSpec", "Distiller", "Fidelity", "Needs", "Output", "Seen"),
    "kdzoo.distillation": ("Distillation",),
    "kdzoo.experiments.run": ("Result", "run"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "Batch",
    "DataSpec",
    "Distillation",
    "Distiller",
    "Fidelity",
    "Needs",
    "Output",
    "Result",
    "Seen",
    "run",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'kdzoo' has no attribute '{name}'")
    return getattr(import_module(_HOME_OF[name]), name)
