"""MLLD: every level against numpy, masks that choose, and the views that each level reads."""

import numpy as np
import pytest
import torch
from kdzoo.distillers.mlld import MLLD, batch_loss, class_loss, instance_loss, lower_half, multi_level_loss
from torch import nn

from kdzoo import Batch, DataSpec, Output
from kdzoo.errors import UserError

TEMPERATURES = (2.0, 3.0, 4.0, 5.0, 6.0)


def logits(phase, classes=7, rows=6):
    steps = torch.arange(rows * classes, dtype=torch.float64)
    return (2 * torch.sin(0.7 * steps + phase) + torch.cos(1.9 * steps)).view(rows, classes)


def softmax(z, temperature):
    return np.exp(z / temperature) / np.exp(z / temperature).sum(1, keepdims=True)


def instance(student, teacher, temperature, mask):
    s, t = softmax(student, temperature), softmax(teacher, temperature)
    return temperature**2 * ((t * np.log(t / s)).sum(1) * mask).sum() / len(s)


def between(student, teacher, temperature, mask, axis):
    """The squared distances of the matrices, entry by entry, over their size."""
    s, t = softmax(student, temperature), softmax(teacher, temperature)
    if axis == 1:
        s, t = s.T, t.T
    total, n = 0.0, len(s)
    for i in range(n):
        for j in range(n):
            total += mask[j] * (t[i] @ t[j] - s[i] @ s[j]) ** 2
    return total / n


def reference(student, teacher):
    """The sum over temperatures of logits of the weak and the strong view."""
    certainty = softmax(teacher[0], 1.0)
    images = certainty.max(1) <= np.percentile(certainty.max(1), 50)
    classes = certainty.sum(0) <= np.percentile(certainty.sum(0), 50)
    return sum(
        instance(student[0], teacher[0], t, images)
        + instance(student[1], teacher[1], t, np.ones(len(images)))
        + between(student[0], teacher[0], t, images, 0)
        + between(student[0], teacher[0], t, classes, 1)
        for t in TEMPERATURES
    )


@pytest.mark.parametrize("classes", [2, 7, 67])
def test_all_levels_and_temperatures_add_up(classes):
    student, teacher = ([logits(phase + i, classes) for i in (0, 0.5)] for phase in (0.3, 1.1))
    expected = reference(*([z.numpy() for z in views] for views in (student, teacher)))
    assert multi_level_loss(student, teacher, TEMPERATURES).item() == pytest.approx(expected, rel=1e-6)


def test_as_published_it_is_what_the_authors_code_gives():
    steps = torch.arange(42, dtype=torch.float64)
    z = [(torch.sin(1.7 * steps + p) + torch.cos(0.61 * steps * steps.sqrt() - p)).view(6, 7) for p in range(4)]
    given = [z[0], z[1]], [2 * z[2], 2 * z[3]], TEMPERATURES
    # Jin-Ying/Multi-Level-Logit-Distillation@5ee473f, KD_ours.forward_train: all terms but the cross-entropy, over 0.9
    assert multi_level_loss(*given, published=True).item() == pytest.approx(24.352783192243958, rel=1e-6)
    assert multi_level_loss(*given).item() != pytest.approx(24.352783192243958, rel=1e-4)


def test_each_level_is_its_formula():
    student, teacher = logits(0.3), logits(1.1)
    rows, columns = torch.arange(6) % 2 == 0, torch.arange(7) % 3 == 0
    s, t = student.numpy(), teacher.numpy()
    for found, expected in (
        (instance_loss(student, teacher, 3.0, rows), instance(s, t, 3.0, rows.numpy())),
        (instance_loss(student, teacher, 3.0), instance(s, t, 3.0, np.ones(6))),
        (batch_loss(student, teacher, 3.0, rows), between(s, t, 3.0, rows.numpy(), 0)),
        (class_loss(student, teacher, 3.0, columns), between(s, t, 3.0, columns.numpy(), 1)),
    ):
        assert found.item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("count", [1, 2, 7, 8])
def test_the_mask_is_the_half_up_to_the_median(count):
    values = torch.sin(3.7 * torch.arange(count).double())
    assert lower_half(values).tolist() == (values.numpy() <= np.percentile(values.numpy(), 50)).tolist()
    assert lower_half(torch.ones(count)).all()


def test_images_outside_of_the_mask_have_no_gradient():
    student, mask = logits(0.3).requires_grad_(), torch.arange(6) % 2 == 0
    instance_loss(student, logits(1.1), 4.0, mask).backward()
    assert not student.grad[~mask].any()
    assert student.grad[mask].any(dim=1).all()


def test_equal_predictions_cost_nothing_and_levels_can_be_had_alone():
    views = [logits(0.3), logits(0.8)]
    assert multi_level_loss(views, views, TEMPERATURES).item() == pytest.approx(0, abs=1e-12)
    other = [logits(1.1), logits(1.6)]
    alone = [multi_level_loss(views, other, TEMPERATURES, (level,)).item() for level in ("instance", "batch", "class")]
    assert min(alone) > 0
    assert sum(alone) == pytest.approx(multi_level_loss(views, other, TEMPERATURES).item(), rel=1e-9)


def test_the_order_of_images_and_of_classes_is_of_no_account():
    student, teacher = ([logits(phase), logits(phase + 0.5)] for phase in (0.3, 1.1))
    before = multi_level_loss(student, teacher, TEMPERATURES).item()
    moved = [[z[[3, 0, 5, 1, 4, 2]][:, [6, 2, 0, 1, 5, 3, 4]] for z in views] for views in (student, teacher)]
    assert multi_level_loss(*moved, TEMPERATURES).item() == pytest.approx(before, rel=1e-9)


def test_gradients_are_those_of_the_formula():
    teacher = [logits(1.1), logits(1.6)]
    assert torch.autograd.gradcheck(
        lambda weak, strong: multi_level_loss([weak, strong], teacher, (2.0, 4.0)),
        (logits(0.3).requires_grad_(), logits(0.8).requires_grad_()),
    )


class Linear(nn.Module):
    """Logits that are a fixed linear map of the images."""

    def __init__(self, phase):
        super().__init__()
        self.weight = nn.Parameter(logits(phase, 7, 12))

    def forward(self, images):
        embedding = images.flatten(1)
        return Output(embedding @ self.weight, embedding, ())


def method(**keywords):
    shape = Output(torch.empty(1, 7), torch.empty(1, 3), ())
    return MLLD(**keywords).assemble(shape, shape, DataSpec("toy", 7, tuple("abcdefg"), 8, torch.arange(7)))


def batch():
    weak = torch.sin(torch.arange(72).double()).view(6, 3, 2, 2)
    views = {"weak": weak, "strong": weak.cos()}
    return Batch.of(torch.full((6, 3, 2, 2), torch.nan), torch.arange(6), 7)._replace(views=views)


def test_both_networks_see_both_views_and_nothing_else():
    student, teacher, given = Linear(0.3), Linear(1.1), batch()
    terms = method()(student, teacher, given)
    seen = [
        [net(given.views[view]).logits.detach().numpy() for view in ("weak", "strong")] for net in (student, teacher)
    ]
    rows = np.arange(6)
    entropy = sum(-np.log(softmax(z, 1.0)[rows, rows]).mean() for z in seen[0])
    assert terms["ce"].item() == pytest.approx(0.1 * entropy, rel=1e-6)
    assert terms["kd"].item() == pytest.approx(0.9 * reference(*seen), rel=1e-6)


def test_views_are_not_mixed_so_mixed_targets_do_not_reach_them():
    student, teacher, given = Linear(0.3), Linear(1.1), batch()
    mixed = given._replace(targets=(given.targets + given.targets.flip(0)) / 2, partner=torch.arange(6).flip(0))
    before = method()(student, teacher, given)["ce"].item()
    assert method()(student, teacher, mixed)["ce"].item() == pytest.approx(before, rel=1e-9)
    smoothed = given._replace(targets=0.9 * given.targets + 0.1 / 7)
    assert method()(student, teacher, smoothed)["ce"].item() != pytest.approx(before, rel=1e-3)


@pytest.mark.parametrize("wrong", [{"temperatures": ()}, {"temperatures": (0.0,)}, {"levels": ()}])
def test_values_without_a_meaning_are_refused(wrong):
    with pytest.raises(UserError, match="expected"):
        method(**wrong)


def test_a_misspelled_level_gets_a_suggestion():
    with pytest.raises(UserError, match="did you mean instance"):
        method(levels=("instances",))
