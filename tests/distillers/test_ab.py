"""Activation boundaries, and the phase in which the student learns them."""

import numpy as np
import pytest
import torch
from kdzoo.distillers.ab import AB, boundary_loss
from torch import nn
from torch.nn import functional as F

from kdzoo import toys
from kdzoo.errors import UserError
from kdzoo.outputs import EVERYTHING


def reference(student, teacher, margin):
    """The authors' two cases."""
    inactive = (student + margin) ** 2 * ((student > -margin) & (teacher <= 0))
    active = (student - margin) ** 2 * ((student <= margin) & (teacher > 0))
    return (inactive + active).sum() / len(student)


# criterion_alternative_L2 of bhheo/AB_distillation@a7701d3, cifar10_AB_distillation.py, over the 3 images
@pytest.mark.parametrize(("margin", "authors"), [(1.0, 40.53476605577723), (0.5, 19.143896915508886)])
def test_a_stage_is_the_hinge_loss_of_the_teachers_signs(waves, margin, authors):
    f_s, f_t = waves(3, 4, 5, 2, dtype=torch.float64), waves(3, 4, 5, 2, phase=1.0, dtype=torch.float64)
    found = boundary_loss(f_s, f_t, margin).item()
    assert found == pytest.approx(reference(f_s.numpy(), f_t.numpy(), margin), rel=1e-9)
    assert found == pytest.approx(authors, rel=1e-9)


def test_only_signs_of_the_teacher_count(waves):
    f_s, f_t = waves(3, 4, 5, 2), waves(3, 4, 5, 2, phase=1.0)
    expected = boundary_loss(f_s, f_t, 1.0)
    assert boundary_loss(f_s, f_t * 7, 1.0) == expected
    assert boundary_loss(3 * f_t.sign(), f_t, 1.0) == 0
    assert boundary_loss(f_s, -f_t, 1.0) != expected


def test_the_loss_before_training_doubles_from_stage_to_stage(student, teacher, data):
    method = AB(stages=(1, 2, 3)).assemble(student, teacher, data())
    connectors = [nn.Conv2d(a, b, 1) for a, b in ((6, 5), (8, 5), (10, 5))]
    expected = 0.0
    for (stage, side, weight), connect in zip(((1, 6, 0.25), (2, 4, 0.5), (3, 2, 1.0)), connectors, strict=True):
        f_s, f_t = (F.adaptive_avg_pool2d(o.preactivations[stage], side) for o in (student, teacher))
        expected += 0.003 * weight * reference(connect(f_s).detach().double().numpy(), f_t.detach().numpy(), 1.0)
    assert method.boundaries(student, teacher, connectors).item() == pytest.approx(expected, rel=1e-5)


def disagreement(together):
    """The share of positions at which both networks' last maps have other signs; their widths agree."""
    images = toys.batch_of(5, size=16).images
    maps = [network(images, EVERYTHING).preactivations[3] for network in (together.student, together.teacher)]
    return np.mean((maps[0] > 0).numpy() != (maps[1] > 0).numpy())


def test_the_phase_before_training_aligns_signs_and_leaves_the_classifier_alone():
    def pair(**keywords):
        student, teacher = toys.Toy(toys.STUDENT), toys.Toy(toys.STUDENT)
        return toys.distillation(
            AB, {"stages": (3,), "ab": 300.0, "lr": 0.01, **keywords}, student=student, teacher=teacher, prepared=False
        )

    torch.manual_seed(0)
    together = pair(epochs=20)
    before = disagreement(together), together.student.classifier.weight.clone()
    names = [name for name, _ in together.named_parameters()]
    together.prepare([toys.batch_of(seed, size=16) for seed in range(4)])
    assert disagreement(together) < 0.6 * before[0]
    assert torch.equal(together.student.classifier.weight, before[1])
    assert [name for name, _ in together.named_parameters()] == names
    assert all(parameter.grad is None for parameter in together.parameters())
    assert together.student.training


def test_a_weight_of_zero_leaves_the_phase_out():
    together = toys.distillation(AB, {"ab": 0.0}, prepared=False)
    before = [parameter.clone() for parameter in together.student.parameters()]
    together.prepare([toys.batch_of()])
    assert all(torch.equal(a, b) for a, b in zip(before, together.student.parameters(), strict=True))
    assert not together.distiller.needs.features


def test_training_itself_reads_logits_alone(student, teacher, data, batch):
    method = AB(kd=1.0).assemble(student, teacher, data())
    assert method.loss(student, teacher, batch()).keys() == {"ce", "kd"}
    assert not list(method.parameters())
    assert AB().assemble(student, teacher, data()).loss(student, teacher, batch()).keys() == {"ce"}


@pytest.mark.parametrize("wrong", [{"epochs": 0}, {"margin": 0.0}, {"lr": 0.0}, {"stages": (0, 4)}])
def test_values_without_a_meaning_are_refused(student, teacher, data, wrong):
    with pytest.raises(UserError, match="expected"):
        AB(**wrong).assemble(student, teacher, data())


def test_networks_that_hide_their_preactivations_are_refused(student, teacher, data):
    with pytest.raises(UserError, match=r"let its stages end in torch\.nn\.ReLU"):
        AB().assemble(student._replace(preactivations=()), teacher, data())
