"""What a run was made on: versions, device and the commit of kdzoo, to trust its number later."""

import os
import platform
import subprocess
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from kdzoo.settings import Run


def environment(run: Run) -> dict[str, Any]:
    """Collect versions, device and code revision: what one needs to trust a number later."""
    import torch

    device = torch.device(run.place.engine.device)
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in ("kdzoo", "torch", "torchvision", "timm", "PyWavelets", "numpy")},
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or str(device),
        "device_type": device.type,
        "precision": run.settings.engine.precision,
        "threads": torch.get_num_threads(),
        "revision": _revision(),
        "folder": str(Path.cwd()),
    }


@cache
def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


@cache
def _revision() -> str | None:
    """Find the commit of kdzoo's checkout, with ``+`` where files differ from it; None for an installed package.

    It is looked up once: a process runs the code that it imported, though the checkout may change meanwhile. It is
    kdzoo's checkout where git knows this very file at its place, whichever links lead here: an installed package may
    lie in a folder of somebody else's.
    """
    here = Path(__file__)
    place = f"kdzoo/{here.parent.name}/{here.name}"
    elsewhere = ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_COMMON_DIR")  # of a hook of git that started us
    settings = {name: value for name, value in os.environ.items() if name not in elsewhere}

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(here.parent), *arguments]
        return subprocess.run(
            command, capture_output=True, text=True, errors="replace", check=True, timeout=10, env=settings
        ).stdout.strip()

    try:
        if git("ls-files", "--full-name", "--error-unmatch", here.name) != place:
            return None
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None
