"""Find plug-ins: methods and data sets that are installed, by name, and one's own by the path of a file.

A plug-in is one file with one class. An entry point names a package, each of whose modules is a plug-in, or one class.
Finding and describing plug-ins reads files and imports none of them, so listing them is quick.
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
from pkgutil import resolve_name
from types import ModuleType
from typing import TYPE_CHECKING, Generic, TypeVar

from kdzoo import own_code
from kdzoo.errors import UserError, unknown
from kdzoo.files import files_named, path_of

if TYPE_CHECKING:
    from kdzoo.distiller import Distiller
    from kdzoo.image_set import ImageSet

# What a method's fidelity says, from the surest to the least sure.
FIDELITIES = {
    "exact": "formulas read in the authors' code or paper",
    "adapted": "carried over from another task or architecture",
    "reconstructed": "the full text was not available; our reading of abstract and relatives",
}
Base = TypeVar("Base")


@dataclass(frozen=True)
class Plugin:
    """A method or a data set that was found and not yet imported."""

    name: str
    module: str
    file: Path
    attribute: str = ""  # the class; empty: the only one of its kind in the module

    @property
    def summary(self) -> str:
        """The first line of the docstring of the method's file."""
        return (ast.get_docstring(self._tree()) or "").split("\n")[0]

    @property
    def title(self) -> str:
        """The name as it is written, with what has to follow it: ``kd``, ``folder:PATH``."""
        argument = self.fact("argument")
        return f"{self.name}:{argument}" if argument else self.name

    @property
    def paper(self) -> str:
        """The paper as a method's class names it."""
        return self.fact("paper")

    @property
    def fidelity(self) -> str:
        """How closely a method follows its paper, in lower case."""
        return self.fact("fidelity").lower()

    def fact(self, name: str) -> str:
        """The value of an attribute that the class sets in its body; empty where it does not."""
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

    def _tree(self) -> ast.Module:
        try:
            return ast.parse(self.file.read_bytes())
        except SyntaxError as error:
            raise UserError(f"{self.file}, line {error.lineno}: {error.msg}; correct the file") from error


@dataclass(frozen=True)
class Registry(Generic[Base]):
    """All plug-ins of one kind."""

    kind: str  # as errors name one
    plural: str
    listed_by: str  # the command that lists their names
    group: str  # of entry points
    base: str  # the public class that they derive from

    def all(self) -> dict[str, Plugin]:
        """Find every plug-in that is installed, by name."""
        found: dict[str, Plugin] = {}
        for point in _points(self.group):
            for plugin in _plugins_of(point):
                other = found.setdefault(plugin.name, plugin)
                if other.file != plugin.file:
                    raise UserError(
                        f"two packages bring {self.plural} named '{plugin.name}': {other.file} and {plugin.file}; "
                        "remove one"
                    )
        return dict(sorted(found.items()))

    def names(self) -> list[str]:
        """List the names of all that are installed, sorted."""
        return list(self.all())

    def find(self, name: str) -> Plugin:
        """Find the plug-in of this name, or the one in the file of this path (``./mine.py``)."""
        if name.endswith(".py"):
            file = path_of(name).resolve()
            if not file.is_file():
                raise UserError(f"no file {name}; expected a Python file that holds one subclass of {self.base}")
            return Plugin(file.stem, f"kdzoo_file_{file.stem}", file)
        known = self.all()
        if name not in known:
            titles = [*(plugin.title for plugin in known.values()), *files_named(name, ".py")]
            raise unknown(self.kind, name, titles, hint=f"('{self.listed_by}' lists all; a path ends with .py)")
        return known[name]

    def load(self, name: str) -> type[Base]:
        """Import the plug-in's class."""
        plugin, base = self.find(name), resolve_name(self.base)
        module = _import(plugin)
        if plugin.attribute:
            classes = [getattr(module, plugin.attribute)]
        else:
            classes = [
                value
                for value in vars(module).values()
                if isinstance(value, type) and issubclass(value, base) and value.__module__ == module.__name__
            ]
        if len(classes) != 1 or not issubclass(classes[0], base):
            named = f" ({', '.join(each.__name__ for each in classes)})" if classes else ""
            raise UserError(
                f"{plugin.file} holds {len(classes)} {self.plural}{named}; expected one subclass of {self.base}"
            )
        return classes[0]


distillers: Registry["Distiller"] = Registry(
    kind="distiller",
    plural="distillers",
    listed_by="kdzoo list distillers",
    group="kdzoo.distillers",
    base="kdzoo.Distiller",
)
data_sets: Registry["ImageSet"] = Registry(
    kind="data", plural="data sets", listed_by="kdzoo list data", group="kdzoo.datasets", base="kdzoo.ImageSet"
)
methods, names, find, load = distillers.all, distillers.names, distillers.find, distillers.load


@cache
def _points(group: str) -> tuple[EntryPoint, ...]:
    """What is installed does not change while we run, and looking it up reads a file of every package."""
    return tuple(entry_points(group=group))


def _plugins_of(point: EntryPoint) -> Iterator[Plugin]:
    spec = importlib.util.find_spec(point.module)
    if spec is None or spec.origin is None:
        raise UserError(f"plug-in '{point.name}' names the module {point.module}, which is not installed")
    if point.attr or not spec.submodule_search_locations:
        yield Plugin(point.name, point.module, Path(spec.origin), point.attr)
        return
    for file in sorted(Path(spec.origin).parent.glob("*.py")):
        if not file.name.startswith("_"):
            yield Plugin(file.stem, f"{point.module}.{file.stem}", file)


def _import(plugin: Plugin) -> ModuleType:
    from kdzoo.process_state import foreign  # here, so that lists need no torch

    with foreign(str(plugin.file), " could not be imported", "correct the file"):
        if not plugin.module.startswith("kdzoo_file_"):
            return importlib.import_module(plugin.module)
        spec = importlib.util.spec_from_file_location(plugin.module, plugin.file)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[plugin.module] = module  # so that its objects can be pickled
        with own_code.up_to_date(own_code.imported(plugin.file), plugin.file.parent):
            spec.loader.exec_module(module)
        return module
