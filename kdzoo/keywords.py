"""Signatures as configuration: typed values from YAML and ``key=value``, and checks of keywords with one wording."""

import inspect
import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import MISSING, field, fields, is_dataclass, make_dataclass
from functools import cache, partial
from io import StringIO
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

from kdzoo.errors import UserError, told, unknown

Number = TypeVar("Number", int, float)
SETTABLE = "bool, int, float, str, Literal[...], or a list, tuple or dict of them"
NO_NUMBER = r"(?:Value )?(.*?)(?: of type '\w+')? could not be converted to (Integer|Float)"  # as OmegaConf says it
NUMBERS = {"Integer": "whole number", "Float": "number"}
PLAIN = {  # parts of OmegaConf's messages that name its own types, and what is said instead
    " is not a TupleConfig, ListConfig": "expected a list in square brackets, such as [1, 2]",
    " of type 'ListConfig'": "expected one value, not a list",
    "Cannot convert 'ListConfig'": "expected one value, not a list",
    "Cannot convert 'DictConfig'": "expected one value, not keys with values",
    " of type 'DictConfig'": "expected one value, not keys with values",
    " to Dict[": "expected keys with their values, such as {key: 1}",
    " is not a valid bool": "expected true or false",
    "Incompatible value 'None'": "expected a value",
    "Unexpected type annotation": f"its type can be no setting; expected {SETTABLE}",
}


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
    values: dict[str, Any] = vars(typed(_schema(factory), given, prefix))
    for name, value in values.items():
        if strange := _not_plain(value):
            raise UserError(f"{prefix}{name} is of type {strange}, which can be no setting; expected {SETTABLE}")
    return values


def _not_plain(value: Any) -> str:
    """Name the type of the first part of a value that YAML and JSON cannot hold as it is; empty where they can."""
    if isinstance(value, dict | list | tuple):
        parts = [*value, *value.values()] if isinstance(value, dict) else value
        return next(filter(None, map(_not_plain, parts)), "")
    return "" if value is None or type(value) in (bool, int, float, str) else type(value).__name__


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
    given = schema, repr(values), prefix
    if given not in _typed:
        _typed[given] = _made(schema, values, prefix, also)
    return deepcopy(_typed[given])


_typed: dict[tuple[type, str, str], Any] = {}  # what was made before: the runs of a suite differ in little


def _made(schema: type, values: Mapping[str, Any], prefix: str, also: type | None) -> Any:
    refuse_markers(values, prefix)
    with explained(prefix, [key for known in (schema, also) if known for key in _keys(known)]):
        merge = partial(_merge, schema)
        try:
            made = OmegaConf.to_object(merge(values))
        except OmegaConfBaseException as error:
            error.full_key = error.full_key or _misfit(merge, values)
            raise
    _check_fields(made, values, prefix)
    return made


def _merge(schema: type, values: Mapping[str, Any]) -> Any:
    return OmegaConf.merge(_structured(schema), OmegaConf.create(dict(values)))


def _misfit(merge: Callable[[Mapping[str, Any]], object], values: Mapping[str, Any], prefix: str = "") -> str:
    """Find the key whose value does not fit, which OmegaConf does not name where that is an element of a list."""
    for key, value in values.items():
        try:
            merge({key: value})
        except OmegaConfBaseException:
            inner = value if isinstance(value, Mapping) else {}
            deeper = _misfit(lambda part, key=key: merge({key: part}), inner, f"{prefix}{key}.")  # type: ignore[misc]
            return deeper or f"{prefix}{key}={value}"
    return ""


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested settings by their full keys, such as ``protocol.lr``."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return found


def setting(default: Any, means: str, check: Callable[..., Any] | None = None, *arguments: Any) -> Any:
    """Declare a dataclass's field with its default, its meaning, and a check that ``typed`` applies to all but None.

    Args:
        default: the default; ``dict`` for an empty one.
        means: what the field is, as ``kdzoo list settings`` prints it.
        check: one of the checks below, which takes ``arguments`` and one keyword.
        arguments: such as the bounds of ``between``.
    """
    metadata = {"means": means} | ({} if check is None else {"check": partial(check, *arguments)})
    return (
        field(default_factory=dict, metadata=metadata) if default is dict else field(default=default, metadata=metadata)
    )


def described(schema: type, prefix: str = "") -> Iterator[tuple[str, Any, str]]:
    """List the fields of a dataclass that ``setting`` declared, with their defaults and meanings, also nested ones."""
    made = schema()
    for column in fields(schema):
        value = getattr(made, column.name)
        if is_dataclass(value):
            yield from described(type(value), f"{prefix}{column.name}.")
        elif "means" in column.metadata:
            yield f"{prefix}{column.name}", value, column.metadata["means"]


def _check_fields(made: Any, given: Any, prefix: str) -> None:
    """Check each field of ``made``, of which ``given`` holds the values before they were converted."""
    for column in fields(made):
        name, value = f"{prefix}{column.name}", getattr(made, column.name)
        raw = given.get(column.name) if isinstance(given, Mapping) else None
        if is_dataclass(value):
            _check_fields(value, raw, f"{name}.")
            continue
        if isinstance(value, bool) and isinstance(raw, int | float) and raw not in (0, 1):
            raise UserError(f"{name}={raw}: expected true or false")
        if "check" in column.metadata and value is not None:
            column.metadata["check"](**{name: value})
        _check_finite(value, name)


def _check_finite(value: Any, name: str) -> None:
    """Check the numbers in a value: none is infinite, and tensors can hold those that are whole."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            _check_finite(inner, f"{name}.{key}")
    elif isinstance(value, list | tuple):
        for inner in value:
            _check_finite(inner, name)
    elif isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{name}={value}: expected a finite number")
    elif isinstance(value, int) and abs(value) >= 2**63:
        raise UserError(f"{name}={value}: expected a number below 2^63")


def refuse_markers(values: Any, where: str) -> None:
    """Refuse texts that OmegaConf would replace: from the environment, or as missing."""
    if isinstance(values, Mapping):
        for key, value in values.items():
            refuse_markers(value, f"{where}{key}.")
    elif isinstance(values, list | tuple):
        for value in values:
            refuse_markers(value, where)
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
        said = str(error).split("\n")[0].replace("Value '$VALUE' of type '$VALUE_TYPE'", "a value in it")
        number = re.sub(NO_NUMBER, lambda found: f"{found[1]} is no {NUMBERS[found[2]]}", said)
        said = next((plain for theirs, plain in PLAIN.items() if theirs in said), number)
        key = getattr(error, "full_key", None)
        raise UserError(f"{prefix}{key}: {said}" if key else said) from error


def read_yaml(text: str, title: str) -> dict[str, Any]:
    """Read a YAML text that holds a mapping; an empty text gives an empty one.

    Raises:
        UserError: the text of ``title`` is no YAML, holds no mapping, or a key twice.
    """
    try:
        content = OmegaConf.to_container(OmegaConf.load(StringIO(text)))
    except (OmegaConfBaseException, yaml.YAMLError, RecursionError, ValueError) as error:
        raise UserError(f"{title} is no valid YAML: {' '.join(str(error).split())}") from error
    except OSError:  # OmegaConf's error for a single value, such as a number
        content = None
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


def by_name(check: Callable[..., Any], *arguments: Any, **keyword: Mapping[str, Any]) -> dict[str, Any]:
    """Apply one of the checks above to each value of a mapping; there may be none."""
    ((name, values),) = keyword.items()
    return {key: check(*arguments, **{f"{name}.{key}": value}) for key, value in values.items()}


def per_channel(check: Callable[..., Any], *arguments: Any, **keyword: Sequence[Any]) -> tuple[Any, ...]:
    """Apply one of the checks above to a value of each channel of an image, or to one value for all."""
    ((name, values),) = keyword.items()
    if len(values) not in (1, 3):
        raise UserError(f"{name}={list(values)}: expected three values, red, green and blue, or one for all")
    return tuple(check(*arguments, **{name: value}) for value in values)


def odd(**keyword: int) -> int:
    """Check that a whole number is odd and above 0."""
    return _checked(keyword, lambda value: value >= 1 and value % 2 == 1, "an odd number from 1")


def one_of(choices: Collection[str], **keyword: str) -> str:
    """Check that a word is one of ``choices``; the error suggests the nearest."""
    ((name, value),) = keyword.items()
    if not isinstance(value, str) or value not in choices:
        raise unknown(name, str(value), choices)
    return value


def some_of(choices: Collection[str], **keyword: Sequence[str]) -> tuple[str, ...]:
    """Check that each of several words is one of ``choices``, and none stands twice; there may be none."""
    ((name, values),) = keyword.items()
    words = tuple(one_of(choices, **{name: value}) for value in values)
    if len(set(words)) < len(words):
        raise UserError(f"{name}={list(values)}: expected each word once")
    return words


def switch_or_auto(**keyword: bool | str) -> bool | str:
    """Check that a switch is on, off or ``auto``."""
    ((name, value),) = keyword.items()
    if value not in (True, False, "on", "off", "auto"):
        raise UserError(f"{name}={value}: expected on, off or auto")
    return value


def name(**keyword: str | Path) -> str:
    """Check that a value is a name, or the path of a file; return it as a text."""
    [(key, given)] = keyword.items()
    if not isinstance(given, str | Path):
        kind = f"the class {given.__name__}" if isinstance(given, type) else f"of type {type(given).__name__}"
        raise UserError(f"{key} is {kind}; expected a name, or the path of a file, such as ./mine.py")
    return str(given)


def names(**keyword: str | Path | Sequence[str | Path]) -> tuple[str, ...]:
    """Check one name or path of a file, or a list of them; return all of them as texts."""
    [(key, given)] = keyword.items()
    found = (given,) if isinstance(given, str | Path) else given
    if not isinstance(found, list | tuple) or not all(isinstance(name, str | Path) for name in found):
        kind = type(given).__name__
        raise UserError(
            f"{key} is of type {kind}; expected a name or a list of names, such as 'package.module:factory' for a "
            "network of your own"
        )
    return tuple(map(str, found))


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


def parameters(factory: Callable[..., Any]) -> list[inspect.Parameter]:
    """List the arguments of ``factory`` with their types, also where these are written as texts.

    Raises:
        UserError: a type is not known.
    """
    try:
        return list(inspect.signature(factory, eval_str=True).parameters.values())
    except (NameError, SyntaxError, AttributeError) as error:
        raise UserError(f"the type of a keyword is not known ({told(error)}); import or correct it") from error


@cache
def _schema(factory: Callable[..., Any]) -> type:
    """Make the dataclass whose fields are the keyword-only arguments of ``factory``."""
    columns: list[Any] = []
    for parameter in parameters(factory):
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY:
            if parameter.default is inspect.Parameter.empty or parameter.annotation is inspect.Parameter.empty:
                raise UserError(
                    f"keyword '{parameter.name}' needs a type and a default, since the constructor's keywords are "
                    "the configuration"
                )
            columns.append((parameter.name, parameter.annotation, _always(parameter.default)))
        elif parameter.kind is parameter.POSITIONAL_OR_KEYWORD and parameter.default is not parameter.empty:
            raise UserError(
                f"keyword '{parameter.name}' can be given by its place; put a * before the keywords: (self, *, ...)"
            )
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
