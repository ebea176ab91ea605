"""Whatever is set, a run is made or one line says what is wrong with it."""

import io
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import fields, is_dataclass
from tempfile import TemporaryDirectory

import click
import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from kdzoo import registry
from kdzoo.cli import cli, main
from kdzoo.engine.device import resolve_auto
from kdzoo.errors import UserError
from kdzoo.resolve import distiller_settings, resolve
from kdzoo.settings import Place, Settings
from kdzoo.store.folder import RunFolder

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
    one_line_or(lambda: resolve(values, overrides))


def one_line_or(make):
    said = ""
    try:
        make()
    except UserError as error:
        said = str(error)
    assert "$VALUE" not in said


@pytest.mark.slow(reason="tries many texts")
@given(key=st.sampled_from(KEYS), value=st.one_of(NUMBERS, WORDS))
@example(key="protocol.batch_size", value=10**20)
@example(key="protocol.milestones", value="[x]")
@example(key="teacher.weights", value="~no-such-user-here/x.pt")
@example(key="output.root", value="~no-such-user-here")
@example(key="data.classes", value="x" * 300)
@example(key="engine.threads", value=100000)
@example(key="student.name", value="???")
@example(key="protocol.augmentation", value="5")
@settings(max_examples=300, deadline=None, derandomize=True)
def test_any_text_for_any_key_of_the_command_line(key, value):
    one_line_or_a_run(BASE, [f"{key}={value}"])


@pytest.mark.slow(reason="tries hundreds of values")
@given(key=st.sampled_from(KEYS), value=VALUES)
@example(key="output.log", value=[[]])
@example(key="output.log", value=["mlflow", {"mlflow": 1}])
@settings(max_examples=300, deadline=None, derandomize=True)
def test_any_value_for_any_key_from_python_or_a_suite(key, value):
    *sections, last = key.split(".")
    values = {name: dict(section) for name, section in BASE.items()}
    inner = values
    for name in sections:
        inner = inner.setdefault(name, {})
    inner[last] = value
    one_line_or_a_run(values, [])


@pytest.mark.slow(reason="tries hundreds of values")
@given(
    recipe=st.dictionaries(st.sampled_from([*keys_of(Settings().protocol.__class__), "unheard"]), VALUES, max_size=4)
)
@settings(max_examples=150, deadline=None, derandomize=True)
def test_any_recipe_in_a_file(tmp_path_factory, recipe):
    file = tmp_path_factory.mktemp("recipes") / "mine.yaml"
    file.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    one_line_or_a_run({**BASE, "protocol": {"name": str(file), "epochs": 3}}, [])


@pytest.mark.slow(reason="tries hundreds of values")
@given(content=st.binary(max_size=64))
@example(content="epochs: 3 # é".encode("latin-1"))
@example(content="epochs: 3".encode("utf-16"))
@settings(max_examples=100, deadline=None, derandomize=True)
def test_any_bytes_in_the_file_of_a_recipe(tmp_path_factory, content):
    file = tmp_path_factory.mktemp("recipes") / "mine.yaml"
    file.write_bytes(content)
    one_line_or_a_run({**BASE, "protocol": {"name": str(file)}}, ["protocol.epochs=3"])


@pytest.mark.slow(reason="tries hundreds of values")
@given(text=st.text(max_size=20))
@settings(max_examples=200, deadline=None, derandomize=True)
def test_any_text_as_an_override(text):
    one_line_or_a_run(BASE, [text])


def keywords_of(name):
    return distiller_settings({"name": name}).keywords


KEYWORDS = sorted((name, keyword) for name in registry.names() for keyword in keywords_of(name))


@pytest.mark.slow(reason="tries hundreds of values")
@given(keyword=st.sampled_from(KEYWORDS), value=VALUES)
@settings(max_examples=300, deadline=None, derandomize=True)
def test_any_value_for_any_keyword_of_any_method(keyword, value):
    method, name = keyword
    one_line_or(lambda: distiller_settings({"name": method, name: value}))


@pytest.mark.parametrize("method", registry.names())
def test_no_number_of_a_method_is_infinite_and_no_weight_negative(method):
    found = keywords_of(method)
    assert distiller_settings({"name": method, **found}).keywords == found  # so that what is refused is the number
    weights = [name for name in ("ce", "kd", method) if name in found]
    numbers = [name for name, value in found.items() if type(value) is float]
    for name, value in [
        *((n, v) for n in numbers for v in (float("nan"), float("inf"))),
        *((n, -1.0) for n in weights),
    ]:
        with pytest.raises(UserError, match=f"{name}={value}: expected"):
            distiller_settings({"name": method, **found, name: value})


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("protocol.milestones=3", r"^protocol\.milestones: expected a list in square brackets, such as \[1, 2\]$"),
        (
            "protocol.augmentation.resized_crop=true",
            r"^protocol\.augmentation\.resized_crop: expected a list in square brackets, such as",
        ),
        ("protocol.lr_of=3", r"^protocol\.lr_of: expected keys with their values, such as \{key: 1\}$"),
        ("protocol.milestones=[x]", r"protocol\.milestones=\['x'\]: a value in it is no whole number"),
        ("protocol.lr_of={resnet8: -1}", r"protocol\.lr_of\.resnet8=-1.0: expected a number above 0"),
        ("data.exif=5", r"data\.exif=5: expected true or false"),
        ("student.std=[1,2]", r"student\.std=\[1.0, 2.0\]: expected three values"),
        ("protocol.warmup=1e20", r"protocol\.warmup=1e\+20: expected a number from 0 to 1000000"),
        ("protocol.augmentation.rand_augment=rand-n99999", r"rand_augment=rand-n99999: expected timm's notation"),
        ("student.name=???", r"student\.name=\?\?\?: texts with"),
        ("engine.device=cpu:5", r"no device cpu:5"),
        ("distiller.kd=-1", r"distiller kd: kd=-1\.0: expected a number from 0"),
        ("teacher.weights=~no-such-user-here/x.pt", "~no-such-user-here/x.pt: there is no such user"),
        ("output.root=" + "x" * 300, r"x{40}\.\.\.x{40} can be no path; expected names of at most 255 bytes"),
    ],
)
def test_what_means_nothing_is_refused_by_its_name(override, said):
    with pytest.raises(UserError, match=said):
        RunFolder.of(resolve_auto(resolve(BASE, [override])))


def options_of(command):
    return [option.opts[0] for option in command.params if isinstance(option, click.Option) and not option.hidden]


COMMANDS = sorted((name, option) for name, command in cli.commands.items() for option in options_of(command))
ARGUMENTS = {"run": [], "bench": ["digits"], "list": ["data"]}


@pytest.mark.slow(reason="tries hundreds of values")
@given(
    command=st.sampled_from(COMMANDS), value=st.one_of(NUMBERS.map(str), WORDS.filter(lambda text: "\0" not in text))
)
@example(command=("bench", "--seeds"), value="100000")
@example(command=("bench", "--out"), value="~no-such-user-here")
@example(command=("run", "--student"), value=":a")
@example(command=("run", "--student"), value=".a:b")
@settings(max_examples=100, deadline=None, derandomize=True)
def test_any_text_for_any_option_of_any_command(command, value):
    name, option = command
    usual = ["--distiller=kd", "--student=resnet8", "--teacher=resnet14"] if name == "run" else []
    code, said = called(name, *ARGUMENTS.get(name, ["/nowhere"]), *usual, f"{option}={value}")
    assert code in (0, 2)
    assert "Traceback" not in said
    assert code == 0 or said.splitlines()[-1].startswith("error: ")


def test_a_command_that_ends_in_a_traceback_would_be_seen(monkeypatch):
    monkeypatch.setattr("kdzoo.resolve.resolve", None)
    with pytest.raises(TypeError):
        called("run", "--distiller=kd", "--student=resnet8")


def called(*arguments):
    """Call the command line up to where training would begin: its exit code, and what it says to the standard error."""

    def no_training(*_, **__):
        raise UserError("training begins")

    said = io.StringIO()
    with (
        TemporaryDirectory() as folder,
        pytest.MonkeyPatch.context() as patch,
        redirect_stderr(said),
        redirect_stdout(io.StringIO()),
    ):
        patch.chdir(folder)  # some of these texts are folders to write in
        patch.setattr(sys, "argv", ["kdzoo", *arguments])
        patch.setattr("kdzoo.experiments.run.execute", no_training)
        patch.setattr("kdzoo.experiments.bench.work_through", no_training)
        with pytest.raises(SystemExit) as ended:
            main()
    return ended.value.code, said.getvalue()
