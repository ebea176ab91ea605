"""Find distillation methods: those of installed packages by name, one's own by the path of a file.

An entry point of group ``kdzoo.distillers`` names a package, each of whose modules is a method, or one class.
Finding and describing methods reads files and imports none of them, so listing them is quick.
"""

import ast
import importlib
import importlib.util
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from kdzoo.errors import UserError, unknown

if TYPE_CHECKING:
    from kdzoo.distiller import Distiller

GROUP = "kdzoo.distillers"
# What a method's fidelity says, from the surest to the least sure.
FIDELITIES = {
    "exact": "formulas read in the authors' code or paper",
    "adapted": "carried over from another task or architecture",
    "reconstructed": "the full text was not available; our reading of abstract and relatives",
}


@dataclass(frozen=True)
class Method:
    """A method that was found but not imported yet."""

    name: str
    module: str
    file: Path
    attribute: str = ""  # the class; empty: the module's only distiller

    @property
    def summary(self) -> str:
        """The first line of the docstring of the method's file."""
        return (ast.get_docstring(self._tree()) or "").split("\n")[0]

    @property
    def paper(self) -> str:
        """The paper that the class names."""
        return self._class_value("paper")

    @property
    def fidelity(self) -> str:
        """How closely the implementation follows its paper, in lower case."""
        return self._class_value("fidelity").lower()

    def _tree(self) -> ast.Module:
        try:
            return ast.parse(self.file.read_text(encoding="utf-8"))
        except SyntaxError as error:
            raise UserError(f"{self.file}, line {error.lineno}: {error.msg}; correct the file") from error

    def _class_value(self, name: str) -> str:
        for node in self._tree().body:
            if not isinstance(node, ast.ClassDef) or self.attribute not in ("", node.name):
                continue
            for line in node.body:
                target = line.targets[0] if isinstance(line, ast.Assign) else getattr(line, "target", None)
                if isinstance(target, ast.Name) and target.id == name:
                    value = getattr(line, "value", None)
                    if isinstance(value, ast.Constant):
                        return str(value.value)
                    if isinstance(value, ast.Attribute):
                        return value.attr
        return ""


def methods() -> dict[str, Method]:
    """Find all installed methods, by name."""
    found: dict[str, Method] = {}
    for point in _points():
        for method in _methods_of(point):
            other = found.setdefault(method.name, method)
            if other.file != method.file:
                raise UserError(
                    f"two plug-ins bring a distiller '{method.name}': {other.file} and {method.file}; remove one"
                )
    return dict(sorted(found.items()))


def names() -> list[str]:
    """List the names of all installed methods, sorted."""
    return list(methods())


def find(name: str) -> Method:
    """Find the method of this name, or the one in the file at this path (``./mine.py``)."""
    if name.endswith(".py"):
        file = Path(name).expanduser().resolve()
        if not file.is_file():
            raise UserError(f"no file {name}; expected a Python file that holds one Distiller")
        return Method(file.stem, f"kdzoo_file_{file.stem}", file)
    known = methods()
    if name not in known:
        raise unknown("distiller", name, known, hint="('kdzoo list distillers' lists all; a path ends with .py)")
    return known[name]


def load(name: str) -> "type[Distiller]":
    """Import a method's class."""
    from kdzoo.distiller import Distiller

    method = find(name)
    try:
        module = _import(method)
    except Exception as error:
        raise UserError(f"{method.file} could not be imported: {type(error).__name__}: {error}") from error
    if method.attribute:
        classes = [getattr(module, method.attribute)]
    else:
        classes = [
            value
            for value in vars(module).values()
            if isinstance(value, type) and issubclass(value, Distiller) and value.__module__ == module.__name__
        ]
    if len(classes) != 1 or not issubclass(classes[0], Distiller):
        raise UserError(f"{method.file} holds {len(classes)} distillers; expected one subclass of kdzoo.Distiller")
    return classes[0]


@cache
def _points() -> tuple[EntryPoint, ...]:
    """What is installed does not change while we run, and looking it up reads a file of every package."""
    return tuple(entry_points(group=GROUP))


def _methods_of(point: EntryPoint) -> Iterator[Method]:
    spec = importlib.util.find_spec(point.module)
    if spec is None or spec.origin is None:
        raise UserError(f"plug-in '{point.name}' names the module {point.module}, which is not installed")
    if point.attr or not spec.submodule_search_locations:
        yield Method(point.name, point.module, Path(spec.origin), point.attr)
        return
    for file in sorted(Path(spec.origin).parent.glob("*.py")):
        if not file.name.startswith("_"):
            yield Method(file.stem, f"{point.module}.{file.stem}", file)


def _import(method: Method) -> ModuleType:
    if not method.module.startswith("kdzoo_file_"):
        return importlib.import_module(method.module)
    spec = importlib.util.spec_from_file_location(method.module, method.file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[method.module] = module  # so that its objects can be pickled
    spec.loader.exec_module(module)
    return module
