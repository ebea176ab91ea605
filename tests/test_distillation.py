"""One module for anybody's loop: precision, modes and gradients are as promised."""

import copy
import io
from itertools import pairwise

import pytest
import torch
from kdzoo.distillers.at import AT
from kdzoo.distillers.kd import KD
from torch import nn
from torch.nn import functional as F

import kdzoo
from kdzoo import (
    Batch,
    DataSpec,
    Distillation,
    Distiller,
    Fidelity,
    Needs,
    NetworkView,
    Output,
    Show,
    UserError,
    registry,
    toys,
)
from kdzoo.models import wrap
from kdzoo.precision import PRECISIONS


class Net(nn.Module):
    """A small network with dropout, batch norm and a notebook of the precisions it computed in and what it showed."""

    def __init__(self, width=4, classes=5):
        super().__init__()
        self.conv = nn.Conv2d(3, width, 3, padding=1)
        self.norm = nn.BatchNorm2d(width)
        self.head = nn.Linear(width, classes)
        self.seen, self.shown = [], []

    def forward(self, images, show):
        feature = self.norm(self.conv(images)).relu()
        embedding = feature.mean((2, 3))
        logits = self.head(embedding)
        self.seen.append(logits.dtype)
        self.shown.append(show)
        return Output(logits, embedding, (feature,) * 4, (feature,) * 4, feature).only(show)

    def classify(self, means):
        return self.head(means)

    def shapes(self):
        return Output(*(x.to("meta") for x in (torch.zeros(2, self.head.out_features), torch.zeros(2, 4))))


class Probe(Distiller):
    """Records what it is shown."""

    paper = "none"
    fidelity = Fidelity.EXACT

    def __init__(self, **needs):
        super().__init__()
        self.needs = Needs(**needs)
        self.connector = nn.Linear(5, 5)
        self.dtypes = []

    def loss(self, student, teacher, batch):
        mapped = self.connector(student.logits)
        self.dtypes.append((student.logits.dtype, teacher.embedding.dtype, mapped.dtype))
        self.teacher_grad = teacher.logits.requires_grad
        return {"match": (mapped - teacher.logits).square().mean()}


@pytest.fixture
def batch():
    return Batch.of(torch.rand(4, 3, 6, 6), torch.tensor([0, 1, 2, 3]), num_classes=5)


def test_networks_run_in_the_callers_precision_and_losses_in_float32(batch):
    student, teacher, probe = Net(), Net(8), Probe()
    distillation = Distillation(student, teacher, probe)
    with torch.autocast("cpu", torch.bfloat16):
        terms = distillation(batch)
    assert student.seen == teacher.seen == [torch.bfloat16]
    assert probe.dtypes == [(torch.float32,) * 3]
    assert terms["match"].dtype == torch.float32
    distillation(batch)
    assert student.seen[-1] == torch.float32


def test_only_student_and_distiller_are_trained(batch):
    student, teacher, probe = Net(), Net(8), Probe()
    distillation = Distillation(student, teacher, probe).train()
    before = copy.deepcopy(teacher.state_dict())
    distillation(batch)["match"].backward()
    assert all(p.grad is not None for p in [*student.parameters(), *probe.parameters()])
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())
    assert all(torch.equal(before[name], value) for name, value in teacher.state_dict().items())
    assert not teacher.training
    assert student.training


def test_the_teachers_graph_is_kept_only_where_it_is_needed(batch):
    images = batch.images.clone().requires_grad_()
    batch = batch._replace(images=images)
    for wanted in (False, True):
        probe = Probe(teacher_grad=wanted)
        Distillation(Net(), Net(), probe)(batch)
        assert probe.teacher_grad == wanted


@pytest.mark.parametrize(
    ("needs", "student_shows", "teacher_shows"),
    [
        ({}, (True, False, False), (True, False, False)),
        ({"features": False}, (False, False, False), (False, False, False)),
        ({"preactivations": ("teacher",)}, (True, False, False), (True, True, False)),
        ({"preactivations": ("student",), "features": False}, (False, True, False), (False, False, False)),
        ({"final": True}, (True, False, True), (True, False, True)),
    ],
)
def test_networks_show_what_the_method_needs_and_no_more(batch, needs, student_shows, teacher_shows):
    student, teacher = Net(), Net()
    Distillation(student, teacher, Probe(**needs))(batch)
    assert student.shown == [student_shows]
    assert teacher.shown == [teacher_shows]


def test_methods_that_share_a_network_are_shown_what_any_of_them_needs():
    needs = [Needs(features=False), Needs(features=False, preactivations=("teacher",)), Needs(final=True)]
    first, second, third = (need.show("teacher") for need in needs)
    assert first | second == Show(False, True, False)
    assert first | second | third == Show(True, True, True)


def test_an_output_of_three_fields_is_whole(batch):
    output = Net()(batch.images, Show()).float()
    assert (len(output.features), output.preactivations, output.final) == (4, (), None)


def test_a_part_of_the_final_map_is_classified_as_the_method_sees_the_network():
    means = torch.rand(3, 4)
    assert NetworkView(Net()).classify(means).requires_grad
    assert not NetworkView(Net(), grad=False).classify(means).requires_grad


def test_a_view_has_no_classifier_where_the_network_names_no_linear_layer():
    network = Net()
    assert NetworkView(network).classifier is None
    network.classifier = network.head
    assert NetworkView(network).classifier is network.head


def test_the_precision_may_be_handed_over_instead_of_read_from_the_surrounding_code(batch):
    student, probe = Net(), Probe(features=False)
    distillation = Distillation(student, Net(), probe, precision=PRECISIONS["bf16"])
    distillation(batch)
    with torch.autocast("cpu", torch.float16):
        distillation(batch)
    assert student.seen == [torch.bfloat16] * 2
    assert set(probe.dtypes) == {(torch.float32,) * 3}


def test_passes_may_be_made_elsewhere(batch):
    teacher, asked = Net(), []

    def passes(images, show):
        asked.append(show)
        return teacher(images, show)

    Distillation(Net(), teacher, Probe(), passes=passes)(batch)
    assert asked == teacher.shown == [Show()]


def test_a_teacher_that_shares_weights_with_the_student_is_refused_as_it_would_freeze_them(batch):
    student = Net()
    with pytest.raises(UserError, match="the teacher shares weights with the student"):
        Distillation(student, student, KD())
    assert all(parameter.requires_grad for parameter in student.parameters())
    assert Distillation(student, copy.deepcopy(student), KD())(batch)["kd"].requires_grad
    teacher = Net()
    student.head = teacher.head.requires_grad_(False)  # which no one trains
    assert Distillation(student, teacher, KD())(batch)["kd"].requires_grad


def test_what_is_no_network_is_refused_by_its_type():
    with pytest.raises(UserError, match=r"the student is of type str; expected a torch\.nn\.Module"):
        kdzoo.distill("resnet18", Net(), "kd", num_classes=5, image_size=8)


def test_a_method_without_a_loss_is_told_so(batch):
    class Silent(Distiller):
        def __init__(self, *, ce: float = 1.0):
            super().__init__(ce=ce)

    with pytest.raises(UserError, match=r"Silent defines no loss\(self, student, teacher, batch\)"):
        Distillation(Net(), Net(), Silent())(batch)


def test_a_term_that_is_no_tensor_is_named(batch):
    class Forgetful(Distiller):
        def __init__(self, *, match: float = 1.0):
            super().__init__(match=match)

        def loss(self, student, teacher, batch):
            return self.weigh(match=lambda: None)

    with pytest.raises(UserError, match="the term 'match' of Forgetful is of type NoneType; return a tensor"):
        Distillation(Net(), Net(), Forgetful())(batch)


def test_a_term_that_is_no_function_is_told_how_it_is_written(batch):
    class Eager(Distiller):
        def __init__(self, *, match: float = 1.0):
            super().__init__(match=match)

        def loss(self, student, teacher, batch):
            return self.weigh(match=F.mse_loss(student.logits, teacher.logits))

    said = r"the term 'match' of Eager is of type Tensor; expected a function, .*: match=lambda: \.\.\."
    with pytest.raises(UserError, match=said):
        Distillation(Net(), Net(), Eager())(batch)


class Running(Distiller):
    """A method with a running mean of the student's logits, computed with their graph or without it."""

    def __init__(self, *, match: float = 1.0, detached: bool = True):
        super().__init__(match=match)
        self.detached = detached

    def build(self, student, teacher, data):
        self.register_buffer("mean", torch.zeros(data.num_classes))

    def loss(self, student, teacher, batch):
        new = student.logits.mean(0)
        self.mean = 0.9 * self.mean + 0.1 * (new.detach() if self.detached else new)
        return self.weigh(match=lambda: F.mse_loss(student.logits - self.mean, teacher.logits))


def test_a_buffer_that_keeps_a_batchs_graph_is_named_before_the_next_batch_goes_through_it(batch):
    sound = Distillation(Net(), Net(), Running())
    for _ in range(2):
        sound(batch)["match"].backward()
    with pytest.raises(UserError, match=r"the buffer mean of Running keeps the graph .* under torch\.no_grad\(\)"):
        Distillation(Net(), Net(), Running(detached=False))(batch)


@pytest.mark.parametrize(
    ("images", "labels", "classes", "said"),
    [
        (
            torch.zeros(2, 3, 8, 8, dtype=torch.uint8),
            None,
            0,
            r"images are uint8 of shape \(2, 3, 8, 8\); expected floats",
        ),
        (torch.zeros(3, 8, 8), None, 0, r"images are float32 of shape \(3, 8, 8\)"),
        (
            torch.zeros(2, 3, 8, 8),
            torch.zeros(3, dtype=torch.int64),
            5,
            r"labels of 2 images are int64 of shape \(3,\)",
        ),
        (torch.zeros(2, 3, 8, 8), torch.zeros(2), 5, r"labels of 2 images are float32 of shape \(2,\); expected int64"),
        (torch.zeros(2, 3, 8, 8), torch.zeros(2, dtype=torch.int64), 0, "num_classes=0: pass the number of classes"),
        (torch.zeros(2, 8, 8, 3), None, 0, r"images are float32 of shape \(2, 8, 8, 3\); expected .* \(B, 3, H, W\)"),
        ([[0.0]], None, 0, r"images are of type list; expected floats"),
        (torch.zeros(2, 3, 8, 8), [0, 1], 5, r"labels of 2 images are of type list; expected int64"),
    ],
)
def test_a_batch_of_what_is_no_batch_is_refused(images, labels, classes, said):
    with pytest.raises(UserError, match=said):
        kdzoo.Batch.of(images, labels, classes)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (
            {"index": torch.zeros(3, dtype=torch.int64)},
            r"the index of 2 images is int64 of shape \(3,\); expected int64",
        ),
        ({"index": torch.zeros(2)}, r"the index of 2 images is float32 of shape \(2,\)"),
        ({"index": [0, 1]}, "the index of 2 images is of type list"),
        ({"progress": 7}, r"progress=7\.0: expected a share from 0 to 1"),
    ],
    ids=["short", "float", "list", "epoch"],
)
def test_an_index_or_a_share_of_training_that_is_none_is_refused(given, said):
    with pytest.raises(UserError, match=said):
        Batch.of(torch.zeros(2, 3, 8, 8), **given)


def test_a_batch_of_other_classes_than_the_networks_is_told_so(batch):
    other = Batch.of(batch.images, batch.labels, num_classes=9)
    with pytest.raises(
        ValueError, match=r"logits are of shape \(4, 5\) and the targets of shape \(4, 9\); expected the"
    ):
        Distillation(Net(), Net(), KD())(other)


@pytest.mark.parametrize(
    ("terms", "said"),
    [
        (lambda loss: loss.mean(), "the loss of Own is of type Tensor; expected a dictionary"),
        (lambda loss: (loss.mean(),), "the loss of Own is of type tuple; expected a dictionary"),
        (lambda loss: {"match": 0.0}, "the term 'match' of Own is of type float"),
    ],
    ids=["bare", "tuple", "number"],
)
def test_a_loss_that_is_no_dictionary_of_tensors_is_told_so(batch, terms, said):
    class Own(Probe):
        def loss(self, student, teacher, batch):
            return terms(student.logits - teacher.logits)

    with pytest.raises(UserError, match=said):
        Distillation(Net(), Net(), Own())(batch)


def test_modules_of_a_method_in_another_precision_are_named(batch):
    halved = Distillation(Net(), Net(), Probe()).bfloat16()
    with pytest.raises(
        UserError, match=r"connector\.weight of Probe is bfloat16, and methods compute in float32; call"
    ):
        halved(batch._replace(images=batch.images.bfloat16()))
    halved.distiller.float()
    assert halved(batch._replace(images=batch.images.bfloat16()))["match"].isfinite()


def test_a_method_without_a_teacher_trains_without_one(batch):
    class Alone(Probe):
        def loss(self, student, teacher, batch):
            return {"norm": student.logits.square().mean()}

    assert Distillation(Net(), None, Alone(teacher=False))(batch)["norm"].isfinite()
    with pytest.raises(
        UserError, match=r"^Probe reads the teacher's embedding, and its needs say teacher=False; leave"
    ):
        Distillation(Net(), None, Probe(teacher=False))(batch)
    with pytest.raises(UserError, match="needs a teacher"):
        Distillation(Net(), None, Probe())


def test_the_phase_before_training_sees_the_networks_as_training_does(batch):
    class Phased(Probe):
        def prepare(self, student, teacher, batches):
            for batch in batches:
                self.shown = teacher(batch.images).logits

    phased = Phased()
    Distillation(Net(), Net(), phased).prepare([batch])
    assert phased.shown.dtype == torch.float32
    assert not phased.shown.requires_grad


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_a_phase_before_training_sees_the_weights_that_it_changed(batch, precision):
    shown = []

    class Phased(Probe):
        def prepare(self, student, teacher, batches):
            for batch in batches:
                shown.append(student(batch.images).logits.detach())
                for parameter in student.network.head.parameters():
                    parameter.data.zero_()

    Distillation(Net(), Net(), Phased(), precision=PRECISIONS[precision]).prepare([batch] * 2)
    assert shown[0].any()
    assert not shown[1].any()


def test_images_of_another_size_than_a_methods_modules_were_made_for_are_named(batch):
    class Placed(Running):
        def build(self, student, teacher, data):
            self.register_buffer("place", torch.ones(data.image_size, data.image_size))

        def loss(self, student, teacher, batch):
            return {"match": (student.features[0] * self.place).mean()}

    together = Distillation(Net(), Net(), Placed(), num_classes=5, image_size=6)
    together(batch._replace(images=torch.rand(2, 3, 6, 6)))
    with pytest.raises(
        UserError, match="Placed was made for images of 6 x 6, and those of this batch are 6 x 4; bring"
    ):
        together(batch._replace(images=torch.rand(2, 3, 6, 4)))


def test_a_loop_of_ones_own_is_asked_for_the_phase_before_training_that_a_method_has(batch):
    class Phased(Probe):
        def prepare(self, student, teacher, batches):
            pass

    together, resumed = (Distillation(Net(), Net(), Phased()) for _ in range(2))
    with pytest.raises(UserError, match=r"Phased has a phase before training; call prepare\(batches\) first"):
        together(batch)
    together.prepare([batch])
    together(batch)
    resumed.load_state_dict(together.state_dict())
    resumed(batch)


def test_a_state_without_the_methods_own_does_not_stand_for_its_phase_before_training(pictures):
    def made(method):
        return kdzoo.distill(cnn(), cnn(6), method, num_classes=5, image_size=32)

    began = made("ofd")
    began.load_state_dict(made("kd").student.state_dict(prefix="student."), strict=False)
    with pytest.raises(UserError, match=r"OFD has a phase before training; call prepare\(batches\) first"):
        began(pictures)
    began.prepare([pictures])
    resumed = made("ofd")
    resumed.load_state_dict(began.state_dict() | {"more": torch.zeros(1)}, strict=False)
    assert resumed(pictures)["ofd"].isfinite()


def test_a_state_says_whether_the_phase_before_training_had_run(pictures):
    began, resumed = (kdzoo.distill(cnn(), cnn(6), "ofd", num_classes=5, image_size=32) for _ in range(2))
    for prepared in (False, True):
        file = io.BytesIO()
        torch.save(began.state_dict(), file)
        file.seek(0)
        resumed.load_state_dict(torch.load(file, weights_only=True))
        assert resumed.distiller.is_prepared == prepared
        began.prepare([pictures])


def test_a_compiled_loop_is_asked_for_the_phase_before_training_as_well(pictures):
    class Phased(KD):
        def prepare(self, student, teacher, batches):
            pass

    together = Distillation(cnn(), cnn(), Phased(), num_classes=5, image_size=32)
    compiled = torch.compile(together, backend="eager")
    with pytest.raises(UserError, match=r"Phased has a phase before training; call prepare\(batches\) first"):
        compiled(pictures)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (lambda batch: iter([batch]), "the batches are of type list_iterator, which is used up .*; pass a list"),
        (lambda batch: [], "an epoch of the phase before training has no batches; pass prepare at least one"),
        (lambda batch: [(batch.images, batch.labels)], r"the batch is of type tuple; expected Batch\.of"),
        (lambda batch: batch, r"the batch is of type Tensor; expected Batch\.of"),
    ],
    ids=["iterator", "none", "tuples", "one"],
)
def test_a_phase_before_training_refuses_what_cannot_be_read_as_batches(batch, given, said):
    class Phased(Probe):
        def prepare(self, student, teacher, batches):
            for _ in range(2):
                list(batches)

    together = Distillation(Net(), Net(), Phased())
    with pytest.raises(UserError, match=said):
        together.prepare(given(batch))
    assert not together.distiller.is_prepared
    together.prepare([batch])
    assert together.distiller.is_prepared


def test_what_ships_is_the_student():
    student = Net()
    assert Distillation(student, Net(), Probe()).deploy() is student


def test_a_batch_from_ones_own_loader_is_complete():
    batch = Batch.of(torch.rand(2, 3, 4, 4), torch.tensor([2, 0]), num_classes=3, progress=0.25)
    assert batch.targets.tolist() == [[0, 0, 1], [1, 0, 0]]
    assert (batch.index, float(batch.progress), batch.views, batch.partner) == (None, 0.25, {}, None)
    batch = Batch.of(torch.rand(2, 3, 4, 4), torch.tensor([2, 0]), num_classes=3, index=torch.tensor([7, 5]))
    assert batch.index.tolist() == [7, 5]


def test_a_data_spec_has_sensible_defaults():
    assert DataSpec("x", 2, ("a", "b"), 8, torch.zeros(0)).superclasses == ()


def cnn(width=4, classes=5):
    """A bare network of four stages."""
    widths = (3, width, width, width, width)
    stages = [nn.Sequential(nn.Conv2d(a, b, 3, 2, 1), nn.ReLU()) for a, b in pairwise(widths)]
    return nn.Sequential(*stages, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, classes))


@pytest.fixture
def pictures():
    return Batch.of(torch.rand(4, 3, 32, 32), torch.tensor([0, 1, 2, 3]), num_classes=5)


class Labelled(Probe):
    """Reads the labels of the training set."""

    def __init__(self):
        super().__init__(features=False, labels=True)
        self.is_active = True

    def build(self, student, teacher, data):
        self.data = data


def test_the_method_is_assembled_for_the_networks_it_is_given(pictures):
    distillation = Distillation(cnn(4), cnn(6), AT(at=10.0), num_classes=5, image_size=32)
    terms = distillation(pictures)
    assert terms.keys() == {"ce", "at"}
    terms["at"].backward()
    assert all(p.grad.any() for p in distillation.student.body[0].parameters())


def test_networks_that_are_wrapped_need_no_more_words(pictures):
    student, teacher = (wrap(cnn(width), image_size=32, num_classes=5) for width in (4, 6))
    distillation = Distillation(student, teacher, AT())
    assert distillation.student is student
    assert distillation(pictures).keys() == {"ce", "at"}


def test_a_method_that_is_assembled_stays_as_it_is():
    student, teacher = Net(), Net()
    method = Labelled().assemble(student.shapes(), teacher.shapes(), DataSpec("x", 5, (), 6, torch.arange(3)))
    Distillation(student, teacher, method, labels=torch.arange(9))
    assert method.data.labels.tolist() == [0, 1, 2]


@pytest.mark.parametrize("missing", ["num_classes", "image_size"])
def test_a_bare_network_says_what_is_missing(missing):
    given = {"num_classes": 5, "image_size": 32}
    del given[missing]
    with pytest.raises(UserError, match=r"the student is a bare Sequential; pass num_classes=\.\.\. and image_size="):
        Distillation(cnn(), cnn(), KD(), **given)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"num_classes": "5"}, "num_classes='5': expected a whole number"),
        ({"num_classes": 5.0}, r"num_classes=5\.0: expected a whole number"),
        ({"image_size": (32, 32)}, r"image_size=\(32, 32\): expected a whole number"),
        ({"labels": [0, 1]}, r"labels of the training set are of type list; expected int64 of shape \(N,\)"),
        ({"labels": torch.eye(5)}, r"labels of the training set are float32 of shape \(5, 5\); expected int64"),
    ],
    ids=["text", "float", "pair", "list", "matrix"],
)
def test_what_is_known_of_the_data_is_of_the_type_it_is_said_to_be(given, said):
    with pytest.raises(UserError, match=said):
        kdzoo.distill(cnn(), cnn(), "crd", **{"num_classes": 5, "image_size": 32, "labels": torch.arange(5), **given})
    whole = {"num_classes": torch.tensor(5), "image_size": torch.tensor(32)}
    assert kdzoo.distill(cnn(), cnn(), "kd", **whole).image_size == 32


def test_a_compiled_network_is_refused_since_hooks_see_its_layers_or_not_by_the_order_of_calls():
    with pytest.raises(UserError, match=r"'the student' is compiled, which .* pass what torch\.compile was given"):
        kdzoo.distill(torch.compile(cnn(), backend="eager"), cnn(), "at", num_classes=5, image_size=32)


def test_a_network_whose_weights_have_no_numbers_is_told_so():
    with torch.device("meta"):
        student = cnn()
    with pytest.raises(UserError, match=r"weights of 'the student' are on the meta device, .* and load weights first"):
        kdzoo.distill(student, cnn(), "kd", num_classes=5, image_size=32)


def test_networks_of_other_classes_are_an_error():
    with pytest.raises(UserError, match="the teacher gives 7 logits, expected 5"):
        Distillation(Net(), Net(classes=7), KD())
    with pytest.raises(UserError, match="the student gives 5 logits, expected 6"):
        Distillation(Net(), Net(), KD(), num_classes=6)
    with pytest.raises(UserError, match="'the teacher' gives 7 logits, expected 5"):
        Distillation(cnn(), cnn(classes=7), KD(), num_classes=5, image_size=32)


def test_a_method_that_remembers_images_refuses_a_batch_that_does_not_say_which_it_holds():
    labels, index = torch.arange(64) % 5, torch.tensor([9, 8, 7, 6])
    distillation = kdzoo.distill(cnn(), cnn(8), "crd", num_classes=5, image_size=32, labels=labels, negatives=4)
    pictures = torch.rand(4, 3, 32, 32)
    with pytest.raises(UserError, match=r"CRD reads which images .* rows as Batch\.of\(\.\.\., index=\.\.\.\)"):
        distillation(Batch.of(pictures, labels[index], num_classes=5))
    before = distillation.distiller.memory_s.clone()
    distillation(Batch.of(pictures, labels[index], num_classes=5, index=index))
    moved = (distillation.distiller.memory_s != before).any(dim=1).nonzero().flatten()
    assert moved.tolist() == sorted(index.tolist())


def test_a_method_that_reads_labels_asks_for_them():
    with pytest.raises(UserError, match="Labelled reads the labels of the training set; pass labels="):
        Distillation(Net(), Net(), Labelled())
    labels = torch.tensor([3, 1, 4])
    given = Distillation(Net(), Net(), Labelled(), labels=labels, image_size=6).distiller.data
    assert (given.num_classes, given.image_size, given.labels.tolist()) == (5, 6, [3, 1, 4])


def test_distilling_by_name_is_the_same_as_by_class(pictures):
    found = []
    for make in (
        lambda *networks: kdzoo.distill(*networks, "at", num_classes=5, image_size=32, at=10.0, stages=(2, 3)),
        lambda *networks: Distillation(*networks, AT(at=10.0, stages=(2, 3)), num_classes=5, image_size=32),
    ):
        torch.manual_seed(0)
        found.append({name: term.item() for name, term in make(cnn(4), cnn(6))(pictures).items()})
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("method", "keywords", "said"),
    [
        ("kdd", {}, "unknown distiller 'kdd'; did you mean"),
        ("kd", {"temprature": 2.0}, "unknown setting 'temprature'; did you mean temperature"),
        ("kd", {"temperature": 0.0}, "temperature=0.0: expected a number above 0"),
        ("kd", {"temperature": "warm"}, "temperature"),
    ],
)
def test_a_mistake_in_words_is_one_line(method, keywords, said):
    with pytest.raises(UserError, match=said):
        kdzoo.distill(cnn(), cnn(), method, num_classes=5, image_size=32, **keywords)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (KD, "method is the class KD; expected a name, or the path of a file"),
        (KD(), "method is of type KD; expected a name, or the path of a file"),
        (None, "method is of type NoneType; expected a name"),
    ],
    ids=["class", "instance", "None"],
)
def test_a_class_where_a_name_belongs_is_one_line(given, said):
    with pytest.raises(UserError, match=said):
        kdzoo.distill(cnn(), cnn(), given, num_classes=5, image_size=32)
    with pytest.raises(UserError, match=said.replace("method is", "distiller is")):
        kdzoo.run(given, "resnet8", "resnet14")


@pytest.mark.parametrize(
    ("given", "said"), [(KD, "the class KD"), ("kd", "of type str"), (None, "of type NoneType")], ids=repr
)
def test_a_class_or_a_name_where_a_method_belongs_is_one_line(given, said):
    with pytest.raises(UserError, match=f"the distiller is {said}; expected a method with its keywords"):
        Distillation(cnn(), cnn(), given, num_classes=5, image_size=32)


def test_a_batch_of_another_type_is_one_line(pictures):
    distillation = Distillation(cnn(4), cnn(6), KD(), num_classes=5, image_size=32)
    with pytest.raises(UserError, match=r"the batch is of type tuple; expected Batch.of"):
        distillation((pictures.images, pictures.labels))


def test_a_phase_before_training_without_the_views_of_a_method_says_of_which_shape_they_are(pictures):
    distillation = kdzoo.distill(cnn(4), cnn(6), "sskd", num_classes=5, image_size=32)
    with pytest.raises(
        UserError, match=r"SSKD reads rotations of the .*: rotations is \(B, 4, 3, H, W\), turned by 0, 90"
    ):
        distillation.prepare([pictures])


def test_a_batch_without_the_views_of_a_method_is_one_line_that_names_them(pictures):
    distillation = kdzoo.distill(cnn(4), cnn(6), "crld", num_classes=5, image_size=32)
    with pytest.raises(UserError, match=r"CRLD reads weak, strong of the batch's views, and it has none"):
        distillation(pictures)
    views = dict.fromkeys(("weak", "strong"), pictures.images)
    assert all(term.isfinite() for term in distillation(pictures._replace(views=views)).values())


@pytest.mark.parametrize(
    "given",
    ["protocol.epochs=1", {"protocol.epochs": 1}, {"protocol.epochs=1"}, iter(["protocol.epochs=1"])],
    ids=["text", "mapping", "set", "iterator"],
)
def test_overrides_that_are_no_list_are_one_line(given, tmp_path):
    suite = tmp_path / "mine.yaml"
    suite.write_text("{pairs: [[resnet14, resnet8]], distillers: [none, kd]}")
    for begin in (
        lambda: kdzoo.run("none", "resnet8", overrides=given),
        lambda: kdzoo.bench(suite, tmp_path / "out", overrides=given, quiet=True),
        lambda: kdzoo.recommend("resnet14", "resnet8", out=tmp_path / "out", overrides=given, quiet=True),
    ):
        with pytest.raises(UserError, match=r"overrides is of type \w+; expected a list of key=value"):
            begin()


@pytest.mark.parametrize(
    ("method", "keywords"),
    [
        ("lskd", {}),
        ("dkd", {}),
        ("nkd", {}),
        ("dist", {"intra": 0.0}),
        ("figkd", {"standardize": True}),
        ("figkd", {"distance": "cosine"}),
        ("figkd", {"band": "content"}),
    ],
)
def test_a_method_that_teaches_nothing_with_two_classes_says_so(method, keywords):
    distiller = registry.load(method)
    with pytest.raises(UserError, match=r"teaches nothing with 2 classes.*at least 3"):
        toys.distillation(distiller, keywords, classes=2)
    toys.distillation(distiller, keywords, classes=3)


@pytest.mark.parametrize(("method", "keywords"), [("kd", {}), ("dist", {}), ("figkd", {}), ("logitmse", {})])
def test_a_method_that_teaches_with_two_classes_is_not_refused(method, keywords):
    assert toys.distillation(registry.load(method), keywords, classes=2)(toys.batch_of(classes=2))


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda output: nn.LazyLinear(3), r"layer\.weight of Built has no shape when build\(\) is done"),
        (lambda output: nn.Parameter(output.logits), r"layer of Built has a shape and no numbers"),
        (lambda output: nn.Buffer(output.embedding), r"layer of Built has a shape and no numbers"),
    ],
)
def test_what_a_method_builds_has_shapes_and_numbers(make, said):
    class Built(KD):
        logit_terms = ()

        def build(self, student, teacher, data):
            self.layer = make(student)

    with pytest.raises(UserError, match=said):
        Distillation(cnn(), cnn(), Built(), num_classes=5, image_size=32)


@pytest.mark.parametrize(
    ("weights", "needs", "maps", "said"),
    [
        ({"match": 1.0}, Needs(features=False), "features", "its needs say features=False; leave that out of needs"),
        ({"match": 1.0}, Needs(), "preactivations", r"its needs do not .*preactivations=\("),
        ({"match": 1.0}, Needs(preactivations=("teacher",)), "preactivations", "its needs do not name this network"),
        (
            {"ce": 1.0, "kd": 1.0},
            Needs(),
            "features",
            r"its terms with a weight \(ce, kd\) .* in the class logit_terms =",
        ),
        ({"ce": 1.0, "match": 0.0}, Needs(), "features", r"its terms with a weight \(ce\) count"),
        ({}, Needs(), "features", r"no term of it has a weight; give super\(\).__init__ the weight"),
    ],
)
def test_maps_that_are_not_shown_say_why_where_they_are_read(weights, needs, maps, said, batch):
    class Own(Distiller):
        paper, fidelity = "none", Fidelity.EXACT

        def __init__(self):
            self.needs = needs
            super().__init__(**weights)

        def loss(self, student, teacher, batch):
            assert list(getattr(student, maps)) == []
            return {"match": getattr(student, maps)[-1].mean()}

    with pytest.raises(UserError, match=f"^Own reads {maps}, and {said}"):
        Distillation(cnn(), cnn(), Own(), num_classes=5, image_size=32)(batch)


def test_layers_that_would_never_be_built_are_told_with_what_to_write():
    class Own(KD):
        def build(self, student, teacher, data):
            self.layer = nn.Linear(student.embedding.shape[1], 3)

    with pytest.raises(
        UserError, match=r"build\(\) of Own would never be called, as its terms \(ce, kd\).*logit_terms ="
    ):
        Distillation(cnn(), cnn(), Own(), num_classes=5, image_size=32)
    Own.logit_terms = ("ce",)
    assert Distillation(cnn(), cnn(), Own(), num_classes=5, image_size=32).distiller.layer.out_features == 3


def test_images_from_0_to_255_are_told_once_and_normalised_ones_are_not(pictures, recwarn):
    for scale, shift in ((1.0, 0.0), (5.0, -2.0)):
        Distillation(cnn(), cnn(), KD(), num_classes=5, image_size=32)(
            pictures._replace(images=scale * pictures.images + shift)
        )
    assert not recwarn.list
    distillation = Distillation(cnn(), cnn(), KD(), num_classes=5, image_size=32)
    for _ in range(2):
        distillation(pictures._replace(images=(255 * pictures.images).round()))
    assert [str(each.message)[:38] for each in recwarn.list] == ["images of the first batch reach 255, a"]
