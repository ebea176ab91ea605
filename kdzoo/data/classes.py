"""Put class names in order: as text, by the numbers in them, or as a file lists them."""

import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any
from unicodedata import normalize

from kdzoo.errors import UserError
from kdzoo.files import path_of, read_text
from kdzoo.quantities import counted


def natural(name: str) -> tuple[Any, ...]:
    """Make the key by which names sort as people count: class 2 before class 10."""
    parts = re.split("([0-9]+)", name)
    return tuple(int(part) if place % 2 else part for place, part in enumerate(parts)), name


ORDERS: dict[str, Callable[[str], Any]] = {"text": str, "natural": natural}


def in_order(names: Sequence[str], order: str) -> tuple[str, ...]:
    """Sort class names.

    Args:
        names: of the classes.
        order: ``text``, as torchvision sorts folders; ``natural``, by the numbers in them, as timm does; or the path of
            a file with one name a line.

    Raises:
        UserError: there is no such file, it names other classes, or two classes have one name.
    """
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise UserError(f"data.classes={order}: two classes of the data are called '{twice[0]}'; rename one")
    if order in ORDERS:
        return tuple(sorted(names, key=ORDERS[order]))
    names_in_file = listed(order)
    known = {normalize("NFC", name): name for name in names}
    for given, others, said in ((known, names_in_file, "lacks"), (names_in_file, known, "lists")):
        if extra := [name for name in given if name not in others]:
            other = "" if said == "lacks" else ", which the data do not have"
            raise UserError(f"data.classes={order} {said} {counted(len(extra), 'class')}, such as '{extra[0]}'{other}")
    return tuple(known[name] for name in names_in_file)


def listed(order: str) -> tuple[str, ...]:
    """Read the class names of a file, one a line.

    Raises:
        UserError: there is no such file, or it names no class or one twice.
    """
    path = path_of(order)
    if not path.is_file():
        raise UserError(f"data.classes={order}: expected text, natural, or a file with one class name a line")
    lines = normalize("NFC", read_text(path).removeprefix("\ufeff")).splitlines()
    names = tuple(line.strip() for line in lines if line.strip())
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise UserError(f"data.classes={order} lists the class '{twice}' twice; remove one")
    if not names:
        raise UserError(f"data.classes={order} lists no class; expected one name a line")
    return names
