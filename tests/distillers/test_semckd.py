"""Attention of the student's stages to the teacher's."""

import numpy as np
import pytest
import torch
from kdzoo.distillers.semckd import ImageCode, SemCKD
from torch.nn import functional as F

from kdzoo import Output, toys
from kdzoo.errors import UserError


def shown(waves, *maps):
    """An output of 6 images with two stages of these channels and sides, and two that are not read."""
    features = [waves(6, c, n, n, phase=phase, dtype=torch.float64) for c, n, phase in maps]
    unread = torch.zeros(6, 1, 1, 1, dtype=torch.float64)
    return Output(torch.zeros(6, 4), torch.zeros(6, 6), (*features, unread, unread))


@pytest.fixture
def pair(waves):
    return shown(waves, (3, 6, 0.0), (4, 3, 0.5)), shown(waves, (5, 4, 1.0), (6, 2, 1.5))


@pytest.fixture
def method(pair, waves):
    """Every parameter has numbers of a closed form, in the order of the authors' modules."""
    method = SemCKD(images=6, stages=(0, 1)).assemble(*pair, toys.data()).double()
    modules = (method.keys, method.queries, method.projectors)
    for i, parameter in enumerate(p for module in modules for p in module.parameters()):
        parameter.data.copy_(0.2 * waves(*parameter.shape, phase=0.3 * i, dtype=torch.float64))
    return method


def test_the_loss_is_that_of_the_authors_code(method, pair):
    # SelfA and SemCKDLoss of DefangChen/SemCKD@ebe5db1, models/util.py and distiller_zoo/SemCKD.py
    assert method.calibrated_error(*pair).item() == pytest.approx(0.7730082493725509, rel=1e-6)


def code(layers, maps):
    rows = maps.reshape(len(maps), -1)
    first, second = ((layer.weight.detach().numpy(), layer.bias.detach().numpy()) for layer in (layers[0], layers[2]))
    vector = np.maximum(rows @ rows.T @ first[0].T + first[1], 0) @ second[0].T + second[1]
    return vector / np.linalg.norm(vector, axis=1, keepdims=True)


def test_the_loss_averages_the_errors_of_all_pairs_under_attention(method, pair):
    method.gamma = 0.5
    method.eval()
    maps = [[f.numpy() for f in output.features[:2]] for output in pair]
    q = [code(c.layers, f) for c, f in zip(method.queries, maps[0], strict=True)]
    k = [code(c.layers, f) for c, f in zip(method.keys, maps[1], strict=True)]
    expected = 0.0
    for i in range(2):
        energy = np.stack([(q[i] * each).sum(axis=1) / 0.5 for each in k], axis=1)
        attention = np.exp(energy) / np.exp(energy).sum(axis=1, keepdims=True)
        for j in range(2):
            f_s, f_t = pair[0].features[i], pair[1].features[j]
            side = min(f_s.shape[2], f_t.shape[2])
            seen = method.projectors[2 * i + j](F.adaptive_avg_pool2d(f_s, side)).detach()
            error = (seen - F.adaptive_avg_pool2d(f_t, side)).square().mean(dim=(1, 2, 3)).numpy()
            expected += (attention[:, j] * error).mean() / 2
    assert method.calibrated_error(*pair).item() == pytest.approx(expected, rel=1e-6)


def test_a_smaller_batch_is_filled_up_and_a_larger_one_is_read_in_part(waves):
    maps = waves(6, 3, 2, 2)
    encode = ImageCode(8)
    rows = maps.flatten(1)
    layers = encode.layers
    expected = F.normalize(layers(torch.cat([rows @ rows.mT, torch.zeros(6, 2)], dim=1)))
    torch.testing.assert_close(encode(maps), expected)
    narrow = ImageCode(4)
    torch.testing.assert_close(narrow(maps), F.normalize(narrow.layers(rows @ rows[:4].mT)))
    others = torch.cat([maps[:4], maps[4:].flip(0)])
    torch.testing.assert_close(narrow(others)[:4], narrow(maps)[:4])
    assert (encode(others)[:4] - encode(maps)[:4]).abs().max() > 1e-4


def test_each_stage_learns_from_all(student, teacher, data, batch):
    method = SemCKD(ce=0, kd=0).assemble(student, teacher, data())
    method.loss(student, teacher, batch())["semckd"].backward()
    assert [f.grad is not None for f in student.features] == [False, True, True, True]
    assert len(method.projectors) == 9
    assert all(p.grad.abs().sum() > 0 for p in method.projectors.parameters())


def test_a_weight_of_zero_leaves_its_term_and_its_modules_out(student, teacher, data, batch):
    method = SemCKD(semckd=0).assemble(student, teacher, data())
    assert method.loss(student, teacher, batch()).keys() == {"ce", "kd"}
    assert not list(method.parameters())


@pytest.mark.parametrize("wrong", [{"gamma": 0.0}, {"images": 0}, {"stages": (1, 1)}])
def test_values_without_a_meaning_are_refused(student, teacher, data, wrong):
    with pytest.raises(UserError, match="expected"):
        SemCKD(**wrong).assemble(student, teacher, data())
