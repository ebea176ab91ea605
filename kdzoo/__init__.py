"""kdzoo: knowledge-distillation methods on one fast and fair engine.

``kdzoo/__init__.pyi`` lists the public names. Each is imported when it is first used, so that ``import kdzoo`` and the
command line start at once.
"""

from pathlib import Path
from typing import Any

import lazy_loader

from kdzoo.imports import not_searched

__version__ = "0.1.0"

_attribute, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)


def __getattr__(name: str) -> Any:
    with not_searched():
        return _attribute(name)


_checkout = Path(__file__).resolve().parents[1]
if (_checkout / "distillers" / "kd.py").is_file():  # there kdzoo.distillers lies beside this folder, not in it
    __path__.append(str(_checkout))
