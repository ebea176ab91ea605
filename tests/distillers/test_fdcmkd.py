"""Bands of frequencies along an embedding's own numbers."""

from itertools import permutations

import numpy as np
import pytest
import torch
from kdzoo.distillers.fdcmkd import FDCMKD, bands, direction_error
from scipy.special import log_softmax

from kdzoo.errors import UserError


def split(x, cut=0.5):
    """Low and high frequencies by sums of cosines and sines."""
    width = x.shape[1]
    highest, n = np.ceil(width // 2 * cut), np.arange(width)
    parts = [np.zeros_like(x), np.zeros_like(x)]
    for k in range(1, width // 2 + 1):
        double = 1 if 2 * k == width else 2
        for wave in (np.cos, np.sin):
            basis = wave(2 * np.pi * k * n / width)
            parts[int(k > highest)] += double * (x @ basis)[:, None] * basis / width
    return parts


def unit(x):
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def bent(x):
    return np.sign(x) * np.log(1 + np.abs(x))


@pytest.mark.parametrize("width", [2, 3, 7, 8, 12])
@pytest.mark.parametrize("cut", [0.0, 0.3, 0.5, 1.0])
def test_the_bands_are_sums_of_waves_and_together_the_centred_embedding(waves, width, cut):
    x = waves(4, width, dtype=torch.float64)
    for found, expected in zip(bands(x, cut), split(x.numpy(), cut), strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-12)
    torch.testing.assert_close(sum(bands(x, cut)), x - x.mean(1, keepdim=True))


def test_the_errors_are_what_a_copy_of_the_authors_code_gives(waves):
    # zxn0710/re-FD-CMKD-main@feda414, FDFilter, norm_feat and log, which split 512 numbers
    student, teacher = (bands(waves(3, 512, phase=phase, dtype=torch.float64), 0.5) for phase in (0.0, 1.0))
    assert direction_error(student[0], teacher[0], loose=False).item() == pytest.approx(0.0018025807987391996, rel=1e-6)
    assert direction_error(student[1], teacher[1], loose=True).item() == pytest.approx(0.0015722290756243508, rel=1e-6)
    assert direction_error(student[1], teacher[1], loose=False).item() != pytest.approx(0.0015722290756243508, rel=1e-3)


def test_over_all_orders_both_bands_have_their_share_of_the_energy(waves):
    x = waves(1, 6, dtype=torch.float64)[0]
    orders = torch.tensor(list(permutations(range(6))))
    low, high = (band.square().sum(1) for band in bands(x[orders], 0.5))
    centred = (x - x.mean()).square().sum()
    torch.testing.assert_close(
        low.mean(), centred * 4 / 5
    )  # two waves, each with a sine, of five that are not the mean
    torch.testing.assert_close(high.mean(), centred / 5)
    assert low.std() > 0.05 * centred  # a single order is another split


def test_the_terms_are_put_together_as_said(student, teacher, data, batch):
    method = FDCMKD(low=2.0, high=3.0, shared=0.5, own=0.25).assemble(student, teacher, data())
    terms = method.loss(student, teacher, batch())
    double = [p.detach().double().numpy() for p in (method.projector.weight, method.projector.bias)]
    e_s = student.embedding.detach().double().numpy() @ double[0].T + double[1]
    seen = [split(e) for e in (e_s, teacher.embedding.detach().double().numpy())]
    low, high = ([unit(parts[band]) for parts in seen] for band in (0, 1))
    assert terms["low"].item() == pytest.approx(2 * np.mean((low[0] - low[1]) ** 2), rel=1e-4)
    assert terms["high"].item() == pytest.approx(3 * np.mean((bent(high[0]) - bent(high[1])) ** 2), rel=1e-4)
    for kind, weight, roles in (("shared", 0.5, (0, 1)), ("own", 0.25, (0,))):
        expected = 0.0
        for number, band in enumerate(("low", "high")):
            linear = method.get_submodule(f"{kind}.{band}.1")
            for role in roles:
                logits = np.maximum(seen[role][number], 0) @ linear.weight.detach().double().numpy().T
                log_p = log_softmax(logits + linear.bias.detach().double().numpy(), axis=1)
                expected -= log_p[range(6), batch().labels].mean()
        assert terms[kind].item() == pytest.approx(weight * expected, rel=1e-5)


def test_equal_directions_have_nothing_to_learn_and_scale_is_of_no_account(waves):
    x, other = waves(4, 8), waves(4, 8, phase=1.0)
    for loose in (False, True):
        assert direction_error(3 * x, x, loose) < 1e-10
        assert direction_error(other, x, loose).item() == pytest.approx(direction_error(5 * other, x, loose).item())
        assert direction_error(other, x, loose) > 0.01


def test_the_loose_error_is_the_smaller_one(waves):
    x, other = waves(4, 8), waves(4, 8, phase=1.0)
    assert direction_error(other, x, loose=True) < direction_error(other, x, loose=False)


def test_equal_widths_need_no_projector_and_keep_their_order(student, data, batch):
    method = FDCMKD(shared=0, own=0).assemble(student, student, data())
    assert not list(method.parameters())
    terms = method.loss(student, student, batch())
    assert terms["low"] == terms["high"] == 0
    mixed = FDCMKD(order="random").assemble(student, student, data())
    assert mixed.loss(student, student, batch())["low"] > 0.001  # each network has an order of its own


def test_state_restores_the_orders(student, teacher, data, batch):
    method, fresh = (FDCMKD(order="random").assemble(student, teacher, data()) for _ in range(2))
    assert method.loss(student, teacher, batch())["low"] != fresh.loss(student, teacher, batch())["low"]
    fresh.load_state_dict(method.state_dict())
    assert method.loss(student, teacher, batch())["low"] == fresh.loss(student, teacher, batch())["low"]


@pytest.mark.parametrize("constant", [0.0, 1.0])
def test_embeddings_without_bands_have_finite_gradients(output, teacher, data, batch, constant):
    student = output(constant=constant)
    sum(FDCMKD().assemble(student, teacher, data()).loss(student, teacher, batch()).values()).backward()
    assert student.embedding.grad.isfinite().all()


def test_a_band_without_frequencies_costs_nothing(waves):
    high = [bands(100 * waves(4, 8, phase=phase), 1.0)[1] for phase in (0.0, 1.0)]
    assert direction_error(*high, loose=True) == 0


def test_a_weight_of_zero_leaves_its_term_and_its_modules_out(student, teacher, data, batch):
    method = FDCMKD(low=0, high=0, shared=0, own=0).assemble(student, teacher, data())
    assert method.loss(student, teacher, batch()).keys() == {"ce"}
    assert not list(method.parameters())
    method = FDCMKD(shared=0, own=0).assemble(student, teacher, data())
    assert method.loss(student, teacher, batch()).keys() == {"ce", "low", "high"}
    assert [name for name, _ in method.named_parameters()] == ["projector.weight", "projector.bias"]


@pytest.mark.parametrize(("keywords", "message"), [({"cut": 1.5}, "cut=1.5"), ({"order": "rand"}, "random")])
def test_a_bad_keyword_is_the_users_error(keywords, message):
    with pytest.raises(UserError, match=message):
        FDCMKD(**keywords)
