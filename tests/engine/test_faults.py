"""A method that breaks its promises fails alone, in one line, and the methods beside it end with the same bits."""

import shutil

import pytest
import torch
from safetensors.torch import load_file

from kdzoo.engine.progress import Progress
from kdzoo.engine.training import train_lanes
from kdzoo.errors import UserError
from kdzoo.store.folder import RunFolder

from ..conftest import untrained_teacher
from ..short_runs import settings

METHOD = '''
"""A method for tests."""

import numpy as np
import torch

from kdzoo import Distiller, Fidelity
from kdzoo.losses import cross_entropy, softened_kl

class Foreign(Distiller):
    paper = "none"
    fidelity = Fidelity.EXACT

    def __init__(self, *, ce: float = 1.0, match: float = 1.0):
        super().__init__(ce=ce, match=match)
        self.steps = 0

    def build(self, student, teacher, data):
        self.data = data
        {build}

    def prepare(self, student, teacher, batches):
        {prepare}

    def loss(self, student, teacher, batch):
        self.steps += 1
        terms = {{
            "ce": cross_entropy(student.logits, batch.targets),
            "match": softened_kl(student.logits, teacher.logits, 4.0),
        }}
        if {when}:
            {loss}
        return terms
'''

BREAK_TEACHER = """
TEACHER = []

def break_teacher():
    with torch.no_grad():
        for weight in TEACHER[0].parameters():
            weight.zero_()


"""


def method(folder, build="pass", prepare="pass", loss="pass", when="self.steps == 4"):
    file = folder / "foreign.py"
    file.write_text(METHOD.format(build=build, prepare=prepare, loss=loss, when=when))
    return str(file)


def weights(outcome):
    return load_file(outcome.folder / "student.safetensors")


@pytest.fixture(scope="module")
def alone(tmp_path_factory, dataset):
    """The weights of the sound method's student, trained with no other beside it."""
    runs = [settings(tmp_path_factory.mktemp("alone"), "kd")]
    [outcome] = train_lanes(runs, dataset, untrained_teacher(dataset), Progress(quiet=True))
    return weights(outcome)


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (
            {"loss": "raise ValueError('no such luck')"},
            r"failed at step 3: ValueError: no such luck \(foreign.py, line",
        ),
        ({"loss": "raise KeyError"}, r"failed at step 3: KeyError \(foreign.py"),
        ({"loss": "exit(0)"}, "failed at step 3: SystemExit: 0"),
        ({"loss": "return None"}, "returned None at step 3; expected a dictionary of loss terms"),
        (
            {"loss": "return terms['ce']"},
            r"returned a tensor of shape \(\) and float32 .* at step 3; expected a dictionary",
        ),
        ({"loss": "return {}"}, "has no loss term"),
        ({"loss": "terms['match'] = 1.0"}, "returned a float as 'match' at step 3; expected a float32 tensor without"),
        ({"loss": "terms['match'] = None"}, "returned None as 'match'"),
        ({"loss": "terms['match'] = terms['match'].double()"}, r"shape \(\) and float64 .* as 'match'"),
        ({"loss": "terms['match'] = student.logits"}, r"shape \(64, 10\) and float32 .* as 'match'"),
        ({"loss": "terms['match'] = terms['match'] + 0j"}, r"complex64 .* as 'match'"),
        ({"loss": "return {k: v.detach() for k, v in terms.items()}"}, "depend on no trained weight"),
        ({"loss": "terms = {'new': terms['match']}"}, "returned the terms new at step 3 in place of ce, match"),
        ({"prepare": "raise ValueError('unready')"}, r"failed before training: ValueError: unready \(foreign.py"),
        ({"build": "raise IndexError('misbuilt')"}, r"failed while it was built: IndexError: misbuilt \(foreign.py"),
        ({"loss": "teacher.logits.clamp_(min=0)"}, "changed the teacher's outputs at step 3"),
        ({"loss": "batch.images.zero_()"}, "changed the batch's images at step 3"),
        ({"loss": "batch.labels.zero_()"}, "changed the batch's labels at step 3"),
        ({"loss": "batch.targets.zero_()"}, "changed the batch's targets at step 3"),
        ({"loss": "torch.set_default_dtype(torch.float64)"}, "changed torch's default dtype at step 3"),
        ({"loss": "torch.set_grad_enabled(False)"}, "changed whether torch computes gradients at step 3"),
    ],
)
@pytest.mark.slow(reason="trains two methods for each promise that is broken")
def test_a_broken_promise_is_one_line_and_no_other_method_notices(tmp_path, dataset, teacher, alone, harm, said):
    foreign = method(tmp_path, **harm)
    runs = [settings(tmp_path / "beside", name) for name in (foreign, "kd")]
    failed, sound = train_lanes(runs, dataset, teacher, Progress(quiet=True))
    assert isinstance(failed, UserError)
    with pytest.raises(UserError, match=said):
        raise failed
    assert "\n" not in str(failed)
    assert weights(sound).keys() == alone.keys()
    assert all(torch.equal(tensor, alone[name]) for name, tensor in weights(sound).items())


@pytest.mark.parametrize(
    ("loss", "said"),
    [
        ("terms['match'] = terms['match'].detach()", "the term 'match' .* depends on no trained weight at step 0"),
        ("self.late = {layer}; terms['match'] = {term}", r"gradient for distiller\.late\.\w+ at step 0, which no opt"),
        ("self.late = [{layer}]; terms['match'] = {term}", r"gradient for a parameter of shape \(10.*\) at step 0"),
    ],
)
def test_a_term_that_trains_nothing_or_what_no_optimizer_sees_is_refused_at_the_first_step(
    tmp_path, dataset, teacher, loss, said
):
    term = "torch.nn.ModuleList(self.late if type(self.late) is list else [self.late])[0](student.logits).mean()"
    loss = loss.format(layer="torch.nn.Linear(10, 10)", term=term)
    foreign = method(tmp_path, loss=loss, when="self.steps == 1")
    [outcome] = train_lanes([settings(tmp_path, foreign)], dataset, teacher, Progress(quiet=True))
    with pytest.raises(UserError, match=said):
        raise outcome


def test_a_term_may_say_nothing_at_first(tmp_path, dataset, teacher):
    foreign = method(tmp_path, loss="terms['match'] = torch.zeros(())", when="self.steps < 4")
    [outcome] = train_lanes([settings(tmp_path, foreign)], dataset, teacher, Progress(quiet=True))
    assert not isinstance(outcome, UserError)


@pytest.mark.parametrize("harm", ["torch.set_default_dtype(torch.float64)", "torch.set_grad_enabled(False)"])
def test_all_that_a_method_changed_is_put_back(tmp_path, dataset, teacher, alone, harm):
    """Of two things changed in one step the first is named, and neither reaches the methods beside it."""
    foreign = method(tmp_path, prepare="TEACHER.append(teacher.network)", loss=f"{harm}; break_teacher()")
    text = (tmp_path / "foreign.py").read_text().replace("class Foreign", BREAK_TEACHER + "class Foreign")
    (tmp_path / "foreign.py").write_text(text)
    runs = [settings(tmp_path / "beside", name) for name in (foreign, "kd")]
    failed, sound = train_lanes(runs, dataset, teacher, Progress(quiet=True))
    assert "at step 3" in str(failed)
    assert weights(sound).keys() == alone.keys()
    assert all(torch.equal(tensor, alone[name]) for name, tensor in weights(sound).items())


def test_a_phase_before_training_that_writes_to_the_teacher_is_that_methods_failure(tmp_path, dataset, teacher, alone):
    foreign = method(tmp_path, prepare="TEACHER.append(teacher.network); break_teacher()")
    text = (tmp_path / "foreign.py").read_text().replace("class Foreign", BREAK_TEACHER + "class Foreign")
    (tmp_path / "foreign.py").write_text(text)
    runs = [settings(tmp_path / "beside", name) for name in (foreign, "kd")]
    failed, sound = train_lanes(runs, dataset, teacher, Progress(quiet=True))
    assert "changed the teacher's weights before training" in str(failed)
    assert weights(sound).keys() == alone.keys()
    assert all(torch.equal(tensor, alone[name]) for name, tensor in weights(sound).items())


def test_a_method_that_breaks_nothing_ends_well(tmp_path, dataset, teacher):
    [outcome] = train_lanes([settings(tmp_path, method(tmp_path))], dataset, teacher, Progress(quiet=True))
    assert not isinstance(outcome, UserError)


def test_labels_that_a_method_keeps_are_its_own(tmp_path, dataset, teacher):
    before = dataset.spec.labels.clone()
    foreign = method(tmp_path, build="data.labels.zero_()")
    train_lanes([settings(tmp_path, foreign)], dataset, teacher, Progress(quiet=True))
    assert torch.equal(dataset.spec.labels, before)


def test_a_teacher_that_was_written_to_is_restored_for_the_others(tmp_path, dataset, teacher, alone):
    harm = "with torch.no_grad(): [p.zero_() for p in TEACHER[0].parameters()]"
    foreign = method(tmp_path, prepare="TEACHER.append(teacher.network)", loss=harm)
    text = (tmp_path / "foreign.py").read_text().replace("class Foreign", "TEACHER = []\n\nclass Foreign")
    (tmp_path / "foreign.py").write_text(text)
    runs = [settings(tmp_path / "beside", name) for name in (foreign, "kd")]
    failed, sound = train_lanes(runs, dataset, teacher, Progress(quiet=True))
    assert "changed the teacher's weights at step 3" in str(failed)
    assert weights(sound).keys() == alone.keys()
    assert all(torch.equal(tensor, alone[name]) for name, tensor in weights(sound).items())


def test_a_teacher_that_changes_itself_is_no_methods_fault(tmp_path, dataset, teacher):
    stem = teacher.network.body.get_submodule("stem.0")
    stem.register_buffer("count", torch.zeros(()))

    def count(layer, given, output):
        layer.count += 1

    stem.register_forward_hook(count)
    runs = [settings(tmp_path, name) for name in ("kd", "logitmse", "none")]
    *failed, other = train_lanes(runs, dataset, teacher, Progress(quiet=True))
    for outcome in failed:
        assert "the teacher changes its body.stem.0.count in each pass, in evaluation mode too" in str(outcome)
    assert other.epochs == 2


@pytest.mark.parametrize("when", [3, 9])  # in between, and in the last step, after which no loss is computed
def test_a_student_that_is_not_finite_never_ships(tmp_path, dataset, teacher, when):
    harm = "terms['match'].register_hook(lambda gradient: gradient * float('nan'))"
    foreign = method(tmp_path, loss=harm)
    text = (tmp_path / "foreign.py").read_text().replace("self.steps == 4", f"self.steps == {when + 1}")
    (tmp_path / "foreign.py").write_text(text)
    run = settings(tmp_path, foreign)
    [outcome] = train_lanes([run], dataset, teacher, Progress(quiet=True))
    with pytest.raises(UserError, match="not finite"):
        raise outcome
    assert not list(tmp_path.glob("*/student.safetensors"))
    assert not list(tmp_path.glob("*/result.json"))


def test_a_rate_that_leaves_no_finite_weight_is_told(tmp_path, dataset, teacher):
    run = settings(tmp_path, "kd", "protocol.epochs=1", "data.limit=64", "protocol.lr=1e38")
    [outcome] = train_lanes([run], dataset, teacher, Progress(quiet=True))
    assert "not finite" in str(outcome)


def test_a_checkpoint_of_another_run_is_refused(tmp_path, dataset, teacher):
    """One of the same network and method, whose name, step and checksum are right."""
    foreign = method(tmp_path, loss="raise ValueError")
    runs = [settings(tmp_path, foreign, f"seed={seed}", "engine.checkpoint_seconds=0") for seed in (0, 1)]
    one, other = (RunFolder.of(run).checkpoints for run in runs)
    train_lanes(runs[:1], dataset, teacher, Progress(quiet=True))
    shutil.copytree(one, other)
    with pytest.raises(UserError, match=r"is damaged, or belongs to another run; move .* away"):
        train_lanes(runs[1:], dataset, teacher, Progress(quiet=True))
    [outcome] = train_lanes(runs[:1], dataset, teacher, Progress(quiet=True))  # its own is taken up
    assert "at step" in str(outcome)
