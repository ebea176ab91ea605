"""Several teachers as settings: what is refused, what makes another run, and what the run is called."""

import sys

import pytest
import yaml
from torch import nn

import kdzoo
from kdzoo.cli import main
from kdzoo.errors import UserError
from kdzoo.experiments import suites
from kdzoo.naming import names_of
from kdzoo.resolve import files_by_part, resolve, several, stored
from kdzoo.results import published
from kdzoo.store.folder import RunFolder
from kdzoo.store.trust import check_code

from .made_runs import write

BASE = {"distiller": {"name": "kd"}, "student": {"name": "resnet8"}}
OTHER = "teacher.others=[{name: resnet20}]"


def resolved(*overrides, teacher="resnet14"):
    return resolve({**BASE, "teacher": {"name": teacher}}, overrides)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        (
            "teacher.others=[{naem: resnet20}]",
            "unknown setting 'teacher.others.naem'; did you mean teacher.others.name",
        ),
        ("teacher.others=[{name: resnet20, others: []}]", "unknown setting 'teacher.others.others'"),
        ("teacher.others=[{weights: a.pth}]", "expected a name in each, such as {name: resnet56}"),
        ("teacher.others=[{name: null}]", "teacher.others.name"),
        ("teacher.others=[resnet20]", "['resnet20']: expected a list of teachers, such as [{name: resnet56}]"),
        ("teacher.others=resnet20", "expected a list of teachers"),
        ("teacher.others=null", "expected a list of teachers"),
        ("teacher.others=[null]", "expected a list of teachers"),
        ("teacher.others.0.name=resnet20", "expected a list of teachers"),
        ("teacher.others=[{name: resnet20, lr: -1}]", "teacher.others.lr=-1.0: expected a number above 0"),
        ("teacher.others=[{name: resnet20, finetune: true}]", "teacher.others.finetune=true: expected weights"),
        ("teacher.others=[{name: a, weights: b, pretrained: true}]", "teacher.others.pretrained=true are both set"),
        ("teacher.others=[{name: a, options: {mean: 1}}]", "teacher.others.options.mean is no keyword to set"),
        ("teacher.features=resnt14", "unknown teacher.features 'resnt14'; did you mean resnet14"),
        ("teacher.features=turn", "did you mean turns"),
        ("teacher.combine=sum", "expected one of ['probabilities', 'logits', 'learned']"),
        ("protocol.teacher_view=week", "expected one of ['same', 'plain', 'weak', 'strong']"),
    ],
)
def test_a_wrong_setting_of_several_teachers_is_one_line(override, said):
    with pytest.raises(UserError) as caught:
        resolved(override)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_further_teachers_without_a_first_are_refused():
    with pytest.raises(UserError, match=r"teacher\.others names further teachers, and teacher\.name none"):
        resolved(OTHER, teacher=None)


def test_an_empty_name_is_one_line():
    with pytest.raises(UserError, match=r"teacher\.name is empty: expected the name of a network, or null for none"):
        resolved(teacher="")


class Made(Exception):
    """The run that a command would train."""


@pytest.fixture
def command(tmp_path, monkeypatch):
    """The teachers of the run that ``kdzoo run`` with a file of settings and these words would train."""
    file = tmp_path / "mine.yaml"
    teacher = {"name": "resnet14", "others": [{"name": "resnet20"}], "epochs": 7}
    file.write_text(yaml.safe_dump({**BASE, "teacher": teacher}))

    def stop(run, fresh):
        raise Made(run)

    def command(*words):
        monkeypatch.setattr("kdzoo.experiments.run.execute", stop)
        monkeypatch.setattr(sys, "argv", ["kdzoo", "run", "--config", str(file), *words])
        with pytest.raises(Made) as caught:
            main()
        return caught.value.args[0].settings.teacher

    return command


def test_teachers_of_the_command_stand_in_for_all_of_the_file(command):
    assert (command().title, command().epochs) == ("resnet14+resnet20", 7)
    assert command("--teacher", "resnet14").title == "resnet14"
    assert command("--teacher", "resnet8").title == "resnet8"
    both = command("--teacher", "resnet14", "--teacher", "resnet8", "--teacher-weights", "a", "--teacher-weights", "b")
    assert [(part.name, part.weights) for part in both.parts] == [("resnet14", "a"), ("resnet8", "b")]
    assert command("--teacher", "resnet14", "teacher.others=[{name: resnet8}]").title == "resnet14+resnet8"


def test_weights_beside_a_file_of_several_teachers_say_whose_they_are(command, capsys):
    with pytest.raises(SystemExit):
        command("--teacher-weights", "a")
    assert "--teacher-weights does not say whose weights it gives" in capsys.readouterr().err


def test_weights_are_given_for_each_teacher_or_for_none():
    assert several(["a", "b"], ["x", "y"]) == {
        "name": "a",
        "weights": "x",
        "others": [{"name": "b", "weights": "y"}],
    }
    assert several(["a", "b"]) == {"name": "a", "others": [{"name": "b"}]}
    assert (several([], ["x"]), several([])) == ({"weights": "x"}, {})
    for names, weights in ((["a", "b"], ["x"]), (["a"], ["x", "y"]), ([], ["x", "y"])):
        with pytest.raises(UserError, match="give weights for each, in the order of the teachers, or for none"):
            several(names, weights)


@pytest.mark.parametrize(("names", "weights"), [([], [""]), (["a"], [""]), (["a", "b"], ["x", ""])])
def test_an_empty_name_of_weights_is_refused_and_trains_no_teacher(names, weights):
    with pytest.raises(UserError, match="--teacher-weights is empty; expected a file or a folder, or leave it out"):
        several(names, weights)


def test_what_a_further_teacher_leaves_out_of_its_training_is_as_of_the_first():
    first, second, third = resolved(
        "teacher.epochs=7",
        "teacher.lr=0.3",
        "teacher.image_size=16",
        "teacher.others=[{name: resnet20}, {name: resnet8, epochs: 9, seed: 4}]",
    ).settings.teacher.parts
    assert (second.name, second.epochs, second.lr, second.seed) == ("resnet20", 7, 0.3, 0)
    assert (third.name, third.epochs, third.lr, third.seed) == ("resnet8", 9, 0.3, 4)
    assert (first.image_size, second.image_size) == (16, None)  # what it reads is its own
    assert first == resolved("teacher.epochs=7", "teacher.lr=0.3", "teacher.image_size=16").settings.teacher


def test_other_teachers_or_another_way_to_answer_make_another_run():
    both = [OTHER], [OTHER, "teacher.combine=logits"], [OTHER, "teacher.features=turns"]
    every = [(), *both, ["teacher.others=[{name: resnet20, seed: 1}]"], [OTHER, "protocol.teacher_view=weak"]]
    assert len({resolved(*overrides).settings.identity() for overrides in every}) == len(every)
    said = "teacher.others=[{name: resnet20, pretrained: false, seed: null, options: {}}]"  # which are the defaults
    assert resolved(said).settings == resolved(OTHER).settings


@pytest.mark.parametrize("override", ["teacher.combine=learned", "teacher.features=turns", "teacher.features=resnet14"])
def test_how_several_answer_means_nothing_for_one_teacher(override):
    assert resolved(override).settings == resolved().settings


def test_what_is_written_down_is_read_again_as_it_was():
    run = resolved(
        "teacher.others=[{name: resnet20, options: {drop_rate: 0.1}, mean: [0.5]}]", "teacher.features=turns"
    )
    assert stored(yaml.safe_load(yaml.safe_dump(run.plain()))) == run


def test_a_run_is_called_by_all_its_teachers():
    settings = resolved(OTHER, "teacher.combine=logits").settings
    assert names_of(settings).teacher == "resnet14 + resnet20 (combine=logits)"
    assert settings.teacher.title == "resnet14+resnet20"
    assert "resnet14-resnet20" in RunFolder.of(resolved(OTHER)).path.name
    apart = resolved("teacher.epochs=3", "teacher.others=[{name: resnet20, seed: 1}]").settings
    assert names_of(apart).teacher == "resnet14 (epochs=3) + resnet20 (epochs=3, seed=1)"
    assert names_of(resolved().settings).teacher == "resnet14"


def test_nothing_is_published_of_several_teachers():
    pair = {"data": "cifar100", "protocol": "crd", "student": "resnet8x4", "method": "kd", "epoch": "last"}
    assert published.find(**pair, teacher="resnet32x4") is not None
    for teacher in ("resnet32x4 + resnet56", "resnet32x4 + resnet32x4", "resnet32x4 + resnet56 (combine=logits)"):
        assert published.find(**pair, teacher=teacher) is None


def test_keywords_that_are_usual_for_a_pair_are_not_those_for_several_teachers():
    crd = {"data": {"name": "cifar100"}, "protocol": {"name": "crd"}, "student": {"name": "wrn_16_2"}}
    beta = [
        resolve({**crd, "distiller": {"name": "dkd"}, "teacher": several(names)}, fingerprint="").settings.distiller
        for names in (["wrn_40_2"], ["wrn_40_2", "resnet56"])
    ]
    assert beta[0] != beta[1] == resolve({**BASE, "distiller": {"name": "dkd"}}).settings.distiller


def test_weights_of_a_further_teacher_are_part_of_what_a_run_is(tmp_path):
    file = tmp_path / "other.pth"
    file.write_bytes(b"one")
    override = f"teacher.others=[{{name: resnet20, weights: {file}}}]"
    run = resolved(override)
    assert files_by_part(run.settings)["teacher"] == {str(file): file}
    file.write_bytes(b"another")
    assert resolved(override).settings.identity() != run.settings.identity()


def test_code_of_a_further_teacher_is_refused_as_that_of_the_first(tmp_path):
    folder = write(tmp_path, 80.0, 0, "teacher.others=[{name: resnet20}]")
    folder.config.write_text(folder.config.read_text().replace("resnet20", "os:abort"))
    with pytest.raises(UserError, match="names code that would run here: os:abort"):
        folder.run()
    config = folder.read_config()
    with pytest.raises(UserError, match="os:abort"):
        check_code(config, folder.path, tmp_path)
    check_code(config, folder.path, tmp_path, parts=("student",))  # which uses no teacher


@pytest.mark.parametrize("others", ["[resnet20]", "resnet20", "[[name]]", "null", "3"])
def test_a_damaged_list_of_teachers_is_one_line(tmp_path, others):
    folder = write(tmp_path, 80.0, 0)
    folder.config.write_text(folder.config.read_text().replace("others: []", f"others: {others}"))
    with pytest.raises(UserError, match=r"is damaged \(teacher\.others is no list of teachers\)") as caught:
        folder.run()
    assert "\n" not in str(caught.value)
    assert len(kdzoo.table(tmp_path, "kd")) == 1  # which reads the result


def test_a_pair_of_a_suite_may_name_several_teachers(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text(
        "pairs: [[resnet14, resnet8], [[resnet14, resnet20], resnet8]]\ndistillers: [kd]\nseeds: [0]\n"
        "teacher: {combine: logits, epochs: 3}\n"
    )
    one, both = (run.settings.teacher for run in suites.load(str(file)).runs)
    assert (one.title, one.combine) == ("resnet14", "probabilities")
    assert (both.title, both.combine) == ("resnet14+resnet20", "logits")
    assert [part.epochs for part in both.parts] == [3, 3]


@pytest.mark.parametrize("pair", ["[[], resnet8]", "[[resnet14, 3], resnet8]", "[['', resnet14], resnet8]"])
def test_a_list_without_names_is_no_pair(tmp_path, pair):
    file = tmp_path / "bad.yaml"
    file.write_text(f"pairs: [{pair}]\ndistillers: [kd]\n")
    with pytest.raises(UserError, match="is no pair"):
        suites.load(str(file))


def test_an_unknown_teacher_of_a_suite_gets_the_nearest(tmp_path):
    file = tmp_path / "bad.yaml"
    file.write_text("pairs: [[[resnet14, resnet200x], resnet8]]\ndistillers: [kd]\n")
    with pytest.raises(UserError, match="unknown model 'resnet200x'; did you mean"):
        suites.load(str(file))


@pytest.mark.parametrize("teacher", [3, nn.Linear(2, 2), [None, "resnet8"], [["resnet8"]]])
def test_a_teacher_that_is_no_name_is_one_line(teacher):
    for asked in (lambda: kdzoo.run("kd", "resnet8", teacher), lambda: kdzoo.recommend(teacher, "resnet8")):
        with pytest.raises(UserError, match=r"teacher is of type \w+; expected a name or a list of names") as caught:
            asked()
        assert "\n" not in str(caught.value)
