"""What a search tries: each method as it comes, and a few settings of its main weight."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from kdzoo import registry
from kdzoo.distiller import Distiller
from kdzoo.errors import UserError
from kdzoo.resolve import distiller_settings, preset
from kdzoo.store.search import Candidate

ALWAYS = ("none", "kd", "logitmse")  # what every method has to beat
FACTOR = 3.0  # from the usual value of a weight to the ends of the range that is tried


def candidates(
    teacher: str, students: Sequence[str], methods: Sequence[str], settings: int, data: str, protocol: str
) -> list[Candidate]:
    """List what a search tries for each student.

    Args:
        teacher: its name.
        students: their names.
        methods: names or files of methods; empty for all that are installed. Those of ``ALWAYS`` are added.
        settings: of each method, its usual one included.
        data: the data set's name, which decides the presets together with the other names.
        protocol: the recipe's name.

    Raises:
        UserError: an unknown method.
    """
    names = dict[registry.Plugin, str]()
    for name in (*ALWAYS, *(methods or registry.names())):
        names.setdefault(registry.distillers.find(name), name)  # a file may be named by two paths
    found = []
    for student in students:
        for name in names.values():
            usual = preset(name, data, protocol, teacher, student)
            found += [Candidate(student, name, keywords) for keywords in variants(name, usual, settings)]
    return found


def variants(name: str, usual: dict[str, Any], settings: int) -> list[dict[str, Any]]:
    """Choose the settings of a method that are tried: its usual one, given as empty, and others of its range.

    The range is what the method's ``search`` declares; else that of its main weight, from a third to three times its
    usual value. The values lie at equal ratios, and the usual one stands for its nearest.

    Args:
        name: of the method, or its file.
        usual: the preset's keywords; those that it does not name have their defaults.
        settings: how many are wanted.
    """
    method = registry.load(name)
    if settings == 1:
        return [{}]
    keywords = distiller_settings({"name": name, **usual}).keywords
    found = method.search or main_weight(method, keywords)
    if not found:
        return [{}]
    try:
        [(keyword, (low, high))] = found.items()
        default = keywords[keyword]
        if not (0 < low < high < math.inf and isinstance(default, int | float)):
            raise ValueError
    except (AttributeError, KeyError, TypeError, ValueError):
        raise UserError(
            f"method {name}: search = {found}: expected one keyword with two numbers, 0 < low < high, whose default is "
            "a number"
        ) from None
    values = np.geomspace(low, high, settings)
    nearest = int(np.abs(np.log(values / default)).argmin()) if default > 0 else 0
    others = (
        round(value) if isinstance(default, int) else float(f"{value:.3g}") for value in np.delete(values, nearest)
    )
    tried = [{keyword: value} for value in dict.fromkeys(others) if value != default]
    return [{}, *(own for own in tried if is_allowed(name, {**keywords, **own}))]


def is_allowed(name: str, keywords: dict[str, Any]) -> bool:
    """Tell whether a method takes these keywords."""
    try:
        distiller_settings({"name": name, **keywords})
    except UserError:
        return False
    return True


def main_weight(method: type[Distiller], keywords: dict[str, Any]) -> dict[str, tuple[float, float]]:
    """Find the weight of a method's own term, with the range that is tried.

    It is the heaviest besides ``ce``, and besides ``kd`` where there are others. Empty where there is no such keyword,
    or where the method's constructor fails, which is told when it is built.
    """
    try:
        given = method(**keywords).weights
    except (Exception, SystemExit):
        return {}
    weights = {name: weight for name, weight in given.items() if name in keywords and weight and name != "ce"}
    own = {name: weight for name, weight in weights.items() if name != "kd"} or weights
    if not own:
        return {}
    heaviest = max(own, key=lambda name: own[name])
    return {heaviest: (own[heaviest] / FACTOR, own[heaviest] * FACTOR)}
