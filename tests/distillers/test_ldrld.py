"""LDRLD: pairs, likeliest classes and the rest against numpy loops, and what each part does not see."""

import numpy as np
import pytest
import torch
from kdzoo.distillers.ldrld import LDRLD, pair_loss, pair_weights
from scipy.special import rel_entr, softmax

from kdzoo.errors import UserError
from kdzoo.losses import softened_kl


def kl(student, teacher):
    return rel_entr(softmax(teacher), softmax(student)).sum()


def reference(student, teacher, depth, temperature):
    """The local and the remaining part, by loops over images and pairs."""
    local, rest = [], []
    for s, t in zip(student.numpy() / temperature, teacher.numpy() / temperature, strict=True):
        order = np.argsort(-s)
        top, others = order[:depth], order[depth:]
        total = kl(s[top], t[top])
        for i in range(len(top)):
            for j in range(i + 1, len(top)):
                pair = top[[i, j]]
                total += 2 * np.exp(-0.05 * (i + j + 2)) / (j - i + 1.5) * kl(s[pair], t[pair])
        local.append(total)
        rest.append(kl(s[others], t[others]) if len(others) else 0)
    return temperature**2 * np.mean(local), temperature**2 * np.mean(rest)


@pytest.mark.parametrize(("classes", "depth"), [(2, 7), (5, 7), (10, 2), (10, 7), (67, 7)])
def test_both_parts_are_the_formula(logits, terms_of, classes, depth):
    student, teacher = logits(0.0, classes), logits(1.0, classes)
    local, rest = reference(student, teacher, depth, 3.0)
    terms = terms_of(LDRLD(local=0.5, rest=2.0, depth=depth, temperature=3.0), student, teacher)
    assert terms["local"].item() == pytest.approx(0.5 * local, rel=1e-6)
    assert terms["rest"].item() == pytest.approx(2 * rest, rel=1e-6)


def test_every_pair_counts_once_and_near_and_high_ones_most():
    pairs, weights = pair_weights(5)
    assert sorted(map(tuple, pairs.mT.tolist())) == [(i, j) for i in range(5) for j in range(i + 1, 5)]
    by_pair = dict(zip(map(tuple, pairs.mT.tolist()), weights.tolist(), strict=True))
    assert by_pair[0, 1] == max(by_pair.values()) == pytest.approx(2 * np.exp(-0.15) / 2.5)
    assert by_pair[0, 1] > by_pair[0, 3]  # nearer
    assert by_pair[0, 1] > by_pair[3, 4]  # higher


def test_with_all_classes_together_the_likeliest_are_classical_distillation(logits, terms_of):
    student, teacher = logits(), logits(1.0)
    pairs, weights = pair_weights(10)
    order = student.argsort(dim=1, descending=True)
    alone = pair_loss(student.gather(1, order) / 4, teacher.gather(1, order) / 4, pairs, weights).mean() * 16
    found = terms_of(LDRLD(depth=10), student, teacher)
    assert found["local"].item() == pytest.approx((alone + softened_kl(student, teacher, 4.0)).item(), rel=1e-6)
    assert found["rest"].item() == 0


def test_the_likeliest_classes_and_the_rest_are_those_of_the_student_and_do_not_see_each_other(logits, terms_of):
    student, teacher = logits(), logits(1.0)
    top = student.topk(4, dim=1).indices
    before = terms_of(LDRLD(depth=4), student, teacher)
    raised = teacher.scatter_add(1, top, torch.full((6, 4), 5.0, dtype=torch.float64))
    after = terms_of(LDRLD(depth=4), student, raised)
    for name in ("local", "rest"):
        assert after[name].item() == pytest.approx(before[name].item(), rel=1e-9)
    one = teacher.scatter_add(1, top[:, :1], torch.full((6, 1), 5.0, dtype=torch.float64))
    assert terms_of(LDRLD(depth=4), student, one)["local"].item() != pytest.approx(before["local"].item(), rel=1e-2)


def test_the_order_of_classes_and_images_is_of_no_account_and_equal_logits_cost_nothing(logits, terms_of):
    student, teacher = logits(), logits(1.0)
    before = terms_of(LDRLD(), student, teacher)["local"].item()
    shuffled = [z[[3, 0, 5, 1, 4, 2]][:, torch.arange(10) * 7 % 10] for z in (student, teacher)]
    assert terms_of(LDRLD(), *shuffled)["local"].item() == pytest.approx(before, rel=1e-9)
    assert terms_of(LDRLD(), student, student + 3.0)["local"].item() == pytest.approx(0, abs=1e-12)
    assert before > 1e-3


def test_gradients_are_those_of_the_formula_and_finite_for_huge_logits(logits):
    pairs, weights = pair_weights(10)
    assert torch.autograd.gradcheck(lambda z: pair_loss(z, logits(1.0), pairs, weights), logits().requires_grad_())
    huge = (1e4 * logits()).float().requires_grad_()
    pair_loss(huge, -1e4 * logits().float(), pairs, weights).sum().backward()
    assert huge.grad.isfinite().all()


@pytest.mark.parametrize("wrong", [{"depth": 1}, {"temperature": 0.0}])
def test_values_without_a_meaning_are_refused(wrong):
    with pytest.raises(UserError, match="expected"):
        LDRLD(**wrong)
