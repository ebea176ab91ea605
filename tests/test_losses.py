"""The losses that methods share, against numpy and scipy in float64."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.special import log_softmax, logsumexp, rel_entr, softmax
from torch import Tensor, distributed
from torch.nn import functional as F

from kdzoo.losses import (
    centred_mse,
    class_or_rest,
    cross_entropy,
    doubling_sum,
    info_nce,
    other_classes_loss,
    row_kl,
    softened_kl,
    standardised,
)
from kdzoo.tensors import all_sum, gather


def waves(*shape: int, phase: float = 0.0) -> Tensor:
    """Numbers of size 1 by a closed form, without a pattern along any axis."""
    t = torch.arange(int(np.prod(shape)), dtype=torch.float64)
    return (torch.sin(1.7 * t + phase) + torch.cos(0.61 * t * t.sqrt() - phase)).reshape(shape)


STUDENT, TEACHER = waves(6, 5), waves(6, 5, phase=1.0)


def test_cross_entropy_weighs_log_probabilities_by_the_targets():
    targets = softmax(waves(6, 5, phase=2.0).numpy(), axis=1)
    expected = -(targets * log_softmax(STUDENT.numpy(), axis=1)).sum(axis=1).mean()
    assert cross_entropy(STUDENT, torch.from_numpy(targets)).item() == pytest.approx(expected, rel=1e-12)


def test_standardised_values_are_those_of_batch_norm_and_one_value_is_no_error():
    values = waves(4, 3, 5, 5)
    seen = standardised(values, (0, 2, 3), 1e-5)
    torch.testing.assert_close(seen, torch.nn.BatchNorm2d(3, affine=False).double()(values))
    assert not torch.allclose(standardised(values, 0, 1e-5), seen, rtol=0.1)
    assert not standardised(waves(1, 3, 1, 1), (0, 2, 3), 1e-5).any()


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_softened_kl_sums_over_classes_and_carries_the_squared_temperature(temperature):
    p_t, p_s = (softmax(z.numpy() / temperature, axis=1) for z in (TEACHER, STUDENT))
    expected = temperature**2 * rel_entr(p_t, p_s).sum(axis=1).mean()
    assert softened_kl(STUDENT, TEACHER, temperature).item() == pytest.approx(expected, rel=1e-9)


def test_softened_kl_runs_from_teacher_to_student():
    there, back = softened_kl(STUDENT, TEACHER, 1.0), softened_kl(TEACHER, STUDENT, 1.0)
    assert not torch.isclose(there, back, rtol=1e-3)


def test_softened_kl_is_a_mean_over_the_batch_and_none_over_classes():
    once = softened_kl(STUDENT, TEACHER, 2.0)
    twice = softened_kl(STUDENT.repeat(2, 1), TEACHER.repeat(2, 1), 2.0)
    torch.testing.assert_close(once, twice)


def test_softened_kl_tends_to_half_the_centred_error_at_high_temperature():
    half = centred_mse(STUDENT, TEACHER) / 2
    torch.testing.assert_close(softened_kl(STUDENT, TEACHER, 1e4), half, rtol=1e-3, atol=0)
    assert not torch.isclose(softened_kl(STUDENT, TEACHER, 1.0), half, rtol=1e-2)


def test_softened_kl_stays_finite_where_a_softmax_underflows():
    student = torch.tensor([[1e4, -1e4], [0.0, 0.0]], requires_grad=True)
    loss = softened_kl(student, torch.tensor([[-1e4, 1e4], [1e4, 0.0]]), 1.0)
    loss.backward()
    assert loss.isfinite()
    assert student.grad.isfinite().all()


def test_centred_mse_is_the_mean_variance_of_the_difference():
    expected = np.var((STUDENT - TEACHER).numpy(), axis=1).mean()
    assert centred_mse(STUDENT, TEACHER).item() == pytest.approx(expected, rel=1e-12)


def test_centred_mse_does_not_see_a_constant():
    shifted = STUDENT + waves(6, 1)
    torch.testing.assert_close(centred_mse(shifted, TEACHER), centred_mse(STUDENT, TEACHER))
    assert not torch.isclose(F.mse_loss(shifted, TEACHER), F.mse_loss(STUDENT, TEACHER), rtol=1e-2)


def contrast(similarities: np.ndarray) -> float:
    """The mean over rows of -log of the diagonal's share."""
    return float(np.mean(logsumexp(similarities, axis=1) - np.diag(similarities)))


def test_info_nce_is_minus_the_log_share_of_the_positive():
    expected = contrast((STUDENT @ TEACHER.T).numpy() / 0.5)
    assert info_nce(STUDENT, TEACHER, 0.5).item() == pytest.approx(expected, rel=1e-12)


def test_info_nce_lets_masked_pairs_go_and_keeps_the_positive():
    similarities = (STUDENT @ TEACHER.T).numpy() / 0.5
    away = np.where(np.eye(6), -np.inf, similarities)
    nearest = np.arange(6), away.argmax(axis=1)
    mask = torch.eye(6, dtype=torch.bool)
    mask[nearest] = True
    similarities[nearest] = -np.inf
    loss = info_nce(STUDENT, TEACHER, 0.5, mask)
    assert loss.item() == pytest.approx(contrast(similarities), rel=1e-12)
    assert not torch.isclose(loss, info_nce(STUDENT, TEACHER, 0.5), rtol=1e-4)


def test_info_nce_repels_further_keys():
    more = torch.cat([TEACHER, waves(3, 5, phase=2.0)])
    expected = contrast((STUDENT @ more.T).numpy() / 0.5)
    assert info_nce(STUDENT, more, 0.5).item() == pytest.approx(expected, rel=1e-12)


def test_info_nce_with_all_negatives_masked_is_zero():
    assert info_nce(STUDENT, TEACHER, 0.1, torch.ones(6, 6, dtype=torch.bool)) == 0


def test_row_kl_is_the_divergence_of_each_row_from_teacher_to_student():
    p_t, p_s = (softmax(z.numpy(), axis=1) for z in (TEACHER, STUDENT))
    np.testing.assert_allclose(row_kl(STUDENT, TEACHER).numpy(), rel_entr(p_t, p_s).sum(axis=1), rtol=1e-9)
    assert not np.allclose(row_kl(TEACHER, STUDENT).numpy(), rel_entr(p_t, p_s).sum(axis=1), rtol=1e-3)


def test_class_or_rest_is_a_classs_probability_and_what_is_left_also_where_that_rounds_to_0():
    chosen = torch.arange(5) == torch.tensor([0, 1, 2, 3, 4, 0])[:, None]
    p = softmax(STUDENT.numpy(), axis=1)[chosen.numpy()]
    np.testing.assert_allclose(class_or_rest(STUDENT, chosen).exp().numpy(), np.stack([p, 1 - p], axis=1), rtol=1e-9)
    sure = torch.tensor([[60.0, 0.0, 0.0]])
    assert (1 - sure.softmax(dim=1)[0, 0]).log().isinf()
    assert class_or_rest(sure, sure > 0)[0, 1].item() == pytest.approx(np.log(2) - 60)


def test_other_classes_loss_compares_the_classes_that_are_kept_and_no_others():
    dropped = STUDENT > 0.5
    assert dropped.any(dim=1).all()
    rows = []
    for s, t, gone in zip(STUDENT.numpy(), TEACHER.numpy(), dropped.numpy(), strict=True):
        s, t = (np.exp(z[~gone] / 2) for z in (s, t))
        rows.append(rel_entr(t / t.sum(), s / s.sum()).sum())
    found = other_classes_loss(STUDENT, TEACHER, dropped, 2.0).item()
    assert found == pytest.approx(4 * np.mean(rows), rel=1e-9)
    assert other_classes_loss(STUDENT + 3 * dropped, TEACHER - 2 * dropped, dropped, 2.0).item() == pytest.approx(found)
    assert found != pytest.approx(softened_kl(STUDENT, TEACHER, 2.0).item(), rel=1e-2)


def test_other_classes_loss_is_0_for_rows_with_one_class_or_none():
    student = STUDENT.clone().requires_grad_()
    for dropped in (torch.ones(6, 5, dtype=torch.bool), torch.arange(5).expand(6, 5) > 0):
        loss = other_classes_loss(student, TEACHER, dropped, 2.0)
        (gradient,) = torch.autograd.grad(loss, student)
        assert loss.item() == 0
        assert not gradient.any()
    assert other_classes_loss(student, TEACHER, torch.arange(5).expand(6, 5) > 1, 2.0).item() > 0


@pytest.mark.parametrize(
    "loss",
    [
        lambda s, t: cross_entropy(s, t.softmax(1)),
        lambda s, t: softened_kl(s, t, 3.0),
        centred_mse,
        lambda s, t: info_nce(s, t, 0.5),
        row_kl,
        lambda s, t: class_or_rest(s, t > 1),
        lambda s, t: other_classes_loss(s, t, t > 1, 2.0),
    ],
    ids=["cross_entropy", "softened_kl", "centred_mse", "info_nce", "row_kl", "class_or_rest", "other_classes_loss"],
)
def test_gradients_are_those_of_the_values_and_half_precision_is_left_behind(loss):
    assert torch.autograd.gradcheck(lambda s: loss(s, TEACHER), (STUDENT.clone().requires_grad_(),))
    assert loss(STUDENT.bfloat16(), TEACHER.bfloat16()).dtype == torch.float32


def test_without_a_process_group_a_rank_is_alone():
    assert gather(STUDENT) is STUDENT
    assert all_sum(STUDENT) is STUDENT


def in_two_ranks(rank: int, folder: str) -> None:
    """What each of two processes sees of a tensor that holds its rank."""
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    mine = torch.full((2, 1), float(rank), requires_grad=True)
    everyone = gather(mine)
    (everyone * torch.tensor([[1.0], [2.0], [30.0], [40.0]])).sum().backward()
    torch.save((everyone.detach(), mine.grad, all_sum(mine)), f"{folder}/{rank}")
    distributed.destroy_process_group()


@pytest.mark.slow(reason="starts processes, each of which imports torch")
def test_two_ranks_see_each_other_own_rows_first_and_own_gradient_only(tmp_path: Path):
    ranks = [subprocess.Popen([sys.executable, __file__, str(rank), str(tmp_path)]) for rank in (0, 1)]
    assert [process.wait() for process in ranks] == [0, 0]
    for rank in (0, 1):
        everyone, gradient, total = torch.load(tmp_path / str(rank))
        assert everyone.flatten().tolist() == [rank, rank, 1 - rank, 1 - rank]
        assert gradient.flatten().tolist() == [1, 2]
        assert total.flatten().tolist() == [1, 1]


if __name__ == "__main__":
    in_two_ranks(int(sys.argv[1]), sys.argv[2])


def test_each_stage_counts_twice_as_much_as_the_one_before_it():
    assert doubling_sum([torch.tensor(value) for value in (4.0, 10.0, 3.0)]) == 4 / 4 + 10 / 2 + 3
    assert doubling_sum([torch.tensor(5.0)]) == 5
