"""The logarithm of a sum of powers of standardised differences."""

import math

import numpy as np
import pytest
import torch
from kdzoo.distillers.srd import SRD, log_power_distance

from kdzoo.errors import UserError


def reference(student, teacher, power):
    z_s, z_t = ((e - e.mean(0)) / np.sqrt(e.var(0) + 1e-4) for e in (student.numpy(), teacher.numpy()))
    return np.log((np.abs(z_s - z_t) ** power).sum())


@pytest.fixture
def pair(waves):
    return waves(6, 5, dtype=torch.float64), waves(6, 5, phase=1.0, dtype=torch.float64)


@pytest.mark.parametrize("power", [1.0, 2.0, 4.0])
def test_it_is_the_logarithm_of_the_sum_of_powers(pair, power):
    assert log_power_distance(*pair, power).item() == pytest.approx(reference(*pair, power), rel=1e-6)
    assert reference(*pair, power) != pytest.approx(reference(*pair, power + 1), rel=1e-2)


def test_it_is_what_the_authors_code_gives_without_its_projector(pair):
    # roymiles/Simple-Recipe-Distillation@31e8477, OurDistillationLoss.forward_loss
    assert log_power_distance(*pair, 4.0).item() == pytest.approx(3.0628245714564275, rel=1e-6)


def test_scale_and_offset_of_each_number_are_of_no_account(pair):
    student, teacher = (10 * e for e in pair)  # so that the 1e-4 in the variance does not count
    scale, offset = torch.linspace(1, 3, 5).double(), torch.linspace(-2, 4, 5).double()
    before = log_power_distance(student, teacher, 4.0).item()
    assert log_power_distance(scale * student + offset, teacher, 4.0).item() == pytest.approx(before, rel=1e-5)
    assert log_power_distance(-student, teacher, 4.0).item() != pytest.approx(before, rel=1e-2)


def test_twice_the_images_add_log_two(pair):
    before, after = log_power_distance(*pair, 4.0), log_power_distance(*(e.repeat(2, 1) for e in pair), 4.0)
    assert (after - before).item() == pytest.approx(math.log(2), rel=1e-6)


def test_the_terms_are_those_of_the_projected_embedding_and_the_logits(student, teacher, data, batch):
    method = SRD(srd=3.0, kd=0).assemble(student, teacher, data())
    projected = student.embedding.double() @ method.projector.weight.double().mT + method.projector.bias.double()
    expected = 3 * reference(projected.detach(), teacher.embedding.detach().double(), 4.0)
    terms = method.loss(student, teacher, batch())
    assert terms["srd"].item() == pytest.approx(expected, rel=1e-4)
    assert terms.keys() == {"ce", "srd"}
    assert method.projector.weight.shape == (5, 10)


@pytest.mark.parametrize("constant", [0.0, 1.0])
def test_gradients_are_finite_for_embeddings_that_do_not_vary(output, data, batch, constant):
    student = output(constant=constant)
    SRD().assemble(student, student, data()).loss(student, student, batch())["srd"].backward()
    assert student.embedding.grad.isfinite().all()


def test_equal_embeddings_have_the_least_loss_and_no_gradient(pair):
    student = pair[0].clone().requires_grad_()
    least = log_power_distance(student, pair[0], 4.0)
    least.backward()
    assert least.item() == pytest.approx(math.log(1e-5))
    assert student.grad.abs().max() == 0


def test_a_weight_of_zero_builds_no_projector(student, teacher, data, batch):
    method = SRD(srd=0).assemble(student, teacher, data())
    assert method.loss(student, teacher, batch()).keys() == {"ce", "kd"}
    assert not list(method.parameters())
    assert not SRD.needs.features


@pytest.mark.parametrize(
    ("keywords", "message"), [({"power": 0.5}, "power=0.5"), ({"temperature": 0}, "temperature=0")]
)
def test_a_bad_keyword_is_the_users_error(keywords, message):
    with pytest.raises(UserError, match=message):
        SRD(**keywords)
