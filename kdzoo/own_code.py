"""A user's own modules: import them, and find the source files that they are made of."""

import ast
import importlib
import importlib.util
import sys
import sysconfig
import traceback
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from importlib.machinery import ExtensionFileLoader, ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType

from kdzoo.errors import UserError
from kdzoo.files import path_of

LIBRARIES = ("torchvision", "timm", "hf-hub", "local-dir")  # before the colon of a network that names no code

_states: dict[str, tuple[str, int, int]] = {}  # of modules imported here: file, size and time of change
_late: set[str] = set()  # those that what needs them had not imported yet when it was imported itself


def import_module(name: str) -> ModuleType:
    """Import a module; one of the working folder wins over an installed one, as in a script that lies there.

    Raises:
        ImportError: there is no such module.
    """
    with up_to_date([name], Path.cwd()):
        return importlib.import_module(name)


@contextmanager
def up_to_date(names: Iterable[str], folder: Path) -> Iterator[None]:
    """Make a context in which these modules are imported from ``folder`` first, and anew if their source has changed.

    Afterwards ``folder`` stays the last place to look, for what they import late.

    Raises:
        UserError: a file hides a package with compiled parts, which a process cannot import twice; or two files of
            one module's name are used, and one of them is imported late, so that it may be taken for the other.
    """
    importlib.invalidate_caches()
    files = sources(names, folder)
    states = {module: _state(file) for module, file in files.items()}
    loaded = {module: _origin(sys.modules[module]) for module in states if module in sys.modules}
    moved = [module for module, origin in loaded.items() if Path(origin or "").resolve() != files[module].resolve()]
    for module in moved:
        if any(name.startswith(f"{module}.") and _is_compiled(part) for name, part in list(sys.modules.items())):
            raise UserError(f"{files[module]} hides the package {module}, which is in use; give the file another name")
    if moved or any(state != _states.get(module, state) for module, state in states.items()):
        tops = {module.partition(".")[0] for module in states}
        for module in [module for module in sys.modules if module.partition(".")[0] in tops]:
            del sys.modules[module]
    others = {module: Path(_states.get(module, state)[0]) for module, state in states.items()}
    former = {module: file for module, file in others.items() if file.is_file() and not file.samefile(files[module])}
    _states.update(states)
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        if str(folder) not in sys.path:
            sys.path.append(str(folder))
    _late.update(states.keys() - sys.modules.keys())
    for module in _late & former.keys():
        raise UserError(
            f"{former[module]} and {files[module]} are both the module {module}, and one of them is imported inside a "
            "function, where it may be taken for the other; import it at the head of the file, or give it another name"
        )


def sources(names: Iterable[str], folder: Path | None = None) -> dict[str, Path]:
    """Find the source files of the user's own modules among these, and of those that they import, by module.

    They are looked for in ``folder`` first, by default in the working folder.

    The user's own are all but Python's, kdzoo's and those installed as packages. Nothing is imported, so a module whose
    name is computed when it is imported is not found.
    """
    found: dict[str, Path] = {}
    waiting = list(names)
    while waiting:
        parts = waiting.pop().split(".")
        for module in (".".join(parts[: end + 1]) for end in range(len(parts))):  # a package runs before its modules
            if module in found or parts[0] == "kdzoo" or parts[0] in sys.stdlib_module_names:
                continue
            spec = _find(module, folder or Path.cwd())
            if spec is None or spec.origin is None or not _is_own(Path(spec.origin)):
                continue
            found[module] = Path(spec.origin)
            package = module if spec.submodule_search_locations else module.rpartition(".")[0]
            waiting += imported(found[module], package)
    return dict(sorted(found.items()))


def named(distiller: str, data: Iterable[str], networks: Iterable[str | None]) -> dict[str, dict[str, Path]]:
    """Find the source files of all code that a run's settings name, by that name; none where it is not found.

    Args:
        distiller: a method's name, or the path of a file.
        data: data sets' names, or the paths of files, with their arguments after a colon.
        networks: their names; ``module:factory`` is code.

    Returns:
        For each name its files, by the path or the module that each is recorded under.
    """
    found: dict[str, dict[str, Path]] = {}
    for name in (distiller, *(each.partition(":")[0] for each in data)):
        file = path_of(name)
        if file.suffix == ".py":
            found[name] = {name: file, **sources(imported(file), file.parent)} if file.is_file() else {}
    for network in networks:
        origin, colon, _ = (network or "").partition(":")
        if network and colon and origin not in LIBRARIES:
            found[network] = sources([origin])
    return found


def imported(file: Path, package: str = "") -> tuple[str, ...]:
    """List the modules that a source file of ``package`` imports, by their full names; some may be no modules."""
    return _imported(package, *_state(file))


@cache
def _imported(package: str, file: str, size: int, changed: int) -> tuple[str, ...]:
    """Read the imports of a file in this state, once for all runs of a suite."""
    try:
        return tuple(dict.fromkeys(_imports(ast.parse(Path(file).read_bytes()), package)))
    except (SyntaxError, ValueError):  # importing it will say so
        return ()


def _imports(tree: ast.Module, package: str) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            with suppress(ImportError):  # more dots than there are packages
                origin = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
                yield from (f"{origin}.{alias.name}" for alias in node.names)


def _find(module: str, folder: Path) -> ModuleSpec | None:
    """Find a module without importing anything, in ``folder`` before any other place."""
    parts = module.split(".")
    path: list[str] = [str(folder), *sys.path]
    spec = None
    for end in range(len(parts)):
        name = ".".join(parts[: end + 1])
        spec = PathFinder.find_spec(name, path)
        if spec is None and not end:
            with suppress(ValueError):  # a module that was made without a file
                spec = importlib.util.find_spec(name)  # by the finders of packages that are installed for editing
        if spec is None:
            return None
        path = list(spec.submodule_search_locations or ())
    return spec


def _is_own(file: Path) -> bool:
    installed = "site-packages" in file.parts or "dist-packages" in file.parts
    return file.suffix == ".py" and not installed and not file.is_relative_to(sysconfig.get_path("stdlib"))


def place(error: BaseException) -> str:
    """Say where an error of others was raised, as ``mine.py, line 7``: in the user's own code, if it came through any.

    Else in any code but torch's, such as that of an installed method.
    """
    if found := own_place(error):
        return found
    torch = importlib.util.find_spec("torch")
    library = str(Path(torch.origin).parent) if torch and torch.origin else "<"
    frames = traceback.extract_tb(error.__traceback__)
    return _last([frame for frame in frames if not frame.filename.startswith((library, "<"))] or frames)


def own_place(error: BaseException) -> str:
    """Say which line of the user's own code an error came through last, if any: a library's line says little."""
    compiled = getattr(error, "real_stack", None) or ()  # of code that torch.compile refuses, and has not run
    frames = [*traceback.extract_tb(error.__traceback__), *compiled]
    files = [Path(frame.filename) for frame in frames]
    ours = Path(__file__).parent
    return _last(
        [frame for frame, file in zip(frames, files, strict=True) if _is_own(file) and not file.is_relative_to(ours)]
    )


def at_own_place(error: BaseException) -> str:
    """Say `` at mine.py, line 7`` of such an error; nothing where it came through no code of the user's."""
    return f" at {found}" if (found := own_place(error)) else ""


def _last(frames: Sequence[traceback.FrameSummary]) -> str:
    return f"{Path(frames[-1].filename).name}, line {frames[-1].lineno}" if frames else ""


def _state(file: Path) -> tuple[str, int, int]:
    stat = file.stat()
    return str(file), stat.st_size, stat.st_mtime_ns


def _is_compiled(module: ModuleType) -> bool:
    spec = getattr(module, "__spec__", None)  # which some that stand in for modules lack
    return isinstance(getattr(spec, "loader", None), ExtensionFileLoader)


def _origin(module: ModuleType) -> str | None:
    spec = module.__spec__
    return None if spec is None else spec.origin


@contextmanager
def script_hidden() -> Iterator[None]:
    """Make a context in which processes start without running the user's script, which so needs no main guard."""
    script = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = script
