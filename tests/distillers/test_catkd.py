"""CAT-KD: maps of classes, what they weigh, and the networks that have none."""

import numpy as np
import pytest
import torch
from kdzoo.distillers.catkd import CATKD, attention_transfer
from torch.nn import functional as F

from kdzoo import Batch, DataSpec, models
from kdzoo.distillation import Distillation
from kdzoo.errors import UserError

DATA = DataSpec("sines", 10, tuple("abcdefghij"), 32, torch.arange(10))


@pytest.mark.parametrize("normalise", [False, True])
def test_it_is_the_mean_squared_difference_of_maps(waves, normalise):
    maps = [waves(3, 4, 5, phase=phase, dtype=torch.float64) for phase in (0.0, 1.0)]
    s, t = (each.numpy() for each in maps)
    if normalise:
        s, t = (each / np.sqrt((each**2).sum(axis=1, keepdims=True)) for each in (s, t))
    assert attention_transfer(*maps, normalise).item() == pytest.approx(np.mean((s - t) ** 2), rel=1e-9)


def test_normalised_maps_forget_how_strong_a_class_is_and_keep_where_it_is(waves):
    s, t = waves(3, 4, 5), waves(3, 4, 5, phase=1.0)
    strength = torch.linspace(0.5, 2.0, 5)
    torch.testing.assert_close(attention_transfer(s * strength, t, True), attention_transfer(s, t, True))
    assert not torch.isclose(attention_transfer(s * strength, t, False), attention_transfer(s, t, False))
    assert not torch.isclose(attention_transfer(s.roll(1, 1), t, True), attention_transfer(s, t, True))


@pytest.mark.parametrize("name", ["resnet8", "wrn_16_1", "mobilenetv2_half", "swin_pico"])
def test_one_cell_is_the_whole_image_and_its_map_the_logits(name):
    torch.manual_seed(0)
    student, teacher = (models.create(each, DATA) for each in (name, "resnet14"))
    method = CATKD(size=1, cat=2.0).assemble(student.shapes(), teacher.shapes(), DATA)
    batch = Batch.of(torch.rand(4, 3, 32, 32), torch.arange(4), 10)
    term = Distillation(student.eval(), teacher, method)(batch)["cat"]
    expected = 2.0 * F.mse_loss(student(batch.images).logits, teacher(batch.images).logits)
    torch.testing.assert_close(term, expected, rtol=1e-3, atol=1e-6)


def test_without_its_weight_it_asks_for_no_map_and_with_it_a_class_token_is_refused():
    student, token = models.create("resnet8", DATA).shapes(), models.create("vit_pico", DATA).shapes()
    assert not CATKD(cat=0).assemble(student, token, DATA).needs.final
    with pytest.raises(UserError, match="the teacher's are not"):
        CATKD().assemble(student, token, DATA)
    with pytest.raises(UserError, match="size=0: expected"):
        CATKD(size=0).assemble(student, student, DATA)
