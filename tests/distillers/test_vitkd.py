"""Shallow maps that are repeated, and a hidden last map that is restored."""

import numpy as np
import pytest
import torch
from kdzoo.distillers.vitkd import ViTKD, hidden_positions, squared_error
from torch.nn import functional as F

from kdzoo import Output, toys
from kdzoo.errors import UserError


def shown(waves, channels, phase):
    shift = (0.0, 0.5, 0.0, 0.7)
    features = [waves(3, channels, 3, 3, phase=phase + s, dtype=torch.float64) for s in shift]
    return Output(torch.zeros(3, 4), torch.zeros(3, channels), tuple(features))


def test_the_loss_is_that_of_the_authors_code(waves):
    student, teacher = shown(waves, 4, 0.0), shown(waves, 6, 1.0)
    method = ViTKD(hidden=1.0).assemble(student, teacher, toys.data()).double()
    parameters = [method.token]
    parameters += [
        p for module in (method.shallow_aligns, method.deep_align, method.restore) for p in module.parameters()
    ]
    for i, parameter in enumerate(parameters):
        parameter.data.copy_(0.2 * waves(*parameter.shape, phase=0.3 * i, dtype=torch.float64))
    # ViTKDLoss of yzd-v/cls_KD@1e5d48f, mmcls/models/dis_losses/vitkd.py, with these parameters and all hidden
    generated, both = 0.0001531874882141655, 0.0037615553413284895
    assert 3e-6 * method.generated(student, teacher).item() == pytest.approx(generated, rel=1e-6)
    assert 3e-5 * method.mimicked(student, teacher).item() == pytest.approx(both - generated, rel=1e-6)


def test_an_error_is_the_squared_distance_of_an_image(waves):
    f_s, f_t = waves(3, 4, 5, 2, dtype=torch.float64), waves(3, 4, 5, 2, phase=1.0, dtype=torch.float64)
    expected = np.sum((f_s.numpy() - f_t.numpy()) ** 2) / 3
    assert squared_error(f_s, f_t).item() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(("hidden", "kept"), [(0.5, 7), (0.25, 11), (1.0, 0)])
def test_so_many_positions_are_hidden_and_others_in_each_image(waves, hidden, kept):
    torch.manual_seed(0)
    masks = hidden_positions(waves(50, 4, 5, 3), hidden)
    assert masks.shape == (50, 1, 5, 3)
    assert ((~masks).sum(dim=(1, 2, 3)) == kept).all()
    if kept:
        assert len({tuple(mask.flatten().tolist()) for mask in masks}) > 40


def test_every_position_is_hidden_equally_often(waves):
    torch.manual_seed(0)
    often = hidden_positions(waves(1, 1, 4, 4).expand(2000, 1, 4, 4), 0.5).float().mean(dim=0)
    assert (often - 0.5).abs().max() < 0.06  # five standard deviations


def test_the_terms_compare_maps_on_their_common_grids(student, teacher, data, batch):
    method = ViTKD(mimic=0.5, generate=0.25, deep=2).assemble(student, teacher, data())
    torch.manual_seed(3)
    terms = method.loss(student, teacher, batch())
    expected = 0.0
    for stage, side, align in zip((0, 1), (7, 6), method.shallow_aligns, strict=True):
        f_s, f_t = (F.adaptive_avg_pool2d(o.features[stage], side) for o in (student, teacher))
        expected += 0.5 * (align(f_s) - f_t).square().sum().item() / 6
    assert terms["mimic"].item() == pytest.approx(expected, rel=1e-5)
    torch.manual_seed(3)
    f_s, f_t = (F.adaptive_avg_pool2d(o.features[2], 4) for o in (student, teacher))
    seen = method.deep_align(f_s)
    mask = hidden_positions(seen, 0.5)
    restored = method.restore(torch.where(mask, method.token, seen))
    expected = 0.25 * ((restored - f_t).square() * mask).sum().item() / 6 / 0.5
    assert terms["generate"].item() == pytest.approx(expected, rel=1e-5)


def test_nothing_hidden_is_read(waves):
    student, teacher = shown(waves, 4, 0.0), shown(waves, 6, 1.0)
    method = ViTKD(hidden=1.0).assemble(student, teacher, toys.data()).double()
    others = student._replace(features=(*student.features[:3], student.features[3].flip(2)))
    assert method.generated(others, teacher) == method.generated(student, teacher)
    partly = ViTKD(hidden=0.5).assemble(student, teacher, toys.data()).double()
    losses = []
    for given in (student, others):
        torch.manual_seed(0)
        losses.append(partly.generated(given, teacher).item())
    assert losses[0] != losses[1]


def test_equal_widths_need_no_alignment(student, data):
    method = ViTKD().assemble(student, student, data())
    assert not list(method.shallow_aligns.parameters())
    assert not list(method.deep_align.parameters())


@pytest.mark.parametrize(("off", "left"), [("mimic", {"ce", "generate"}), ("generate", {"ce", "mimic"})])
def test_a_weight_of_zero_leaves_its_term_and_its_modules_out(student, teacher, data, batch, off, left):
    method = ViTKD(**{off: 0}).assemble(student, teacher, data())
    assert method.loss(student, teacher, batch()).keys() == left
    both = ViTKD().assemble(student, teacher, data())
    assert len(list(method.parameters())) < len(list(both.parameters()))
    assert not list(ViTKD(mimic=0, generate=0).assemble(student, teacher, data()).parameters())


@pytest.mark.parametrize("wrong", [{"hidden": 0.0}, {"hidden": 1.5}, {"shallow": (4,)}, {"deep": 4}])
def test_values_without_a_meaning_are_refused(student, teacher, data, wrong):
    with pytest.raises(UserError, match="expected"):
        ViTKD(**wrong).assemble(student, teacher, data())
