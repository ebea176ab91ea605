"""Read files of weights of any training code, without running code that they hold."""

from __future__ import annotations

import mmap
import re
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from kdzoo.errors import UserError, is_shortage
from kdzoo.files import path_of

IN_FOLDERS = ("model.safetensors", "pytorch_model.bin", "student.safetensors")  # of the hub, and of kdzoo's own runs
SPLIT = re.compile(r"-\d{5}-of-(?!00001)\d{5}\.\w+$|\.index\.json$")  # names of parts of weights, of the hub

IN_PARTS = {  # names of the parts that several processes wrote, and what makes one file of them
    re.compile(r"\.distcp$"): "python -m torch.distributed.checkpoint.format_utils dcp_to_torch FOLDER weights.pt",
    re.compile(r"^zero_to_fp32\.py$|^(bf16_)?zero_pp_rank_\d+_"): "the zero_to_fp32.py that lies beside them",
}


class Extra:
    """A stand-in for an object that trainers put beside the weights; it keeps nothing and does nothing."""

    def __init__(self, *_: Any, **__: Any):
        pass

    def __new__(cls, *_: Any, **__: Any) -> Extra:
        return super().__new__(cls)

    def __setstate__(self, _: Any) -> None:
        pass


class ExtraMapping:
    """A stand-in for subclasses of dict, whose items are kept in a plain one."""

    def __new__(cls, *_: Any, **__: Any) -> dict[Any, Any]:  # type: ignore[misc]  # an instance of dict is the purpose
        return {}


# The types beside torch's own that a file may hold. None of them is imported: stand-ins are made in their place.
EXTRAS = (
    "argparse.Namespace",
    "types.SimpleNamespace",
    *(
        f"pathlib.{path}"
        for path in ("Path", "PosixPath", "WindowsPath", "PurePath", "PurePosixPath", "PureWindowsPath")
    ),
    *(f"pathlib._local.{path}" for path in ("Path", "PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath")),
    *(f"numpy.{core}.multiarray.{maker}" for core in ("core", "_core") for maker in ("scalar", "_reconstruct")),
    "numpy.dtype",
    "numpy.ndarray",
    "omegaconf.dictconfig.DictConfig",
    "omegaconf.listconfig.ListConfig",
    "omegaconf.base.Metadata",
    "omegaconf.base.ContainerMetadata",
    *(
        f"omegaconf.nodes.{kind}Node"
        for kind in ("Any", "String", "Integer", "Float", "Boolean", "Path", "Enum", "Bytes")
    ),
    "typing.Any",
    *(f"builtins.{kind}" for kind in ("int", "float", "str", "bool", "bytes", "list", "tuple", "dict", "object")),
    "datetime.datetime",
    "datetime.timedelta",
)
EXTRA_MAPPINGS = (
    "collections.defaultdict",
    "easydict.EasyDict",
    "yacs.config.CfgNode",
    "lightning.fabric.utilities.data.AttributeDict",
    "lightning_fabric.utilities.data.AttributeDict",
    "pytorch_lightning.utilities.parsing.AttributeDict",
)
ALLOWED: list[Any] = [*((Extra, name) for name in EXTRAS), *((ExtraMapping, name) for name in EXTRA_MAPPINGS)]


def find_file(given: Path) -> Path:
    """Return the file of weights at a path: itself, or the one in a folder that holds a model.

    Raises:
        UserError: there is none, or several that each hold a part of the weights.
    """
    path = path_of(given)
    names = [path.name]
    if path.is_dir():
        found = next((path / name for name in IN_FOLDERS if (path / name).is_file()), None)
        if found is not None:
            return found
        names = [file.name for file in path.iterdir()]
    if any(SPLIT.search(name) for name in names):
        raise UserError(
            f"the weights of '{path}' are split into several files; where they were made, save them in one: "
            "model.save_pretrained(folder, max_shard_size='1TB')"
        )
    for part, how in IN_PARTS.items():
        if any(part.search(name) for name in names):
            raise UserError(
                f"the weights of '{path}' lie in parts, one of each process; make one file of them with {how}"
            )
    if path.is_dir():
        raise UserError(f"folder '{path}' holds no weights; expected {' or '.join(IN_FOLDERS)} in it")
    if not path.is_file():
        raise UserError(f"weights '{path}' not found; expected a .safetensors, .pt or .pth file, or a folder with one")
    return path


def read_file(path: Path) -> Any:
    """Read a file of safetensors or of ``torch.save``: what it holds, with stand-ins for what is no weight.

    Raises:
        UserError: it is neither, or it holds objects whose loading would run code.
    """
    try:
        if _is_safetensors(path):
            return load_file(path)
        with torch.serialization.safe_globals(ALLOWED), warnings.catch_warnings(), path.open("rb") as file:
            warnings.simplefilter("ignore")  # of pickle protocols, which either load or do not
            return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # on damaged files, torch's reader raises errors of many kinds
        raise UserError(_refusal(path, str(error))) from error


def written_by_kdzoo(path: Path) -> bool:
    """Tell whether kdzoo wrote a file, which then says what its network was adapted to."""
    try:
        with safe_open(path, "pt") as content:
            return "kdzoo" in (content.metadata() or {})
    except (SafetensorError, OSError) as error:
        if is_shortage(error):
            raise
        return False


def _is_safetensors(path: Path) -> bool:
    with path.open("rb") as file:  # its header is JSON, whichever suffix the file was given
        return file.read(9)[8:] == b"{"


def _refusal(path: Path, said: str) -> str:
    """Say in one line why a file cannot be read, and what to do next."""
    said = re.sub(r"\x1b\[[0-9;]*m", "", said)
    refused = re.search(r"(?:GLOBAL|unrecognized function) ([\w.<>]+)", said)
    program = _program(path)
    if "TorchScript" in said or (not program and _holds(path, b"torch.nn.modules")):
        return (
            f"'{path}' cannot be read as weights: it holds a whole module, and loading one runs code; where it was "
            "made, save its state_dict(): torch.save(model.state_dict(), 'weights.pt')"
        )
    if refused:
        name = refused[1] if "." in refused[1] else f"builtins.{refused[1]}"
        return (
            f"'{path}' cannot be read as weights: it holds {name}, and loading that may run code; where it was made, "
            "save the tensors alone: torch.save(model.state_dict(), 'weights.pt')"
        )
    return (
        f"'{path}' cannot be read as weights: {program or _kind(path)}; expected safetensors, or a file of torch.save"
    )


def _holds(path: Path, words: bytes) -> bool:
    if not path.stat().st_size:
        return False
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return content.find(words) >= 0


def _program(path: Path) -> str:
    """Say which kind of exported program a file holds; nothing where it holds none."""
    with path.open("rb") as file:
        head = file.read(3)
    if re.match(rb"\x08.[\x12\x1a\x22\x28\x32\x3a\x42]", head, re.DOTALL):  # a version, and a field that may follow
        return "it is a program of ONNX"
    if head.startswith(b"PK") and _holds(path, b"/models/model.json"):
        return "it is a program of torch.export"
    return ""


def _kind(path: Path) -> str:
    """Say what a file is that holds no weights."""
    with path.open("rb") as file:
        head = file.read(256)
    if path.stat().st_size < 16:
        return f"it has {path.stat().st_size} bytes"
    if head.startswith(b"version https://git-lfs"):
        return "it is a pointer of Git LFS, and 'git lfs pull' fetches the file"
    if head.isascii() and not re.search(rb"[\x00-\x08]", head):
        return "it is a text file"
    return "it is damaged, or of another kind"
