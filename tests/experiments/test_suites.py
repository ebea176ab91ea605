"""A suite file is read whole, checked before anything is trained, and means the same runs each time."""

import functools
import re
from pathlib import Path

import pytest
import timm
import torch

from kdzoo import models, registry
from kdzoo.errors import UserError
from kdzoo.experiments import suites

from ..small_suites import QUICK


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("seed: [1]", "unknown key in suite bad 'seed'; did you mean seeds"),
        ("pairs: [[resnet14, resnet8, resnet8]]", "is no pair"),
        ("pairs: [resnet8]", "resnet8 is no pair"),
        ("pairs: [[resnet14, 8]]", "is no pair"),
        ("pairs: [[resnet14, resnet81]]", "unknown model 'resnet81'; did you mean resnet8"),
        ("pairs: [[torchvision:resnet188, resnet8]]", "unknown torchvision model 'resnet188'; did you mean resnet18"),
        ("pairs: resnet8", "has no list of pairs"),
        ("distillers:", "has no list of distillers"),
        ("distillers: kd", "has no list of distillers"),
        ("distillers: [kdd]", "unknown distiller 'kdd'; did you mean kd"),
        ("distillers: [{name: kd, temp: 1}]", "distiller.temp"),
        ("distillers: [{temperature: 1}]", "is no distiller"),
        ("distillers: [kd, kd]", "has a run twice"),
        ("pairs: [[resnet14, resnet8], {teacher: resnet14, student: resnet8}]", "has a run twice"),
        ("seeds: [0, 0]", "has a run twice"),
        ("data: [digits, digits]", "has a run twice"),
        ("seeds: 3", "has no list of seeds; expected one, such as seeds: [0, 1, 2]"),
        ("seeds: []", "has no list of seeds"),
        ("seeds: [one]", "seed"),
        (f"seeds: [{2**63}]", f"seed {2**63}: expected a whole number from 0 to {2**63 - 1}"),
        ("data: digit", "unknown data 'digit'; did you mean digits"),
        ("data: []", "[] is no data"),
        ("data: {name: bands, options: {lo: 1}}", "did you mean data.options.low"),
        ("protocol: quik", "unknown protocol 'quik'; did you mean quick"),
        ("protocol: [quick]", "is no protocol"),
        ("teacher: 30", "expected settings of it"),
        ("teacher: {name: resnet14}", "expected settings of it"),
        ("teacher: {epoch: 3}", "did you mean teacher.epochs"),
        ("pairs: [[resnet14, resnet8]]\npairs: [[resnet14, resnet14]]", "found duplicate key pairs"),
        ("pairs: [", "no valid YAML"),
    ],
)
def test_a_wrong_suite_is_one_line(tmp_path, text, said):
    file = tmp_path / "bad.yaml"
    sound = {"pairs": "pairs: [[resnet14, resnet8]]", "distillers": "distillers: [kd]"}
    rest = [line for key, line in sound.items() if not text.startswith(key)]
    file.write_text("\n".join([*rest, text]))
    with pytest.raises(UserError) as caught:
        suites.load(str(file))
    assert said in str(caught.value).replace(str(file), "bad")
    assert "\n" not in str(caught.value)


def test_a_file_of_a_method_that_is_named_by_two_paths_is_one_method(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("mine", "other"):
        Path(f"{name}.py").write_bytes(registry.find("kd").file.read_bytes())
    text = "pairs: [[resnet14, resnet8]]\ndistillers: [{}]"
    for again in ("./mine.py", str(tmp_path / "mine.py")):
        Path("bad.yaml").write_text(text.format(f"mine.py, {again}"))
        with pytest.raises(UserError, match=f"has a run twice: resnet14 -> resnet8, {re.escape(again)}"):
            suites.load("bad.yaml")
    Path("good.yaml").write_text(text.format("mine.py, ./other.py"))
    assert [run.settings.distiller.name for run in suites.load("good.yaml").runs] == ["mine.py", "./other.py"]


def test_runs_that_an_override_makes_alike_name_it(tmp_path):
    file = tmp_path / "two.yaml"
    file.write_text("pairs: [[resnet14, resnet8]]\ndistillers: [kd, {name: kd, temperature: 2.0}]")
    with pytest.raises(UserError, match=r"where distiller\.temperature=3 applies to every run; .* or that setting"):
        suites.load(str(file), overrides=["distiller.temperature=3"])


def test_a_suite_is_a_mapping(tmp_path):
    file = tmp_path / "bad.yaml"
    file.write_text("[1, 2]")
    with pytest.raises(UserError, match="holds no mapping"):
        suites.load(str(file))


def test_an_unknown_suite_gets_the_nearest(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yml").touch()
    for name, near in (("digit", "digits"), ("mine", r"mine\.yml\?")):
        with pytest.raises(UserError, match=f"did you mean {near}"):
            suites.load(name)


load = functools.cache(suites.load)


@functools.cache
def can_be_built(network):
    with torch.device("meta"):
        return timm.create_model(models.short_names().get(network, network), num_classes=7) is not None


@pytest.mark.parametrize("name", suites.shipped())
@pytest.mark.slow(reason="builds every network of every shipped suite")
def test_every_shipped_suite_is_valid_and_its_networks_can_be_built(name):
    runs = load(name).runs
    assert runs
    for network in {run.settings.student.name for run in runs} | {run.settings.teacher.name for run in runs} - {None}:
        assert can_be_built(network)


@pytest.mark.slow(reason="makes every run of the suites")
@pytest.mark.parametrize("name", [name for name in suites.shipped() if name not in ("bands", "controls", "heart")])
def test_the_suites_of_the_tables_stand_on_baselines_pairs_and_seeds(name):
    runs = load(name).runs
    assert {"none", "kd", "logitmse", "uhkd", "figkd", "lfcc"} <= {run.settings.distiller.name for run in runs}
    assert len({(run.settings.teacher.name, run.settings.student.name) for run in runs}) >= 2
    assert {run.settings.seed for run in runs} == {0, 1, 2}


@pytest.mark.parametrize("name", ["cifar100-hetero", "imagenet-hetero"])
def test_teachers_of_the_heterogeneous_suites_have_published_weights(name):
    names = {run.settings.teacher.name for run in load(name).runs}
    classes = {name: models.pretrained_classes(name) for name in names}
    assert all(classes.values())
    if name == "imagenet-hetero":
        assert set(classes.values()) == {1000}


def test_all_stands_for_every_method_that_is_installed(tmp_path):
    file = tmp_path / "every.yaml"
    file.write_text("pairs: [[resnet14, resnet8]]\ndistillers: all")
    runs = suites.load(str(file)).runs
    assert [run.settings.distiller.name for run in runs] == registry.names()


def test_seeds_of_the_command_replace_the_files(tmp_path, suite):
    assert {run.settings.seed for run in suites.load(str(tmp_path / "mine.yaml"), seeds=3).runs} == {0, 1, 2}


def test_a_suite_of_too_many_runs_is_refused_at_once(two, tmp_path):
    with pytest.raises(UserError, match=r"has 200,000 runs; expected at most 10,000: lower --seeds"):
        suites.load(two.file, seeds=100_000)


@pytest.mark.parametrize("seed", [0, 7])
def test_a_seed_among_the_settings_replaces_the_files(tmp_path, suite, seed):
    file = tmp_path / "mine.yaml"
    assert len(suites.load(str(file)).runs) > len(suites.load(str(file), overrides=[f"seed={seed}"]).runs)
    assert {run.settings.seed for run in suites.load(str(file), overrides=[f"seed={seed}"]).runs} == {seed}
    with pytest.raises(UserError, match=f"--seeds 2 and seed={seed}: expected one of them"):
        suites.load(str(file), seeds=2, overrides=[f"seed={seed}"])
    with pytest.raises(UserError, match="seed 'x': expected a whole number"):
        suites.load(str(file), overrides=["seed=x"])


def test_seeds_change_nothing_else_of_a_run(two, tmp_path):
    many = suites.load(two.file, seeds=3, overrides=QUICK).runs
    assert [run.settings.seed for run in many] == [0, 0, 1, 1, 2, 2]
    for run in many:
        again = suites.load(two.file, overrides=[*QUICK, f"seed={run.settings.seed}"]).runs
        assert run in again


@pytest.mark.parametrize("seed", ["-1", "0.5", "true", "x", str(2**63)])
def test_a_seed_is_a_whole_number(two, seed):
    Path(two.file).write_text(Path(two.file).read_text().replace("distillers:", f"seeds: [0, {seed}], distillers:"))
    with pytest.raises(UserError, match=r"seed .*: expected a whole number"):
        suites.load(two.file)


def test_a_seed_in_quotes_is_shown_with_its_quotes(two):
    Path(two.file).write_text(Path(two.file).read_text().replace("distillers:", "seeds: ['0'], distillers:"))
    with pytest.raises(UserError, match=r"seed '0': expected a whole number from 0 to \d+, written without quotes"):
        suites.load(two.file)


def test_a_pair_may_have_all_methods_as_a_suite_may(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("{pairs: [{teacher: resnet14, student: resnet8, distillers: all}], distillers: [none]}")
    assert [run.settings.distiller.name for run in suites.load(str(file)).runs] == registry.names()
