"""Knowledge review: fused maps and the hierarchical context loss."""

import numpy as np
import pytest
import torch
from kdzoo.distillers.reviewkd import Pyramid, ReviewKD, context_loss
from scipy.signal import correlate
from scipy.special import expit
from torch.nn import functional as F

from kdzoo import Distillation, Needs, Show, models
from kdzoo.errors import UserError


def averaged(maps, cells):
    """Averages over cells x cells windows, which overlap where the sides are no multiples."""
    _, _, h, w = maps.shape
    windows = [[(i * n // cells, -(-(i + 1) * n // cells)) for i in range(cells)] for n in (h, w)]
    rows = [[maps[:, :, a:b, c:d].mean((2, 3)) for c, d in windows[1]] for a, b in windows[0]]
    return np.moveaxis(np.array(rows), (0, 1), (2, 3))


def context(f_s, f_t, levels):
    losses = [np.mean((f_s - f_t) ** 2)]
    losses += [np.mean((averaged(f_s, g) - averaged(f_t, g)) ** 2) for g in levels]
    return np.average(losses, weights=[0.5**i for i in range(len(losses))])


@pytest.mark.parametrize(("side", "levels"), [(8, (4, 2, 1)), (4, (2, 1)), (2, (1,)), (1, ())])
def test_the_context_loss_weighs_coarser_levels_by_half_and_half_again(waves, side, levels):
    f_s = waves(3, 4, side, side, dtype=torch.float64)
    f_t = waves(3, 4, side, side, phase=1.0, dtype=torch.float64)
    expected = context(f_s.numpy(), f_t.numpy(), levels)
    assert context_loss(f_s, f_t, Pyramid((side, side))).item() == pytest.approx(expected, rel=1e-9)


def test_levels_of_odd_grids_are_adaptive_averages(waves):
    maps = waves(3, 4, 7, 5, dtype=torch.float64)
    levels = Pyramid((7, 5)).double()(maps)
    assert [level.shape[2:] for level in levels] == [(7, 5), (4, 4), (2, 2), (1, 1)]
    for level in levels:
        torch.testing.assert_close(level, F.adaptive_avg_pool2d(maps, level.shape[2:]))


def numbers(tensor):
    return tensor.detach().double().numpy()


def normed(maps, norm):
    return maps / np.sqrt(1 + norm.eps)  # as it is before the first batch, in evaluation


def nearest(maps, grid):
    h, w = maps.shape[2:]
    return maps[:, :, np.arange(grid[0]) * h // grid[0]][:, :, :, np.arange(grid[1]) * w // grid[1]]


def reviewed(method, maps_s, grids):
    """The fusions in plain numpy, deep to shallow."""
    deeper, results = None, []
    for maps, fuse, grid in zip(maps_s, method.fusions, grids, strict=True):
        mixed = np.einsum("oc,bchw->bohw", numbers(fuse.enter[0].weight)[:, :, 0, 0], maps)
        fused = normed(mixed, fuse.enter[1])
        if deeper is not None:
            deeper = nearest(deeper, maps.shape[2:])
            weights = numbers(fuse.weigh[0].weight)[:, :, 0, 0]
            z = np.einsum("oc,bchw->bohw", weights, np.concatenate([fused, deeper], axis=1))
            z = expit(z + numbers(fuse.weigh[0].bias)[:, None, None])
            fused = fused * z[:, :1] + deeper * z[:, 1:]
        deeper = nearest(fused, grid)
        kernels = numbers(fuse.leave[0].weight)
        padded = np.pad(deeper, ((0, 0), (0, 0), (1, 1), (1, 1)))
        out = [[correlate(image, kernel, mode="valid")[0] for kernel in kernels] for image in padded]
        results.append(normed(np.array(out), fuse.leave[1]))
    return results


@pytest.mark.parametrize("roles", [(), ("teacher",), ("student",), ("student", "teacher")])
def test_the_term_reviews_from_the_embedding_to_the_shallowest_stage(output, data, batch, roles):
    grids = ((5, 16, 16), (5, 8, 8), (7, 4, 4), (6, 3, 3))  # the teacher's, each finer than the student's
    student, teacher = output(), output(grids, phase=1.0)
    method = ReviewKD(stages=(1, 3), warmup=0.5, preactivations=roles).assemble(student, teacher, data()).eval()
    shown_s = student.preactivations if "student" in roles else student.features
    shown_t = teacher.preactivations if "teacher" in roles else teacher.features
    maps_s = [numbers(student.embedding)[:, :, None, None], *(numbers(shown_s[l]) for l in (3, 1))]
    maps_t = [numbers(teacher.embedding)[:, :, None, None], *(numbers(shown_t[l]) for l in (3, 1))]
    expected = 0.0
    seen = reviewed(method, maps_s, [maps.shape[2:] for maps in maps_t])
    for f_s, f_t, levels in zip(seen, maps_t, ((), (2, 1), (4, 2, 1)), strict=True):
        expected += context(f_s, f_t, levels)
    late = batch()._replace(progress=torch.tensor(0.9))
    assert method.loss(student, teacher, late)["review"].item() == pytest.approx(5 * expected, rel=1e-5)


def test_the_weight_rises_over_the_warmup(student, teacher, data, batch):
    method = ReviewKD(warmup=0.4).assemble(student, teacher, data()).eval()
    at = {p: method.loss(student, teacher, batch()._replace(progress=torch.tensor(p)))["review"] for p in (0, 0.1, 0.7)}
    assert at[0] == 0
    torch.testing.assert_close(4 * at[0.1], at[0.7])
    steady = ReviewKD(warmup=0).assemble(student, teacher, data()).eval()
    steady.load_state_dict(method.state_dict())
    assert steady.loss(student, teacher, batch())["review"] == at[0.7]


def test_the_student_learns_from_every_stage_asked_for_and_no_other(student, teacher, data, batch):
    method = ReviewKD(ce=0, stages=(1, 3), warmup=0).assemble(student, teacher, data())
    method.loss(student, teacher, batch())["review"].backward()
    assert [f.grad is not None for f in student.features] == [False, True, False, True]
    assert all(p.grad.abs().sum() > 0 for p in method.parameters())


@pytest.mark.parametrize("constant", [0.0, 1.0])
def test_gradients_are_finite_for_constant_maps(output, teacher, data, batch, constant):
    student = output(constant=constant)
    method = ReviewKD(warmup=0).assemble(student, teacher, data())
    method.loss(student, teacher, batch())["review"].backward()
    assert all(p.grad.isfinite().all() for p in method.parameters())


def test_a_weight_of_zero_leaves_its_term_and_its_modules_out(student, teacher, data, batch):
    method = ReviewKD(review=0).assemble(student, teacher, data())
    assert method.loss(student, teacher, batch()).keys() == {"ce"}
    assert not list(method.parameters())
    assert not method.needs.features
    assert ReviewKD(ce=0).assemble(student, teacher, data()).loss(student, teacher, batch()).keys() == {"review"}


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"warmup": 20}, "warmup=20"),
        ({"stages": (5,)}, "stages"),
        ({"preactivations": ("techer",)}, "did you mean teacher"),
    ],
)
def test_a_bad_keyword_is_the_users_error(student, teacher, data, keywords, message):
    with pytest.raises(UserError, match=message):
        ReviewKD(**keywords).assemble(student, teacher, data())


def test_the_teachers_maps_are_those_before_the_last_relu_and_the_students_are_not(student, teacher, data):
    assert ReviewKD().assemble(student, teacher, data()).needs == Needs(logits=False, preactivations=("teacher",))


@pytest.mark.parametrize("role", ["student", "teacher"])
def test_a_network_that_hides_its_preactivations_is_refused_before_training(student, teacher, data, role):
    shown = {"student": student, "teacher": teacher}
    shown[role] = shown[role]._replace(preactivations=())
    with pytest.raises(UserError, match=f"leave '{role}' out"):
        ReviewKD(preactivations=(role,)).assemble(*shown.values(), data())
    ReviewKD(preactivations=()).assemble(*shown.values(), data())


def test_a_rectified_teachers_negative_numbers_count(data, batch):
    """What the term would be blind to after the ReLU."""
    spec = data()
    torch.manual_seed(0)
    teacher, student = (models.create("resnet8", spec).eval() for _ in range(2))
    images = torch.rand(6, 3, 32, 32)
    method = ReviewKD(ce=0, warmup=0).assemble(student.shapes(), teacher.shapes(), spec).eval()
    terms = Distillation(student, teacher, method).eval()(batch()._replace(images=images))
    seen = teacher(images, Show(preactivations=True))
    assert all((f >= 0).all() for f in seen.features)
    assert all((f < 0).any() for f in seen.preactivations)
    blind = method.loss(student(images, Show()), seen._replace(preactivations=seen.features), batch())
    assert blind["review"].item() != pytest.approx(terms["review"].item(), rel=1e-2)
    assert method.loss(student(images, Show()), seen, batch())["review"].item() == pytest.approx(
        terms["review"].item(), rel=1e-5
    )
