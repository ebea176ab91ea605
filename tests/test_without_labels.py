"""Which methods learn without labels, which without a classifier, and what the others say."""

import pytest
import torch
from kdzoo.distillers.at import AT
from kdzoo.distillers.kd import KD
from torch import nn

import kdzoo
from kdzoo import Batch, Distillation, UserError, registry, toys
from kdzoo.engine.micro_batches import micro_batches
from kdzoo.models import wrap

NEED_LABELS = {"ab", "crd", "dctat", "dkd", "fbt", "freekd", "fsp", "nkd", "none", "ofa", "rld", "tfkd"}


def refuses(**lacking):
    found = set()
    for name in registry.names():
        try:
            registry.load(name)().leave_out(**lacking)
        except UserError as error:
            found.add(name if "\n" not in str(error) else f"{name} in several lines")
    return found


def test_exactly_these_methods_need_labels():
    assert refuses(labels=True) == NEED_LABELS


def test_what_is_left_out_is_named_once_and_weighs_nothing():
    method = AT()
    assert method.leave_out(labels=True) == ["ce"]
    assert method.weights["ce"] == 0
    assert method.weights["at"] > 0
    assert method.leave_out(labels=True) == []
    assert KD().leave_out() == []
    assert KD(ce=0.0).leave_out(labels=True) == []


@pytest.mark.parametrize(
    ("method", "keywords"),
    [("dctat", {"guided": False}), ("freekd", {"epochs": 0}), ("ab", {"kd": 1.0}), ("fsp", {"kd": 1.0})],
)
def test_whether_labels_are_needed_may_be_a_matter_of_keywords(method, keywords):
    kind = registry.load(method)
    assert "ce" in kind(**keywords).leave_out(labels=True)
    with pytest.raises(UserError, match="learns from labels, and the data have none; choose another method"):
        kind().leave_out(labels=True)


def test_kd_has_nothing_left_without_its_term_or_without_logits():
    with pytest.raises(UserError, match="KD learns from labels"):
        KD(kd=0.0).leave_out(labels=True)
    with pytest.raises(UserError, match="KD learns from logits, and the teacher has no classifier"):
        KD().leave_out(logits=True)


def test_without_labels_and_without_logits_the_message_names_what_is_lacking_to_the_method():
    with pytest.raises(UserError, match=r"KD learns from logits, .* such as fitnet or pkt"):
        KD().leave_out(labels=True, logits=True)
    with pytest.raises(UserError, match=r"DKD learns from labels, .* such as fitnet or pkt"):
        registry.load("dkd")().leave_out(labels=True, logits=True)
    both = registry.load("uhkd")(kd=1.0)
    assert sorted(both.leave_out(labels=True, logits=True)) == ["ce", "kd"]


def test_a_method_that_reads_labels_in_its_own_term_fails_by_a_clear_message():
    batch = Batch.of(torch.rand(4, 3, 8, 8))
    assert batch.labels is None
    assert batch.targets is None
    assert batch.view_targets is None
    with pytest.raises(UserError, match="learns from labels"):
        toys.distillation(registry.load("dkd"), labelled=False)
    terms = toys.distillation(KD, labelled=False)(batch)
    assert terms.keys() == {"kd"}


def test_a_batch_without_labels_in_a_loop_with_labels_is_one_line():
    batch = Batch.of(torch.rand(4, 3, 8, 8))
    with pytest.raises(UserError, match=r"the batch has no labels.*pass labelled=False"):
        toys.distillation(KD)(batch)
    assert toys.distillation(KD, {"ce": 0.0})(batch).keys() == {"kd"}


def test_a_batch_without_labels_is_cut_as_others_are():
    parts = micro_batches(Batch.of(torch.rand(4, 3, 8, 8)), 2)
    assert [(len(part.images), part.labels, part.targets) for part in parts] == [(2, None, None)] * 2


def backbone(width):
    stages = [nn.Sequential(nn.Conv2d(a, b, 3, 2, 1), nn.ReLU()) for a, b in ((3, width), *[(width, width)] * 3)]
    return nn.Sequential(*stages, nn.AdaptiveAvgPool2d(1), nn.Flatten())


def test_networks_of_ones_own_without_a_classifier_learn_from_their_embedding():
    together = kdzoo.distill(backbone(4), backbone(6), "pkt", num_classes=0, image_size=32, labelled=False)
    assert together.left_out == ["ce"] or "ce" not in together.distiller.weights or not together.distiller.weights["ce"]
    terms = together(Batch.of(torch.rand(4, 3, 32, 32)))
    sum(terms.values()).backward()
    assert together.student.body[0][0].weight.grad.any()
    output = together.deploy()(torch.rand(2, 3, 32, 32))
    assert (output.logits.shape, output.embedding.shape) == ((2, 0), (2, 4))


def test_a_wrapped_backbone_shows_what_it_returns_as_its_embedding():
    body, images = backbone(4).eval(), torch.rand(2, 3, 32, 32)
    network = wrap(body, image_size=32, num_classes=0).eval()
    assert torch.equal(network(images).embedding, body((images - network.mean) / network.std))
    assert not network.has_classifier
    assert network.facts()["classifier"] is False


def test_a_student_with_a_classifier_does_not_fit_a_teacher_without_one():
    teacher = wrap(backbone(6), image_size=32, num_classes=0)
    headed = nn.Sequential(*backbone(4), nn.Linear(4, 5))
    with pytest.raises(UserError, match="logits, expected"):
        Distillation(wrap(headed, image_size=32, num_classes=5), teacher, KD())
