"""Settings are typed, complete, and wrong ones are refused with a helpful line."""

import csv
import subprocess
import sys
from dataclasses import FrozenInstanceError, fields, is_dataclass
from pathlib import Path

import pytest
import torch
import yaml

import kdzoo
from kdzoo import DataSpec, models, registry
from kdzoo.errors import UserError
from kdzoo.files import shipped_folder
from kdzoo.keywords import flat
from kdzoo.resolve import protocol_names, read_protocol, resolve, stored
from kdzoo.settings import DistillerSettings, Place, all_settings

BASE = {"distiller": {"name": "kd"}, "student": {"name": "resnet8"}}


def test_defaults_are_the_quick_protocol_on_digits():
    settings = resolve(BASE).settings
    assert (settings.data.name, settings.protocol.name, settings.seed) == ("digits", "quick", 0)


def test_a_methods_keywords_are_its_settings():
    method = resolve(BASE, ["distiller.temperature=2", "distiller.ce=0.5"]).settings.distiller
    assert method == DistillerSettings("kd", {"ce": 0.5, "kd": 0.9, "temperature": 2.0})


def test_overrides_win_over_the_protocols_file():
    settings = resolve({**BASE, "protocol": {"name": "crd"}}, ["protocol.lr=0.1"]).settings
    assert settings.protocol.lr == 0.1
    assert settings.protocol.augmentation.flip


@pytest.mark.parametrize("path", ["#1/best.pth", "runs #2/best.pth", "@home/best.pth", "&best.pth"])
def test_a_value_is_kept_whole_where_yaml_would_cut_it_or_refuse_it(path):
    assert resolve(BASE, [f"teacher.weights={path}"]).settings.teacher.weights == path
    assert resolve(BASE, [f"teacher.weights='{path}'"]).settings.teacher.weights == path


def test_milestones_and_warm_up_shrink_with_the_epochs():
    crd = {**BASE, "protocol": {"name": "crd"}}
    assert resolve(crd).settings.protocol.milestones == (150, 180, 210)
    assert resolve(crd, ["protocol.epochs=24"]).settings.protocol.milestones == (15, 18, 21)
    own = resolve(crd, ["protocol.epochs=24", "protocol.milestones=[20]"])
    assert own.settings.protocol.milestones == (20,)


@pytest.mark.parametrize("name", protocol_names())
def test_every_shipped_protocol_is_valid(name):
    assert read_protocol(name).name == name


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("protocol.epoch=3", "did you mean protocol.epochs"),
        ("distiller.temprature=3", "did you mean distiller.temperature"),
        ("distiller.name=kdd", "did you mean kd"),
        ("protocol.name=cdr", "did you mean crd"),
        ("sed=1", "did you mean seed"),
        ("epochs=3", "did you mean protocol.epochs or teacher.epochs"),
        ("temperature=4", "did you mean distiller.temperature?"),
        ("distiller.temprature=4", "did you mean distiller.temperature?"),
        ("engine.tread=3", "did you mean engine.threads?"),
        ("protocl.epochs=3", "did you mean protocol"),
        ("engine.xyzzy=3", "known: engine.accumulate, engine."),
        ("protocol.epochs=three", "protocol.epochs: 'three' is no whole number"),
        ("protocol.lr=x", "protocol.lr: 'x' is no number"),
        ("protocol.epochs=", "protocol.epochs: expected a value"),
        ("teacher.pretrained=maybe", "teacher.pretrained: expected true or false"),
        ("protocol.augmentation.flp=true", "protocol.augmentation.flip"),
        ("distiller.ce=much", "distiller.ce: 'much' is no number"),
        ("protocol.epochs=x", "protocol.epochs: 'x' is no whole number"),
        ("protocol.epochs=0", "protocol.epochs=0: expected a number from 1 to"),
        ("protocol.optimizer=adam", "expected one of ['sgd', 'adamw', 'muon']"),
        ("engine.precision=half", "expected one of"),
        ("protocol=3", "protocol=3: expected protocol.KEY=value, such as protocol.name=quick"),
        ("distiller=dkd", "distiller=dkd: expected distiller.KEY=value, such as distiller.name=kd"),
        ("distiller.temprature=4", "distiller kd: unknown setting"),
        ("distiller.ce=[1,2]", "distiller kd: distiller.ce: expected one value, not a list"),
        ("protocol.lr={a: 1}", "protocol.lr: expected one value, not keys with values"),
        ("data.classes=[one]", "data.classes: expected one value, not a list"),
        ("data.classes={a: 1}", "data.classes: expected one value, not keys with values"),
        ("epochs", "expected key=value"),
        ("student.name=[1", "parsing"),
    ],
)
def test_a_wrong_setting_is_one_line_that_helps(override, said):
    with pytest.raises(UserError) as caught:
        resolve(BASE, [override])
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_protocol_file_of_ones_own(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("epochs: 3\noptimizer: adamw\nlr: 0.001\n")
    assert resolve({**BASE, "protocol": {"name": str(file)}}).settings.protocol.epochs == 3
    file.write_text("epochs: [3\n")
    with pytest.raises(UserError, match="no valid YAML"):
        read_protocol(str(file))
    with pytest.raises(UserError, match="no file"):
        read_protocol(str(tmp_path / "other.yaml"))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("3\n", "holds no mapping"),
        ("true\n", "holds no mapping"),
        ("[1, 2]\n", "holds no mapping"),
        (f"epochs: 1{'0' * 5000}\n", "no valid YAML"),
        ("epochs: 1\nepochs: 2\n", "duplicate key"),
    ],
)
def test_a_file_that_holds_no_settings_is_one_line(text, said, tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    with pytest.raises(UserError, match=said) as caught:
        read_protocol(str(file))
    assert "\n" not in str(caught.value)


def test_a_file_may_begin_with_a_byte_order_mark_and_end_its_lines_as_windows_does(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_bytes("\ufeffepochs: 3\r\nlr: 0.001\r\n".encode())
    assert read_protocol(str(file)).epochs == 3


def test_yaml_cannot_build_objects(tmp_path):
    file = tmp_path / "evil.yaml"
    file.write_text("epochs: !!python/object/apply:os.getpid []\n")
    with pytest.raises(UserError, match="no valid YAML"):
        read_protocol(str(file))


def test_identity_tells_runs_apart_by_what_changes_the_result():
    identity = resolve(BASE).settings.identity()
    assert resolve(BASE, ["output.root=elsewhere", "engine.threads=1"]).settings.identity() == identity
    for override in ("seed=1", "distiller.kd=1", "protocol.lr=0.1", "data.limit=9", "student.name=resnet14"):
        assert resolve(BASE, [override]).settings.identity() != identity


def test_a_learning_rate_that_is_given_holds_for_every_network():
    small = {**BASE, "student": {"name": "shufflenetv1"}, "protocol": {"name": "crd"}}
    assert resolve(small).settings.protocol.lr_of["shufflenetv1"] == 0.01
    given = resolve(small, ["protocol.lr=0.2"]).settings.protocol
    assert (given.lr, given.lr_of) == (0.2, {})
    assert resolve(small, ["protocol.lr=0.2", "protocol.lr_of.resnet8=1"]).settings.protocol.lr_of == {"resnet8": 1}


def test_every_key_that_can_be_given_is_listed_with_its_meaning():
    usual = resolve(BASE).plain()
    del usual["files"], usual["data"]["fingerprint"], usual["distiller"]
    listed = {key for key, _, _ in all_settings()}
    assert set(flat(usual)) | {"distiller.name"} == {key for key in listed if not key.endswith((".options", ".lr_of"))}
    assert all(means for _, _, means in all_settings())


@pytest.mark.parametrize(
    "key", [f"{part.name}.{key.name}" for part in fields(Place) for key in fields(getattr(Place(), part.name))]
)
def test_no_key_of_the_place_is_part_of_what_a_run_is(key):
    usual = resolve(BASE)
    section, name = key.split(".")
    value = getattr(getattr(usual.place, section), name)
    text = {"compile": "off", "keep": "logits"}.get(name, "cuda")
    words = {str: text, int: 3, float: 0.5, tuple: "[mlflow]", type(None): 0.5}
    other = not value if isinstance(value, bool) else words[type(value)]
    changed = resolve(BASE, [f"{key}={other}"])
    assert changed.settings == usual.settings
    assert changed.place != usual.place


def test_settings_and_place_cannot_be_written():
    settings, place = resolve(BASE)
    for part in (settings, place):
        for one in [part, *(getattr(part, column.name) for column in fields(part))]:
            if is_dataclass(one):
                with pytest.raises(FrozenInstanceError):
                    setattr(one, fields(one)[0].name, None)


def test_what_is_written_down_is_read_again_as_it_was(tmp_path):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("{epochs: 3, lr_of: {resnet8: 0.5}, augmentation: {resized_crop: [0.5, 1]}}")
    more = [
        "distiller.name=reviewkd",
        "distiller.stages=[1, 2]",
        "data.name=bands",
        "data.options.low=2",
        "engine.threads=3",
    ]
    run = resolve({**BASE, "protocol": {"name": str(recipe)}}, more)
    recipe.unlink()  # what was written is complete
    assert stored(run.plain()) == run


def test_a_section_that_is_no_mapping_is_one_line():
    with pytest.raises(UserError, match=r"engine=4: expected engine\.KEY=value"):
        resolve(BASE, ["engine=4"])


@pytest.mark.parametrize("part", ["protocol.name", "teacher.protocol"])
def test_an_edited_recipe_is_another_run(tmp_path, part):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("{epochs: 3, lr: 0.1}")
    before, again = (resolve(BASE, [f"{part}={recipe}", "protocol.lr=0.1"]).settings.identity() for _ in range(2))
    assert before == again
    recipe.write_text("{epochs: 3, lr: 0.2}")  # by which the teacher is trained in both
    assert resolve(BASE, [f"{part}={recipe}", "protocol.lr=0.1"]).settings.identity() != before


def test_an_edited_distiller_file_is_another_run(tmp_path):
    file = tmp_path / "mine.py"
    text = '''"""Mine."""
from kdzoo import Distiller
class Mine(Distiller):
    def __init__(self, *, ce: float = 1.0):
        super().__init__(ce=ce)
'''
    file.write_text(text)
    base = {**BASE, "distiller": {"name": str(file)}}
    before = resolve(base).settings.identity()
    file.write_text(text + "# another\n")
    assert resolve(base).settings.identity() != before


def test_a_keyword_without_a_type_cannot_be_configured(tmp_path):
    file = tmp_path / "untyped.py"
    file.write_text("from kdzoo import Distiller\nclass U(Distiller):\n    def __init__(self, *, ce=1.0): ...\n")
    with pytest.raises(UserError, match="'ce' needs a type and a default"):
        resolve({**BASE, "distiller": {"name": str(file)}})


def test_a_keyword_that_may_be_given_by_its_place_is_told_to_stand_behind_a_star(tmp_path):
    file = tmp_path / "placed.py"
    file.write_text("from kdzoo import Distiller\nclass P(Distiller):\n    def __init__(self, ce: float = 1.0): ...\n")
    with pytest.raises(UserError, match=r"'ce' can be given by its place; put a \* before the keywords"):
        resolve({**BASE, "distiller": {"name": str(file)}})


@pytest.mark.parametrize(
    ("keyword", "said"),
    [
        ("mode: Mode = Mode.A", "distiller.mode is of type Mode, which can be no setting; expected bool, int, float"),
        ("place: Path = Path()", "distiller.place is of type PosixPath, which can be no setting"),
        ("options: Options = Options()", "distiller.options is of type Options, which can be no setting"),
        ("modes: list[Mode] = [Mode.A]", "distiller.modes is of type Mode, which can be no setting"),
        ("raw: bytes = b''", "distiller.raw is of type bytes, which can be no setting"),
        ("call: Callable = print", "distiller.call: its type can be no setting; expected bool, int, float"),
        ("level: 'Level' = 1", r"the type of a keyword is not known \(NameError: name 'Level' is not defined"),
    ],
)
def test_a_keyword_whose_type_no_file_can_hold_is_refused_in_one_line(tmp_path, keyword, said):
    file = tmp_path / "mine.py"
    file.write_text(f'''"""Mine."""
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from kdzoo import Distiller
class Mode(StrEnum):
    A = "a"
@dataclass(frozen=True)
class Options:
    a: float = 1.0
class Mine(Distiller):
    def __init__(self, *, ce: float = 1.0, {keyword}):
        super().__init__(ce=ce)
''')
    with pytest.raises(UserError, match=said) as caught:
        resolve({**BASE, "distiller": {"name": str(file)}})
    assert "\n" not in str(caught.value)


def test_the_fields_own_weights_for_a_pair_are_the_defaults_there():
    pair = {
        "distiller": {"name": "dkd"},
        "teacher": {"name": "resnet56"},
        "student": {"name": "resnet20"},
        "data": {"name": "cifar100"},
        "protocol": {"name": "crd"},
    }
    assert resolve(pair).settings.distiller.keywords["beta"] == 2.0
    assert resolve(pair, ["distiller.beta=3"]).settings.distiller.keywords["beta"] == 3.0
    assert resolve(pair, ["data.name=digits"]).settings.distiller.keywords["beta"] == 8.0


def test_every_preset_resolves_to_its_value():
    with (shipped_folder() / "presets.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        assert row["source"]
        pair = {
            "distiller": {"name": row["distiller"]},
            "teacher": {"name": row["teacher"]},
            "student": {"name": row["student"]},
            "data": {"name": row["data"]},
            "protocol": {"name": row["protocol"]},
        }
        value, shown = yaml.safe_load(row["value"]), resolve(pair).settings.distiller.keywords[row["keyword"]]
        assert (list(shown) if isinstance(value, list) else shown) == value


def test_no_pair_has_two_presets_of_one_keyword():
    with (shipped_folder() / "presets.csv").open(encoding="utf-8") as file:
        keys = [tuple(row.values())[:6] for row in csv.DictReader(file)]
    assert len(set(keys)) == len(keys)


@pytest.mark.slow(reason="builds every network of a preset")
def test_presets_fit_the_networks_of_their_pairs():
    with (shipped_folder() / "presets.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    data = DataSpec("cifar100", 100, tuple(map(str, range(100))), 32, torch.arange(100))
    shapes = {
        name: models.create(name, data).shapes() for name in {row[r] for row in rows for r in ("teacher", "student")}
    }
    for row in rows:
        keywords = {row["keyword"]: yaml.safe_load(row["value"])}
        registry.load(row["distiller"])(**keywords).assemble(shapes[row["student"]], shapes[row["teacher"]], data)


def test_networks_with_four_stages_and_a_stem_of_their_own_are_matched_in_all_of_them():
    """Their first map is a stage's; in networks of three stages it is the stem's."""
    for distiller in ("at", "nst", "vid", "reviewkd"):
        for teacher, student, stages in (("vgg13", "vgg8", [0, 1, 2, 3]), ("resnet56", "resnet20", [1, 2, 3])):
            pair = {"teacher": {"name": teacher}, "student": {"name": student}}
            where = {"data": {"name": "cifar100"}, "protocol": {"name": "crd"}, "distiller": {"name": distiller}}
            assert list(resolve({**pair, **where}).settings.distiller.keywords["stages"]) == stages


def test_a_checkout_that_is_installed_elsewhere_too_finds_its_own_recipes(tmp_path):
    (tmp_path / "kdzoo").symlink_to(Path(kdzoo.__file__).parent)
    code = "from kdzoo.resolve import protocol_names; print(protocol_names())"
    said = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "quick" in said.stdout


def test_a_run_without_a_teacher_is_called_so():
    assert resolve(BASE).settings.task == "no teacher on digits"
    assert resolve({**BASE, "teacher": {"name": "vit_s"}}).settings.task == "vit_s on digits"
