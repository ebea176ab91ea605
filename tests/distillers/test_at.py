"""Attention transfer."""

import numpy as np
import pytest
import torch
from kdzoo.distillers.at import AT, attention_loss, attention_map
from torch.nn import functional as F

from kdzoo.errors import UserError


def attention(maps, p):
    q = (np.abs(maps) ** p).mean(axis=1).reshape(len(maps), -1)
    return q / np.linalg.norm(q, axis=1, keepdims=True)


@pytest.mark.parametrize("p", [1.0, 2.0, 3.0])
def test_a_stage_is_the_mean_squared_error_of_normalised_attention(waves, p):
    f_s, f_t = waves(3, 4, 5, 2, dtype=torch.float64), waves(3, 7, 5, 2, phase=1.0, dtype=torch.float64)
    expected = np.mean((attention(f_s.numpy(), p) - attention(f_t.numpy(), p)) ** 2)
    assert attention_loss(f_s, f_t, p).item() == pytest.approx(expected, rel=1e-9)


def test_the_term_is_the_sum_of_stages_on_their_common_grids(student, teacher, data, batch):
    term = AT(at=10.0, stages=(0, 2)).assemble(student, teacher, data()).loss(student, teacher, batch())["at"]
    expected = 0.0
    for stage, side in ((0, 7), (2, 4)):
        pair = (F.adaptive_avg_pool2d(o.features[stage].detach().double(), side).numpy() for o in (student, teacher))
        a_s, a_t = (attention(maps, 2) for maps in pair)
        expected += 10 * np.mean((a_s - a_t) ** 2)
    assert term.item() == pytest.approx(expected, rel=1e-5)


def test_attention_is_blind_to_scale_sign_and_order_of_channels_and_to_nothing_else(waves):
    maps = waves(3, 4, 5, 2)
    expected = attention_map(maps, 2.0)
    for other in (maps * 3, -maps, maps[:, [2, 0, 3, 1]], maps.repeat(1, 2, 1, 1)):
        torch.testing.assert_close(attention_map(other, 2.0), expected)
    assert (attention_map(maps.flip(2), 2.0) - expected).abs().max() > 0.01


def test_one_position_has_nothing_to_match(waves):
    assert attention_loss(waves(3, 4, 1, 1), waves(3, 2, 1, 1, phase=1.0), 2.0) == 0


@pytest.mark.parametrize("p", [1.0, 2.0])
@pytest.mark.parametrize("constant", [0.0, 1.0])
def test_gradients_are_finite_for_constant_maps(output, teacher, data, batch, constant, p):
    student = output(constant=constant)
    AT(p=p).assemble(student, teacher, data()).loss(student, teacher, batch())["at"].backward()
    assert all(f.grad.isfinite().all() for f in student.features[1:])


def test_a_weight_of_zero_leaves_its_term_out(student, teacher, data, batch):
    method = AT(at=0).assemble(student, teacher, data())
    assert method.loss(student, teacher, batch()).keys() == {"ce"}
    assert not method.needs.features
    assert AT(ce=0).assemble(student, teacher, data()).loss(student, teacher, batch()).keys() == {"at"}


@pytest.mark.parametrize(("keywords", "message"), [({"p": 0.5}, "p=0.5"), ({"stages": ()}, "stages")])
def test_a_bad_keyword_is_the_users_error(student, teacher, data, keywords, message):
    with pytest.raises(UserError, match=message):
        AT(**keywords).assemble(student, teacher, data())
