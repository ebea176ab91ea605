"""Frequency attention: learned filters, the review of stages, and its mask."""

import numpy as np
import pytest
import torch
from kdzoo.distillers.famkd import FAMKD, FrequencyAttention, Review, local_attention
from torch.nn import functional as F

from kdzoo.errors import UserError
from kdzoo.spectral import frequency_filter, high_pass


@pytest.mark.parametrize("grid", [(4, 4), (7, 5), (1, 1)])
def test_the_filter_mixes_channels_at_each_frequency(waves, grid):
    maps, weight = waves(2, 3, *grid, dtype=torch.float64), waves(3, 4, *grid, 2, dtype=torch.float64)
    mask = high_pass(*grid, 1.0)
    spectrum = np.fft.fft2(maps.numpy(), norm="ortho")
    mixed = np.zeros((2, 4, *grid), complex)
    for i in range(3):
        for o in range(4):
            mixed[:, o] += spectrum[:, i] * (weight[i, o, ..., 0] + 1j * weight[i, o, ..., 1]).numpy()
    expected = np.fft.ifft2(mixed * mask.numpy(), norm="ortho").real
    np.testing.assert_allclose(frequency_filter(maps, weight, mask).numpy(), expected, rtol=1e-6, atol=1e-12)


def test_the_depthwise_filter_is_the_full_one_without_what_mixes(waves):
    maps, weight, mask = waves(2, 3, 7, 5), waves(3, 7, 5, 2), high_pass(7, 5, 1.0)
    full = torch.zeros(3, 3, 7, 5, 2)
    for channel in range(3):
        full[channel, channel] = weight[channel]
    ours, theirs = (frequency_filter(maps, w, mask) for w in (weight, full))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_the_filter_reads_weights_in_any_memory_format(waves):
    maps, weight, mask = waves(2, 3, 7, 5), waves(3, 7, 5, 2), high_pass(7, 5, 1.0)
    last = weight.contiguous(memory_format=torch.channels_last)
    assert last.stride() != weight.stride()
    assert torch.equal(frequency_filter(maps, last, mask), frequency_filter(maps, weight, mask))


@pytest.mark.parametrize("side", [2, 4, 7, 8, 14, 32])
def test_the_mask_clears_the_mean_on_any_grid(side):
    attend = FrequencyAttention(3, (side, side), 1.0, "full")
    flat = torch.ones(1, 3, side, side)
    assert frequency_filter(flat, attend.weight, attend.mask).abs().max() < 1e-5
    half = int(0.1 * (side // 2))  # of the published square, which is empty on small maps
    cleared = np.zeros((side, side), bool)
    cleared[side // 2 - half : side // 2 + half, side // 2 - half : side // 2 + half] = True
    assert cleared.any() == (side >= 20)
    unmasked = FrequencyAttention(3, (side, side), -1.0, "full").mask
    assert frequency_filter(flat, attend.weight, unmasked).abs().max() > 0.01


def test_a_single_position_is_not_masked_away():
    attend = FrequencyAttention(3, (1, 1), 1.0, "full")
    assert frequency_filter(torch.ones(1, 3, 1, 1), attend.weight, attend.mask).abs().min() > 0


def test_local_attention_is_a_softmax_over_nine_neighbours_by_channel(waves):
    query, key, value = (waves(2, 5, 4, 3, phase=p, dtype=torch.float64) for p in (0.0, 1.0, 2.0))
    rows, columns = waves(2, 3, dtype=torch.float64), waves(3, 3, phase=1.0, dtype=torch.float64)
    q, k, v = (x.numpy() for x in (query, *(F.pad(x, (1, 1, 1, 1)) for x in (key, value))))
    expected = np.zeros_like(q)
    for b, c, y, x in np.ndindex(*q.shape):
        offset = rows[c].numpy()[:, None] if c < 2 else columns[c - 2].numpy()[None]
        scores = np.exp(q[b, c, y, x] * (k[b, c, y : y + 3, x : x + 3] + offset))
        expected[b, c, y, x] = (scores / scores.sum() * v[b, c, y : y + 3, x : x + 3]).sum()
    seen = local_attention(query, key, value, rows, columns)
    np.testing.assert_allclose(seen.numpy(), expected, rtol=1e-6)


def test_half_of_each_branch_at_first(waves):
    maps, attend = waves(2, 3, 4, 4), FrequencyAttention(3, (4, 4), 1.0, "full")
    expected = 0.5 * frequency_filter(maps, attend.weight, attend.mask) + 0.5 * attend.convolve(maps)
    torch.testing.assert_close(attend(maps), expected)


@pytest.mark.parametrize(
    ("channels", "grid", "numbers"),
    [(64, (56, 56), 64 * 64 * 56 * 56), (512, (7, 7), 512 * 512 * 7 * 7), (768, (14, 14), 768 * 14 * 14)],
)
def test_weights_mix_channels_as_long_as_they_are_few(channels, grid, numbers):
    with torch.device("meta"):
        attend = FrequencyAttention(channels, grid, 1.0, "auto")
    assert attend.weight.numel() == 2 * numbers
    assert not any(p.is_complex() for p in attend.parameters())


def test_the_term_is_the_sum_of_errors_of_reviewed_stages_the_deepest_first(student, teacher, data, batch):
    method = FAMKD(fam=2.0, warmup=0, stages=(1, 3)).assemble(student, teacher, data()).eval()
    expected, deeper = 0.0, None
    pairs = [(o.embedding[:, :, None, None], o.features[3], o.features[1]) for o in (student, teacher)]
    for f_s, f_t, review in zip(*pairs, method.reviews, strict=True):
        seen, deeper = review(f_s, deeper)
        expected += (seen - f_t).square().mean().item()
    terms = method.loss(student, teacher, batch())
    assert terms["fam"].item() == pytest.approx(2 * expected, rel=1e-5)


def test_stages_come_deep_first_in_whatever_order_they_are_given(student, teacher, data, batch):
    terms = []
    for stages in ((0, 2, 3), (3, 0, 2)):
        torch.manual_seed(0)
        method = FAMKD(warmup=0, stages=stages).assemble(student, teacher, data()).eval()
        terms.append(method.loss(student, teacher, batch())["fam"].item())
    assert terms[0] == terms[1]


def test_what_is_deeper_is_heard_above(waves):
    maps = waves(2, 4, 8, 8)
    review = Review(maps, waves(1, 6, 5, 5), deeper=6, cutoff=1.0, mixing="full").eval()
    seen = [review(maps, waves(2, 6, 2, 2, phase=p))[0] for p in (0.0, 1.0)]
    assert not torch.allclose(*seen, atol=1e-4)
    assert seen[0].shape == (2, 6, 5, 5)


def test_the_term_grows_over_the_warmup(student, teacher, data, batch):
    method = FAMKD(warmup=0.2).assemble(student, teacher, data()).eval()
    batches = {p: batch()._replace(progress=torch.tensor(p)) for p in (0, 0.1, 0.2, 0.9)}
    at = {p: method.loss(student, teacher, given)["fam"].item() for p, given in batches.items()}
    assert at[0] == 0
    assert at[0.1] == pytest.approx(at[0.9] / 2, rel=1e-5)
    assert at[0.2] == pytest.approx(at[0.9], rel=1e-5)


@pytest.mark.parametrize("mixing", ["full", "depthwise"])
def test_all_that_trains_gets_a_gradient(student, teacher, data, batch, mixing):
    method = FAMKD(warmup=0, mixing=mixing).assemble(student, teacher, data())
    method.loss(student, teacher, batch())["fam"].backward()
    missing = [name for name, p in method.named_parameters() if p.grad is None or not p.grad.any()]
    assert not missing
    assert all(f.grad.any() for f in student.features)


@pytest.mark.parametrize("constant", [None, 0.0, 1.0])
def test_any_pair_of_maps_is_finite(output, data, batch, constant):
    student = output(((3, 7, 5), (4, 5, 7), (5, 3, 1), (6, 1, 1)), constant=constant)
    teacher = output(((5, 3, 8),) * 4, constant=constant)
    method = FAMKD(warmup=0).assemble(student, teacher, data())
    method.loss(student, teacher, batch())["fam"].backward()
    assert all(f.grad.isfinite().all() for f in student.features)
    assert all(p.grad.isfinite().all() for p in method.parameters())


def test_what_cannot_be_is_refused(student, teacher, data):
    for keywords, message in (
        ({"mixing": "ful"}, "did you mean full"),
        ({"warmup": 20.0}, "warmup=20.0: expected a share"),
        ({"temperature": 0}, "temperature=0"),
    ):
        with pytest.raises(UserError, match=message):
            FAMKD(**keywords).assemble(student, teacher, data())
