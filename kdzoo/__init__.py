"""kdzoo: knowledge-distillation methods on one fast and fair engine.

``kdzoo/__init__.pyi`` lists the public names. Each is imported when it is first used, so that ``import kdzoo`` and the
command line start at once.
"""

import lazy_loader

__version__ = "0.1.0"

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
