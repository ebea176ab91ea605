"""Signatures as configuration: typed values from YAML and ``key=value``, and checks of keywords with one wording."""

import inspect
import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import MISSING, asdict, field, fields, is_dataclass, make_dataclass
from functools import cache, partial
from itertools import pairwise
from typing import Any, TypeVar

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

from kdzoo.errors import UserError, unknown

Number = TypeVar("Number", int, float)


def keyword_settings(
    factory: Callable[..., Any], given: Mapping[str, Any], prefix: str = "distiller."
) -> dict[str, Any]:
    """Return a value for each keyword-only argument of ``factory``: the one ``given``, or its default.

    Args:
        factory: a distiller, the function that makes a data set, or anything else whose signature is its configuration.
        given: values by keyword.
        prefix: how errors name a keyword.

    Raises:
        UserError: an unknown keyword, a value of another type, or a keyword that lacks a type or a default.
    """
    return asdict(typed(_schema(factory), given, prefix))


def typed(schema: type, values: Mapping[str, Any], prefix: str, also: type | None = None) -> Any:
    """Make an instance of the dataclass ``schema`` from ``values``, after checking their types.

    Args:
        schema: the dataclass, whose fields may be dataclasses again.
        values: by the fields' names.
        prefix: how errors begin each key's name.
        also: a dataclass whose keys errors may suggest beside those of ``schema``.

    Raises:
        UserError: an unknown key, with the nearest, or a value of another type.
    """
    _refuse_markers(values, prefix)
    with explained(prefix, [key for known in (schema, also) if known for key in _keys(known)]):
        made = OmegaConf.to_object(OmegaConf.merge(_structured(schema), OmegaConf.create(dict(values))))
    _check_fields(made, prefix)
    return made


def setting(default: Any, check: Callable[..., Any], *arguments: Any) -> Any:
    """Declare a dataclass's field with its default and one of the checks below, which ``typed`` applies; None passes.

    Args:
        default: the default.
        check: takes ``arguments`` and one keyword.
        arguments: such as the bounds of ``between``.
    """
    return field(default=default, metadata={"check": partial(check, *arguments)})


def _check_fields(made: Any, prefix: str) -> None:
    for column in fields(made):
        value = getattr(made, column.name)
        if is_dataclass(value):
            _check_fields(value, f"{prefix}{column.name}.")
        elif "check" in column.metadata and value is not None:
            column.metadata["check"](**{f"{prefix}{column.name}": value})


def _refuse_markers(values: Any, where: str) -> None:
    """Refuse texts that OmegaConf would replace: from the environment, or as missing."""
    if isinstance(values, Mapping):
        for key, value in values.items():
            _refuse_markers(value, f"{where}{key}.")
    elif isinstance(values, list | tuple):
        for value in values:
            _refuse_markers(value, where)
    elif isinstance(values, str) and ("${" in values or values == "???"):
        raise UserError(f"{where.rstrip('.')}={values}: texts with ${{...}} and ??? are not replaced; write the value")


@contextmanager
def explained(prefix: str = "", known: Sequence[str] = ()) -> Iterator[None]:
    """Turn OmegaConf's errors inside the context into a UserError of one line, with suggestions from ``known``."""
    try:
        yield
    except ConfigKeyError as error:
        raise unknown("setting", f"{prefix}{error.full_key}", [prefix + key for key in known]) from error
    except (OmegaConfBaseException, yaml.YAMLError, TypeError, ValueError, AttributeError, OverflowError) as error:
        said = str(error).split("\n")[0]
        key = getattr(error, "full_key", None)
        raise UserError(f"{prefix}{key}: {said}" if key else said) from error


def read_yaml(text: str, title: str) -> dict[str, Any]:
    """Read a YAML text that holds a mapping; an empty text gives an empty one.

    Raises:
        UserError: the text of ``title`` is no YAML, holds no mapping, or a key twice.
    """
    try:
        content = OmegaConf.to_container(OmegaConf.create(text)) if text.strip() else {}
    except (OmegaConfBaseException, yaml.YAMLError, RecursionError) as error:
        raise UserError(f"{title} is no valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise UserError(f"{title} holds no mapping; expected keys with their values")
    return {str(key): value for key, value in content.items()}


# Checks of keywords: each takes one keyword by its name and gives its value back.


def positive(**keyword: Number) -> Number:
    """Check that a number is above 0."""
    return _checked(keyword, lambda value: value > 0, "a number above 0")


def not_negative(**keyword: Number) -> Number:
    """Check that a number is 0 or above."""
    return _checked(keyword, lambda value: value >= 0, "a number from 0")


def at_least(lowest: Number, **keyword: Number) -> Number:
    """Check that a number is ``lowest`` or above."""
    return _checked(keyword, lambda value: value >= lowest, f"a number from {lowest}")


def share(**keyword: float) -> float:
    """Check that a number is from 0 to 1."""
    return _checked(keyword, lambda value: 0 <= value <= 1, "a share from 0 to 1")


def fraction(**keyword: float) -> float:
    """Check that a number is from 0 to below 1."""
    return _checked(keyword, lambda value: 0 <= value < 1, "a number from 0 to below 1")


def between(lowest: Number, highest: Number, **keyword: Number) -> Number:
    """Check that a number is from ``lowest`` to ``highest``."""
    return _checked(keyword, lambda value: lowest <= value <= highest, f"a number from {lowest} to {highest}")


def matching(pattern: str, expected: str, **keyword: str) -> str:
    """Check that a whole text matches a regular expression; ``expected`` says in words what it allows."""
    ((name, value),) = keyword.items()
    if not re.fullmatch(pattern, value):
        raise UserError(f"{name}={value}: expected {expected}")
    return value


def rising(check: Callable[..., Any], *arguments: Any, **keyword: Sequence[Any]) -> tuple[Any, ...]:
    """Apply one of the checks above to each of several values, none below the one before; there may be none."""
    ((name, values),) = keyword.items()
    checked = tuple(check(*arguments, **{name: value}) for value in values)
    if any(one > two for one, two in pairwise(checked)):
        raise UserError(f"{name}={list(values)}: expected values in rising order")
    return checked


def odd(**keyword: int) -> int:
    """Check that a whole number is odd and above 0."""
    return _checked(keyword, lambda value: value >= 1 and value % 2 == 1, "an odd number from 1")


def one_of(choices: Collection[str], **keyword: str) -> str:
    """Check that a word is one of ``choices``; the error suggests the nearest."""
    ((name, value),) = keyword.items()
    if value not in choices:
        raise unknown(name, value, choices)
    return value


def each(check: Callable[..., Any], *arguments: Any, **keyword: Sequence[Any]) -> tuple[Any, ...]:
    """Apply one of the checks above to each of several values; there must be at least one."""
    ((name, values),) = keyword.items()
    if not len(values):
        raise UserError(f"{name}=(): expected at least one value")
    return tuple(check(*arguments, **{name: value}) for value in values)


def _checked(keyword: dict[str, Any], holds: Callable[[Any], bool], expected: str) -> Any:
    ((name, value),) = keyword.items()
    finite = isinstance(value, int) or (isinstance(value, float) and math.isfinite(value))
    if not (finite and holds(value)):
        raise UserError(f"{name}={value}: expected {expected}")
    return value


@cache
def _schema(factory: Callable[..., Any]) -> type:
    """Make the dataclass whose fields are the keyword-only arguments of ``factory``."""
    columns: list[Any] = []
    for parameter in inspect.signature(factory, eval_str=True).parameters.values():
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY:
            if parameter.default is inspect.Parameter.empty or parameter.annotation is inspect.Parameter.empty:
                raise UserError(
                    f"keyword '{parameter.name}' needs a type and a default, since the constructor's keywords are "
                    "the configuration"
                )
            columns.append((parameter.name, parameter.annotation, _always(parameter.default)))
    return make_dataclass("Keywords", columns)


_structured = cache(OmegaConf.structured)  # which merging copies


def _always(value: Any) -> Any:
    """Make a dataclass field with this default, which may be a list."""
    return field(default_factory=lambda: value)


def _keys(schema: type, prefix: str = "") -> Iterator[str]:
    for column in fields(schema):
        yield prefix + column.name
        if column.default_factory is not MISSING and is_dataclass(column.default_factory):
            yield from _keys(column.default_factory, f"{prefix}{column.name}.")
