"""Answer ``kdzoo list`` and ``kdzoo show``: lists of names, and a page for one method or one network."""

import inspect
import json
from contextlib import suppress
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from kdzoo import registry
from kdzoo.errors import UserError, unknown
from kdzoo.quantities import counted

if TYPE_CHECKING:
    from kdzoo.distiller import Distiller


def page(name: str, data: str) -> RenderableType:
    """Describe a method or a network.

    Raises:
        UserError: the name is neither's.
    """
    if name.endswith(".py") or name in registry.names():
        return distiller_page(name)
    try:
        return model_page(name, data)
    except UserError as error:
        if not str(error).startswith("unknown model"):
            raise
        from kdzoo.models import names

        known = [*registry.names(), *names.known()]
        hint = "(all: kdzoo list distillers, kdzoo list models)"
        raise unknown("method or network", name, known, hint) from error


def distiller_page(name: str) -> RenderableType:
    """Describe a method: its paper, fidelity, documentation, and keywords with their defaults.

    Raises:
        UserError: the method's class lacks what is described here, or its constructor fails.
    """
    from kdzoo.process_state import foreign  # here, so that lists need no torch

    method = registry.find(name)
    distiller = registry.load(name)
    with foreign(str(method.file), " cannot be explained", f"'kdzoo check {name}' says what to correct"):
        return _distiller_page(method, distiller)


def _distiller_page(method: registry.Plugin, distiller: "type[Distiller]") -> RenderableType:
    from kdzoo.keywords import parameters  # which loads more than lists need

    keywords = Table("keyword", "type", "default", title="distiller.KEYWORD=value", title_justify="left")
    for parameter in parameters(distiller):
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY:
            kind = inspect.formatannotation(parameter.annotation).replace("typing.", "")
            keywords.add_row(parameter.name, kind, repr(parameter.default))
    facts = Table.grid(padding=(0, 2))
    facts.add_row("method", method.name)
    facts.add_row("paper", distiller.paper)
    facts.add_row("fidelity", f"{distiller.fidelity}: {registry.FIDELITIES[str(distiller.fidelity)]}")
    if without := _does_without(distiller):
        facts.add_row("learns without", ", ".join(without))
    facts.add_row("file", str(method.file))
    return Group(facts, Text(), Text(method.summary), Text(inspect.getdoc(distiller) or ""), Text(), keywords)


def _does_without(distiller: "type[Distiller]") -> list[str]:
    """List what the method, with its defaults, can do without."""
    found = ["a teacher"] if not distiller.needs.teacher else []
    for what, lacking in (("labels", {"labels": True}), ("a classifier", {"logits": True})):
        with suppress(UserError):
            distiller().leave_out(**lacking)
            found.append(what)
    return found


def model_page(name: str, data: str) -> RenderableType:
    """Describe a network for a data set: parameters, shapes, and what was adapted."""

    from kdzoo import models
    from kdzoo.data import outline

    spec = outline(data)
    known = models.describe(models.create(name, spec))
    facts = Table.grid(padding=(0, 2))
    for key, value in known.items():
        if key == "adapted":
            value = "\n".join(value) or "nothing"
        elif key == "taps":
            value = "\n".join(" x ".join(map(str, shape)) for shape in value)
        facts.add_row(key.replace("_", " "), f"{value:,}" if isinstance(value, int) else str(value))
    return Group(Text(f"{name} on {data} ({counted(spec.num_classes, 'class')}, {spec.image_size} px)"), Text(), facts)


def listing(kind: str, style: str) -> str:
    """List all names of one kind, one a line; methods with their paper and fidelity."""
    if kind == "distillers":
        rows = [("method", "fidelity", "paper", "what it does")]
        rows += [(m.name, m.fidelity, m.paper, m.summary) for m in registry.methods().values()]
        if style == "markdown":
            head, *body = [f"| {' | '.join(row)} |" for row in rows]
            return "\n".join([head, "|---" * len(rows[0]) + "|", *body])
        widths = [max(len(row[i]) for row in rows) for i in range(3)]
        return "\n".join(
            "  ".join([*(cell.ljust(w) for cell, w in zip(row, widths, strict=False)), row[3]]) for row in rows
        )
    if kind == "models":
        from kdzoo import models

        return "\n".join(
            [*sorted(models.short_names()), "and any name of timm, torchvision:NAME, package.module:factory"]
        )
    if kind == "settings":
        from kdzoo.settings import all_settings

        known = [(f"{key}={json.dumps(value)}", means) for key, value, means in all_settings()]
        width = max(len(key) for key, _ in known)
        return "\n".join(f"{key:{width}}  {means}" for key, means in known)
    if kind == "data":
        found = registry.data_sets.all().values()
        width = max(len(each.title) for each in found)
        return "\n".join(f"{each.title:{width}}  {each.summary}" for each in found)
    from kdzoo.experiments import suites
    from kdzoo.resolve import protocol_names

    return "\n".join(protocol_names() if kind == "protocols" else suites.shipped())
