"""Denoising of student features by a diffusion model of the teacher's."""

import math

import numpy as np
import pytest
import torch
from kdzoo.distillers.diffkd import TIMES, DiffKD, Diffusion, less_noisy, noisy, signal_shares
from torch import nn
from torch.nn import functional as F

from kdzoo.errors import UserError


@pytest.fixture
def drawn(waves, monkeypatch):
    """Random numbers by a closed form: noise of the phases 1, 2 ... and the times 0, 250, 700 and 999."""
    calls = []

    def noise(maps):
        calls.append(maps)
        return waves(*maps.shape, phase=float(len(calls)), dtype=maps.dtype)

    monkeypatch.setattr(torch, "randn_like", noise)
    monkeypatch.setattr(torch, "randint", lambda most, shape, device: torch.tensor([0, 250, 700, 999]))
    return calls


@pytest.fixture
def filled(waves):
    """A module in double precision whose parameters are a closed form."""

    def fill(module, phase):
        with torch.no_grad():
            for i, p in enumerate(module.double().parameters()):
                p.copy_(0.3 * waves(*p.shape, phase=phase + 0.1 * i))
        return module

    return fill


@pytest.fixture
def diffusion(filled, waves):
    def build(inputs, channels, spatial):
        made = Diffusion(inputs, channels, 5, spatial).double()
        for phase, module in enumerate((made.align, made.noise, made.clean_share, made.refine)):
            filled(module, float(phase))
        with torch.no_grad():
            made.times.weight.copy_(0.3 * waves(TIMES, channels, phase=5.0))
        return made

    return build


def test_maps_are_denoised_and_noise_is_predicted_as_by_the_authors_code(drawn, diffusion, filled, waves):
    # hunto/image_classification_sota@6f7a70a, lib/models/losses/diffkd, with the same parameters and draws
    made = diffusion(6, 8, spatial=True)
    encoder = filled(nn.Sequential(nn.Conv2d(12, 8, 1), nn.BatchNorm2d(8)), 6.0)
    decoder = filled(nn.Conv2d(8, 12, 1), 7.0)
    student, teacher = (waves(4, c, 3, 3, phase=phase, dtype=torch.float64) for c, phase in ((6, 8.0), (12, 9.0)))
    code, refined = encoder(teacher), made(student)
    first = [-0.08508793616421696, -0.31683557537916296, -0.6140933060184016]
    np.testing.assert_allclose(refined.detach().flatten()[:3], first, rtol=1e-5)
    assert refined.abs().mean().item() == pytest.approx(0.41114994094966223, rel=1e-6)
    assert F.mse_loss(refined, code).item() == pytest.approx(0.9570154448057863, rel=1e-6)
    assert made.error(code).item() == pytest.approx(1.1352766553352973, rel=1e-6)
    assert F.mse_loss(decoder(code), teacher).item() == pytest.approx(1.4558302069457032, rel=1e-6)
    assert len(drawn) == 2


def test_logits_are_denoised_as_by_the_authors_code(drawn, diffusion, waves):
    made = diffusion(5, 5, spatial=False)
    student, teacher = (waves(4, 5, 1, 1, phase=phase, dtype=torch.float64) for phase in (8.0, 9.0))
    refined = made(student)
    first = [0.015951957077306136, -1.0006250396622727, 0.14790736087602666]
    np.testing.assert_allclose(refined.detach().flatten()[:3], first, rtol=1e-5)
    assert made.error(teacher).item() == pytest.approx(1.1005045983846338, rel=1e-6)


def test_the_signals_share_falls_from_almost_one_to_almost_nothing():
    shares, betas = signal_shares(), np.linspace(1e-4, 0.02, 1000)
    np.testing.assert_allclose(shares, np.cumprod(1 - betas), rtol=1e-9)
    assert shares[0].item() == pytest.approx(1 - 1e-4)
    assert shares[-1] < 1e-4


def test_a_step_with_the_true_noise_leads_to_any_other_share_exactly(waves):
    clean, noise = waves(3, 4, 2, 2, dtype=torch.float64), waves(3, 4, 2, 2, phase=1.0, dtype=torch.float64)
    maps = noisy(clean, noise, torch.full((3,), 0.3, dtype=torch.float64))
    torch.testing.assert_close(maps, math.sqrt(0.3) * clean + math.sqrt(0.7) * noise)
    step = less_noisy(maps, noise, 0.3, 0.8)
    torch.testing.assert_close(step, noisy(clean, noise, torch.full((3,), 0.8, dtype=torch.float64)))
    torch.testing.assert_close(less_noisy(step, noise, 0.8, 1.0), clean)
    assert not torch.allclose(less_noisy(step, noise.flip(0), 0.8, 1.0), clean, atol=0.1)


def test_denoising_visits_the_less_noisy_half_of_the_times():
    shares = signal_shares()
    steps = Diffusion(2, 2, 5, spatial=False).steps
    assert [time for time, _, _ in steps] == [400, 300, 200, 100, 0]
    assert [signal for _, signal, _ in steps] == [shares[time].item() for time in (400, 300, 200, 100, 0)]
    assert [after for _, _, after in steps] == [*(shares[time].item() for time in (300, 200, 100, 0)), 1.0]
    assert [time for time, _, _ in Diffusion(2, 2, 1, spatial=False).steps] == [0]


def test_the_terms_are_put_together_as_said(student, teacher, data, batch):
    method = DiffKD(feature=2.0, logit=3.0, diffusion=0.5, autoencoder=0.25, channels=8).assemble(
        student, teacher, data()
    )
    torch.manual_seed(1)
    terms = method.loss(student, teacher, batch())
    torch.manual_seed(1)
    f_s, f_t = (F.adaptive_avg_pool2d(o.features[3], 2) for o in (student, teacher))
    code = method.encoder(f_t)
    assert terms["feature"].item() == pytest.approx(2 * F.mse_loss(method.map_diffusion(f_s), code).item(), rel=1e-5)
    assert terms["autoencoder"].item() == pytest.approx(F.mse_loss(method.decoder(code), f_t).item() / 4, rel=1e-5)
    refined = method.logit_diffusion(student.logits[:, :, None, None]).flatten(1).double()
    kl = F.kl_div(refined.log_softmax(1), teacher.logits.double().softmax(1), reduction="batchmean").item()
    assert terms["logit"].item() == pytest.approx(3 * kl, rel=1e-4)
    errors = method.map_diffusion.error(code) + method.logit_diffusion.error(teacher.logits[:, :, None, None])
    assert terms["diffusion"].item() == pytest.approx(0.5 * errors.item(), rel=1e-5)


def test_only_the_autoencoders_error_teaches_the_autoencoder_and_only_two_terms_the_student(
    student, teacher, data, batch
):
    method = DiffKD(channels=8).assemble(student, teacher, data())
    taught = {}
    for name, term in method.loss(student, teacher, batch()).items():
        wanted = [*method.encoder.parameters(), student.features[3], student.logits]
        grads = torch.autograd.grad(term, wanted, allow_unused=True, retain_graph=True)
        taught[name] = [grads[0] is not None, grads[-2] is not None, grads[-1] is not None]
    assert taught == {
        "ce": [False, False, True],
        "feature": [False, True, False],
        "autoencoder": [True, False, False],
        "logit": [False, False, True],
        "diffusion": [False, False, False],
    }


def test_the_noise_of_known_features_can_be_learned(waves):
    torch.manual_seed(0)
    made, features = Diffusion(2, 4, 5, spatial=True), waves(32, 4, 2, 2)
    optimizer = torch.optim.Adam(made.parameters(), lr=0.01)
    errors = []
    for _ in range(60):
        optimizer.zero_grad()
        error = made.error(features)
        error.backward()
        optimizer.step()
        errors.append(error.item())
    assert np.mean(errors[-10:]) < 0.8 * np.mean(errors[:3])


def test_twice_the_teachers_channels_are_the_code_where_none_is_given(student, teacher, data):
    method = DiffKD(channels=None).assemble(student, teacher, data())
    assert method.encoder[0].weight.shape == (10, 5, 1, 1)


@pytest.mark.parametrize("constant", [0.0, 1.0])
def test_gradients_are_finite_for_constants(output, teacher, data, batch, constant):
    student = output(constant=constant)
    method = DiffKD(channels=8).assemble(student, teacher, data())
    sum(method.loss(student, teacher, batch()).values()).backward()
    assert student.features[3].grad.isfinite().all()
    assert student.logits.grad.isfinite().all()


def test_a_weight_of_zero_leaves_its_term_and_its_diffusion_out(student, teacher, data, batch):
    method = DiffKD(feature=0, channels=8).assemble(student, teacher, data())
    assert method.loss(student, teacher, batch()).keys() == {"ce", "logit", "diffusion"}
    assert not method.needs.features
    method = DiffKD(logit=0, channels=8).assemble(student, teacher, data())
    assert method.loss(student, teacher, batch()).keys() == {"ce", "feature", "diffusion", "autoencoder"}
    method = DiffKD(feature=0, logit=0).assemble(student, teacher, data())
    assert method.loss(student, teacher, batch()).keys() == {"ce"}
    assert not list(method.parameters())


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"channels": 0}, "channels=0"),
        ({"steps": 0}, "steps=0"),
        ({"steps": 501}, "steps=501"),
        ({"temperature": 0}, "temperature=0"),
        ({"stage": 4}, "stages"),
    ],
)
def test_a_bad_keyword_is_the_users_error(student, teacher, data, keywords, message):
    with pytest.raises(UserError, match=message):
        DiffKD(**keywords).assemble(student, teacher, data())
