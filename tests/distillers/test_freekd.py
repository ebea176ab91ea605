"""Matching of wavelet detail under the masks of trained prompts."""

import numpy as np
import pytest
import pywt
import torch
from kdzoo.distillers.freekd import FreeKD, masked_distance, overlap, prompt_masks

from kdzoo.errors import UserError

GRIDS = ((4, 16, 16), (5, 7, 5), (6, 2, 2), (3, 1, 1))


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def reference_masks(band, prompts):
    """Where prompts (P, C) look in a band (B, C, H, W), or in three (B, C, 3, H, W), by numpy."""
    summed = band.sum(axis=2) if band.ndim == 5 else band
    return sigmoid(np.einsum("pc,bchw->bphw", prompts, summed))


def reference_distance(student, teacher, prompts):
    """The authors' loss of one level: every mask times every channel, then the mean difference."""
    masks = reference_masks(teacher, prompts)[:, :, None]
    masks = masks[:, :, :, None] if teacher.ndim == 5 else masks
    return np.mean(np.abs(student[:, None] * masks - teacher[:, None] * masks))


def by_level(maps, levels):
    """Detail (B, C, 3, H, W), fine to coarse, by PyWavelets."""
    return [np.stack(bands, axis=2) for bands in reversed(pywt.wavedec2(maps, "haar", "reflect", levels)[1:])]


class Counting(list):
    """Batches that know how often they were gone through."""

    rounds = 0

    def __iter__(self):
        self.rounds += 1
        return super().__iter__()


@pytest.fixture
def teacher_net(output):
    """A teacher that shows the same of every batch."""
    seen = output(GRIDS, phase=1.0)
    return lambda images: seen


def prompts_of(method):
    return [method.get_buffer(f"prompts{stage}") for stage in method.stages]


@pytest.mark.parametrize("shape", [(3, 4, 5, 7), (3, 4, 3, 5, 7), (3, 4, 1, 1)])
def test_masked_distances_are_the_authors(waves, shape):
    student, teacher = waves(*shape, dtype=torch.float64), waves(*shape, phase=1.0, dtype=torch.float64)
    prompts = waves(6, 4, dtype=torch.float64)
    masks = prompt_masks(teacher, prompts)
    np.testing.assert_allclose(masks.numpy(), reference_masks(teacher.numpy(), prompts.numpy()), rtol=1e-6)
    expected = reference_distance(student.numpy(), teacher.numpy(), prompts.numpy())
    assert masked_distance(student, teacher, masks).item() == pytest.approx(expected, rel=1e-6)


def test_overlap_is_the_mean_dice_of_different_masks(waves):
    masks = waves(3, 4, 5, 6, dtype=torch.float64).sigmoid()
    expected = []
    for image in masks.flatten(2).numpy():
        for i, first in enumerate(image):
            for j, second in enumerate(image):
                if i != j:
                    expected.append(2 * (first * second).sum() / ((first**2).sum() + (second**2).sum()))
    assert overlap(masks).item() == pytest.approx(np.mean(expected), rel=1e-6)
    assert overlap(masks[:, :1].expand(-1, 3, -1, -1)).item() == pytest.approx(1)
    apart = torch.zeros(1, 2, 1, 2)
    apart[0, 0, 0, 0] = apart[0, 1, 0, 1] = 1
    assert overlap(apart).item() == 0
    assert overlap(masks[:, :1]).item() == 0


def test_the_term_is_the_mean_over_stages_of_what_fits_each(output, data, batch):
    student, teacher = output(GRIDS), output(tuple((4, h, w) for _, h, w in GRIDS), phase=1.0)
    method = FreeKD(detail=2.0, mse=3.0).assemble(student, teacher, data())
    expected, errors = [], []
    for n, levels in enumerate((3, 2, 1, 0)):
        prompts = prompts_of(method)[n].double().numpy()
        assert prompts.shape == (1 + levels, 6, 4)
        f_s = method.projectors[n](student.features[n]).detach().double().numpy()
        f_t = teacher.features[n].detach().double().numpy()
        pairs = [*zip(by_level(f_s, levels), by_level(f_t, levels), strict=True)] if levels else [(f_s, f_t)]
        used = prompts[1:] if levels else prompts
        expected.append(sum(reference_distance(s, t, q) for (s, t), q in zip(pairs, used, strict=True)))
        errors.append(np.mean((f_s - f_t) ** 2))
    terms = method.loss(student, teacher, batch())
    assert terms["detail"].item() == pytest.approx(2 * np.mean(expected), rel=1e-5)
    assert terms["mse"].item() == pytest.approx(3 * np.mean(errors), rel=1e-5)


def test_prompts_are_trained_before_for_so_many_epochs(output, data, batch, teacher_net):
    student, teacher = output(GRIDS), output(GRIDS, phase=1.0)
    for epochs in (0, 1, 3):
        method, batches = FreeKD(epochs=epochs).assemble(student, teacher, data()), Counting([batch(), batch()])
        before = [prompts.clone() for prompts in prompts_of(method)]
        method.prepare(None, teacher_net, batches)
        assert batches.rounds == epochs
        moved = [not torch.equal(*pair) for pair in zip(before, prompts_of(method), strict=True)]
        assert all(moved) if epochs else not any(moved)


def test_each_prompt_learns_also_those_of_detail(output, data, batch, teacher_net):
    method = FreeKD().assemble(output(GRIDS), output(GRIDS, phase=1.0), data())
    before = [prompts.clone() for prompts in prompts_of(method)]
    method.prepare(None, teacher_net, [batch()])
    for old, new in zip(before, prompts_of(method), strict=True):
        assert ((new - old).abs().sum(dim=2) > 1e-4).all()


def test_prompts_part_as_they_learn(output, data, batch, teacher_net):
    torch.manual_seed(0)
    method = FreeKD(stages=(0,), epochs=60).assemble(output(GRIDS), output(GRIDS, phase=1.0), data())
    content = method.bands[0](teacher_net(None).features[0].detach())[0]
    before = overlap(prompt_masks(content, prompts_of(method)[0][0])).item()
    method.prepare(None, teacher_net, [batch()])
    assert overlap(prompt_masks(content, prompts_of(method)[0][0])).item() < before - 0.05


def test_prompts_are_state_and_stay_as_they_are_in_training(output, data, batch, teacher_net):
    student, teacher = output(GRIDS), output(GRIDS, phase=1.0)
    method, fresh = FreeKD().assemble(student, teacher, data()), FreeKD().assemble(student, teacher, data())
    method.prepare(None, teacher_net, [batch()])
    assert not any(prompts.requires_grad for prompts in prompts_of(method))
    method.loss(student, teacher, batch())["detail"].backward()
    assert all(p.grad is not None and p.grad.any() for p in method.parameters())
    fresh.load_state_dict(method.state_dict())
    terms = [m.loss(student, teacher, batch())["detail"].item() for m in (method, fresh)]
    assert terms[0] == terms[1]


def test_masks_choose_where_the_difference_counts(waves):
    teacher, prompts = torch.zeros(1, 1, 2, 2), torch.full((1, 1), 20.0)
    teacher[0, 0, 0, 0], teacher[0, 0, 1, 1] = 1.0, -1.0
    masks = prompt_masks(teacher, prompts)
    shown, hidden = teacher.clone(), teacher.clone()
    shown[0, 0, 0, 0] += 1
    hidden[0, 0, 1, 1] += 1
    assert masked_distance(shown, teacher, masks).item() == pytest.approx(0.25)
    assert masked_distance(hidden, teacher, masks).item() < 1e-6


def test_detail_is_blind_to_the_students_mean(output, data, batch):
    student, teacher = output(GRIDS), output(GRIDS, phase=1.0)
    raised = student._replace(features=tuple(f.detach() + 3 for f in student.features))
    for stages, blind in (((0, 1, 2), True), ((3,), False)):
        method = FreeKD(stages=stages).assemble(student, teacher, data())
        usual, other = (method.loss(s, teacher, batch())["detail"].item() for s in (student, raised))
        assert (other == pytest.approx(usual, rel=1e-4)) is blind


def test_without_the_band_term_there_are_no_prompts_and_no_phase(output, data, batch):
    student, teacher = output(GRIDS), output(GRIDS, phase=1.0)
    batches = Counting([batch()])
    plain, mse = (
        FreeKD(detail=0).assemble(student, teacher, data()),
        FreeKD(detail=0, mse=1.0).assemble(student, teacher, data()),
    )
    for method, terms in ((plain, {"ce"}), (mse, {"ce", "mse"})):
        method.prepare(None, None, batches)
        assert not any("prompts" in name for name, _ in method.named_buffers())
        assert set(method.loss(student, teacher, batch())) == terms
    assert batches.rounds == 0
    assert not plain.needs.features


def test_what_cannot_be_is_refused(student, teacher, data):
    for keywords in ({"levels": 0}, {"prompts": 0}, {"epochs": -1}, {"temperature": 0}):
        with pytest.raises(UserError, match="expected a number"):
            FreeKD(**keywords).assemble(student, teacher, data())
