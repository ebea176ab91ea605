"""The likelihood of the teacher's maps, with a variance that is learned."""

import numpy as np
import pytest
import torch
from kdzoo.distillers.vid import VID, gaussian_loss
from scipy.stats import norm
from torch.nn import functional as F

from kdzoo.errors import UserError


def test_the_loss_is_a_gaussians_negative_log_likelihood_less_its_constant(waves):
    mean, target = waves(3, 4, 5, 2, dtype=torch.float64), waves(3, 4, 5, 2, phase=1.0, dtype=torch.float64)
    variance = torch.tensor([0.5, 1.0, 2.0, 5.0], dtype=torch.float64)
    deviation = variance.sqrt().numpy()[:, None, None]
    expected = -norm.logpdf(target.numpy(), mean.numpy(), deviation).mean() - np.log(2 * np.pi) / 2
    assert gaussian_loss(mean, target, variance).item() == pytest.approx(expected, rel=1e-9)


def test_the_term_is_the_sum_over_stages_on_their_common_grids(student, teacher, data, batch):
    method = VID(vid=0.5, variance=3.0, stages=(0, 2)).assemble(student, teacher, data())
    expected = 0.0
    for index, (stage, side) in enumerate(((0, 7), (2, 4))):
        f_s, f_t = (F.adaptive_avg_pool2d(o.features[stage].detach().double(), side) for o in (student, teacher))
        hidden = f_s.numpy()
        for layer in (0, 2, 4):
            weight = method.regressors[index][layer].weight.detach().double()[:, :, 0, 0].numpy()
            hidden = np.einsum("oc,bchw->bohw", weight, hidden if layer == 0 else np.maximum(hidden, 0))
        expected += 0.5 * np.mean((hidden - f_t.numpy()) ** 2 / 3 + np.log(3)) / 2
    assert method.loss(student, teacher, batch())["vid"].item() == pytest.approx(expected, rel=1e-5)


def test_the_variance_is_among_the_parameters_and_trains_to_the_mean_squared_error(student, teacher, data, batch):
    method = VID(ce=0, stages=(1,)).assemble(student, teacher, data())
    (alpha,) = method.alphas
    assert any(parameter is alpha for parameter in method.parameters())
    assert alpha.shape == teacher.features[1].shape[1:2]
    optimizer = torch.optim.Adam([alpha], lr=0.1)
    for _ in range(300):
        optimizer.zero_grad()
        method.loss(student, teacher, batch())["vid"].backward()
        optimizer.step()
    f_s, f_t = method.grids[0](student.features[1], teacher.features[1])
    errors = (method.regressors[0](f_s) - f_t).square().mean((0, 2, 3))
    torch.testing.assert_close(F.softplus(alpha) + 1e-5, errors, rtol=1e-3, atol=0)
    assert (errors - 5).abs().min() > 0.5  # it came from elsewhere


@pytest.mark.parametrize("variance", [1e-3, 5.0, 1e4])
def test_the_variance_starts_where_it_is_told_to(student, teacher, data, variance):
    for alpha in VID(variance=variance).assemble(student, teacher, data()).alphas:
        expected = torch.full_like(alpha, variance)
        torch.testing.assert_close(F.softplus(alpha) + 1e-5, expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize("constant", [0.0, 1.0])
def test_gradients_are_finite_for_constant_maps(output, teacher, data, batch, constant):
    student = output(constant=constant)
    method = VID().assemble(student, teacher, data())
    method.loss(student, teacher, batch())["vid"].backward()
    assert all(p.grad.isfinite().all() for p in method.parameters())


def test_every_stage_of_the_student_gets_a_gradient(student, teacher, data, batch):
    VID().assemble(student, teacher, data()).loss(student, teacher, batch())["vid"].backward()
    assert all(f.grad.abs().sum() > 0 for f in student.features[1:])


def test_a_weight_of_zero_leaves_its_term_and_its_modules_out(student, teacher, data, batch):
    method = VID(vid=0).assemble(student, teacher, data())
    assert method.loss(student, teacher, batch()).keys() == {"ce"}
    assert not list(method.parameters())
    assert not method.needs.features
    assert VID(ce=0).assemble(student, teacher, data()).loss(student, teacher, batch()).keys() == {"vid"}


@pytest.mark.parametrize(("keywords", "message"), [({"variance": 0}, "variance=0"), ({"stages": (1, 1)}, "stages")])
def test_a_bad_keyword_is_the_users_error(student, teacher, data, keywords, message):
    with pytest.raises(UserError, match=message):
        VID(**keywords).assemble(student, teacher, data())
