"""Contrast of low-pass features across two networks."""

import numpy as np
import pytest
import torch
from kdzoo.distillers.lfcc import FILTERS, LFCC, exempt_pairs, filter_basis
from scipy.special import logsumexp
from torch.nn import functional as F

from kdzoo.errors import UserError

ODD = ((3, 7, 5), (4, 5, 7), (5, 3, 1), (6, 1, 1))


def contrast(similarities):
    return np.mean(logsumexp(similarities, axis=1) - np.diag(similarities))


def embeddings(method, student, teacher, scales=(1, 2, 4)):
    """Pairs of normalised embeddings of every stage and scale, by convolution first and torch's own pooling."""
    for f_s, f_t, project in zip(student.features, teacher.features, method.projectors, strict=True):
        mixed = torch.einsum("oc,bchw->bohw", project.weight[:, :, 0], f_s)
        sides = min(f_s.shape[-1], f_t.shape[-1])
        for g in dict.fromkeys(min(g, sides) for g in scales):
            pooled = (F.adaptive_avg_pool2d(maps, g).flatten(1) for maps in (mixed, f_t))
            yield [(u / u.norm(dim=1, keepdim=True)).detach().double().numpy() for u in pooled]


def test_the_term_is_the_mean_contrast_of_all_stages_and_scales(student, teacher, data, batch):
    method = LFCC(contrast=0.5, tau=0.2).assemble(student, teacher, data())
    pairs = list(embeddings(method, student, teacher))
    assert len(pairs) == 3 + 3 + 3 + 2  # the last stage of the student has 2 x 2 cells: no grid of 4
    expected = np.mean([contrast(u_s @ u_t.T / 0.2) for u_s, u_t in pairs])
    term = method.loss(student, teacher, batch())["contrast"]
    assert term.item() == pytest.approx(0.5 * expected, rel=1e-5)


def test_images_in_one_order_are_closer_than_in_another(teacher, data, batch):
    method = LFCC().assemble(teacher, teacher, data())
    with torch.no_grad():
        for project in method.projectors:
            project.weight.copy_(torch.eye(5)[..., None])
    shuffled = teacher._replace(features=tuple(f.roll(1, 0) for f in teacher.features))
    near, far = (method.loss(s, teacher, batch())["contrast"] for s in (teacher, shuffled))
    assert near < far / 2


def test_rows_that_share_a_mixed_image_do_not_repel(student, teacher, data, batch):
    partner = torch.tensor([2, 1, 0, 5, 4, 3])  # row 1 and row 4 are mixed with themselves
    method = LFCC(contrast=1, tau=0.2).assemble(student, teacher, data())
    values = []
    for u_s, u_t in embeddings(method, student, teacher):
        similarities = u_s @ u_t.T / 0.2
        for i, j in ((0, 2), (2, 0), (3, 5), (5, 3)):
            similarities[i, j] = -np.inf
        values.append(contrast(similarities))
    mixed = method.loss(student, teacher, batch()._replace(partner=partner))["contrast"].item()
    assert mixed == pytest.approx(np.mean(values), rel=1e-5)
    assert mixed != pytest.approx(method.loss(student, teacher, batch())["contrast"].item(), rel=1e-3)


def test_a_pair_is_masked_both_ways_where_partners_are_not_mutual():
    mask = exempt_pairs(torch.arange(3), torch.tensor([1, 2, 0]), same_class=False)
    assert torch.equal(mask, ~torch.eye(3, dtype=torch.bool))
    mask = exempt_pairs(torch.arange(4), torch.tensor([1, 2, 3, 0]), same_class=False)
    assert mask[0].tolist() == [False, True, False, True]


def test_rows_of_one_class_do_not_repel_where_that_is_asked(student, teacher, data, batch):
    method = LFCC(contrast=1, tau=0.2, mask_same_class=True).assemble(student, teacher, data())
    values = []
    for u_s, u_t in embeddings(method, student, teacher):
        similarities = u_s @ u_t.T / 0.2
        similarities[4, 5] = similarities[5, 4] = -np.inf  # the two images of class 4
        values.append(contrast(similarities))
    assert method.loss(student, teacher, batch())["contrast"].item() == pytest.approx(np.mean(values), rel=1e-5)
    assert exempt_pairs(batch().labels, None, same_class=False) is None


def test_teachers_of_other_ranks_repel_too_and_are_no_partners(student, teacher, data, batch, monkeypatch):
    def two_ranks(rows):  # the other one's differ by a flip
        return torch.cat([rows, rows.flip(0)])

    monkeypatch.setattr("kdzoo.distillers.lfcc.gather", two_ranks)
    method = LFCC(contrast=1, tau=0.2).assemble(student, teacher, data())
    values = []
    for u_s, u_t in embeddings(method, student, teacher):
        similarities = u_s @ np.concatenate([u_t, u_t[::-1]]).T / 0.2
        similarities[0, 2] = similarities[2, 0] = -np.inf
        values.append(contrast(similarities))
    partner = torch.tensor([2, 1, 0, 3, 4, 5])
    term = method.loss(student, teacher, batch()._replace(partner=partner))["contrast"]
    assert term.item() == pytest.approx(np.mean(values), rel=1e-5)


@pytest.mark.parametrize("kind", ["average", "gaussian", "ideal", "none"])
@pytest.mark.parametrize("grid", [(8, 8), (7, 5)])
def test_every_low_pass_keeps_constants(kind, grid):
    cells = filter_basis(grid, (4, 4), (2, 2), kind).sum(dim=1)
    torch.testing.assert_close(cells, torch.ones_like(cells))


@pytest.mark.parametrize("kind", ["gaussian", "ideal"])
def test_other_low_passes_stop_what_pooling_lets_through(kind):
    y, x = torch.meshgrid(torch.arange(16.0), torch.arange(16.0), indexing="ij")
    fast = torch.cos(2 * torch.pi * (3 * x + 3 * y) / 16 + 0.3).double().flatten()
    through = {k: (filter_basis((16, 16), (16, 16), (4, 4), k) @ fast).norm() for k in (kind, "average")}
    assert through[kind] < through["average"] / 2


def test_high_pass_and_pooling_share_nothing_and_together_are_everything(waves):
    maps = waves(7 * 5, dtype=torch.float64)
    high = filter_basis((7, 5), (7, 5), (2, 4), "highpass") @ maps
    pooling = filter_basis((7, 5), (7, 5), (2, 4), "average")
    torch.testing.assert_close(pooling @ high, torch.zeros(8, dtype=torch.float64), rtol=0, atol=1e-9)
    torch.testing.assert_close(pooling @ maps, pooling @ (maps - high))
    assert high.norm() > 0.5 * maps.norm()


def test_without_a_filter_features_meet_on_the_finest_common_grid(student, teacher, data, batch):
    method = LFCC(contrast=1, tau=0.2, filter="none").assemble(student, teacher, data())
    values = [contrast(s @ t.T / 0.2) for s, t in embeddings(method, student, teacher, scales=(99,))]
    assert method.loss(student, teacher, batch())["contrast"].item() == pytest.approx(np.mean(values), rel=1e-5)


@pytest.mark.parametrize("kind", FILTERS)
@pytest.mark.parametrize("constant", [None, 0.0, 1.0])
@pytest.mark.parametrize("grids", [ODD, ((2, 1, 9),) * 4])
def test_terms_and_gradients_are_finite_for_any_grids_zeros_and_constants(
    output, teacher, data, batch, kind, constant, grids
):
    student = output(grids, constant=constant)
    method = LFCC(contrast=1, filter=kind).assemble(student, teacher, data())
    sum(method.loss(student, teacher, batch()).values()).backward()
    gradients = [f.grad for f in student.features if f.grad is not None] + [p.grad for p in method.parameters()]
    assert all(g.isfinite().all() for g in gradients)


def test_every_stage_of_the_student_gets_a_gradient(student, teacher, data, batch):
    LFCC(kd=0).assemble(student, teacher, data()).loss(student, teacher, batch())["contrast"].backward()
    assert all(f.grad.abs().sum() > 0 for f in student.features)


def test_a_weight_of_zero_leaves_its_term_and_its_modules_out(student, teacher, data, batch):
    method = LFCC(contrast=0).assemble(student, teacher, data())
    assert method.loss(student, teacher, batch()).keys() == {"ce", "kd"}
    assert not list(method.parameters())
    assert not method.needs.features
    assert LFCC().assemble(student, teacher, data()).needs.features
    assert LFCC(ce=0, kd=0).assemble(student, teacher, data()).loss(student, teacher, batch()).keys() == {"contrast"}


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"temperature": 0}, "temperature=0: expected"),
        ({"tau": -1}, "tau=-1: expected"),
        ({"scales": ()}, "scales"),
        ({"scales": (0, 1)}, "scales"),
        ({"filter": "gausian"}, "did you mean gaussian"),
        ({"stages": (0, 4)}, "expected distinct numbers from 0 to 3"),
        ({"filter": "highpass", "scales": (9,)}, "leave nothing"),
    ],
)
def test_a_bad_keyword_is_the_users_error_in_one_line(student, teacher, data, keywords, message):
    with pytest.raises(UserError, match=message) as error:
        LFCC(**keywords).assemble(student, teacher, data())
    assert "\n" not in str(error.value)
