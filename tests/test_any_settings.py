"""Whatever is set, a run is made or one line says what is wrong with it."""

from contextlib import suppress
from dataclasses import fields, is_dataclass

import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from kdzoo.errors import UserError
from kdzoo.resolve import resolve
from kdzoo.settings import Place, Settings

BASE = {"distiller": {"name": "kd"}, "student": {"name": "resnet8"}, "teacher": {"name": "resnet14"}}


def keys_of(schema, prefix=""):
    """All keys of a dataclass's fields, with those inside of them."""
    for column in fields(schema):
        default = column.default_factory() if callable(column.default_factory) else column.default
        if is_dataclass(default):
            yield from keys_of(type(default), f"{prefix}{column.name}.")
        else:
            yield prefix + column.name


# Not those that name files and folders: what is read from there is another test's.
KEYS = sorted({*keys_of(Settings), *keys_of(Place)} - {"distiller.keywords", "data.name", "protocol.name"})
NUMBERS = st.one_of(
    st.integers(-(10**20), 10**20),
    st.floats(),
    st.sampled_from([0, -1, 1, 2, 1e9, -0.1, float("nan"), float("inf"), 10**20]),
)
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
WORDS = st.one_of(
    st.sampled_from(["???", "${x}", "${oc.env:HOME}", "null", "true", "[]", "{}", "[1", "!!x", "a: b", "~"]), TEXTS
)
PLAIN = st.one_of(st.none(), st.booleans(), NUMBERS, WORDS)
VALUES = st.recursive(PLAIN, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=2))


def one_line_or_a_run(values, overrides):
    with suppress(UserError):
        resolve(values, overrides)


@given(key=st.sampled_from(KEYS), value=st.one_of(NUMBERS, WORDS))
@example(key="protocol.batch_size", value=10**20)
@example(key="engine.threads", value=100000)
@example(key="student.name", value="???")
@example(key="protocol.augmentation", value="5")
@settings(max_examples=300, deadline=None, derandomize=True)
def test_any_text_for_any_key_of_the_command_line(key, value):
    one_line_or_a_run(BASE, [f"{key}={value}"])


@given(key=st.sampled_from(KEYS), value=VALUES)
@settings(max_examples=300, deadline=None, derandomize=True)
def test_any_value_for_any_key_from_python_or_a_suite(key, value):
    *sections, last = key.split(".")
    values = {name: dict(section) for name, section in BASE.items()}
    inner = values
    for name in sections:
        inner = inner.setdefault(name, {})
    inner[last] = value
    one_line_or_a_run(values, [])


@given(
    recipe=st.dictionaries(st.sampled_from([*keys_of(Settings().protocol.__class__), "unheard"]), VALUES, max_size=4)
)
@settings(max_examples=150, deadline=None, derandomize=True)
def test_any_recipe_in_a_file(tmp_path_factory, recipe):
    file = tmp_path_factory.mktemp("recipes") / "mine.yaml"
    file.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    one_line_or_a_run({**BASE, "protocol": {"name": str(file), "epochs": 3}}, [])


@given(content=st.binary(max_size=64))
@example(content="epochs: 3 # é".encode("latin-1"))
@example(content="epochs: 3".encode("utf-16"))
@settings(max_examples=100, deadline=None, derandomize=True)
def test_any_bytes_in_the_file_of_a_recipe(tmp_path_factory, content):
    file = tmp_path_factory.mktemp("recipes") / "mine.yaml"
    file.write_bytes(content)
    one_line_or_a_run({**BASE, "protocol": {"name": str(file)}}, ["protocol.epochs=3"])


@given(text=st.text(max_size=20))
@settings(max_examples=200, deadline=None, derandomize=True)
def test_any_text_as_an_override(text):
    one_line_or_a_run(BASE, [text])
