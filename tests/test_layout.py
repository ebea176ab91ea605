"""The rooms of the house: imports run downwards only, no file is part of a circle, and no method is known by name."""

import ast
from collections.abc import Iterable, Iterator
from configparser import ConfigParser
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "kdzoo"
# Rooms from the ground up: what stands in one line may import that line's own rooms and those before it.
FLOORS = (
    (
        "errors",
        "files",
        "imports",
        "keywords",
        "modes",
        "own_code",
        "precision",
        "process_state",
        "randomness",
        "recipe",
        "tensors",
        "quantities",
    ),
    ("losses", "spectral", "outputs", "distiller", "image_set", "registry"),
    ("connectors", "models", "data", "datasets", "phase"),
    ("distillation", "settings"),
    ("resolve",),
    ("naming", "toys"),
    ("store",),
    ("checks", "engine"),
    ("experiments",),
    ("results",),
    ("commands",),
    ("cli", "__init__", "__main__"),
)
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}


def imported(tree: ast.AST, modules: Iterable[str]) -> Iterator[str]:
    """The modules of ``modules`` that a file imports, at its head or inside of functions; not for types alone."""
    known = set(modules)
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING":
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield from ({inner, node.module} & known if inner not in known else {inner})
        yield from imported(node, known)


@cache
def arrows() -> dict[str, set[str]]:
    """What each module of kdzoo imports of kdzoo."""
    files = {
        ".".join(("kdzoo", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__"): path
        for path in PACKAGE.rglob("*.py")
    }
    trees = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in files.items()}
    return {name: set(imported(tree, files)) - {name} for name, tree in trees.items()}


def room(module: str) -> str:
    return module.split(".")[1] if "." in module else "__init__"


def climbs(found: dict[str, set[str]]) -> list[str]:
    """The imports from a lower floor to a higher one."""
    return [
        f"{name} imports {other}"
        for name, others in found.items()
        for other in others - {"kdzoo"}
        if FLOOR_OF[room(other)] > FLOOR_OF[room(name)]
    ]


def test_every_room_has_a_floor():
    assert {room(name) for name in arrows()} == FLOOR_OF.keys()


def test_imports_run_downwards():
    assert climbs(arrows()) == []
    assert climbs({"kdzoo.data.loader": {"kdzoo.engine.loop"}}) == ["kdzoo.data.loader imports kdzoo.engine.loop"]


def test_no_file_is_part_of_a_circle():
    # A package's face hands names on and imports what lies below it; within a package files name each other directly.
    faces = {name for name in arrows() if (PACKAGE.parent / Path(*name.split(".")) / "__init__.py").is_file()}
    found = {name: others - faces for name, others in arrows().items() if name not in faces}
    tuple(TopologicalSorter(found).static_order())
    with pytest.raises(CycleError):
        tuple(TopologicalSorter({"a": {"b"}, "b": {"a"}}).static_order())


def test_every_package_is_installed():
    config = ConfigParser()
    config.read(PACKAGE.parent / "setup.cfg", encoding="utf-8")
    installed = set(config["options"]["packages"].split())
    folders = {file.parent.relative_to(PACKAGE.parent) for file in PACKAGE.rglob("__init__.py")}
    packages = {".".join(folder.parts) for folder in folders}
    assert packages <= installed
    assert not packages <= installed - {"kdzoo.checks"}


def test_kdzoo_imports_no_method():
    names = {path.stem for path in (PACKAGE.parent / "distillers").glob("*.py")} - {"__init__"}
    assert len(names) > 30
    methods = {f"kdzoo.distillers.{name}" for name in names} | {"kdzoo.distillers"}
    for path in PACKAGE.rglob("*.py"):
        assert not list(imported(ast.parse(path.read_text(encoding="utf-8")), methods)), path
